"""Backward kernels of ALiBi attention: scores and bias are computed again, from lse alone.

    p_ij = e^(s_ij - lse_i)   delta_i = do_i . o_i   ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j   dk_j = scale sum_i ds_ij q_i   dv_j = sum_i p_ij do_i

per head and sequence, with s of triton_forward.py. lse is kept to base 2, as the forward kernel
has it: turning it to base e and back rounds it twice more, an error that grows with |lse|. Products
take the dtype of the inputs, the rest is float32. One kernel owns blocks of queries (delta, dq),
one owns blocks of keys (dk, dv): every output is written by one program, so there are no atomics
and the same bits come twice. The other side comes in two loops, as in the forward kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modaltune.kernels.alibi_attn.triton_blocks import (
    LOG2E,
    add_product,
    distances,
    load_rows,
    load_vector,
    masked_block,
    scores,
    sections,
    store_rows,
    work_item,
    zero_rows,
)


@triton.jit
def _add_keys(dq, q, do, lse, delta, slope, distance, k_ptr, v_ptr, stride_kn, stride_vn, left,
              scale,
              BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
              TAIL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Add what a block of keys sends to dq, but for the factor `scale`."""
    k = load_rows(k_ptr, stride_kn, left, BLOCK_N, HEAD_DIM, MAIN, TAIL, MASKED, UPCAST)  # [N, D]
    s = scores(q, k, TAIL, PRECISION) * scale - slope[:, None] * distance  # [M, N]
    p = tl.exp2(s - lse[:, None])  # [M, N]
    if MASKED:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, p, 0.0)
    v = load_rows(v_ptr, stride_vn, left, BLOCK_N, HEAD_DIM, MAIN, TAIL, MASKED, UPCAST)  # [N, D]
    ds = p * (scores(do, v, TAIL, PRECISION) - delta[:, None])  # [M, N]
    return add_product(dq, ds, k, TAIL, PRECISION)


@triton.jit
def alibi_attn_bwd_dq_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cells_ptr, slopes_ptr, work_ptr,
    delta_ptr, dq_ptr,
    stride_gn, stride_gh, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_on, stride_oh,
    num_rows, num_prefix, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, NEEDS_DQ: tl.constexpr,
):  # fmt: skip
    """delta and, if NEEDS_DQ, dq of BLOCK_M queries of one head. dq has the strides of out."""
    start, begin, end = work_item(work_ptr)
    head = tl.program_id(1)
    valid = end - start
    rows = start + tl.arange(0, BLOCK_M)  # [M]
    at = start.to(tl.int64)
    do = load_rows(
        grad_out_ptr + at * stride_gn + head * stride_gh, stride_gn, valid,
        BLOCK_M, HEAD_DIM, MAIN, TAIL, True, UPCAST,
    )  # fmt: skip
    o = load_rows(
        out_ptr + at * stride_on + head * stride_oh, stride_on, valid,
        BLOCK_M, HEAD_DIM, MAIN, TAIL, True, UPCAST,
    )  # fmt: skip
    delta = tl.sum(do[0].to(tl.float32) * o[0].to(tl.float32), 1)  # [M]
    if TAIL:
        delta += tl.sum(do[1].to(tl.float32) * o[1].to(tl.float32), 1)
    of_head = head.to(tl.int64) * num_rows
    tl.store(delta_ptr + of_head + rows, delta, mask=rows < end)

    if NEEDS_DQ:
        tiles, full_end, masked_blocks = sections(begin, end, num_prefix, BLOCK_N)
        lse = load_vector(lse_ptr + of_head + start, valid, 0.0, BLOCK_M, True)  # [M]
        point = (
            load_vector(cells_ptr + start, valid, 0.0, BLOCK_M, True),  # [M]
            load_vector(cells_ptr + num_rows + start, valid, 0.0, BLOCK_M, True),  # [M]
        )
        # No bias in rows of the prefix.
        slope = tl.load(slopes_ptr + head) * tl.where(rows < tiles, 0.0, LOG2E)  # [M]
        q = load_rows(
            q_ptr + at * stride_qn + head * stride_qh, stride_qn, valid,
            BLOCK_M, HEAD_DIM, MAIN, TAIL, True, UPCAST,
        )  # fmt: skip
        k_ptr += head * stride_kh
        v_ptr += head * stride_vh
        dq = zero_rows(BLOCK_M, MAIN, TAIL)  # [M, D]
        for first in range(tiles, full_end, BLOCK_N):
            distance = distances(point, cells_ptr + first, num_rows, BLOCK_N, BLOCK_N, False)
            dq = _add_keys(
                dq, q, do, lse, delta, slope, distance,
                k_ptr + tl.cast(first, tl.int64) * stride_kn,
                v_ptr + tl.cast(first, tl.int64) * stride_vn,
                stride_kn, stride_vn, BLOCK_N, scale_log2,
                BLOCK_N, HEAD_DIM, MAIN, TAIL, False, UPCAST, PRECISION,
            )  # fmt: skip
        for step in range(0, masked_blocks):
            first, left, factor = masked_block(step, begin, tiles, full_end, end, BLOCK_N)
            distance = factor * distances(point, cells_ptr + first, num_rows, left, BLOCK_N, True)
            dq = _add_keys(
                dq, q, do, lse, delta, slope, distance,
                k_ptr + tl.cast(first, tl.int64) * stride_kn,
                v_ptr + tl.cast(first, tl.int64) * stride_vn,
                stride_kn, stride_vn, left, scale_log2,
                BLOCK_N, HEAD_DIM, MAIN, TAIL, True, UPCAST, PRECISION,
            )  # fmt: skip
        dq_ptr += at * stride_on + head * stride_oh
        store_rows(dq_ptr, stride_on, valid, dq, scale, BLOCK_M, HEAD_DIM, MAIN, TAIL)


