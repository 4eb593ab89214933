"""Backward kernels of the injector, which recompute everything from the inputs of the forward pass.

With u the gradient of y, n = rstd (x - mean), and S_l, S_d sums over tiles and over columns

    do = (g u) Wo        dp_hg = do_h . v_hg     ds = p (dp - sum_g p dp) scale
    dq_h = ds_h k_h      dk_h = S_l ds_h^T q_h   dv_h = S_l p_h^T do_h
    dx = u (1 + g) + rstd (dq W' - A - n B)      A = dq . c / D     B = dq . (q - b') / D
    T = S_l dq^T n       M = S_l o^T u           r = S_l u          t = S_l u x

and the gradients of weights, gate and shifts follow from T, M, r, t and S_l dq by products of
weights alone (`launch_inject_bwd`). A and B are the two means over D that the gradient of a
LayerNorm needs, in terms of what is E wide. Four kernels: q and do of all rows [N, E] (project),
the attention of one head over a span of rows (attention), dx (input), and T, M, r, t of a span of
rows (weights). Everything is accumulated in float32; operands of products and the [N, E] tensors
between kernels have the dtype of x. Sums over tiles are partial sums by span, added up in a fixed
order.
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
def _load_inner(base, keep, BLOCK_L: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
                INNER: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Columns FIRST .. FIRST + COLS of rows of an `[N, INNER]` tensor, zero where not kept."""
    offsets = tl.arange(0, BLOCK_L)[:, None] * INNER + (FIRST + tl.arange(0, COLS))[None, :]
    tile = tl.load(base + offsets, mask=keep[:, None], other=0.0)  # [L, COLS]
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_inner(base, tile, keep, BLOCK_L: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
                 INNER: tl.constexpr):  # fmt: skip
    """Store columns FIRST .. FIRST + COLS of rows of an `[N, INNER]` tensor."""
    offsets = tl.arange(0, BLOCK_L)[:, None] * INNER + (FIRST + tl.arange(0, COLS))[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=keep[:, None])


