"""Operators `modaltune::frozen_ffn_fwd` and `modaltune::frozen_ffn_bwd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.frozen_feedforward.cpu import frozen_ffn_cpu_bwd, frozen_ffn_cpu_fwd

_INPUTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, "
    "Tensor? inner_weight, Tensor? inner_bias, Tensor weight2"
)


def _forward(*arguments: Any) -> Tensor:
    return frozen_ffn_cpu_fwd(*arguments)


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward(*arguments: Any) -> Tensor:
    return frozen_ffn_cpu_bwd(*arguments)


def _backward_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.eps = inputs  # the last bias has no part in gradients
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError(
            "frozen_ffn: weights have no gradient here; call requires_grad_(False) on them, or "
            "build the branch from torch.nn.functional"
        )
    found = torch.ops.modaltune.frozen_ffn_bwd(grad, *ctx.saved_tensors, ctx.eps)
    return (found, *[None] * 9)


define(f"frozen_ffn_fwd({_INPUTS}, Tensor bias2, float eps) -> Tensor", _forward, _forward_fake)
define(f"frozen_ffn_bwd(Tensor grad, {_INPUTS}, float eps) -> Tensor", _backward, _backward_fake)
differentiable("frozen_ffn_fwd", _setup_context, _gradients)
autocast("frozen_ffn_fwd")

frozen_ffn_fwd = torch.ops.modaltune.frozen_ffn_fwd
