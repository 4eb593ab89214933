"""Operators `modaltune::gated_pool_fwd` and `modaltune::gated_pool_bwd`.

The forward one carries the autograd formula, which calls the backward one. Its third output, the
log-sum-exp of the scores of each case, is for the backward pass alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._checks import check_offsets
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.gated_pooling.cpu import gated_pool_cpu_bwd, gated_pool_cpu_fwd

MAX_TRITON_HEADS = 16  # heads are padded to one tensor-core tile
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INPUTS = (
    "Tensor x, Tensor value_weight, Tensor value_bias, Tensor gate_weight, Tensor gate_bias, "
    "Tensor score_weight, Tensor score_bias"
)


def beyond_triton(dtype: torch.dtype, heads: int) -> str:
    """Return why the Triton kernels do not cover a call, or nothing."""
    if dtype not in TRITON_DTYPES:
        return f"takes float16, bfloat16 or float32, got {dtype}"
    if heads > MAX_TRITON_HEADS:
        return f"takes at most {MAX_TRITON_HEADS} heads C, got {heads}"
    return ""


def _check_device(x: Tensor) -> None:
    if x.device.type != "cuda" and not INTERPRET:
        raise RuntimeError(
            "gated_pool: impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the "
            f"environment before Python starts, got {x.device}; use impl='auto'"
        )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, impl = arguments
    x, *weights, offsets = tensors
    tensors = [x, *weights, check_offsets(offsets, x.shape[0])]  # not looked at when compiled
    if impl == "cpu":
        return gated_pool_cpu_fwd(*tensors)
    _check_device(x)
    from modaltune.kernels.gated_pooling.triton_kernels import launch_gated_pool_fwd

    with torch.cuda.device_of(x):
        return launch_gated_pool_fwd(*tensors)


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    score_weight, offsets = rest[4], rest[6]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads, cases = score_weight.shape[0], offsets.shape[0] - 1
    return (
        x.new_empty(cases, heads, x.shape[1]),
        x.new_empty(x.shape[0], heads, dtype=exact),
        x.new_empty(cases, heads, dtype=exact),
    )


def _backward(*arguments: Any) -> list[Tensor]:
    *given, impl = arguments
    if impl == "cpu":
        return gated_pool_cpu_bwd(*given)
    _check_device(given[0])
    from modaltune.kernels.gated_pooling.triton_kernels import launch_gated_pool_bwd

    with torch.cuda.device_of(given[0]):
        return launch_gated_pool_bwd(*given)


def _backward_fake(grad_pooled: Tensor, grad_scores: Tensor | None, *rest: Any) -> list[Tensor]:
    inputs, needs = rest[:7], rest[11]
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, impl = inputs
    ctx.impl = impl
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gradients(
    ctx: Any, grad_pooled: Tensor | None, grad_scores: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, offsets, pooled, scores, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:7])
    if grad_pooled is None:
        grad_pooled = torch.zeros_like(pooled)
    found = torch.ops.modaltune.gated_pool_bwd(
        grad_pooled, grad_scores, *inputs, pooled, scores, lse, offsets, needs, ctx.impl
    )
    grads = iter(found)
    return (*(next(grads) if need else None for need in needs), None, None)


define(
    f"gated_pool_fwd({_INPUTS}, Tensor offsets, str impl) "
    "-> (Tensor pooled, Tensor scores, Tensor lse)",
    _forward,
    _forward_fake,
)
define(
    f"gated_pool_bwd(Tensor grad_pooled, Tensor? grad_scores, {_INPUTS}, Tensor pooled, "
    "Tensor scores, Tensor lse, Tensor offsets, bool[] needs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("gated_pool_fwd", _setup_context, _gradients)
autocast("gated_pool_fwd")

gated_pool_fwd = torch.ops.modaltune.gated_pool_fwd
