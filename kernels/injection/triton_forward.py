"""Forward kernels of the injector.

    y = x + g * (x + Wo o + bo)       o_h = softmax_g(scale q_h . k_hg + bias_g) v_h
    q = rstd (x W'^T - mean c) + b'   W' = Wq * w   c_e = sum_d W'_ed   b' = Wq b + bq

x, y a tile's row; w, b scale and shift of the LayerNorm; mean, rstd its statistics; g the gate; h a
head, k, v its keys and values. Statistics, products, softmax and residuals are float32; operands
of products have the dtype of x. The LayerNorm is folded into the query product: its statistics are
summed over the columns that the product passes anyway, and corrected with the sums c afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modaltune.kernels.injection.triton_blocks import (
    LOG2E,
    load_keys,
    load_row,
    load_weight,
    normed_query,
    project_rows,
    row_mask,
    shown_keys,
    softmax_weights,
)


@triton.jit
def inject_fwd_fold_kernel(
    norm_weight_ptr, norm_bias_ptr, query_weight_ptr, query_bias_ptr, output_weight_ptr,
    query_ptr, query_sum_ptr, query_shift_ptr, output_ptr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """W', c, b' and Wo transposed, each head padded with zeros to HEAD_PAD rows.

    Every padded head is HEAD_PAD rows, at least 16, which BLOCK_E divides.
    """
    tl.static_assert(HEAD_PAD % BLOCK_E == 0)
    rows = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)  # [E]
    within = rows % HEAD_PAD
    source = rows // HEAD_PAD * HEAD_DIM + within  # [E]
    real = (within < HEAD_DIM) & (rows < HEADS * HEAD_PAD)
    cols = tl.arange(0, BLOCK_D)  # [D]
    inside = (cols < WIDTH)[None, :]
    mask = real[:, None] & inside  # [E, D]
    places = rows[:, None] * WIDTH + cols[None, :]  # [E, D]
    pointers = query_weight_ptr + (source[:, None] * WIDTH + cols[None, :])
    weight = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [E, D]
    folded = weight * load_row(norm_weight_ptr, cols, WIDTH)[None, :]  # [E, D]
    # The sums are those of the rounded weight, which is what the rows are multiplied with.
    folded = folded.to(query_ptr.dtype.element_ty)
    tl.store(query_ptr + places, folded, mask=inside)
    tl.store(query_sum_ptr + rows, tl.sum(folded.to(tl.float32), 1))
    shift = tl.sum(weight * load_row(norm_bias_ptr, cols, WIDTH)[None, :], 1)  # [E]
    shift += tl.load(query_bias_ptr + source, mask=real, other=0.0).to(tl.float32)
    tl.store(query_shift_ptr + rows, shift)
    pointers = output_weight_ptr + (cols[None, :] * (HEADS * HEAD_DIM) + source[:, None])
    tl.store(output_ptr + places, tl.load(pointers, mask=mask, other=0.0), mask=inside)


@triton.jit
def _attend(state, k_base, v_base, bias_base, shown, strides, scale, HEADS: tl.constexpr,
            HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, KEYS_MAIN: tl.constexpr,
            KEYS_TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Put the attended values of HEADS heads where their queries stand in `state` [L, columns].

    A head is taken out and put back by comparing slot numbers, which are known for every register:
    exact, and without a product or a trip through shared memory. The strides are (keys, values,
    bias of a head); that of the bias is 0 at run time, so that it is loaded again for every head
    and occupies no registers between.
    """
    ROWS: tl.constexpr = state.shape[0]
    SLOTS: tl.constexpr = state.shape[1] // HEAD_PAD
    slots = tl.reshape(state, (ROWS, SLOTS, HEAD_PAD))
    slot = tl.arange(0, SLOTS)[None, :, None]
    for head in tl.range(0, HEADS, num_stages=1):
        k = load_keys(k_base, strides[0], shown[0], 0, KEYS_MAIN, HEAD_DIM, HEAD_PAD, UPCAST)
        v = load_keys(v_base, strides[1], shown[0], 0, KEYS_MAIN, HEAD_DIM, HEAD_PAD, UPCAST)
        k_tail, v_tail = k, v
        if KEYS_TAIL:
            k_tail = load_keys(
                k_base, strides[0], shown[1], KEYS_MAIN, KEYS_TAIL, HEAD_DIM, HEAD_PAD, UPCAST
            )
            v_tail = load_keys(
                v_base, strides[1], shown[1], KEYS_MAIN, KEYS_TAIL, HEAD_DIM, HEAD_PAD, UPCAST
            )
        q = tl.sum(tl.where(slot == head, slots, tl.zeros_like(slots)), 1)  # [L, HEAD_PAD]
        p, p_tail, share = softmax_weights(
            q.to(k.dtype), (k, k_tail), bias_base, scale, KEYS_MAIN, KEYS_TAIL, PRECISION
        )
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)  # [L, HEAD_PAD]
        if KEYS_TAIL:
            o = tl.dot(p_tail.to(v.dtype), v_tail, o, input_precision=PRECISION)
        o = (o * share[:, None]).to(slots.dtype)
        slots = tl.where(slot == head, o[:, None, :], slots)  # [L, SLOTS, HEAD_PAD]
        k_base += HEAD_DIM
        v_base += HEAD_DIM
        bias_base += strides[2]
    return tl.reshape(slots, (ROWS, SLOTS * HEAD_PAD))


