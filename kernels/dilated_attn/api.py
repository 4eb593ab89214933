"""Dilated attention (LongNet): every branch in place, merged as one softmax."""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor

from modaltune.kernels._checks import (
    check_float,
    check_offsets,
    check_shape,
    is_autocast_on,
    operator_dtype,
    require,
)
from modaltune.kernels._dispatch import OutOfReachError, choose_impl
from modaltune.kernels.dilated_attn import ops
from modaltune.kernels.dilated_attn.ops import misalignment as misalignment
from modaltune.kernels.dilated_attn.reference import dilated_attention_reference

logger = logging.getLogger(__name__)


def _choose(
    q: Tensor, offsets: Tensor, segments: tuple[int, ...], ratios: tuple[int, ...], impl: str
) -> str:
    """Return the implementation to run, with the reason where the one asked for can't be it."""
    op = "dilated_attention"
    beyond = ops.beyond_triton(operator_dtype(q), q.shape[2])
    if impl == "triton" and beyond:
        raise OutOfReachError(f"{op}: impl='triton' can't run: {beyond}; use impl='auto'")
    kernels = ("cpu",) if beyond else ("triton", "cpu")
    chosen = choose_impl(op, impl, q.device, (*kernels, "reference"))
    if chosen == "reference" or torch.compiler.is_compiling():
        return chosen  # values can't be looked at while tracing; the operator's body checks them
    reason = misalignment(offsets.diff().tolist(), segments, ratios)
    if reason is None:
        return chosen
    if impl != "auto":
        raise OutOfReachError(f"{op}: impl={impl!r} can't run: {reason}; use impl='auto'")
    _say_misaligned(reason)
    return "reference"


@cache
def _say_misaligned(reason: str) -> None:
    logger.info("dilated_attention: using the reference path (%s)", reason)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: tuple[int, ...],
    dilation_ratios: tuple[int, ...],
    offsets: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend within dilated segments of several lengths at once (LongNet).

    Branch (w, r) cuts a sequence into segments of w rows; head h keeps the rows whose residue
    modulo r, counted inside the segment, is its group `h // ceil(H / r)`. The branches are merged
    by a softmax over their log-sum-exp; these weights are constants in the backward pass.

    The backward pass computes scores again: beyond q, k and v, a call saves 4 bytes per row and
    head (float32 log-sum-exp; 8 in float64), or nothing where no input needs a gradient. Nothing of
    a branch is kept.

    Args:
        q: `[N, H, d]` queries of all sequences, packed; slices of a fused product are fine.
        k: `[N, H, d]` keys, in the dtype of q.
        v: `[N, H, d]` values, in the dtype of q.
        segment_lengths: Rows per segment, one per branch; clipped to the sequence.
        dilation_ratios: Dilation per branch, ≥ 1; at least one branch has dilation 1, so that
            every row is visited.
        offsets: `[B + 1]` integer, first row of each sequence and N; None for one sequence.
        scale: Factor on the scores; `d ** -0.5` unless given.
        impl: `auto`, `triton` (CUDA; CPU tensors only under `TRITON_INTERPRET=1`; heads of at most
            128 columns), `cpu` or `reference`. Segments that are no multiple of their dilation,
            where a sequence has more than one of them, are the reference's alone.

    Returns:
        `[N, H, d]` in the dtype of `q`.

    Raises:
        TypeError: q is not floating point.
        ValueError: Shapes, dtypes, devices, offsets or branches contradict each other, or scale is
            not finite.
        RuntimeError: The implementation asked for does not cover this input.

    Source: LongNet (Ding et al., 2023), with the zero padding of the published ModalTune.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None))
    require(
        q.shape[1] > 0 and q.shape[2] > 0,
        f"q must have at least one head and one column, got {list(q.shape)}",
    )
    mixed = is_autocast_on(q.device)
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, tuple(q.shape))
        require(
            tensor.device == q.device and (mixed or tensor.dtype == q.dtype),
            f"{name} must have the dtype and device of q ({q.dtype}, {q.device}), "
            f"got {tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )
    require(
        len(segment_lengths) == len(dilation_ratios) > 0 and min(*segment_lengths, 1) >= 1,
        "segment_lengths and dilation_ratios must be non-empty, of equal length and positive, got "
        f"{segment_lengths} and {dilation_ratios}",
    )
    require(
        1 in dilation_ratios and min(dilation_ratios) >= 1,
        f"dilation_ratios must be positive and contain 1, got {dilation_ratios}",
    )
    bounds = check_offsets(offsets, q.shape[0])
    branches = (tuple(segment_lengths), tuple(dilation_ratios))
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    require(math.isfinite(factor), f"scale must be finite, got {scale}")
    chosen = _choose(q, bounds, *branches, impl)
    if chosen == "reference":
        return dilated_attention_reference(
            q,
            k,
            v,
            offsets=bounds,
            segment_lengths=branches[0],
            dilation_ratios=branches[1],
            scale=factor,
        )
    out: Tensor = ops.dilated_attn_fwd(q, k, v, bounds, *branches, factor, chosen)[0]
    return out