@triton.jit
def inject_bwd_project_kernel(
    rows_ptr, factor_ptr, weight_ptr, sum_ptr, shift_ptr,
    out_ptr, statistics_ptr,
    stride_rn,
    num_rows, eps,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, STATISTICS: tl.constexpr, FROM_REGISTERS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, mean and rstd of BLOCK_L rows of x (STATISTICS), or do of as many rows of u."""
    INNER: tl.constexpr = MAIN + TAIL
    start = tl.program_id(0) * BLOCK_L
    rows = tl.arange(0, BLOCK_L)
    keep = rows < num_rows - start
    base = rows_ptr + start.to(tl.int64) * stride_rn
    main, tail, mean, variance, rest = project_rows(
        base, stride_rn, keep, weight_ptr, factor_ptr, BLOCK_L, BLOCK_K, WIDTH, MAIN, TAIL,
        STATISTICS, FROM_REGISTERS, UPCAST, PRECISION,
    )  # fmt: skip
    if STATISTICS:
        rstd = tl.rsqrt(variance + eps)  # [L]
        tl.store(statistics_ptr + start + rows, mean, mask=keep)
        tl.store(statistics_ptr + num_rows + start + rows, rstd, mask=keep)
        main = normed_query(main, rest, rstd, sum_ptr, shift_ptr, 0, MAIN)
        if TAIL:
            tail = normed_query(tail, rest, rstd, sum_ptr, shift_ptr, MAIN, TAIL)
    out_base = out_ptr + start.to(tl.int64) * INNER
    _store_inner(out_base, main, keep, BLOCK_L, 0, MAIN, INNER)
    if TAIL:
        _store_inner(out_base, tail, keep, BLOCK_L, MAIN, TAIL, INNER)


@triton.jit
def _add_gradients(sums, weights, rows, PRECISION: tl.constexpr):
    """The sums [G, HEAD_PAD] plus weights [L, G] transposed times rows [L, HEAD_PAD]."""
    return tl.dot(tl.trans(weights.to(rows.dtype)), rows, sums, input_precision=PRECISION)


@triton.jit
def inject_bwd_attention_kernel(
    q_ptr, grad_o_ptr, keys_ptr, values_ptr, key_bias_ptr, span_ptr,
    o_ptr, grad_q_ptr, grad_keys_ptr, grad_values_ptr, grad_shift_ptr,
    stride_kb, stride_kg, stride_vb, stride_vg, stride_bb,
    scale,
    BLOCK_L: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, INNER: tl.constexpr,
    KEYS_MAIN: tl.constexpr, KEYS_TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and dq of one head of a span of rows, and that span's share of dk, dv and S_l dq."""
    span = tl.program_id(0)
    head = tl.program_id(1)
    case = tl.load(span_ptr + 3 * span).to(tl.int64)
    first_row = tl.load(span_ptr + 3 * span + 1)
    end = tl.load(span_ptr + 3 * span + 2)
    KEYS: tl.constexpr = KEYS_MAIN + KEYS_TAIL
    bias_base = key_bias_ptr + case * stride_bb
    shown, shown_tail, _ = shown_keys(bias_base, KEYS_MAIN, KEYS_TAIL)
    k_base = keys_ptr + case * stride_kb + head * HEAD_DIM
    v_base = values_ptr + case * stride_vb + head * HEAD_DIM
    k = load_keys(k_base, stride_kg, shown, 0, KEYS_MAIN, HEAD_DIM, HEAD_PAD, UPCAST)
    v = load_keys(v_base, stride_vg, shown, 0, KEYS_MAIN, HEAD_DIM, HEAD_PAD, UPCAST)
    dk = tl.zeros([KEYS_MAIN, HEAD_PAD], tl.float32)
    dv = tl.zeros([KEYS_MAIN, HEAD_PAD], tl.float32)
    k_tail, v_tail, dk_tail, dv_tail = k, v, dk, dv
    if KEYS_TAIL:
        k_tail = load_keys(
            k_base, stride_kg, shown_tail, KEYS_MAIN, KEYS_TAIL, HEAD_DIM, HEAD_PAD, UPCAST
        )
        v_tail = load_keys(
            v_base, stride_vg, shown_tail, KEYS_MAIN, KEYS_TAIL, HEAD_DIM, HEAD_PAD, UPCAST
        )
        dk_tail = tl.zeros([KEYS_TAIL, HEAD_PAD], tl.float32)
        dv_tail = tl.zeros([KEYS_TAIL, HEAD_PAD], tl.float32)
    shift = tl.zeros([HEAD_PAD], tl.float32)
    for step in range(0, end - first_row, BLOCK_L):
        start = first_row + step
        keep = tl.arange(0, BLOCK_L) < end - start
        place = start.to(tl.int64) * INNER + head * HEAD_PAD
        q = _load_inner(q_ptr + place, keep, BLOCK_L, 0, HEAD_PAD, INNER, UPCAST)
        do = _load_inner(grad_o_ptr + place, keep, BLOCK_L, 0, HEAD_PAD, INNER, UPCAST)
        p, p_tail, share = softmax_weights(
            q, (k, k_tail), bias_base, scale * LOG2E, KEYS_MAIN, KEYS_TAIL, PRECISION
        )
        p *= share[:, None]  # [L, KEYS_MAIN]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [L, KEYS_MAIN]
        mean = tl.sum(p * dp, 1)  # [L]
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)  # [L, HEAD_PAD]
        dp_tail = dp
        if KEYS_TAIL:
            p_tail *= share[:, None]  # [L, KEYS_TAIL]
            dp_tail = tl.dot(do, tl.trans(v_tail), input_precision=PRECISION)
            mean += tl.sum(p_tail * dp_tail, 1)
            o = tl.dot(p_tail.to(v.dtype), v_tail, o, input_precision=PRECISION)
        ds = p * (dp - mean[:, None]) * scale  # [L, KEYS_MAIN]
        dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)  # [L, HEAD_PAD]
        dk = _add_gradients(dk, ds, q, PRECISION)
        dv = _add_gradients(dv, p, do, PRECISION)
        if KEYS_TAIL:
            ds_tail = p_tail * (dp_tail - mean[:, None]) * scale  # [L, KEYS_TAIL]
            dq = tl.dot(ds_tail.to(k.dtype), k_tail, dq, input_precision=PRECISION)
            dk_tail = _add_gradients(dk_tail, ds_tail, q, PRECISION)
            dv_tail = _add_gradients(dv_tail, p_tail, do, PRECISION)
        shift += tl.sum(dq, 0)
        _store_inner(o_ptr + place, o, keep, BLOCK_L, 0, HEAD_PAD, INNER)
        _store_inner(grad_q_ptr + place, dq, keep, BLOCK_L, 0, HEAD_PAD, INNER)
    cols = tl.arange(0, HEAD_PAD)
    partial = span.to(tl.int64) * (KEYS * INNER) + head * HEAD_PAD
    every = tl.arange(0, KEYS_MAIN) >= 0
    _store_inner(grad_keys_ptr + partial, dk, every, KEYS_MAIN, 0, HEAD_PAD, INNER)
    _store_inner(grad_values_ptr + partial, dv, every, KEYS_MAIN, 0, HEAD_PAD, INNER)
    if KEYS_TAIL:
        partial += KEYS_MAIN * INNER
        every = tl.arange(0, KEYS_TAIL) >= 0
        _store_inner(grad_keys_ptr + partial, dk_tail, every, KEYS_TAIL, 0, HEAD_PAD, INNER)
        _store_inner(grad_values_ptr + partial, dv_tail, every, KEYS_TAIL, 0, HEAD_PAD, INNER)
    tl.store(grad_shift_ptr + span * INNER + head * HEAD_PAD + cols, shift)


