"""What all rivals share: one embedding per case, from packed tiles and one gene vector."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from modaltune.batch import CaseBatch

GENES = "genes"


class Baseline(nn.Module):
    """Embeds cases; `SupervisedModel` puts heads on it.

    A case without the modality that a baseline reads gets zeros in its place, so every case has a
    finite embedding and no case is left out of a comparison.

    Attributes:
        width: Width d of the embedding.
        tile_width: Width of the tile features read; None for a baseline without images.
        gene_width: Genes in the expression vector read; None for a baseline without genes.
    """

    width: int
    tile_width: int | None = None
    gene_width: int | None = None

    @abstractmethod
    def forward(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, d]` of B cases."""

    def check(self, batch: CaseBatch) -> None:
        """Raise InputError where a batch has other widths than this baseline, or bad values."""
        genes = {} if self.gene_width is None else {GENES: self.gene_width}
        batch.check_values(self.tile_width, genes)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is trained."""
        return [p for p in self.parameters() if p.requires_grad]


def has_tiles(batch: CaseBatch) -> Tensor:
    """Return `[B, 1]` bool on the device of the tiles, which cases have any."""
    return (batch.offsets.diff() > 0).unsqueeze(1).to(batch.tiles.device)


def gene_values(batch: CaseBatch, like: Tensor, genes: int) -> tuple[Tensor, Tensor]:
    """Return expression `[B, M]` (zeros where unknown) and `[B, 1]` bool, which cases have it.

    Args:
        batch: B cases.
        like: A weight whose dtype and device the values get.
        genes: M, for a batch none of whose cases has any.
    """
    values, present = batch.modality(GENES)
    if values is None:
        values = like.new_zeros(batch.num_cases, genes)
    return values.to(like), present.unsqueeze(1).to(like.device)


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """Return `[B, ...]` values where `[B, 1]` mask is true, else zeros."""
    mask = mask.reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, values.new_zeros(()))
