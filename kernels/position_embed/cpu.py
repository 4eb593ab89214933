"""Sin-cos positions on the CPU: each axis value that occurs is computed once, then gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels.position_embed.reference import _waves


def embed_positions_cpu(x: Tensor, cells: Tensor, cls_token: Tensor, *, offsets: Tensor) -> Tensor:
    """Return `[N + B, D]`, equal to the reference to the bit."""
    total, width = x.shape
    half = width // 2
    sizes = offsets.diff()
    out = x.new_empty((total + sizes.numel(), width))
    # Row of each tile once a cls row stands before every case.
    shift = torch.repeat_interleave(torch.arange(1, sizes.numel() + 1), sizes)
    rows = torch.arange(total) + shift
    placed = x.clone()
    for columns, axis in ((slice(0, half), 1), (slice(half, width), 0)):
        values, where = torch.unique(cells[:, axis], return_inverse=True)
        table = torch.cat(_waves(values, half // 2), dim=1).to(x.dtype)
        placed[:, columns] += table[where]
    out[rows] = placed
    out[offsets[:-1] + torch.arange(sizes.numel())] = cls_token.to(x.dtype).reshape(1, -1)
    return out