@triton.jit
def inject_bwd_input_kernel(
    x_ptr, grad_ptr, q_ptr, grad_q_ptr, statistics_ptr, gamma_ptr, query_ptr, query_sum_ptr,
    query_shift_ptr, key_bias_ptr, work_ptr, grad_x_ptr,
    stride_xn, stride_un, stride_bb, stride_gn,
    num_rows,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, KEYS_MAIN: tl.constexpr, KEYS_TAIL: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of at most BLOCK_L rows of one case; u where y was x."""
    INNER: tl.constexpr = MAIN + TAIL
    item = work_ptr + 4 * tl.program_id(0)
    case = tl.load(item).to(tl.int64)
    start = tl.load(item + 1)
    rows = tl.arange(0, BLOCK_L)
    keep = rows < tl.load(item + 2) - start
    _, _, some = shown_keys(key_bias_ptr + case * stride_bb, KEYS_MAIN, KEYS_TAIL)
    update = keep & (rows >= tl.load(item + 3) - start) & some
    place = start.to(tl.int64) * INNER
    # Rows of the prefix have no dq: what stands in their place was never written.
    dq = _load_inner(grad_q_ptr + place, update, BLOCK_L, 0, MAIN, INNER, UPCAST)  # [L, MAIN]
    q = _load_inner(q_ptr + place, update, BLOCK_L, 0, MAIN, INNER, UPCAST).to(tl.float32)
    inner = tl.arange(0, MAIN)
    exact = dq.to(tl.float32)
    centre = tl.sum(exact * tl.load(query_sum_ptr + inner)[None, :], 1)  # [L]
    slope = tl.sum(exact * (q - tl.load(query_shift_ptr + inner)[None, :]), 1)  # [L]
    dq_tail = dq
    if TAIL:
        inner_tail = MAIN + tl.arange(0, TAIL)
        dq_tail = _load_inner(grad_q_ptr + place, update, BLOCK_L, MAIN, TAIL, INNER, UPCAST)
        q = _load_inner(q_ptr + place, update, BLOCK_L, MAIN, TAIL, INNER, UPCAST).to(tl.float32)
        exact = dq_tail.to(tl.float32)
        centre += tl.sum(exact * tl.load(query_sum_ptr + inner_tail)[None, :], 1)
        slope += tl.sum(exact * (q - tl.load(query_shift_ptr + inner_tail)[None, :]), 1)
    mean = tl.load(statistics_ptr + start + rows, mask=update, other=0.0)  # [L]
    rstd = tl.load(statistics_ptr + num_rows + start + rows, mask=update, other=0.0)  # [L]
    # dx = u (1 + g) + rstd dq W' + still - x slant
    slant = rstd * rstd * slope / WIDTH  # [L]
    still = mean * slant - rstd * centre / WIDTH  # [L]
    x_base = x_ptr + start.to(tl.int64) * stride_xn
    u_base = grad_ptr + start.to(tl.int64) * stride_un
    out_base = grad_x_ptr + start.to(tl.int64) * stride_gn
    for first in range(0, WIDTH, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        weight = load_weight(query_ptr, inner, cols, WIDTH, BLOCK_D, UPCAST)  # [MAIN, D]
        change = tl.dot(dq, weight, input_precision=PRECISION)  # [L, D]
        if TAIL:
            weight = load_weight(query_ptr, inner_tail, cols, WIDTH, BLOCK_D, UPCAST)
            change = tl.dot(dq_tail, weight, change, input_precision=PRECISION)
        mask = row_mask(keep, cols, WIDTH, BLOCK_D)
        changed = row_mask(update, cols, WIDTH, BLOCK_D)
        pointers = x_base + (rows[:, None] * stride_xn + cols[None, :])
        x = tl.load(pointers, mask=changed, other=0.0).to(tl.float32)  # [L, D]
        pointers = u_base + (rows[:, None] * stride_un + cols[None, :])
        u = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [L, D]
        change = rstd[:, None] * change + still[:, None] - x * slant[:, None]
        change += u * load_row(gamma_ptr, cols, WIDTH)[None, :]
        dx = (u + tl.where(update[:, None], change, 0.0)).to(grad_x_ptr.dtype.element_ty)
        tl.store(out_base + (rows[:, None] * stride_gn + cols[None, :]), dx, mask=mask)


@triton.jit
def _store_sums(base, tile, cols, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows FIRST .. FIRST + ROWS, columns `cols`, of a partial sum `[INNER, WIDTH]`."""
    rows = FIRST + tl.arange(0, ROWS)
    mask = (rows >= 0)[:, None] & (cols < WIDTH)[None, :]
    tl.store(base + (rows[:, None] * WIDTH + cols[None, :]), tile, mask=mask)


@triton.jit
def inject_bwd_weights_kernel(
    x_ptr, grad_ptr, inner_ptr, statistics_ptr, key_bias_ptr, span_ptr,
    sums_ptr, column_sums_ptr,
    stride_xn, stride_un, stride_bb,
    num_rows,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, KEYS_MAIN: tl.constexpr, KEYS_TAIL: tl.constexpr, QUERY: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of a span's share of T from dq (QUERY), or of M, r and t from o."""
    INNER: tl.constexpr = MAIN + TAIL
    span = tl.program_id(0)
    case = tl.load(span_ptr + 3 * span).to(tl.int64)
    first_row = tl.load(span_ptr + 3 * span + 1)
    end = tl.load(span_ptr + 3 * span + 2)
    _, _, some = shown_keys(key_bias_ptr + case * stride_bb, KEYS_MAIN, KEYS_TAIL)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_L)
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    main = tl.zeros([MAIN, BLOCK_D], tl.float32)
    tail = main
    if TAIL:
        tail = tl.zeros([TAIL, BLOCK_D], tl.float32)
    plain = tl.zeros([BLOCK_D], tl.float32)
    times_x = tl.zeros([BLOCK_D], tl.float32)
    for step in range(0, end - first_row, BLOCK_L):
        start = first_row + step
        # Rows of a case without any key passed through: they moved no weight.
        keep = (rows < end - start) & some
        mask = row_mask(keep, cols, WIDTH, BLOCK_D)
        x_base = x_ptr + start.to(tl.int64) * stride_xn
        tile = tl.load(x_base + (rows[:, None] * stride_xn + cols[None, :]), mask=mask, other=0.0)
        if QUERY:
            mean = tl.load(statistics_ptr + start + rows, mask=keep, other=0.0)  # [L]
            rstd = tl.load(statistics_ptr + num_rows + start + rows, mask=keep, other=0.0)  # [L]
            tile = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]  # [L, D]
        else:
            x = tile.to(tl.float32)  # [L, D]
            u_base = grad_ptr + start.to(tl.int64) * stride_un
            pointers = u_base + (rows[:, None] * stride_un + cols[None, :])
            # Once more for the sums (out of L2, beside x): a buffer that a product and something
            # else read is filled anew too early, see `project_rows`.
            u = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            plain += tl.sum(u, 0)
            times_x += tl.sum(u * x, 0)
            tile = tl.load(pointers, mask=mask, other=0.0)  # [L, D]
        tile = tile.to(dtype)
        base = inner_ptr + start.to(tl.int64) * INNER
        inner = _load_inner(base, keep, BLOCK_L, 0, MAIN, INNER, UPCAST)  # [L, MAIN]
        main = tl.dot(tl.trans(inner), tile, main, input_precision=PRECISION)  # [MAIN, D]
        if TAIL:
            inner = _load_inner(base, keep, BLOCK_L, MAIN, TAIL, INNER, UPCAST)  # [L, TAIL]
            tail = tl.dot(tl.trans(inner), tile, tail, input_precision=PRECISION)  # [TAIL, D]
    partial = sums_ptr + span.to(tl.int64) * (INNER * WIDTH)
    _store_sums(partial, main, cols, MAIN, 0, WIDTH)
    if TAIL:
        _store_sums(partial, tail, cols, TAIL, MAIN, WIDTH)
    if not QUERY:
        sums = column_sums_ptr + span.to(tl.int64) * (2 * WIDTH) + cols
        tl.store(sums, plain, mask=cols < WIDTH)
        tl.store(sums + WIDTH, times_x, mask=cols < WIDTH)
