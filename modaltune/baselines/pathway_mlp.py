"""Self-normalising networks, one per pathway, and what they say together. Genes only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from modaltune.baselines.baseline import Baseline, gene_values, keep
from modaltune.batch import CaseBatch


class PathwayMLPSettings(BaseModel):
    """Shape of the pathway MLP; SELU, its initialisation and alpha dropout are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_width: int = Field(32, gt=0, description="width of both layers of a pathway's network")
    width: int = Field(256, gt=0, description="width of the joining layer and of the embedding")
    dropout: float = Field(0.1, ge=0, lt=1, description="alpha dropout after each SELU")


class PathwaySNN(nn.Module):
    """Two SELU layers per pathway on the genes it lists; one token per pathway.

    The fused `modaltune.kernels.pathway_mlp` has the ELU of the published gene encoder, whose
    activations drift; this one keeps mean 0 and variance 1, which is what the paper is about. Its
    first layer is a weighted bag of rows per pathway, so nothing of size cases x memberships x
    width is made.

    Args:
        gene_index: `[nnz]` int64 genes of all pathways in the expression vector.
        offsets: `[P + 1]` int64 first membership of each pathway.
        width: Width d of both layers.
        dropout: Alpha dropout after each SELU, in training.

    Source: Klambauer et al., "Self-Normalizing Neural Networks" (NeurIPS 2017), equation 2 and
        section 3; per-pathway networks as in SurvPath (Jaume et al., CVPR 2024).
    """

    gene_index: Tensor
    offsets: Tensor

    def __init__(self, gene_index: Tensor, offsets: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("gene_index", gene_index.to(torch.int64), persistent=False)
        self.register_buffer("offsets", offsets.to(torch.int64), persistent=False)
        sizes = self.offsets.diff()
        members, pathways = gene_index.numel(), sizes.numel()
        spread = sizes.to(torch.get_default_dtype()).rsqrt().repeat_interleave(sizes)
        self.weight1 = nn.Parameter(torch.randn(members, width) * spread.unsqueeze(1))
        self.bias1 = nn.Parameter(torch.zeros(pathways, width))
        self.weight2 = nn.Parameter(torch.randn(pathways, width, width) / math.sqrt(width))
        self.bias2 = nn.Parameter(torch.zeros(pathways, width))
        self.dropout = nn.AlphaDropout(dropout)

    @property
    def num_pathways(self) -> int:
        """Number of pathways P."""
        return self.offsets.numel() - 1

    def first_layer(self, expression: Tensor) -> Tensor:
        """Return activations `[B, P, d]` of the first layer for expression `[B, M]`."""
        cases, members = expression.shape[0], self.gene_index.numel()
        rows = torch.arange(members, device=expression.device).repeat(cases)
        starts = torch.arange(cases, device=expression.device).unsqueeze(1) * members
        summed = F.embedding_bag(
            rows,
            self.weight1,
            (starts + self.offsets[:-1]).flatten(),
            mode="sum",
            per_sample_weights=expression[:, self.gene_index].flatten(),
        )
        return F.selu(summed.unflatten(0, (cases, self.num_pathways)) + self.bias1)

    def forward(self, expression: Tensor) -> Tensor:
        """Return pathway tokens `[B, P, d]` of standardised expression `[B, M]`."""
        hidden = self.dropout(self.first_layer(expression))
        mixed = torch.einsum("bpi,poi->bpo", hidden, self.weight2)
        return self.dropout(F.selu(mixed + self.bias2))


class PathwayMLP(Baseline):
    """A self-normalising network per pathway, their tokens joined by one more SELU layer.

    Args:
        gene_index: `[nnz]` int64 genes of all pathways in the expression vector.
        offsets: `[P + 1]` int64 first membership of each pathway.
        settings: Its shape.

    Source: see `PathwaySNN`.
    """

    def __init__(
        self, gene_index: Tensor, offsets: Tensor, settings: PathwayMLPSettings | None = None
    ) -> None:
        super().__init__()
        settings = settings or PathwayMLPSettings()
        self.width = settings.width
        self.gene_width = int(gene_index.max()) + 1
        self.pathways = PathwaySNN(gene_index, offsets, settings.token_width, settings.dropout)
        joined = self.pathways.num_pathways * settings.token_width
        self.join = nn.Linear(joined, settings.width)
        nn.init.normal_(self.join.weight, std=joined**-0.5)
        nn.init.zeros_(self.join.bias)
        self.dropout = nn.AlphaDropout(settings.dropout)

    def forward(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, d]`; zeros for a case without genes."""
        values, present = gene_values(batch, self.join.weight, self.gene_width or 0)
        tokens = self.pathways(values).flatten(1)
        return keep(self.dropout(F.selu(self.join(tokens))), present)
