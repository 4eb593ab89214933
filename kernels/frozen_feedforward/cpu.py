"""The frozen feed-forward branch on the CPU: blocks of rows whose wide part stays in the cache.

    h = LN(x)   u = W1 h + b1   n = LN'(gelu(u))   y = W2 n + b2

What is W wide exists for one block of rows at a time: 1,024 rows at W = 3,072 are 12 MB. The
backward pass computes u of its block again, which costs one product more and spares `4 W` bytes a
row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.kernels._products import product, product_back

# Fewer rows make the products slower (their weights are read once a block), more leave the cache.
BLOCK_ROWS = 1024

_norm = torch.ops.aten.native_layer_norm
_norm_back = torch.ops.aten.native_layer_norm_backward
_X_ALONE = [True, False, False]


def frozen_ffn_cpu_fwd(
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
    """Return `[N, D]`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows, into in zip(x.split(BLOCK_ROWS), out.split(BLOCK_ROWS), strict=True):
        normed = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
        wide = product(normed, weight1, bias1, gelu=True, keep=True)
        if inner_weight is not None:
            wide = F.layer_norm(wide, wide.shape[-1:], inner_weight, inner_bias, eps)
        into.copy_(product(wide, weight2, bias2, keep=True))
    return out


def _gelu_back(grad: Tensor, u: Tensor) -> Tensor:
    """Return the gradient of u; half precision in float32, as the forward pass."""
    if u.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten.gelu_backward(grad.float(), u.float()).to(u.dtype)
    return torch.ops.aten.gelu_backward(grad, u)


def frozen_ffn_cpu_bwd(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    inner_weight: Tensor | None,
    inner_bias: Tensor | None,
    weight2: Tensor,
    eps: float,
) -> Tensor:
    """Return the gradient `[N, D]` of x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = BLOCK_ROWS
    for rows, pulled, into in zip(x.split(step), grad.split(step), out.split(step), strict=True):
        shape, wide_shape = rows.shape[-1:], weight1.shape[:1]
        normed, mean, scale = _norm(rows, shape, norm_weight, norm_bias, eps)
        u = product(normed, weight1, bias1, keep=True)
        pulled = product_back(pulled.contiguous(), weight2, keep=True)
        if inner_weight is not None:
            half = u.dtype in (torch.float16, torch.bfloat16)
            active = F.gelu(u.float()).to(u.dtype) if half else F.gelu(u)
            _, of_mean, of_scale = _norm(active, wide_shape, inner_weight, inner_bias, eps)
            pulled = _norm_back(
                pulled, active, wide_shape, of_mean, of_scale, inner_weight, inner_bias, _X_ALONE
            )[0]
            del active
        pulled = product_back(_gelu_back(pulled, u), weight1, keep=True)
        into.copy_(
            _norm_back(pulled, rows, shape, mean, scale, norm_weight, norm_bias, _X_ALONE)[0]
        )
    return out
