"""Sin-cos positions from grid cells, written out: the oracle for every faster path."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

MAX_PERIOD = 10000.0


def axis_waves(cells: Tensor, quarter: int) -> tuple[Tensor, Tensor]:
    """Return sin and cos, `[N, quarter]` float64 each, of the cells `[N]` of one axis."""
    frequency = MAX_PERIOD ** -(
        torch.arange(quarter, dtype=torch.float64, device=cells.device) / quarter
    )
    angle = cells.to(torch.float64).unsqueeze(-1) * frequency
    return torch.sin(angle), torch.cos(angle)


def position_rows_reference(cells: Tensor, width: int) -> Tensor:
    """Return `[N, width]` float64 rows: sin and cos of the second cell coordinate, then the first.

    Source: METHOD of the published Prov-GigaPath encoder; second coordinate first, as published.
    """
    quarter = width // 4
    return torch.cat([*axis_waves(cells[:, 1], quarter), *axis_waves(cells[:, 0], quarter)], dim=1)


def embed_positions_reference(
    x: Tensor, cells: Tensor, cls_token: Tensor, *, offsets: Tensor
) -> Tensor:
    """Return `[N + B, D]`: per case the cls token (no position), then tiles plus positions."""
    placed = x + position_rows_reference(cells, x.shape[1]).to(x.dtype)
    bounds = offsets.tolist()
    pieces = []
    for start, end in pairwise(bounds):
        pieces += [cls_token.to(x.dtype).reshape(1, -1), placed[start:end]]
    return torch.cat(pieces) if pieces else placed
