"""Frozen linear maps on the CPU: one product forward, one back, nothing kept between them."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels._products import product, product_back


def frozen_linear_cpu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Return `[..., M]` of `[..., K]`."""
    out = product(x.reshape(-1, x.shape[-1]), weight, bias, gelu=activation == "gelu", keep=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def frozen_linear_cpu_bwd(
    grad: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Return the gradient `[..., K]` of x; with an activation its input is computed again."""
    shape = (*grad.shape[:-1], weight.shape[1])
    grad = grad.reshape(-1, grad.shape[-1])
    if activation == "gelu" and x is not None:
        wide = product(x.reshape(-1, x.shape[-1]), weight, bias, keep=True)
        half = wide.dtype in (torch.float16, torch.bfloat16)
        exact = (t.float() if half else t for t in (grad, wide))
        grad = torch.ops.aten.gelu_backward(*exact).to(wide.dtype)
    return product_back(grad, weight, keep=True).view(shape)


def _thirds(weight: Tensor) -> list[slice]:
    width = weight.shape[0] // 3
    return [slice(i * width, (i + 1) * width) for i in range(3)]


def frozen_qkv_cpu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three `[N, M]` of `[N, K]`, each in memory of its own."""
    q, k, v = (
        product(x, weight, None if bias is None else bias[part], keep=True, part=part)
        for part in _thirds(weight)
    )
    return q, k, v


def frozen_qkv_cpu_bwd(grads: list[Tensor | None], weight: Tensor) -> Tensor:
    """Return the gradient `[N, K]` of x; at least one gradient is given."""
    total: Tensor | None = None
    for grad, part in zip(grads, _thirds(weight), strict=True):
        if grad is not None:
            total = product_back(grad.contiguous(), weight, total, keep=True, part=part)
    if total is None:
        raise ValueError("one of the gradients must be given, got none")
    return total
