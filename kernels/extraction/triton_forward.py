"""Forward kernels of the extractor: sums of weights, one pass over the tiles, merge of the blocks.

    W'_ed = W_ed a_d       c_e = sum_d W'_ed       b'_e = b_e + sum_d W_ed z_d
    kv_le = r_l (sum_d W'_ed x_ld - m_l c_e) + b'_e
    s_gl = q_g . k_l / sqrt(width of a head)       o_g = sum_l e^(s_gl - lse_g) v_l

W' is rounded to the dtype of W and never stored: every program folds its piece, as it loads it.
x tiles, m and r their mean and 1 / deviation, a and z scale and shift of the LayerNorm, W and b the
projection, e its columns; q, k, v per head. Products take the dtype of the inputs; sums, softmax
and merge are float32, exponents to base 2. A block of rows leaves its own o, rounded to the dtype
of the inputs, and its own lse: half the bytes of a float32 maximum, sum and accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modaltune.kernels.extraction.triton_blocks import (
    head_rows,
    keys_and_values,
    slices,
    source_rows,
    widen,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def extraction_fwd_weights_kernel(
    weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, constants_ptr,
    stride_we,
    width,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """c and b' of one column: constants are [2, columns]."""
    column = tl.program_id(0)
    source, is_real = source_rows(column, NUM_HEADS, HEAD_DIM, HEAD_PAD, PER_GROUP)
    row_ptr = weight_ptr + source.to(tl.int64) * stride_we
    total = tl.zeros([BLOCK_K], tl.float32)
    shift = tl.zeros([BLOCK_K], tl.float32)
    for at in range(0, width, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)  # [K]
        inside = k < width
        weight = widen(tl.load(row_ptr + k, mask=inside & is_real, other=0.0), UPCAST)
        weight = weight.to(tl.float32)
        scale = widen(tl.load(norm_weight_ptr + k, mask=inside, other=0.0), UPCAST)
        move = widen(tl.load(norm_bias_ptr + k, mask=inside, other=0.0), UPCAST)
        # The sum is taken of what the product will see: the rounded weights.
        scaled = (weight * scale.to(tl.float32)).to(weight_ptr.dtype.element_ty)  # [K]
        total += widen(scaled, UPCAST).to(tl.float32)
        shift += weight * move.to(tl.float32)
    bias = widen(tl.load(bias_ptr + source, mask=is_real, other=0.0), UPCAST).to(tl.float32)
    tl.store(constants_ptr + column, tl.sum(total, 0))
    constants_ptr += 2 * GROUPS * PER_GROUP * HEAD_PAD
    tl.store(constants_ptr + column, tl.sum(shift, 0) + bias)


