"""Operators `modaltune::dilated_attn_fwd` and `modaltune::dilated_attn_bwd`.

The forward one carries the autograd formula, which calls the backward one. Its second output, the
log-sum-exp of each row and head to base 2, is for the backward pass alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import autocast, define, differentiable
from modaltune.kernels.dilated_attn.cpu import (
    accumulation_dtype,
    dilated_attn_cpu_bwd,
    dilated_attn_cpu_fwd,
)
from modaltune.kernels.dilated_attn.reference import branch_shape

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_DIM = 128
_BRANCHES = "Tensor offsets, int[] segment_lengths, int[] dilation_ratios, float scale"


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
    impl: str,
) -> tuple[Tensor, Tensor]:
    branches = (tuple(segment_lengths), tuple(dilation_ratios))
    bounds = _checked_bounds(impl, q, offsets, *branches)
    if impl == "cpu":
        return dilated_attn_cpu_fwd(q, k, v, offsets, branches, scale)
    from modaltune.kernels.dilated_attn.triton_kernels import Call, launch_dilated_attn_fwd

    with torch.cuda.device_of(q):
        return launch_dilated_attn_fwd(q, k, v, Call(tuple(bounds), *branches, scale))


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype)),
    )


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    offsets: Tensor,
    segment_lengths: list[int],
    dilation_ratios: list[int],
    scale: float,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    branches = (tuple(segment_lengths), tuple(dilation_ratios))
    bounds = _checked_bounds(impl, q, offsets, *branches)
    if impl == "cpu":
        # A gradient taken inside an autocast region would have its products rounded.
        with torch.autocast("cpu", enabled=False):
            return dilated_attn_cpu_bwd(grad_out, q, k, v, lse, offsets, branches, scale, needs)
    from modaltune.kernels.dilated_attn.triton_kernels import Call, launch_dilated_attn_bwd

    with torch.cuda.device_of(q):
        return launch_dilated_attn_bwd(
            grad_out, q, k, v, lse, Call(tuple(bounds), *branches, scale), needs
        )


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *rest: Any
) -> list[Tensor]:
    needs = rest[-2]
    return [q.new_empty(q.shape) for need in needs if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, *ctx.options, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[1], offsets)


def _gradients(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if grad_out is None:
        return (None,) * 8
    grads = iter(
        torch.ops.modaltune.dilated_attn_bwd(
            grad_out, *ctx.saved_tensors, *ctx.options, needs, ctx.impl
        )
    )
    return (*(next(grads) if need else None for need in needs), *(None,) * 5)


define(
    f"dilated_attn_fwd(Tensor q, Tensor k, Tensor v, {_BRANCHES}, str impl) "
    "-> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
)
define(
    "dilated_attn_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor lse, "
    f"{_BRANCHES}, bool[] needs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("dilated_attn_fwd", _setup_context, _gradients)
autocast("dilated_attn_fwd")

dilated_attn_fwd = torch.ops.modaltune.dilated_attn_fwd
