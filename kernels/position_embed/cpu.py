"""Sin-cos positions on the CPU: each value of an axis that occurs is computed once, then added."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from modaltune.kernels.position_embed.reference import axis_waves

_WIDEST = 4096  # values of an axis that are tabulated without looking which of them occur


def _occurring(axis: Tensor) -> tuple[Tensor, Tensor]:
    """Return values that contain all of an axis' cells, and where each cell stands among them."""
    axis = axis.long()
    low, high = (int(t) for t in torch.aminmax(axis))
    if high - low < max(_WIDEST, axis.numel()):
        return torch.arange(low, high + 1), axis - low
    return torch.unique(axis, return_inverse=True)


def embed_positions_cpu(x: Tensor, cells: Tensor, cls_token: Tensor, *, offsets: Tensor) -> Tensor:
    """Return `[N + B, D]`, equal to the reference to the bit."""
    total, width = x.shape
    half = width // 2
    out = x.new_empty(total + offsets.numel() - 1, width)
    out[offsets[:-1] + torch.arange(offsets.numel() - 1)] = cls_token.to(x.dtype).reshape(1, -1)
    for columns, axis in ((slice(0, half), 1), (slice(half, width), 0)) if total else ():
        values, where = _occurring(cells[:, axis])
        table = torch.cat(axis_waves(values, half // 2), dim=1).to(x.dtype)
        for case, (start, end) in enumerate(pairwise(offsets.tolist())):
            placed = out[start + case + 1 : end + case + 1, columns]
            torch.add(x[start:end, columns], table[where[start:end]], out=placed)
    return out
