"""Operators `modaltune::extract_fwd` and `modaltune::extract_bwd`.

The forward one carries the autograd formula, which calls the backward one. Its second and third
outputs, the attended values before they are rounded and the log-sum-exp of the scores, are for the
backward pass alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._checks import check_offsets
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.extraction._head_groups import (
    MAX_HEAD_DIM,
    MAX_QUERIES,
    MAX_QUERIES_FLOAT32,
)
from modaltune.kernels.extraction.cpu import exact_dtype, extract_cpu_bwd, extract_cpu_fwd

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TENSORS = ("queries", "x", "norm_weight", "norm_bias", "kv_weight", "kv_bias")
_INPUTS = ", ".join(f"Tensor {name}" for name in TENSORS)
_OPTIONS = "Tensor offsets, int num_heads, int num_prefix, float eps"


def beyond_triton(dtype: torch.dtype, queries: int, head_dim: int) -> str:
    """Return why the Triton kernels do not cover a call, or nothing.

    Args:
        dtype: Of all tensors.
        queries: G.
        head_dim: Width of a head.
    """
    if dtype not in TRITON_DTYPES:
        return f"takes float16, bfloat16 or float32, got {dtype}"
    most = MAX_QUERIES_FLOAT32 if dtype == torch.float32 else MAX_QUERIES
    if queries > most:
        return f"takes at most {most} queries a case in {dtype}, which stay on chip, got {queries}"
    if head_dim > MAX_HEAD_DIM:
        return f"takes heads of at most {MAX_HEAD_DIM} columns, got {head_dim}"
    return ""


def _check_device(x: Tensor) -> None:
    if x.device.type != "cuda" and not INTERPRET:
        raise RuntimeError(
            "extract: impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment "
            f"before Python starts, got {x.device}; use impl='auto'"
        )


def _is_empty(queries: Tensor) -> bool:
    return queries.numel() == 0


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, impl = arguments
    queries, x = given[:2]
    given[6] = check_offsets(given[6], x.shape[0])  # not looked at before when compiled
    if _is_empty(queries):
        return _forward_fake(*arguments)
    if impl == "cpu":
        return extract_cpu_fwd(*given)
    _check_device(x)
    from modaltune.kernels.extraction.triton_kernels import launch_extraction_fwd

    with torch.cuda.device_of(x):
        return launch_extraction_fwd(*given)


def _forward_fake(queries: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_heads, exact = rest[5], exact_dtype(x)
    cases, count, inner = queries.shape
    return (
        queries.new_empty(cases, count, inner),
        queries.new_empty(cases, count, inner, dtype=exact),
        queries.new_empty(cases, num_heads, count, dtype=exact),
    )


def _backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    *given, impl = arguments
    tensors, needs = given[:6], given[12]
    queries, x = tensors[:2]
    # A gradient taken inside an autocast region would have its products rounded.
    with torch.autocast(x.device.type, enabled=False):
        if _is_empty(queries):
            return [torch.zeros_like(t) for t, need in zip(tensors, needs, strict=True) if need]
        if impl == "cpu":
            return extract_cpu_bwd(grad_out, *given)
        _check_device(x)
        from modaltune.kernels.extraction.triton_kernels import launch_extraction_bwd

        with torch.cuda.device_of(x):
            return launch_extraction_bwd(grad_out, *given)


def _backward_fake(grad_out: Tensor, *rest: Any) -> list[Tensor]:
    tensors, needs = rest[:6], rest[12]
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, num_heads, num_prefix, eps, impl = inputs
    ctx.options = (num_heads, num_prefix, eps)
    ctx.impl = impl
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(
    ctx: Any, grad_out: Tensor | None, _exact: Tensor | None, _lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, offsets, exact, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    if grad_out is None:
        return (None,) * 11
    found = torch.ops.modaltune.extract_bwd(
        grad_out, *inputs, exact, lse, offsets, *ctx.options, needs, ctx.impl
    )
    grads = iter(found)
    return (*(next(grads) if need else None for need in needs), *(None,) * 5)


define(
    f"extract_fwd({_INPUTS}, {_OPTIONS}, str impl) -> (Tensor out, Tensor exact, Tensor lse)",
    _forward,
    _forward_fake,
)
define(
    f"extract_bwd(Tensor grad_out, {_INPUTS}, Tensor exact, Tensor lse, {_OPTIONS}, "
    "bool[] needs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("extract_fwd", _setup_context, _gradients)
autocast("extract_fwd")

extract_fwd = torch.ops.modaltune.extract_fwd
