"""Stochastic depth over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_path(branch: Tensor, p: float, training: bool, offsets: Tensor | None = None) -> Tensor:
    """Drop a residual branch of whole cases with probability `p`, scale the others by 1/(1-p).

    Args:
        branch: `[M, ...]` packed rows with `offsets`, or `[B, ...]` one entry a case without.
        p: Drop probability, 0 to 1.
        training: False returns `branch` as it is.
        offsets: `[B + 1]` first row of each case.

    Source: Huang et al., 2016, stochastic depth.
    """
    if not training or p == 0.0:
        return branch
    cases = branch.shape[0] if offsets is None else offsets.numel() - 1
    keep = torch.rand(cases, device=branch.device).ge(p).to(branch.dtype) / (1.0 - p)
    if offsets is not None:
        keep = keep.repeat_interleave(offsets.diff().to(branch.device))
    return branch * keep.reshape(-1, *[1] * (branch.dim() - 1))
