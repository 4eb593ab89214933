"""Backward kernels of dilated attention: weights are computed again, from the merged lse alone.

    P_ij = e^(s_ij - lse_i)           alpha_ib = sum_{j in b(i)} P_ij + pad_b(i) e^(-lse_i)
    delta_ib = sum_{j in b(i)} P_ij (do_i . v_j) / alpha_ib
    dq_i = scale sum_b sum_{j in b(i)} P_ij (do_i . v_j - delta_ib) k_j
    dk_j = scale sum_b sum_{i in b(j)} P_ij (do_i . v_j - delta_ib) q_i      dv_j = sum P_ij do_i

with s, b(i), pad of triton_forward.py. alpha_ib is the weight of branch b in the published merge, a
constant of the backward pass, and P_ij / alpha_ib the softmax inside the branch; so delta_ib is
do_i . o_ib with branch outputs o_ib that are never stored. delta is known only after all keys of a
branch: one pass sums P (do . v - guess) k and P k, and delta settles the rest. The guess, delta of
the first keys, keeps the difference free of cancellation.

Products take the dtype of the inputs, the rest is float32. One kernel owns blocks of queries
(delta, dq), one owns blocks of keys (dk, dv): each output is written by one program, so there are
no atomics and the same bits come twice. In half precision P goes into products times 2^SHIFT, as
weights among tens of thousands of keys are too small for float16; delta is stored times 2^-SHIFT.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modaltune.kernels.dilated_attn.triton_blocks import (
    NO_ATTENTION,
    NOWHERE,
    add_product,
    add_rows,
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
def _weights(q, do, lse, k_ptr, v_ptr, step_k, step_v, first, end, scale,
             BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
             TAIL: tl.constexpr, UPCAST: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Keys [N, D] of BLOCK_N places from `first` on, P [M, N] and do . v [M, N].

    lse is infinite for rows of other segments.
    """
    i = tl.arange(0, BLOCK_N)  # [N]
    keep = first + i < end  # [N]
    k = load_rows(k_ptr + first * step_k + i * step_k, keep, HEAD_DIM, MAIN, TAIL, UPCAST)
    p = tl.exp2(scores(q, k, TAIL, PRECISION) * scale - lse[:, None])  # [M, N]
    if first + BLOCK_N > end:
        p = tl.where(keep[None, :], p, 0.0)
    v = load_rows(v_ptr + first * step_v + i * step_v, keep, HEAD_DIM, MAIN, TAIL, UPCAST)
    return k, p, scores(do, v, TAIL, PRECISION)


