"""MCAT: gene groups attend to tiles, both sets are transformed and pooled. Image and genes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modaltune.baselines.abmil import GatedAttention
from modaltune.baselines.baseline import Baseline, gene_values, has_tiles, keep
from modaltune.baselines.pathway_mlp import PathwaySNN
from modaltune.batch import CaseBatch


class MCATSettings(BaseModel):
    """Shape of MCAT; the defaults are the paper's, with pathways as its gene groups."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(256, gt=0, description="width of every token and of the embedding")
    heads: int = Field(8, gt=0, description="heads of the set transformers")
    hidden: int = Field(512, gt=0, description="hidden width of the set transformers")
    layers: int = Field(2, gt=0, description="layers of each set transformer")
    dropout: float = Field(0.25, ge=0, lt=1, description="in training, everywhere")

    @model_validator(mode="after")
    def _check(self) -> MCATSettings:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} and {self.width}")
        return self


class SetPool(nn.Module):
    """A transformer over a set of tokens, gated attention pooling, and one more layer."""

    def __init__(self, settings: MCATSettings) -> None:
        super().__init__()
        width = settings.width
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, settings.hidden, settings.dropout, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.attend = GatedAttention(width, width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `[B, d]` of tokens `[B, P, d]`."""
        mixed = self.transformer(tokens)
        cases, count, _ = mixed.shape
        offsets = torch.arange(cases + 1, device="cpu") * count
        pooled, _ = self.attend(mixed.flatten(0, 1), offsets)
        return self.dropout(torch.relu(self.project(pooled)))


class MCAT(Baseline):
    """Multimodal co-attention transformer.

        H = ReLU(W tiles)      G = a self-normalising network per gene group
        A = softmax(Wq G (Wk H)^T / sqrt d)      H' = Wo A Wv H
        embedding = MLP([pool(transformer(H')), pool(transformer(G))])

    The heavy bag of tiles becomes one token per gene group before any self-attention. A case
    without tiles has zeros in the place of the first pooled vector, a case without genes in that of
    the second; then the co-attention has zero gene tokens, whose queries are its bias.

    Args:
        tile_width: Width of the tile features.
        gene_index: `[nnz]` int64 genes of all groups in the expression vector.
        offsets: `[P + 1]` int64 first membership of each group.
        settings: Its shape.

    Source: Chen et al., "Multimodal Co-Attention Transformer for Survival Prediction in Gigapixel
        Whole Slide Images" (ICCV 2021), section 3.
    """

    def __init__(
        self,
        tile_width: int,
        gene_index: Tensor,
        offsets: Tensor,
        settings: MCATSettings | None = None,
    ) -> None:
        super().__init__()
        settings = settings or MCATSettings()
        width = self.width = settings.width
        self.tile_width, self.gene_width = tile_width, int(gene_index.max()) + 1
        self.project = nn.Linear(tile_width, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.groups = PathwaySNN(gene_index, offsets, width, settings.dropout)
        self.co_attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.image_pool = SetPool(settings)
        self.gene_pool = SetPool(settings)
        self.fuse = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )

    def group_tokens(self, batch: CaseBatch) -> tuple[Tensor, Tensor]:
        """Return gene group tokens `[B, P, d]`, zeros where unknown, and `[B, 1]` who has them."""
        values, present = gene_values(batch, self.project.weight, self.gene_width or 0)
        return keep(self.groups(values), present), present

    def co_attend(
        self, groups: Tensor, tiles: Tensor, offsets: Tensor, *, with_maps: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Let every gene group look at the tiles of its own case.

        Args:
            groups: `[B, P, d]` queries.
            tiles: `[N, d]` projected tiles of all cases, packed.
            offsets: `[B + 1]` int64 first tile of each case.
            with_maps: Whether to return the attention, too.

        Returns:
            `[B, P, d]`, zeros for a case without tiles; and per case `[P, n]` attention whose rows
            sum to 1 (none unless asked for).
        """
        attended, maps = [], []
        for query, (start, end) in zip(groups, pairwise(offsets.tolist()), strict=True):
            if start == end:
                attended.append(torch.zeros_like(query))
                maps.append(query.new_zeros(query.shape[0], 0))
                continue
            keys = tiles[start:end]
            found, attention = self.co_attention(query, keys, keys, need_weights=with_maps)
            attended.append(found)
            maps += [attention] if with_maps else []
        return torch.stack(attended), maps if with_maps else ()

    def project_tiles(self, batch: CaseBatch) -> Tensor:
        """Return projected tiles `[N, d]`."""
        tiles = batch.tiles.to(self.project.weight.dtype)
        if not tiles.shape[0]:
            return tiles.new_zeros(0, self.width)
        return self.dropout(torch.relu(self.project(tiles)))

    def attention(self, batch: CaseBatch) -> Sequence[Tensor]:
        """Return per case the co-attention `[P, n]` of its gene groups over its tiles."""
        groups, _ = self.group_tokens(batch)
        return self.co_attend(groups, self.project_tiles(batch), batch.offsets, with_maps=True)[1]

    def forward(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, d]`."""
        groups, present = self.group_tokens(batch)
        attended, _ = self.co_attend(groups, self.project_tiles(batch), batch.offsets)
        image = keep(self.image_pool(attended), has_tiles(batch))
        genes = keep(self.gene_pool(groups), present)
        return self.fuse(torch.cat([image, genes], dim=1))
