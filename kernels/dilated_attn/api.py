"""Dilated attention (LongNet): every branch in place, merged as one softmax."""

from __future__ import annotations

from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.dilated_attn.cpu import dilated_attention_cpu
from modaltune.kernels.dilated_attn.reference import branch_shape, dilated_attention_reference


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

    Args:
        q: `[N, H, d]` queries of all sequences, packed.
        k: `[N, H, d]` keys.
        v: `[N, H, d]` values.
        segment_lengths: Rows per segment, one per branch; clipped to the sequence.
        dilation_ratios: Dilation per branch, ≥ 1; at least one branch has dilation 1, so that
            every row is visited.
        offsets: `[B + 1]` integer, first row of each sequence and N; None for one sequence.
        scale: Factor on the scores; `d ** -0.5` unless given.
        impl: `auto`, `triton`, `cpu` or `reference`.

    Returns:
        `[N, H, d]` in the dtype of `q`.

    Raises:
        ValueError: Shapes, offsets or branches contradict each other.
        RuntimeError: The implementation asked for does not cover this input.

    Source: LongNet (Ding et al., 2023), with the zero padding of the published ModalTune.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None))
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, tuple(q.shape))
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
    chosen = choose_impl("dilated_attention", impl, q.device, ("cpu", "reference"))
    reason = misalignment(bounds.diff().tolist(), *branches)
    if reason and chosen != "reference":
        if impl != "auto":
            raise RuntimeError(f"dilated_attention: impl={impl!r} can't run: {reason}")
        chosen = "reference"
    run = dilated_attention_cpu if chosen == "cpu" else dilated_attention_reference
    return run(
        q,
        k,
        v,
        offsets=bounds,
        segment_lengths=branches[0],
        dilation_ratios=branches[1],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
