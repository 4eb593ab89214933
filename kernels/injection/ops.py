"""Operators `modaltune::inject_fwd`, `modaltune::inject_bwd` and `modaltune::inject_tasks_fwd`.

The forward one carries the autograd formula, which calls the backward one. Nothing but the inputs
is saved between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._checks import check_offsets
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.injection.cpu import (
    inject_cpu_bwd,
    inject_cpu_fwd,
    inject_tasks_cpu,
)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_INNER = 256  # columns that stay on chip, after padding every head
MAX_TRITON_KEYS = 128
# Tensors that may need a gradient, in the order of the arguments.
_DIFFERENTIABLE = 10
_INPUTS = (
    "Tensor x, Tensor keys, Tensor values, Tensor gamma, Tensor norm_weight, Tensor norm_bias, "
    "Tensor query_weight, Tensor query_bias, Tensor output_weight, Tensor output_bias, "
    "Tensor? key_mask, Tensor offsets, int num_heads, int num_prefix, float eps"
)

_TASKS = "Tensor task_keys, Tensor task_values"


def beyond_triton(dtype: torch.dtype, inner: int, num_heads: int, tokens: int) -> str:
    """Return why the Triton kernels do not cover a call, or nothing."""
    if dtype not in TRITON_DTYPES:
        return f"takes float16, bfloat16 or float32, got {dtype}"
    if tokens > MAX_TRITON_KEYS:
        return f"holds at most {MAX_TRITON_KEYS} keys on chip, got {tokens}"
    head_pad = max(16, 1 << (inner // num_heads - 1).bit_length())
    if num_heads * head_pad > MAX_TRITON_INNER:
        return (
            f"holds at most {MAX_TRITON_INNER} columns on chip, got {num_heads} heads of "
            f"{inner // num_heads}, padded to {head_pad}"
        )
    return ""


def _check_device(x: Tensor) -> None:
    if x.device.type != "cuda" and not INTERPRET:
        raise RuntimeError(
            "inject: impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment "
            f"before Python starts, got {x.device}; use impl='auto'"
        )


def _forward(*arguments: Any) -> Tensor:
    *given, impl = arguments
    given[11] = check_offsets(given[11], given[0].shape[0])  # not looked at before when compiled
    if impl == "cpu":
        return inject_cpu_fwd(*given)
    _check_device(given[0])
    from modaltune.kernels.injection.triton_kernels import launch_inject_fwd

    return launch_inject_fwd(*given)


def _forward_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward(*arguments: Any) -> list[Tensor]:
    *given, impl = arguments
    if impl == "cpu":
        return inject_cpu_bwd(*given)
    _check_device(given[0])
    from modaltune.kernels.injection.triton_kernels import launch_inject_bwd

    return launch_inject_bwd(*given)


def _backward_fake(grad: Tensor, *rest: Any) -> list[Tensor]:
    inputs, needs = rest[:_DIFFERENTIABLE], rest[-2]
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _tasks_forward(*arguments: Any) -> Tensor:
    given = list(arguments)
    given[13] = check_offsets(given[13], given[0].shape[0])
    return inject_tasks_cpu(*given)


def _tasks_fake(x: Tensor, keys: Tensor, values: Tensor, task_keys: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(task_keys.shape[1], *x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, num_heads, num_prefix, eps, impl = inputs
    ctx.options = (num_heads, num_prefix, eps)
    ctx.impl = impl
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    found = iter(torch.ops.modaltune.inject_bwd(grad, *tensors, *ctx.options, needs, ctx.impl))
    grads = [next(found) if need else None for need in needs]
    return (*grads, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE))


define(f"inject_fwd({_INPUTS}, str impl) -> Tensor", _forward, _forward_fake)
define(
    f"inject_bwd(Tensor grad, {_INPUTS}, bool[] needs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("inject_fwd", _setup_context, _gradients)
autocast("inject_fwd")

# Without gradients, on the CPU: `inject_tasks` takes it there alone.
define(
    f"inject_tasks_fwd({_INPUTS.replace('Tensor gamma', _TASKS + ', Tensor gamma')}) -> Tensor",
    _tasks_forward,
    _tasks_fake,
)
autocast("inject_tasks_fwd")

inject_fwd = torch.ops.modaltune.inject_fwd
inject_tasks_fwd = torch.ops.modaltune.inject_tasks_fwd
