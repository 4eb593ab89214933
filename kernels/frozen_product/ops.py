"""Operators `modaltune::frozen_linear_fwd` and `modaltune::frozen_linear_bwd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.frozen_product.cpu import frozen_linear_cpu_bwd, frozen_linear_cpu_fwd


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return frozen_linear_cpu_fwd(x, weight, bias, activation)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    return frozen_linear_cpu_bwd(grad, x, weight, bias, activation)


def _backward_fake(grad: Tensor, x: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation = inputs
    # Without an activation the gradient needs the weight alone.
    ctx.save_for_backward(*((x, weight, bias) if ctx.activation else (None, weight, None)))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError(
            "frozen_linear: weight and bias have no gradient here; call requires_grad_(False) on "
            "them, or use torch.nn.functional.linear"
        )
    x, weight, bias = ctx.saved_tensors
    found = torch.ops.modaltune.frozen_linear_bwd(grad, x, weight, bias, ctx.activation)
    return found, None, None, None


define(
    "frozen_linear_fwd(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "frozen_linear_bwd(Tensor grad, Tensor? x, Tensor weight, Tensor? bias, str activation) "
    "-> Tensor",
    _backward,
    _backward_fake,
)
differentiable("frozen_linear_fwd", _setup_context, _gradients)
autocast("frozen_linear_fwd")

frozen_linear_fwd = torch.ops.modaltune.frozen_linear_fwd
