"""Forward kernels of ALiBi attention: an online softmax, the bias computed from cells on chip.

    s_ij = scale * q_i . k_j - slope * |g_i - g_j|   lse_i = log sum_j e^s_ij
    o_i = sum_j e^(s_ij - lse_i) v_j

per head and sequence; i, j rows, g a row's cell, |.| the Euclidean distance, 0 where i or j is a
prefix row. Products take the dtype of the inputs; scores, bias, softmax and sums are float32, to
base 2 on chip (`scale` comes in times log2 e). Keys come in two loops: full blocks of tile rows
without any mask, then the blocks of prefix rows and the ragged end, masked.
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
def alibi_attn_fwd_cells_kernel(
    grid_ptr, work_ptr, cells_ptr,
    stride_gn, stride_gc,
    num_rows,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """cells[:, i] = grid[i] - grid[last row of the sequence of i], as float32.

    float32 holds cells less than 2^24 apart exactly, wherever the grid begins; the last row is a
    tile if any row is.
    """
    start, _, end = work_item(work_ptr)
    rows = start + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    keep = rows < end
    last_ptr = grid_ptr + (end - 1).to(tl.int64) * stride_gn
    row_ptrs = grid_ptr + rows.to(tl.int64) * stride_gn  # [BLOCK_L]
    for axis in tl.static_range(2):
        cell = tl.load(row_ptrs + axis * stride_gc, mask=keep, other=0)  # [BLOCK_L]
        cell = (cell - tl.load(last_ptr + axis * stride_gc)).to(tl.float32)
        tl.store(cells_ptr + axis * num_rows + rows, cell, mask=keep)


@triton.jit
def _fold(state, q, slope, distance, k_ptr, v_ptr, stride_kn, stride_vn, left, scale,
          BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
          MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Fold a block of keys of one head into the softmax (maximum, sum, accumulators) of queries."""
    top, total, acc = state
    k = load_rows(k_ptr, stride_kn, left, BLOCK_N, HEAD_DIM, MAIN, TAIL, MASKED, UPCAST)  # [N, D]
    s = scores(q, k, TAIL, PRECISION) * scale - slope[:, None] * distance  # [M, N]
    if MASKED:
        s = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))  # [M]
    shrink = tl.exp2(top - new_top)  # [M]
    p = tl.exp2(s - new_top[:, None])  # [M, N]
    total = total * shrink + tl.sum(p, 1)  # [M]
    v = load_rows(v_ptr, stride_vn, left, BLOCK_N, HEAD_DIM, MAIN, TAIL, MASKED, UPCAST)  # [N, D]
    acc_main, acc_tail = acc[0] * shrink[:, None], acc[1]  # [M, D]
    if TAIL:
        acc_tail = acc_tail * shrink[:, None]
    return new_top, total, add_product((acc_main, acc_tail), p, v, TAIL, PRECISION)


@triton.jit
def alibi_attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cells_ptr, slopes_ptr, work_ptr, out_ptr, lse_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    num_rows, num_prefix, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M queries of HEADS (1 or 2) neighbouring heads, which share distances."""
    start, begin, end = work_item(work_ptr)
    head = tl.program_id(1) * HEADS
    valid = end - start
    rows = start + tl.arange(0, BLOCK_M)  # [M]
    tiles, full_end, masked_blocks = sections(begin, end, num_prefix, BLOCK_N)
    point = (
        load_vector(cells_ptr + start, valid, 0.0, BLOCK_M, True),  # [M]
        load_vector(cells_ptr + num_rows + start, valid, 0.0, BLOCK_M, True),  # [M]
    )
    unit = tl.where(rows < tiles, 0.0, LOG2E)  # [M], no bias in rows of the prefix
    q_ptr += start.to(tl.int64) * stride_qn + head * stride_qh
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh

    state = (
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        zero_rows(BLOCK_M, MAIN, TAIL),
    )
    q = load_rows(q_ptr, stride_qn, valid, BLOCK_M, HEAD_DIM, MAIN, TAIL, True, UPCAST)  # [M, D]
    slope = tl.load(slopes_ptr + head) * unit  # [M]
    state_b, q_b, slope_b = state, q, slope
    if HEADS == 2:
        q_b = load_rows(
            q_ptr + stride_qh, stride_qn, valid, BLOCK_M, HEAD_DIM, MAIN, TAIL, True, UPCAST
        )
        slope_b = tl.load(slopes_ptr + head + 1) * unit

    for first in range(tiles, full_end, BLOCK_N):
        distance = distances(point, cells_ptr + first, num_rows, BLOCK_N, BLOCK_N, False)  # [M, N]
        k_rows = k_ptr + tl.cast(first, tl.int64) * stride_kn
        v_rows = v_ptr + tl.cast(first, tl.int64) * stride_vn
        state = _fold(
            state, q, slope, distance, k_rows, v_rows, stride_kn, stride_vn, BLOCK_N, scale,
            BLOCK_N, HEAD_DIM, MAIN, TAIL, False, UPCAST, PRECISION,
        )  # fmt: skip
        if HEADS == 2:
            state_b = _fold(
                state_b, q_b, slope_b, distance, k_rows + stride_kh, v_rows + stride_vh,
                stride_kn, stride_vn, BLOCK_N, scale,
                BLOCK_N, HEAD_DIM, MAIN, TAIL, False, UPCAST, PRECISION,
            )  # fmt: skip
    for step in range(0, masked_blocks):
        first, left, factor = masked_block(step, begin, tiles, full_end, end, BLOCK_N)
        distance = factor * distances(point, cells_ptr + first, num_rows, left, BLOCK_N, True)
        k_rows = k_ptr + tl.cast(first, tl.int64) * stride_kn
        v_rows = v_ptr + tl.cast(first, tl.int64) * stride_vn
        state = _fold(
            state, q, slope, distance, k_rows, v_rows, stride_kn, stride_vn, left, scale,
            BLOCK_N, HEAD_DIM, MAIN, TAIL, True, UPCAST, PRECISION,
        )  # fmt: skip
        if HEADS == 2:
            state_b = _fold(
                state_b, q_b, slope_b, distance, k_rows + stride_kh, v_rows + stride_vh,
                stride_kn, stride_vn, left, scale,
                BLOCK_N, HEAD_DIM, MAIN, TAIL, True, UPCAST, PRECISION,
            )  # fmt: skip

    out_ptr += start.to(tl.int64) * stride_on + head * stride_oh
    lse_ptr += head.to(tl.int64) * num_rows + start
    _finish(state, out_ptr, lse_ptr, stride_on, valid, BLOCK_M, HEAD_DIM, MAIN, TAIL)
    if HEADS == 2:
        out_ptr += stride_oh
        lse_ptr += num_rows
        _finish(state_b, out_ptr, lse_ptr, stride_on, valid, BLOCK_M, HEAD_DIM, MAIN, TAIL)


@triton.jit
def _finish(state, out_ptr, lse_ptr, stride_on, valid, BLOCK_M: tl.constexpr,
            HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Store o and lse (to base 2) of one head from its softmax state."""
    top, total, acc = state
    rows = tl.arange(0, BLOCK_M)  # [M]
    tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < valid)
    share = 1.0 / total[:, None]  # [M, 1]
    store_rows(out_ptr, stride_on, valid, acc, share, BLOCK_M, HEAD_DIM, MAIN, TAIL)
