"""Backward kernels of the extractor: keys and values are computed again, from lse and o alone.

    p_gl = e^(s_gl - lse_g)   delta_g = do_g . o_g   ds_gl = p_gl (do_g . v_l - delta_g)
    dv_l = sum_g p_gl do_g    dk_l = t sum_g ds_gl q_g    dq_g = t sum_l ds_gl k_l
    w_le = r_l dkv_le         dx_l = w_l W' - (r_l sum_e dkv_le c_e
                                     + (x_l - m_l) r_l^2 sum_e dkv_le (kv_le - b'_e)) / D

per head, with the legend of triton_forward.py and t = 1 / sqrt(width of a head). The two sums over
the width in the backward pass of a LayerNorm are sums over e here, which the program that has dkv
also has. k and v are written in columns by group and the dtype of x, and w over them, for dx and
for the weights' products; the rest is float32. Every number is written by one program: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modaltune.kernels.extraction.triton_blocks import (
    folded,
    head_rows,
    keys_and_values,
    source_rows,
    widen,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def extraction_bwd_project_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, constants_ptr, work_ptr,
    kv_ptr, rows_ptr,
    stride_xn, stride_we,
    num_rows, width, eps,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k and v of BLOCK_L rows for one group, and (first group) mean and 1 / deviation [2, N]."""
    COLUMNS: tl.constexpr = 2 * PER_GROUP * HEAD_PAD
    block = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    rows = tl.load(work_ptr + 3 * block + 1) + tl.arange(0, BLOCK_L)  # [L]
    keep = rows < tl.load(work_ptr + 3 * block + 2)
    kv, mean, rstd = keys_and_values(
        x_ptr, weight_ptr, norm_weight_ptr, constants_ptr, rows, keep, group, stride_xn, stride_we,
        width, eps, NUM_HEADS, HEAD_DIM, HEAD_PAD, PER_GROUP, GROUPS, BLOCK_L, BLOCK_K, EVEN_K,
        UPCAST, PRECISION,
    )  # fmt: skip
    rows64 = rows.to(tl.int64)
    columns = group * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    at = kv_ptr + rows64[:, None] * (GROUPS * COLUMNS) + columns[None, :]  # [L, COLUMNS]
    tl.store(at, kv.to(kv_ptr.dtype.element_ty), mask=keep[:, None])
    is_first = keep & (group == 0)
    tl.store(rows_ptr + rows64, mean, mask=is_first)
    tl.store(rows_ptr + tl.cast(num_rows, tl.int64) + rows64, rstd, mask=is_first)


@triton.jit
def _pull(dk, dv, k, v, q_ptr, do_ptr, out_ptr, lse_ptr, dq_ptr, stride_qg, stride_dg, stride_og,
          keep, head, num_queries, scale, FROM: tl.constexpr, ROWS: tl.constexpr,
          NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
          UPCAST: tl.constexpr, PRECISION: tl.constexpr, NEEDS_DQ: tl.constexpr,
          NEEDS_DKV: tl.constexpr):  # fmt: skip
    """Add what queries FROM .. FROM + ROWS send to dk and dv [L, HEAD_PAD]; store their dq."""
    q = head_rows(
        q_ptr, stride_qg, head, num_queries, FROM, ROWS, NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST
    )
    do = head_rows(
        do_ptr, stride_dg, head, num_queries, FROM, ROWS, NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST
    )
    o = head_rows(
        out_ptr, stride_og, head, num_queries, FROM, ROWS, NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST
    )
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)  # [G]
    g = FROM + tl.arange(0, ROWS)  # [G]
    # An infinite lse makes the weights of padded queries zero.
    lse = tl.load(lse_ptr + head * num_queries + g, mask=g < num_queries, other=float("inf"))
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # [L, G]
    p = tl.exp2(s - lse[None, :] * LOG2E)  # [L, G]
    p = tl.where(keep[:, None], p, 0.0)
    if HEAD_PAD > 64:
        # Operands of 128 columns fill the registers; a barrier keeps them from being loaded ahead.
        tl.debug_barrier()
    ds = tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]  # [L, G]
    ds = (p * ds).to(k.dtype)
    if NEEDS_DKV:
        if HEAD_PAD > 64:
            tl.debug_barrier()
        dv = tl.dot(p.to(v.dtype), do, dv, input_precision=PRECISION)
        if HEAD_PAD > 64:
            tl.debug_barrier()
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if NEEDS_DQ:
        dq = tl.dot(tl.trans(k), ds, input_precision=PRECISION) * scale  # [HEAD_PAD, G]
        at = dq_ptr + g[None, :] * HEAD_PAD + tl.arange(0, HEAD_PAD)[:, None]
        tl.store(at, dq, mask=(g < num_queries)[None, :])
    return dk, dv


