"""Forward kernel of dilated attention: one online softmax over the keys of all branches of a row.

    s_ij = scale * q_i . k_j          Z_i = sum_b (sum_{j in b(i)} e^s_ij + pad_b(i))
    o_i = sum_b sum_{j in b(i)} e^s_ij v_j / Z_i          lse_i = log2 Z_i

per head and sequence; b(i): keys of row i's segment in branch b, pad_b(i): zero keys that the
published form appends to it, each of score 0. Branches that share a key each count it. The merge
of branches by e^lse_b as published is this same sum. Products take the dtype of the inputs;
scores, softmax and sums are float32, to base 2 (`scale` comes in times log2 e).

A branch whose log-sum-exp is exactly 0 counts as one that does not visit the row, as published:
log-sum-exp NO_ATTENTION. That takes segments of one key (`is_lone`) and a score of 0. Branches that
do not visit a row weigh nothing, unless no other branch is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modaltune.kernels.dilated_attn.triton_blocks import (
    LOWEST,
    NO_ATTENTION,
    add_product,
    block_rows,
    branch,
    load_rows,
    program_block,
    row_segments,
    scores,
    store_rows,
    zero_rows,
)


@triton.jit
def _fold(state, q, k_ptr, v_ptr, step_k, step_v, first, end, hidden, scale, is_lone,
          IS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
          MAIN: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Fold BLOCK_N places from `first` on into the softmax (maximum, sum, accumulators) of rows.

    hidden [M]: whether a row is in another segment. IS_LAST: whether the places may end before
    `end`; the loop over whole blocks has no branch in it, and so its loads run ahead.
    """
    top, total, acc = state
    i = tl.arange(0, BLOCK_N)  # [N]
    keep = first + i < end  # [N]
    k = load_rows(k_ptr + first * step_k + i * step_k, keep, HEAD_DIM, MAIN, TAIL, UPCAST)
    s = scores(q, k, TAIL, PRECISION)  # [M, N]
    if IS_LAST:
        s = tl.where(is_lone & (s == 0.0), NO_ATTENTION, s * scale)
        s = tl.where(keep[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.where(hidden, LOWEST, tl.max(s, 1)))  # [M]
        p = tl.exp2(s - tl.where(hidden, float("inf"), new_top)[:, None])  # [M, N]
    else:
        new_top = tl.maximum(top, tl.where(hidden, LOWEST, tl.max(s, 1) * scale))
        p = tl.exp2(s * scale - tl.where(hidden, float("inf"), new_top)[:, None])
    shrink = tl.exp2(top - new_top)  # [M]
    total = total * shrink + tl.sum(p, 1)  # [M]
    v = load_rows(v_ptr + first * step_v + i * step_v, keep, HEAD_DIM, MAIN, TAIL, UPCAST)
    main, tail = acc[0] * shrink[:, None], acc[1]  # [M, D]
    if TAIL:
        tail = tail * shrink[:, None]
    return new_top, total, add_product((main, tail), p, v, TAIL, PRECISION)


@triton.jit
def dilated_attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, units_ptr, residues_ptr, branches_ptr, out_ptr, lse_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    num_rows, num_heads, num_units, num_branches, modulus, classes, heads_together, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of a block of BLOCK_M rows of one head."""
    head, kind, unit = program_block(classes, num_units, 0, num_heads, heads_together)
    position, exists, begin, length = block_rows(
        units_ptr, residues_ptr, modulus, classes, head, kind, unit, BLOCK_M, ROWS
    )
    first_row = begin.to(tl.int64)
    q_ptr += first_row * stride_qn + head * stride_qh
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    q_rows = q_ptr + position.to(tl.int64) * stride_qn  # [M]
    q = load_rows(q_rows, exists, HEAD_DIM, MAIN, TAIL, UPCAST)  # [M, D]
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    state = (top, tl.zeros([BLOCK_M], tl.float32), zero_rows(BLOCK_M, MAIN, TAIL))
    for index in range(0, num_branches):
        ratio, group, segment_places, places = branch(branches_ptr, index, head, num_heads, length)
        segment, _, first_segment, end_segment = row_segments(
            position, exists, ratio, group, segment_places, places
        )
        start = (begin + group).to(tl.int64)
        step_k = ratio.to(tl.int64) * stride_kn
        step_v = ratio.to(tl.int64) * stride_vn
        k_rows = k_ptr + start * stride_kn
        v_rows = v_ptr + start * stride_vn
        for number in range(first_segment, end_segment):
            first = number * segment_places
            end = tl.minimum(first + segment_places, places)
            hidden = segment != number  # [M]
            whole = first + (end - first) // BLOCK_N * BLOCK_N
            for block in range(first, whole, BLOCK_N):
                state = _fold(
                    state, q, k_rows, v_rows, step_k, step_v, block, end, hidden, scale,
                    False, False, BLOCK_N, HEAD_DIM, MAIN, TAIL, UPCAST, PRECISION,
                )  # fmt: skip
            if whole < end:
                state = _fold(
                    state, q, k_rows, v_rows, step_k, step_v, whole, end, hidden, scale,
                    segment_places == 1, True, BLOCK_N, HEAD_DIM, MAIN, TAIL, UPCAST, PRECISION,
                )  # fmt: skip

    pads = tl.zeros([BLOCK_M], tl.int32)
    skipped = tl.zeros([BLOCK_M], tl.int32)
    for index in range(0, num_branches):
        ratio, group, segment_places, places = branch(branches_ptr, index, head, num_heads, length)
        segment, pads_here, _, _ = row_segments(
            position, exists, ratio, group, segment_places, places
        )
        pads += pads_here
        skipped += (segment < 0).to(tl.int32)
    top, total, acc = state
    new_top = tl.where(pads > 0, tl.maximum(top, 0.0), top)  # [M]
    new_top = tl.where(exists, new_top, 0.0)
    shrink = tl.exp2(top - new_top)  # [M]
    # Where there are pads, new_top is not negative.
    total = tl.where(exists, total * shrink, 1.0) + pads.to(tl.float32) * tl.exp2(
        -tl.maximum(new_top, 0.0)
    )
    total += skipped.to(tl.float32) * tl.exp2(-(new_top - NO_ATTENTION))
    lse_ptr += head.to(tl.int64) * num_rows + first_row
    tl.store(lse_ptr + position, new_top + tl.log2(total), mask=exists)
    share = (shrink / total)[:, None]  # [M, 1]
    out_ptr += first_row * stride_on + head * stride_oh
    out_rows = out_ptr + position.to(tl.int64) * stride_on  # [M]
    store_rows(out_rows, exists, acc, share, HEAD_DIM, MAIN, TAIL)
