"""The feed-forward branch written out in plain PyTorch: the oracle for every faster path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frozen_ffn_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    inner_weight: Tensor | None,
    inner_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> Tensor:
    """Return `[N, D]`; differentiable in everything."""
    wide = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight1, bias1)
    # Published under mixed precision: GELU in float32, cast back.
    half = wide.dtype in (torch.float16, torch.bfloat16)
    wide = F.gelu(wide.float()).to(wide.dtype) if half else F.gelu(wide)
    if inner_weight is not None:
        wide = F.layer_norm(wide, wide.shape[-1:], inner_weight, inner_bias, eps)
    return F.linear(wide, weight2, bias2)
