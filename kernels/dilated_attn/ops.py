"""Operators `modaltune::dilated_attn_fwd` and `modaltune::dilated_attn_bwd`.

The forward one carries the autograd formula, which calls the backward one. Its outputs beyond the
first are for the backward pass alone: the log-sum-exp of each row and head and, on the CPU path
with `keep`, outputs and log-sum-exps of the branches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.dilated_attn.cpu import (
    dilated_attn_cpu_bwd,
    dilated_attn_cpu_fwd,
    lse_dtype,
    parts_shape,
)
from modaltune.kernels.dilated_attn.reference import branch_shape

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_DIM = 128

_Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def misalignment(
    lengths: list[int], segment_lengths: tuple[int, ...], dilation_ratios: tuple[int, ...]
) -> str | None:
    """Say which segment breaks the in-place form, or return None when every path is exact.

    With more than one segment, a segment length that is no multiple of its dilation shifts the
    outputs of later segments in the published implementation. Only the reference does that.
    """
    for length in lengths:
        for segment, ratio in zip(segment_lengths, dilation_ratios, strict=True):
            w, n, _ = branch_shape(max(length, 1), segment, ratio)
            if n > 1 and w % ratio:
                return f"segment {segment} is no multiple of its dilation {ratio} at {length} rows"
    return None


def beyond_triton(dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the Triton kernels do not cover a call, or None."""
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float16, bfloat16 or float32, got {dtype}"
    if head_dim > MAX_TRITON_HEAD_DIM:
        return f"the kernels take heads of at most {MAX_TRITON_HEAD_DIM} columns, got {head_dim}"
    return None


def _checked_bounds(
    impl: str, q: Tensor, offsets: Tensor, segments: tuple[int, ...], ratios: tuple[int, ...]
) -> list[int]:
    """Return the offsets as a list; what tracing could not look at is checked here."""
    bounds: list[int] = offsets.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != q.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"offsets must rise from 0 to the number of rows {q.shape[0]}, got {bounds[:8]}"
        )
    reason = misalignment(lengths, segments, ratios)
    if impl == "triton" and q.device.type != "cuda" and not INTERPRET:
        reason = f"CPU tensors need TRITON_INTERPRET=1 before Python starts, got {q.device}"
    if reason:
        raise RuntimeError(
            f"dilated_attention: impl={impl!r} can't run: {reason}; use impl='reference'"
        )
    return bounds


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    segment_lengths: list[int],
    dilation_ratios: list[int],
    scale: float,
    keep: bool,
    impl: str,
) -> _Forward:
    segments, ratios = tuple(segment_lengths), tuple(dilation_ratios)
    bounds = _checked_bounds(impl, q, offsets, segments, ratios)
    if impl == "cpu":
        out, lse, *parts = dilated_attn_cpu_fwd(q, k, v, offsets, segments, ratios, scale)
        if keep:
            return out, lse, parts[0], parts[1]
    else:
        from modaltune.kernels.dilated_attn.triton_kernels import Call, launch_dilated_attn_fwd

        call = Call(tuple(bounds), segments, ratios, scale)
        with torch.cuda.device_of(q):
            out, lse = launch_dilated_attn_fwd(q, k, v, call)
    return out, lse, q.new_empty(0), lse.new_empty(0)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    segment_lengths: list[int],
    dilation_ratios: list[int],
    scale: float,
    keep: bool,
    impl: str,
) -> _Forward:
    rows, heads, dim = q.shape
    exact = lse_dtype(q)
    shape: tuple[int, ...] = (0,)
    if keep and impl == "cpu":
        shape = parts_shape(rows, offsets.shape[0] - 1, heads, dim, tuple(dilation_ratios))
    return (
        q.new_empty(rows, heads, dim),
        q.new_empty(heads, rows, dtype=exact),
        q.new_empty(shape),
        q.new_empty(shape[:2], dtype=exact),
    )


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    out_parts: Tensor,
    lse_parts: Tensor,
    offsets: Tensor,
    segment_lengths: list[int],
    dilation_ratios: list[int],
    scale: float,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    segments, ratios = tuple(segment_lengths), tuple(dilation_ratios)
    bounds = _checked_bounds(impl, q, offsets, segments, ratios)
    grads: tuple[Tensor | None, ...]
    if impl == "cpu":
        grads = dilated_attn_cpu_bwd(
            grad_out, q, k, v, lse, out_parts, lse_parts, offsets, segments, ratios, scale
        )
    else:
        from modaltune.kernels.dilated_attn.triton_kernels import Call, launch_dilated_attn_bwd

        call = Call(tuple(bounds), segments, ratios, scale)
        with torch.cuda.device_of(q):
            grads = launch_dilated_attn_bwd(
                grad_out, q, k, v, lse, call, only_queries=not (needs[1] or needs[2])
            )
    return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    out_parts: Tensor,
    lse_parts: Tensor,
    offsets: Tensor,
    segment_lengths: list[int],
    dilation_ratios: list[int],
    scale: float,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    return [
        t.new_empty(t.shape, dtype=t.dtype)
        for t, need in zip((q, k, v), needs, strict=True)
        if need
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Forward) -> None:
    q, k, v, offsets, *ctx.options, _, ctx.impl = inputs
    _, *for_backward = output
    ctx.mark_non_differentiable(*for_backward)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *for_backward, offsets)


def _gradients(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if grad_out is None:
        return (None,) * 9
    grads = iter(
        torch.ops.modaltune.dilated_attn_bwd(
            grad_out, *ctx.saved_tensors, *ctx.options, needs, ctx.impl
        )
    )
    return (*(next(grads) if need else None for need in needs), *(None,) * 6)


_BRANCHES = "Tensor offsets, int[] segment_lengths, int[] dilation_ratios, float scale"
define(
    f"dilated_attn_fwd(Tensor q, Tensor k, Tensor v, {_BRANCHES}, bool keep, str impl) "
    "-> (Tensor out, Tensor lse, Tensor out_parts, Tensor lse_parts)",
    _forward,
    _forward_fake,
)
define(
    "dilated_attn_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor out_parts, "
    f"Tensor lse_parts, {_BRANCHES}, bool[] needs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("dilated_attn_fwd", _setup_context, _gradients)
autocast("dilated_attn_fwd")

dilated_attn_fwd = torch.ops.modaltune.dilated_attn_fwd