@triton.jit
def _add_queries(dk, dv, k, v, slope, distance, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qn,
                 stride_gn, left, scale,
                 BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
                 TAIL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
                 PRECISION: tl.constexpr, NEEDS_DK: tl.constexpr,
                 NEEDS_DV: tl.constexpr):  # fmt: skip
    """Add what a block of queries sends to dk (but for the factor `scale`) and dv."""
    q = load_rows(q_ptr, stride_qn, left, BLOCK_M, HEAD_DIM, MAIN, TAIL, MASKED, UPCAST)  # [M, D]
    # An infinite lse makes the weights of rows past the end zero.
    lse = load_vector(lse_ptr, left, float("inf"), BLOCK_M, MASKED)  # [M]
    s = scores(k, q, TAIL, PRECISION) * scale - slope[:, None] * distance  # [N, M], transposed
    p = tl.exp2(s - lse[None, :])  # [N, M]
    do = load_rows(do_ptr, stride_gn, left, BLOCK_M, HEAD_DIM, MAIN, TAIL, MASKED, UPCAST)  # [M, D]
    if NEEDS_DV:
        dv = add_product(dv, p, do, TAIL, PRECISION)
    if NEEDS_DK:
        delta = load_vector(delta_ptr, left, 0.0, BLOCK_M, MASKED)  # [M]
        ds = p * (scores(v, do, TAIL, PRECISION) - delta[None, :])  # [N, M]
        dk = add_product(dk, ds, q, TAIL, PRECISION)
    return dk, dv


@triton.jit
def alibi_attn_bwd_dkdv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cells_ptr, slopes_ptr, work_ptr,
    dk_ptr, dv_ptr,
    stride_gn, stride_gh, stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_dn, stride_dh,
    num_rows, num_prefix, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv (those needed) of BLOCK_N keys of one head; both have strides `stride_d`."""
    start, begin, end = work_item(work_ptr)
    head = tl.program_id(1)
    valid = end - start
    rows = start + tl.arange(0, BLOCK_N)  # [N]
    at = start.to(tl.int64)
    tiles, full_end, masked_blocks = sections(begin, end, num_prefix, BLOCK_M)
    point = (
        load_vector(cells_ptr + start, valid, 0.0, BLOCK_N, True),  # [N]
        load_vector(cells_ptr + num_rows + start, valid, 0.0, BLOCK_N, True),  # [N]
    )
    # No bias in columns of the prefix.
    slope = tl.load(slopes_ptr + head) * tl.where(rows < tiles, 0.0, LOG2E)  # [N]
    k = load_rows(
        k_ptr + at * stride_kn + head * stride_kh, stride_kn, valid,
        BLOCK_N, HEAD_DIM, MAIN, TAIL, True, UPCAST,
    )  # fmt: skip
    v = k
    if NEEDS_DK:
        v = load_rows(
            v_ptr + at * stride_vn + head * stride_vh, stride_vn, valid,
            BLOCK_N, HEAD_DIM, MAIN, TAIL, True, UPCAST,
        )  # fmt: skip
    q_ptr += head * stride_qh
    grad_out_ptr += head * stride_gh
    lse_ptr += head.to(tl.int64) * num_rows
    delta_ptr += head.to(tl.int64) * num_rows
    dk = zero_rows(BLOCK_N, MAIN, TAIL)  # [N, D]
    dv = zero_rows(BLOCK_N, MAIN, TAIL)  # [N, D]
    for first in range(tiles, full_end, BLOCK_M):
        distance = distances(point, cells_ptr + first, num_rows, BLOCK_M, BLOCK_M, False)  # [N, M]
        dk, dv = _add_queries(
            dk, dv, k, v, slope, distance,
            q_ptr + tl.cast(first, tl.int64) * stride_qn,
            grad_out_ptr + tl.cast(first, tl.int64) * stride_gn,
            lse_ptr + first, delta_ptr + first, stride_qn, stride_gn, BLOCK_M, scale_log2,
            BLOCK_M, HEAD_DIM, MAIN, TAIL, False, UPCAST, PRECISION, NEEDS_DK, NEEDS_DV,
        )  # fmt: skip
    for step in range(0, masked_blocks):
        first, left, factor = masked_block(step, begin, tiles, full_end, end, BLOCK_M)
        distance = factor * distances(point, cells_ptr + first, num_rows, left, BLOCK_M, True)
        dk, dv = _add_queries(
            dk, dv, k, v, slope, distance,
            q_ptr + tl.cast(first, tl.int64) * stride_qn,
            grad_out_ptr + tl.cast(first, tl.int64) * stride_gn,
            lse_ptr + first, delta_ptr + first, stride_qn, stride_gn, left, scale_log2,
            BLOCK_M, HEAD_DIM, MAIN, TAIL, True, UPCAST, PRECISION, NEEDS_DK, NEEDS_DV,
        )  # fmt: skip
    offset = at * stride_dn + head * stride_dh
    if NEEDS_DK:
        store_rows(dk_ptr + offset, stride_dn, valid, dk, scale, BLOCK_N, HEAD_DIM, MAIN, TAIL)
    if NEEDS_DV:
        store_rows(dv_ptr + offset, stride_dn, valid, dv, 1.0, BLOCK_N, HEAD_DIM, MAIN, TAIL)