@triton.jit
def _emit(dkv, kv, w_at, sums_ptr, keep, mean, rstd, constants_ptr, columns,
          ALL_COLUMNS: tl.constexpr):  # fmt: skip
    """Store w and the column sums of one head's dk or dv [L, HEAD_PAD]; return its row sums [L]."""
    w = (dkv * rstd[:, None]).to(w_at.dtype.element_ty)  # [L, HEAD_PAD]
    tl.store(w_at, w, mask=keep[:, None])
    tl.store(sums_ptr + columns, tl.sum(dkv, 0))
    # Of the rounded w, so that the mean of x cancels exactly in the weights' products.
    tl.store(sums_ptr + ALL_COLUMNS + columns, tl.sum(w.to(tl.float32) * mean[:, None], 0))
    column_sum = tl.load(constants_ptr + columns)  # [HEAD_PAD]
    bias = tl.load(constants_ptr + ALL_COLUMNS + columns)  # [HEAD_PAD]
    first = tl.sum(dkv * column_sum[None, :], 1)  # [L]
    return first, tl.sum(dkv * (kv.to(tl.float32) - bias[None, :]), 1)


@triton.jit
def extraction_bwd_kernel(
    do_ptr, q_ptr, constants_ptr, out_ptr, lse_ptr, work_ptr,
    kv_ptr, dq_ptr, sums_ptr, rows_ptr,
    stride_db, stride_dg, stride_qb, stride_qg, stride_ob, stride_og,
    num_queries, num_rows, scale,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_DQ: tl.constexpr, NEEDS_DKV: tl.constexpr,
):  # fmt: skip
    """Partial dq, w (over k and v), column sums and row sums of one block of rows, one head.

    dq: [blocks, heads, G, HEAD_PAD]. sums: [blocks, 2, columns], of dkv and of w m. rows:
    [2 + 2 * heads, N], the mean and 1 / deviation of each row, then each head's two row sums.
    """
    ALL_COLUMNS: tl.constexpr = 2 * PER_GROUP * HEAD_PAD * GROUPS
    block = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    case = tl.load(work_ptr + 3 * block).to(tl.int64)
    start = tl.load(work_ptr + 3 * block + 1)
    rows = tl.arange(0, BLOCK_L)  # [L], from start on
    keep = rows < tl.load(work_ptr + 3 * block + 2) - start
    column = (head // PER_GROUP * 2 * PER_GROUP + head % PER_GROUP) * HEAD_PAD
    columns = column + tl.arange(0, HEAD_PAD)  # [HEAD_PAD], of k; those of v are a half group on
    kv_ptr += start.to(tl.int64) * ALL_COLUMNS
    k_at = kv_ptr + (rows[:, None] * ALL_COLUMNS + columns[None, :])  # [L, HEAD_PAD]
    v_at = k_at + PER_GROUP * HEAD_PAD
    k = widen(tl.load(k_at, mask=keep[:, None], other=0.0), UPCAST)
    v = widen(tl.load(v_at, mask=keep[:, None], other=0.0), UPCAST)
    # All of k and v is read before any w is written over it.
    tl.debug_barrier()
    dk = tl.zeros([BLOCK_L, HEAD_PAD], tl.float32)
    dv = tl.zeros([BLOCK_L, HEAD_PAD], tl.float32)
    q_ptr += case * stride_qb
    do_ptr += case * stride_db
    out_ptr += case * stride_ob
    lse_ptr += case * NUM_HEADS * num_queries
    dq_ptr += (block.to(tl.int64) * NUM_HEADS + head) * num_queries * HEAD_PAD
    dk, dv = _pull(
        dk, dv, k, v, q_ptr, do_ptr, out_ptr, lse_ptr, dq_ptr, stride_qg, stride_dg, stride_og,
        keep, head, num_queries, scale, 0, MAIN,
        NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST, PRECISION, NEEDS_DQ, NEEDS_DKV,
    )  # fmt: skip
    if TAIL:
        dk, dv = _pull(
            dk, dv, k, v, q_ptr, do_ptr, out_ptr, lse_ptr, dq_ptr, stride_qg, stride_dg, stride_og,
            keep, head, num_queries, scale, MAIN, TAIL,
            NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST, PRECISION, NEEDS_DQ, NEEDS_DKV,
        )  # fmt: skip
    if NEEDS_DKV:
        one_row = tl.cast(num_rows, tl.int64)
        rows_ptr += start
        mean = tl.load(rows_ptr + rows, mask=keep, other=0.0)  # [L]
        rstd = tl.load(rows_ptr + one_row + rows, mask=keep, other=0.0)  # [L]
        sums_ptr += block.to(tl.int64) * 2 * ALL_COLUMNS
        first, second = _emit(
            dk * scale, k, k_at, sums_ptr, keep, mean, rstd, constants_ptr, columns, ALL_COLUMNS
        )
        of_v, of_v_again = _emit(
            dv, v, v_at, sums_ptr, keep, mean, rstd, constants_ptr, columns + PER_GROUP * HEAD_PAD,
            ALL_COLUMNS,
        )  # fmt: skip
        of_head = rows_ptr + (2 + 2 * head) * one_row + rows  # [L]
        tl.store(of_head, first + of_v, mask=keep)
        tl.store(of_head + one_row, second + of_v_again, mask=keep)


@triton.jit
def extraction_bwd_dx_kernel(
    x_ptr, w_ptr, weight_ptr, norm_weight_ptr, rows_ptr, work_ptr,
    dx_ptr,
    stride_xn, stride_we, stride_dn,
    num_rows, width,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_L rows and BLOCK_D columns; columns of a block are neighbours in the grid."""
    ALL_COLUMNS: tl.constexpr = 2 * PER_GROUP * HEAD_PAD * GROUPS
    IS_PADDED: tl.constexpr = HEAD_DIM != HEAD_PAD or NUM_HEADS % PER_GROUP != 0
    pieces = tl.cdiv(width, BLOCK_D)
    block = tl.program_id(0) // pieces
    start = tl.load(work_ptr + 3 * block + 1)
    rows = start + tl.arange(0, BLOCK_L)  # [L]
    keep = rows < tl.load(work_ptr + 3 * block + 2)
    rows64 = rows.to(tl.int64)
    d = tl.program_id(0) % pieces * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    e = tl.arange(0, BLOCK_K)  # [K]
    w_row_ptr = w_ptr + rows64 * ALL_COLUMNS  # [L]
    dx = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for at in range(0, ALL_COLUMNS, BLOCK_K):
        w = tl.load(w_row_ptr[:, None] + (at + e)[None, :], mask=keep[:, None], other=0.0)  # [L, K]
        source, is_real = source_rows(at + e, NUM_HEADS, HEAD_DIM, HEAD_PAD, PER_GROUP)
        weight = folded(
            weight_ptr, norm_weight_ptr, stride_we, source, is_real, d, width, IS_PADDED, EVEN_D,
            UPCAST,
        )  # fmt: skip
        dx = tl.dot(widen(w, UPCAST), weight, dx, input_precision=PRECISION)  # [L, D]
    mean = tl.load(rows_ptr + rows64, mask=keep, other=0.0)  # [L]
    one_row = tl.cast(num_rows, tl.int64)
    rstd = tl.load(rows_ptr + one_row + rows64, mask=keep, other=0.0)  # [L]
    first = tl.zeros([BLOCK_L], tl.float32)
    second = tl.zeros([BLOCK_L], tl.float32)
    for head in range(NUM_HEADS):
        of_head = rows_ptr + (2 + 2 * head) * one_row + rows64  # [L]
        first += tl.load(of_head, mask=keep, other=0.0)
        second += tl.load(of_head + one_row, mask=keep, other=0.0)
    inside = keep[:, None] & (d < width)[None, :]
    x = tl.load(x_ptr + rows64[:, None] * stride_xn + d[None, :], mask=inside, other=0.0)  # [L, D]
    x = widen(x, UPCAST).to(tl.float32) - mean[:, None]
    dx -= (first * rstd / width)[:, None] + x * (second * rstd * rstd / width)[:, None]
    at = dx_ptr + rows64[:, None] * stride_dn + d[None, :]
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def extraction_bwd_merge_kernel(
    part_ptr, first_ptr, dq_ptr,
    stride_qb, stride_qg,
    num_queries,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_G queries of one head of one case: the sum over its blocks, in their order."""
    case = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)  # [G]
    d = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
    begin = tl.load(first_ptr + case)
    end = tl.load(first_ptr + case + 1)
    total = tl.zeros([BLOCK_G, HEAD_PAD], tl.float32)
    for at in range(begin, end, BLOCK_S):
        block = at + tl.arange(0, BLOCK_S)  # [S]
        keep = (block < end)[:, None] & (g < num_queries)[None, :]  # [S, G]
        place = (block.to(tl.int64) * NUM_HEADS + head)[:, None] * num_queries + g[None, :]
        total += tl.sum(tl.load(
            part_ptr + place[:, :, None] * HEAD_PAD + d[None, None, :],
            mask=keep[:, :, None], other=0.0,
        ), 0)  # [G, HEAD_PAD]  # fmt: skip
    at = dq_ptr + case * stride_qb + g[:, None] * stride_qg + (head * HEAD_DIM + d)[None, :]
    inside = (g < num_queries)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, total.to(dq_ptr.dtype.element_ty), mask=inside)