@triton.jit
def _add_keys(state, q, do, lse, guess, k_ptr, v_ptr, step_k, step_v, first, end, scale,
              BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
              TAIL: tl.constexpr, UPCAST: tl.constexpr,
              PRECISION: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Add a block of keys to (sum of P, of P (do . v - guess), the same two times keys)."""
    sum_p, sum_e, acc_p, acc_e = state
    k, p, dp = _weights(
        q, do, lse, k_ptr, v_ptr, step_k, step_v, first, end, scale,
        BLOCK_N, HEAD_DIM, MAIN, TAIL, UPCAST, PRECISION,
    )  # fmt: skip
    e = p * (dp * (2.0**-SHIFT) - guess[:, None])  # [M, N]
    acc_p = add_product(acc_p, p, k, TAIL, PRECISION)
    acc_e = add_product(acc_e, e, k, TAIL, PRECISION)
    return sum_p + tl.sum(p, 1), sum_e + tl.sum(e, 1), acc_p, acc_e


@triton.jit
def dilated_attn_bwd_dq_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, units_ptr, residues_ptr, branches_ptr,
    delta_ptr, dq_ptr,
    stride_gn, stride_gh, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_dn, stride_dh,
    num_rows, num_heads, num_units, num_branches, dense_branch, modulus, classes, first_head,
    heads_here, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """dq of a block of BLOCK_M rows of one head, and delta [branches, heads, rows].

    delta stands at the place of its row in the lattice of the branch: consecutive for the kernel
    that reads it. `dense_branch` has dilation 1 and so visits every row.
    """
    head, kind, unit = program_block(classes, num_units, first_head, heads_here, heads_here)
    position, exists, begin, length = block_rows(
        units_ptr, residues_ptr, modulus, classes, head, kind, unit, BLOCK_M, ROWS
    )
    row = (begin + position).to(tl.int64)  # [M]
    of_head = head.to(tl.int64) * num_rows
    q = load_rows(
        q_ptr + row * stride_qn + head * stride_qh, exists,
        HEAD_DIM, MAIN, TAIL, UPCAST,
    )  # fmt: skip
    do = load_rows(
        grad_out_ptr + row * stride_gn + head * stride_gh, exists,
        HEAD_DIM, MAIN, TAIL, UPCAST,
    )  # fmt: skip
    lse = tl.load(lse_ptr + of_head + row, mask=exists, other=0.0)  # [M]
    lse = tl.where(lse < 0.5 * NO_ATTENTION, float("inf"), lse)
    # Where there are pads, their sum alone makes lse at least 0.
    pad_weight = tl.exp2(-tl.maximum(lse, 0.0)) * (2.0**SHIFT)  # [M]
    lse -= SHIFT
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh

    ratio, group, segment_places, places = branch(
        branches_ptr, dense_branch, head, num_heads, length
    )
    segment, _, number, _ = row_segments(position, exists, ratio, group, segment_places, places)
    number = tl.where(number == NOWHERE, 0, number)
    first = number * segment_places
    end = tl.minimum(first + segment_places, places)
    start = begin.to(tl.int64)
    _, p, dp = _weights(
        q, do, tl.where(segment == number, lse, float("inf")),
        k_ptr + start * stride_kn, v_ptr + start * stride_vn,
        ratio.to(tl.int64) * stride_kn, ratio.to(tl.int64) * stride_vn, first, end, scale_log2,
        BLOCK_N, HEAD_DIM, MAIN, TAIL, UPCAST, PRECISION,
    )  # fmt: skip
    weight = tl.sum(p, 1)  # [M]
    guess = tl.sum(p * dp, 1) / tl.where(weight > 0.0, weight, 1.0) * (2.0**-SHIFT)  # [M]

    acc_e = zero_rows(BLOCK_M, MAIN, TAIL)  # [M, D]
    for index in range(0, num_branches):
        ratio, group, segment_places, places = branch(branches_ptr, index, head, num_heads, length)
        segment, pads, first_segment, end_segment = row_segments(
            position, exists, ratio, group, segment_places, places
        )
        # A softmax over one key has no slope.
        end_segment = tl.where(segment_places == 1, 0, end_segment)
        start = (begin + group).to(tl.int64)
        step_k = ratio.to(tl.int64) * stride_kn
        step_v = ratio.to(tl.int64) * stride_vn
        k_rows = k_ptr + start * stride_kn
        v_rows = v_ptr + start * stride_vn
        zero = tl.zeros([BLOCK_M], tl.float32)
        state = (zero, zero, zero_rows(BLOCK_M, MAIN, TAIL), acc_e)
        for number in range(first_segment, end_segment):
            first = number * segment_places
            end = tl.minimum(first + segment_places, places)
            lse_here = tl.where(segment == number, lse, float("inf"))  # [M]
            for block in range(first, end, BLOCK_N):
                state = _add_keys(
                    state, q, do, lse_here, guess, k_rows, v_rows, step_k, step_v, block, end,
                    scale_log2, BLOCK_N, HEAD_DIM, MAIN, TAIL, UPCAST, PRECISION, SHIFT,
                )  # fmt: skip
        sum_p, sum_e, acc_p, acc_e = state
        alpha = sum_p + pads.to(tl.float32) * pad_weight
        delta = (sum_e + guess * sum_p) / tl.where(alpha > 0.0, alpha, 1.0)  # [M]
        acc_e = add_rows(acc_e, guess - delta, acc_p, TAIL)
        of_branch = (index * num_heads + head).to(tl.int64) * num_rows
        tl.store(delta_ptr + of_branch + begin + position // ratio, delta, mask=segment >= 0)

    dq_rows = dq_ptr + row * stride_dn + head * stride_dh
    store_rows(dq_rows, exists, acc_e, scale, HEAD_DIM, MAIN, TAIL)


@triton.jit
def _add_queries(state, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, step_q, step_g, ratio, first, end,
                 hide, scale, is_lone, num_branches,
                 BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
                 TAIL: tl.constexpr, UPCAST: tl.constexpr,
                 PRECISION: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Add the queries at BLOCK_N places from `first` on to dk (but for the factor scale) and dv.

    hide [M]: -inf for keys of other segments, 0 for others.
    """
    dk, dv = state
    i = tl.arange(0, BLOCK_N)  # [N]
    place = first + i
    keep = place < end  # [N]
    q = load_rows(q_ptr + first * step_q + i * step_q, keep, HEAD_DIM, MAIN, TAIL, UPCAST)
    # An infinite lse makes the weights of rows past the end zero.
    lse = tl.load(lse_ptr + place * ratio, mask=keep, other=float("inf")) - SHIFT  # [N]
    delta = tl.load(delta_ptr + place, mask=keep & (is_lone == 0), other=0.0)  # [N]
    is_bare = lse < 0.5 * NO_ATTENTION  # [N], rows without attention in any branch
    lse = tl.where(is_bare, float("inf"), lse)
    s = scores(k, q, TAIL, PRECISION)  # [M, N], transposed
    p = tl.exp2((s * scale + hide[:, None]) - lse[None, :])  # [M, N]
    if is_lone:
        # A key of score 0 has no part, unless the row has no other; then branches weigh alike.
        share = tl.where(is_bare, 2.0**SHIFT / num_branches, 0.0)[None, :]  # [1, N]
        p = tl.where(s == 0.0, tl.where(hide[:, None] == 0.0, share, 0.0), p)
    do = load_rows(do_ptr + first * step_g + i * step_g, keep, HEAD_DIM, MAIN, TAIL, UPCAST)
    dv = add_product(dv, p, do, TAIL, PRECISION)
    # A softmax over one key has no slope.
    factor = tl.where(is_lone, 0.0, 2.0**-SHIFT)
    ds = p * (scores(v, do, TAIL, PRECISION) * factor - delta[None, :])  # [M, N]
    return add_product(dk, ds, q, TAIL, PRECISION), dv


@triton.jit
def dilated_attn_bwd_dkdv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, units_ptr, residues_ptr, branches_ptr,
    dk_ptr, dv_ptr,
    stride_gn, stride_gh, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_dn, stride_dh,
    num_rows, num_heads, num_units, num_branches, modulus, classes, first_head, heads_here,
    scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of BLOCK_M rows of one head; the rows that see a key are its keys."""
    head, kind, unit = program_block(classes, num_units, first_head, heads_here, heads_here)
    position, exists, begin, length = block_rows(
        units_ptr, residues_ptr, modulus, classes, head, kind, unit, BLOCK_M, ROWS
    )
    row = (begin + position).to(tl.int64)  # [M]
    k_rows = k_ptr + row * stride_kn + head * stride_kh
    v_rows = v_ptr + row * stride_vn + head * stride_vh
    k = load_rows(k_rows, exists, HEAD_DIM, MAIN, TAIL, UPCAST)  # [M, D]
    v = load_rows(v_rows, exists, HEAD_DIM, MAIN, TAIL, UPCAST)  # [M, D]
    q_ptr += head * stride_qh
    grad_out_ptr += head * stride_gh
    lse_ptr += head.to(tl.int64) * num_rows
    state = (zero_rows(BLOCK_M, MAIN, TAIL), zero_rows(BLOCK_M, MAIN, TAIL))
    for index in range(0, num_branches):
        ratio, group, segment_places, places = branch(branches_ptr, index, head, num_heads, length)
        segment, _, first_segment, end_segment = row_segments(
            position, exists, ratio, group, segment_places, places
        )
        start = (begin + group).to(tl.int64)
        step_q = ratio.to(tl.int64) * stride_qn
        step_g = ratio.to(tl.int64) * stride_gn
        q_rows = q_ptr + start * stride_qn
        do_rows = grad_out_ptr + start * stride_gn
        lse_rows = lse_ptr + start
        delta_rows = delta_ptr + (index * num_heads + head).to(tl.int64) * num_rows + begin
        for number in range(first_segment, end_segment):
            first = number * segment_places
            end = tl.minimum(first + segment_places, places)
            hide = tl.where(segment == number, 0.0, float("-inf"))  # [M]
            for block in range(first, end, BLOCK_N):
                state = _add_queries(
                    state, k, v, q_rows, do_rows, lse_rows, delta_rows, step_q, step_g, ratio,
                    block, end, hide, scale_log2, segment_places == 1, num_branches,
                    BLOCK_N, HEAD_DIM, MAIN, TAIL, UPCAST, PRECISION, SHIFT,
                )  # fmt: skip

    dk, dv = state
    offset = row * stride_dn + head * stride_dh
    store_rows(dk_ptr + offset, exists, dk, scale, HEAD_DIM, MAIN, TAIL)
    store_rows(dv_ptr + offset, exists, dv, 2.0**-SHIFT, HEAD_DIM, MAIN, TAIL)
