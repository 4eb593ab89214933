"""A linear map written out in plain PyTorch: the oracle for every faster path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frozen_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Return `[..., M]`; differentiable in everything.

    GELU of half precision is computed in float32 and cast back, as published.
    """
    out = F.linear(x, weight, bias)
    if activation is None:
        return out
    half = out.dtype in (torch.float16, torch.bfloat16)
    return F.gelu(out.float()).to(out.dtype) if half else F.gelu(out)