@triton.jit
def _attend(k, v, q_ptr, part_ptr, part_lse_ptr, stride_qg, keep, row, head, num_queries,
            scale, FROM: tl.constexpr, ROWS: tl.constexpr, NUM_HEADS: tl.constexpr,
            HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, UPCAST: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Store o and lse (to base 2) of queries FROM .. FROM + ROWS over a block of rows, one head."""
    q = head_rows(
        q_ptr, stride_qg, head, num_queries, FROM, ROWS, NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST
    )
    # Queries along the columns: every warp keeps its own rows of k, as the product left them.
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [L, G]
    s = tl.where(keep[:, None], s, float("-inf"))
    top = tl.max(s, 0)  # [G]
    p = tl.exp2(s - top[None, :])  # [L, G]
    total = tl.sum(p, 0)  # [G]
    acc = tl.dot(tl.trans(p.to(v.dtype)), v, input_precision=PRECISION)  # [G, HEAD_PAD]
    g = FROM + tl.arange(0, ROWS)  # [G]
    is_real = g < num_queries
    at = row * num_queries + g  # [G]
    tl.store(part_lse_ptr + at, top + tl.log2(total), mask=is_real)
    part_at = part_ptr + at[:, None] * HEAD_PAD + tl.arange(0, HEAD_PAD)[None, :]  # [G, HEAD_PAD]
    part = (acc / total[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(part_at, part, mask=is_real[:, None])


@triton.jit
def extraction_fwd_kernel(
    q_ptr, x_ptr, weight_ptr, norm_weight_ptr, constants_ptr, work_ptr,
    part_ptr, part_lse_ptr,
    stride_qb, stride_qg, stride_xn, stride_we,
    num_queries, width, eps, scale,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse over one block of rows for the heads of one group: [blocks, heads, G(, HEAD_PAD)].

    Groups of a block are neighbours in the grid, so they read the same rows at the same time.
    `scale` is the factor of q . k times log2(e).
    """
    block = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    case = tl.load(work_ptr + 3 * block).to(tl.int64)
    start = tl.load(work_ptr + 3 * block + 1)
    rows = start + tl.arange(0, BLOCK_L)  # [L]
    keep = rows < tl.load(work_ptr + 3 * block + 2)
    kv, _, _ = keys_and_values(
        x_ptr, weight_ptr, norm_weight_ptr, constants_ptr, rows, keep, group, stride_xn, stride_we,
        width, eps, NUM_HEADS, HEAD_DIM, HEAD_PAD, PER_GROUP, GROUPS, BLOCK_L, BLOCK_K, EVEN_K,
        UPCAST, PRECISION,
    )  # fmt: skip
    parts = slices(kv, BLOCK_L, 2 * PER_GROUP, HEAD_PAD)  # each [L, HEAD_PAD]
    q_ptr += case * stride_qb
    row = block.to(tl.int64) * GROUPS * PER_GROUP + group * PER_GROUP
    for index in tl.static_range(PER_GROUP):
        _attend(
            parts[index], parts[PER_GROUP + index], q_ptr, part_ptr, part_lse_ptr,
            stride_qg, keep, row + index, group * PER_GROUP + index, num_queries, scale, 0, MAIN,
            NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST, PRECISION,
        )  # fmt: skip
        if TAIL:
            _attend(
                parts[index], parts[PER_GROUP + index], q_ptr, part_ptr, part_lse_ptr,
                stride_qg, keep, row + index, group * PER_GROUP + index, num_queries, scale, MAIN,
                TAIL, NUM_HEADS, HEAD_DIM, HEAD_PAD, UPCAST, PRECISION,
            )  # fmt: skip


@triton.jit
def extraction_fwd_merge_kernel(
    part_ptr, part_lse_ptr, first_ptr, out_ptr, exact_ptr, lse_ptr,
    stride_ob, stride_og,
    num_queries,
    NUM_HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_G queries of one head of one case, from its blocks in their order.

    `exact` is o before it is rounded, for the backward pass; it has the strides of `out`. A case
    without rows has no block: its o is 0 and its lse minus infinity.
    """
    case = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)  # [G]
    d = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
    begin = tl.load(first_ptr + case)
    end = tl.load(first_ptr + case + 1)
    keep_g = g < num_queries
    top = tl.where(keep_g, float("-inf"), 0.0)  # [G]
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, HEAD_PAD], tl.float32)
    for at in range(begin, end, BLOCK_S):
        block = at + tl.arange(0, BLOCK_S)  # [S]
        keep = (block < end)[:, None] & keep_g[None, :]  # [S, G]
        place = (block.to(tl.int64) * PADDED_HEADS + head)[:, None] * num_queries + g[None, :]
        part_lse = tl.load(part_lse_ptr + place, mask=keep, other=float("-inf"))  # [S, G]
        part_at = part_ptr + place[:, :, None] * HEAD_PAD + d[None, None, :]
        part = tl.load(part_at, mask=keep[:, :, None], other=0.0)  # [S, G, HEAD_PAD]
        part = widen(part, UPCAST).to(tl.float32)
        new_top = tl.maximum(top, tl.max(part_lse, 0))  # [G]
        shrink = tl.exp2(top - new_top)  # [G]
        share = tl.exp2(part_lse - new_top[None, :])  # [S, G]
        total = total * shrink + tl.sum(share, 0)
        acc = acc * shrink[:, None] + tl.sum(part * share[:, :, None], 0)
        top = new_top
    is_empty = begin == end
    some = tl.where(keep_g & (begin < end), total, 1.0)  # [G]
    lse = tl.where(is_empty, float("-inf"), (top + tl.log2(some)) * LN2)
    tl.store(lse_ptr + (case * NUM_HEADS + head) * num_queries + g, lse, mask=keep_g)
    at = case * stride_ob + g[:, None] * stride_og + (head * HEAD_DIM + d)[None, :]
    inside = keep_g[:, None] & (d < HEAD_DIM)[None, :]
    out = acc / some[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(exact_ptr + at, out, mask=inside)
