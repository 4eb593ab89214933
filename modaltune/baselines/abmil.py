"""ABMIL: tiles projected, then pooled by gated attention. Image only."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from modaltune.baselines.baseline import Baseline
from modaltune.batch import CaseBatch
from modaltune.kernels import gated_pool


class ABMILSettings(BaseModel):
    """Shape of ABMIL; the defaults are the paper's, which has no dropout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(500, gt=0, description="width of a projected tile and of the embedding")
    attention_width: int = Field(128, gt=0, description="hidden width of the gated attention")
    dropout: float = Field(0.0, ge=0, lt=1, description="of projected tiles, in training")


class GatedAttention(nn.Module):
    """Weights packed rows by gated attention and sums them, case by case."""

    def __init__(self, width: int, attention_width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, attention_width)
        self.gate = nn.Linear(width, attention_width)
        self.score = nn.Linear(attention_width, 1)
        self.impl = "auto"

    def forward(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[B, d]` pooled rows, zero for a case without, and raw scores `[N]`.

        Args:
            x: `[N, d]` rows of all cases, packed.
            offsets: `[B + 1]` int64, first row of each case.
        """
        pooled, scores = gated_pool(
            x,
            self.value.weight,
            self.value.bias,
            self.gate.weight,
            self.gate.bias,
            self.score.weight,
            self.score.bias,
            offsets=offsets,
            impl=self.impl,
        )
        return pooled.squeeze(1), scores.squeeze(1)


class ABMIL(Baseline):
    """Attention-based multiple instance learning with gated attention.

        h_l = ReLU(W x_l + b)      w = softmax_l s . (tanh(V h_l) * sigmoid(U h_l))
        embedding = sum_l w_l h_l

    Args:
        tile_width: Width of the tile features.
        settings: Its shape.

    Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning" (ICML 2018),
        equations 7 and 9.
    """

    def __init__(self, tile_width: int, settings: ABMILSettings | None = None) -> None:
        super().__init__()
        settings = settings or ABMILSettings()
        self.width, self.tile_width = settings.width, tile_width
        self.project = nn.Linear(tile_width, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.attend = GatedAttention(settings.width, settings.attention_width)

    def pool(self, batch: CaseBatch) -> tuple[Tensor, Tensor]:
        """Return the embeddings `[B, d]` and the raw attention scores `[N]` of the tiles."""
        tiles = batch.tiles.to(self.project.weight.dtype)
        if not tiles.shape[0]:
            return tiles.new_zeros(batch.num_cases, self.width), tiles.new_zeros(0)
        projected = self.dropout(torch.relu(self.project(tiles)))
        return self.attend(projected, batch.offsets)

    def attention(self, batch: CaseBatch) -> Tensor:
        """Return the attention `[N]` of the tiles; it sums to 1 over each case that has tiles."""
        _, scores = self.pool(batch)
        counts = batch.offsets.diff().tolist()
        return torch.cat([own.softmax(0) for own in scores.split(counts)])

    def forward(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, d]`; zeros for a case without tiles."""
        return self.pool(batch)[0]
