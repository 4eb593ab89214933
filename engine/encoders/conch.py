"""The vision tower of CONCH v1.5: a ViT-L/16 whose tokens are read by one learned query.

Built from published facts about its form (names and shapes in the weights file, widths, heads, the
way positions are stretched), not from its code, and unverified against the gated weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

POOLER_WIDTH = 768
POOLER_HEADS = 8
# The published tower has the position grid of a 224 px image and stretches it when it meets 448.
_STORED_GRID = 14
_POSITIONS = "trunk.pos_embed"


class AttentionalPooler(nn.Module):
    """Cross-attention of learned queries to tokens, all projections without bias.

    Args:
        width: Width of queries and output.
        context_width: Width of the tokens.
        heads: Attention heads.
        queries: Number of learned queries.
    """

    def __init__(self, width: int, context_width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.ln_k = nn.LayerNorm(context_width)
        self.ln_q = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, L, d]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `[B, queries, width]` for tokens `[B, L, context_width]`."""
        query = self.to_q(self.ln_q(self.query)).expand(tokens.shape[0], -1, -1)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(
            self._split(query), self._split(key), self._split(value)
        )
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class ConchVisionTower(nn.Module):
    """ViT trunk, one-query pooler over all of its tokens, final LayerNorm.

    Args:
        architecture: timm name of the trunk.
        **trunk_args: Arguments of the trunk.
    """

    def __init__(self, architecture: str, **trunk_args: Any) -> None:
        super().__init__()
        trunk: Any = timm.create_model(architecture, pretrained=False, **trunk_args)
        self.trunk = trunk
        self.attn_pool_contrast = AttentionalPooler(
            POOLER_WIDTH, trunk.num_features, POOLER_HEADS, queries=1
        )
        self.ln_contrast = nn.LayerNorm(POOLER_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, 768]` for images `[B, 3, p, p]`."""
        tokens = self.trunk.forward_features(x)  # [B, 1 + patches, 1024], cls first
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def stretch_positions(state: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Return `state` with its position table stretched to `tokens` rows, cls included.

    The published tower holds a 14 × 14 grid (a table of another size is first brought to it,
    bilinear) and stretches it bicubically for larger images, in DINO's way: the scale is computed
    from the target side plus 0.1, so the sample points are not those of a plain resize.

    Args:
        state: Weights of the tower; returned as a new mapping.
        tokens: Rows that the network has: 1 + side².
    """
    table = state.get(_POSITIONS)
    if table is None or table.dim() != 3 or not _is_square(table.shape[1] - 1):
        return dict(state)  # strict loading names it
    if table.shape[1] != 1 + _STORED_GRID**2:
        table = resample_abs_pos_embed(
            table,
            new_size=[_STORED_GRID, _STORED_GRID],
            num_prefix_tokens=1,
            interpolation="bilinear",
            antialias=False,
        )
    side = math.isqrt(tokens - 1)
    if side != _STORED_GRID:
        grid = table[:, 1:].transpose(1, 2).unflatten(2, (_STORED_GRID, _STORED_GRID)).float()
        factor = (side + 0.1) / _STORED_GRID
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        table = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    return {**state, _POSITIONS: table}