@triton.jit
def inject_fwd_kernel(
    x_ptr, keys_ptr, values_ptr, key_bias_ptr, work_ptr,
    query_ptr, query_sum_ptr, query_shift_ptr, output_ptr, output_bias_ptr, gamma_ptr, out_ptr,
    stride_xn, stride_kb, stride_kg, stride_vb, stride_vg, stride_bb, stride_bh, stride_on,
    eps, scale,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, KEYS_MAIN: tl.constexpr, KEYS_TAIL: tl.constexpr,
    FROM_REGISTERS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of at most BLOCK_L rows of one case; prefix rows, and all without any key, stay as x."""
    item = work_ptr + 4 * tl.program_id(0)
    case = tl.load(item).to(tl.int64)
    start = tl.load(item + 1)
    valid = tl.load(item + 2) - start
    prefix = tl.load(item + 3) - start
    rows = tl.arange(0, BLOCK_L)
    keep = rows < valid
    x_base = x_ptr + start.to(tl.int64) * stride_xn
    # What products and softmax work with: the interpreter has no bfloat16.
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty

    product, product_tail, _, variance, rest = project_rows(
        x_base, stride_xn, keep, query_ptr, gamma_ptr, BLOCK_L, BLOCK_K, WIDTH, MAIN, TAIL,
        True, FROM_REGISTERS, UPCAST, PRECISION,
    )  # fmt: skip
    rstd = tl.rsqrt(variance + eps)  # [L]
    q = normed_query(product, rest, rstd, query_sum_ptr, query_shift_ptr, 0, MAIN).to(dtype)
    q_tail = q
    if TAIL:
        q_tail = normed_query(product_tail, rest, rstd, query_sum_ptr, query_shift_ptr, MAIN, TAIL)
        q_tail = q_tail.to(dtype)

    bias_base = key_bias_ptr + case * stride_bb
    shown, shown_tail, some = shown_keys(bias_base, KEYS_MAIN, KEYS_TAIL)
    k_base = keys_ptr + case * stride_kb
    v_base = values_ptr + case * stride_vb
    strides = (stride_kg, stride_vg, stride_bh)
    FIRST: tl.constexpr = min(HEADS, MAIN // HEAD_PAD)
    o = _attend(
        q, k_base, v_base, bias_base, (shown, shown_tail), strides, scale * LOG2E, FIRST,
        HEAD_DIM, HEAD_PAD, KEYS_MAIN, KEYS_TAIL, UPCAST, PRECISION,
    )  # fmt: skip
    o_tail = o
    if TAIL:
        inner_tail = MAIN + tl.arange(0, TAIL)
        o_tail = _attend(
            q_tail, k_base + FIRST * HEAD_DIM, v_base + FIRST * HEAD_DIM, bias_base,
            (shown, shown_tail), strides, scale * LOG2E, HEADS - FIRST,
            HEAD_DIM, HEAD_PAD, KEYS_MAIN, KEYS_TAIL, UPCAST, PRECISION,
        )  # fmt: skip

    inner = tl.arange(0, MAIN)
    update = ((rows >= prefix) & some)[:, None]
    out_base = out_ptr + start.to(tl.int64) * stride_on
    for first in range(0, WIDTH, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        weight = load_weight(output_ptr, inner, cols, WIDTH, BLOCK_D, UPCAST)  # [MAIN, D]
        z = tl.dot(o, weight, input_precision=PRECISION)  # [L, D]
        if TAIL:
            weight = load_weight(output_ptr, inner_tail, cols, WIDTH, BLOCK_D, UPCAST)
            z = tl.dot(o_tail, weight, z, input_precision=PRECISION)  # [L, D]
        mask = row_mask(keep, cols, WIDTH, BLOCK_D)
        pointers = x_base + (rows[:, None] * stride_xn + cols[None, :])
        x = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z += load_row(output_bias_ptr, cols, WIDTH)[None, :]
        y = x + load_row(gamma_ptr, cols, WIDTH)[None, :] * (x + z)  # [L, D]
        y = tl.where(update, y, x).to(out_ptr.dtype.element_ty)
        tl.store(out_base + (rows[:, None] * stride_on + cols[None, :]), y, mask=mask)
