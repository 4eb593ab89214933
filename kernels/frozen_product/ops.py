"""Operators `modaltune::frozen_linear_{fwd,bwd}` and `modaltune::frozen_qkv_{fwd,bwd}`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.frozen_product.cpu import (
    frozen_linear_cpu_bwd,
    frozen_linear_cpu_fwd,
    frozen_qkv_cpu_bwd,
    frozen_qkv_cpu_fwd,
)


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


def _refuse_trained(ctx: Any, op: str) -> None:
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError(
            f"{op}: weight and bias have no gradient here; call requires_grad_(False) on them, or "
            "take impl='reference'"
        )


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_trained(ctx, "frozen_linear")
    x, weight, bias = ctx.saved_tensors
    found = torch.ops.modaltune.frozen_linear_bwd(grad, x, weight, bias, ctx.activation)
    return found, None, None, None


def _qkv_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return frozen_qkv_cpu_fwd(x, weight, bias)


def _qkv_forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0] // 3)
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


def _qkv_backward(
    grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None, weight: Tensor
) -> Tensor:
    return frozen_qkv_cpu_bwd([grad_q, grad_k, grad_v], weight)


def _qkv_backward_fake(
    grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None, weight: Tensor
) -> Tensor:
    rows = next(grad.shape[0] for grad in (grad_q, grad_k, grad_v) if grad is not None)
    return weight.new_empty(rows, weight.shape[1])


def _qkv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1])


def _qkv_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_trained(ctx, "frozen_qkv")
    (weight,) = ctx.saved_tensors
    return torch.ops.modaltune.frozen_qkv_bwd(*grads, weight), None, None


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
define(
    "frozen_qkv_fwd(Tensor x, Tensor weight, Tensor? bias) -> (Tensor q, Tensor k, Tensor v)",
    _qkv_forward,
    _qkv_forward_fake,
)
define(
    "frozen_qkv_bwd(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, Tensor weight) -> Tensor",
    _qkv_backward,
    _qkv_backward_fake,
)
differentiable("frozen_linear_fwd", _setup_context, _gradients)
differentiable("frozen_qkv_fwd", _qkv_setup_context, _qkv_gradients)
autocast("frozen_linear_fwd")
autocast("frozen_qkv_fwd")

frozen_linear_fwd = torch.ops.modaltune.frozen_linear_fwd
frozen_qkv_fwd = torch.ops.modaltune.frozen_qkv_fwd
