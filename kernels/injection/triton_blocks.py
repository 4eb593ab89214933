"""Pieces that the injector's kernels share: tiles of rows and weights, projections, softmax.

The inner width E is kept as two tiles, MAIN and TAIL columns, powers of two (192 = 128 + 64), made
of heads padded to HEAD_PAD columns each. Keys are likewise KEYS_MAIN and KEYS_TAIL rows
(65 keys: 64 + 16). A tail of 0 does not exist: its place repeats the main tile and is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_weight(base, rows, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Tile [rows, cols] of a weight `[E, WIDTH]`, zero past WIDTH; every program wants it again."""
    pointers = base + (rows[:, None] * WIDTH + cols[None, :])
    if WIDTH % BLOCK == 0:
        tile = tl.load(pointers, eviction_policy="evict_last")
    else:
        tile = tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def row_mask(keep, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Mask [L, cols] of rows to keep and columns below WIDTH."""
    mask = keep[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return mask


@triton.jit
def load_row(base, cols, WIDTH: tl.constexpr):
    """Columns of a vector `[WIDTH]` as float32, zero past its end."""
    return tl.load(base + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def project_rows(base, stride, keep, weight_ptr, factor_ptr, BLOCK_L: tl.constexpr,
                 BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
                 TAIL: tl.constexpr, STATISTICS: tl.constexpr, FROM_REGISTERS: tl.constexpr,
                 UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows times a weight `[MAIN + TAIL, WIDTH]` transposed: (main, tail, mean, variance, rest).

    With STATISTICS the mean and variance of the rows come out of the same pass, and `rest` is the
    mean of the rows as they were multiplied: float32 rows are multiplied without their shift, so
    that a large mean costs no digits. Without STATISTICS the rows are scaled by the columns of
    `factor_ptr` first.
    """
    rows = tl.arange(0, BLOCK_L)
    inner = tl.arange(0, MAIN)
    main = tl.zeros([BLOCK_L, MAIN], tl.float32)
    tail = main
    if TAIL:
        inner_tail = MAIN + tl.arange(0, TAIL)
        tail = tl.zeros([BLOCK_L, TAIL], tl.float32)
    shift = tl.zeros([BLOCK_L], tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    squares = tl.zeros([BLOCK_L], tl.float32)
    if STATISTICS:
        # Sums of differences from the mean of a row's first values: the variance does not cancel.
        cols = tl.arange(0, BLOCK_K)
        pointers = base + (rows[:, None] * stride + cols[None, :])  # [L, BLOCK_K]
        x = tl.load(pointers, mask=row_mask(keep, cols, WIDTH, BLOCK_K), other=0.0)
        shift = tl.sum(x.to(tl.float32), 1) / min(WIDTH, BLOCK_K)
    for first in range(0, WIDTH, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        mask = row_mask(keep, cols, WIDTH, BLOCK_K)
        pointers = base + (rows[:, None] * stride + cols[None, :])
        x = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last")  # [L, BLOCK_K]
        if UPCAST:
            x = x.to(tl.float32)
        if STATISTICS:
            apart = x.to(tl.float32) - shift[:, None]  # [L, BLOCK_K]
            if WIDTH % BLOCK_K != 0:
                apart = tl.where((cols < WIDTH)[None, :], apart, 0.0)
            total += tl.sum(apart, 1)
            squares += tl.sum(apart * apart, 1)
            if base.dtype.element_ty == tl.float32:
                x = apart
            elif FROM_REGISTERS:
                # Times one, which the compiler does not know: see `_refills`. Where the product
                # takes the rows from a buffer that the statistics read too, Triton (3.6 to 3.8,
                # sm_90) fills that buffer anew while the product still reads it.
                x = x * (stride > 0).to(x.dtype)
        else:
            x = (x * load_row(factor_ptr, cols, WIDTH)[None, :]).to(x.dtype)
        weight = load_weight(weight_ptr, inner, cols, WIDTH, BLOCK_K, UPCAST)  # [MAIN, BLOCK_K]
        main = tl.dot(x, tl.trans(weight), main, input_precision=PRECISION)  # [L, MAIN]
        if TAIL:
            weight = load_weight(weight_ptr, inner_tail, cols, WIDTH, BLOCK_K, UPCAST)
            tail = tl.dot(x, tl.trans(weight), tail, input_precision=PRECISION)  # [L, TAIL]
    centre = total / WIDTH  # [L]
    mean = shift + centre  # [L]
    variance = tl.maximum(squares / WIDTH - centre * centre, 0.0)  # [L]
    if base.dtype.element_ty == tl.float32:
        return main, tail, mean, variance, centre
    else:
        return main, tail, mean, variance, mean


@triton.jit
def normed_query(product, rest, rstd, sum_ptr, bias_ptr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """Queries [L, COLS] of normalised rows from the product of rows whose mean is `rest`."""
    inner = FIRST + tl.arange(0, COLS)
    sums = tl.load(sum_ptr + inner)  # [COLS]
    bias = tl.load(bias_ptr + inner)  # [COLS]
    return (product - rest[:, None] * sums[None, :]) * rstd[:, None] + bias[None, :]


@triton.jit
def load_keys(base, stride, shown, FIRST: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
              HEAD_PAD: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Rows FIRST .. FIRST + ROWS of the keys or values of a head, zero where hidden."""
    rows = FIRST + tl.arange(0, ROWS)[:, None]  # [G, 1]
    cols = tl.arange(0, HEAD_PAD)[None, :]  # [1, HEAD_PAD]
    keep = shown[:, None] & (cols < HEAD_DIM)
    tile = tl.load(base + (rows * stride + cols), mask=keep, other=0.0)  # [G, HEAD_PAD]
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def shown_keys(bias_ptr, KEYS_MAIN: tl.constexpr, KEYS_TAIL: tl.constexpr):
    """Which keys of a case are shown (main [KEYS_MAIN], tail [KEYS_TAIL]), and whether any is."""
    main = tl.load(bias_ptr + tl.arange(0, KEYS_MAIN)) == 0.0
    some = tl.max(main.to(tl.int32), 0)
    tail = main
    if KEYS_TAIL:
        tail = tl.load(bias_ptr + KEYS_MAIN + tl.arange(0, KEYS_TAIL)) == 0.0
        some = tl.maximum(some, tl.max(tail.to(tl.int32), 0))
    return main, tail, some > 0


@triton.jit
def softmax_weights(q, k, bias_ptr, scale, KEYS_MAIN: tl.constexpr, KEYS_TAIL: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Weights of a head before division (main [L, KEYS_MAIN], tail) and 1 / their sum [L].

    `scale` holds log2 e; the bias is 0 for a shown key and -inf for a hidden one. Without any key
    all weights are zero.
    """
    main = tl.dot(q, tl.trans(k[0]), input_precision=PRECISION) * scale  # [L, KEYS_MAIN]
    main += tl.load(bias_ptr + tl.arange(0, KEYS_MAIN))[None, :]
    top = tl.max(main, 1)  # [L]
    tail = main
    if KEYS_TAIL:
        tail = tl.dot(q, tl.trans(k[1]), input_precision=PRECISION) * scale  # [L, KEYS_TAIL]
        tail += tl.load(bias_ptr + KEYS_MAIN + tl.arange(0, KEYS_TAIL))[None, :]
        top = tl.maximum(top, tl.max(tail, 1))
    top = tl.maximum(top, -1e30)  # without any key it is -inf, and -inf - top would be NaN
    main = tl.exp2(main - top[:, None])
    total = tl.sum(main, 1)  # [L], at least 1 where there is a key
    if KEYS_TAIL:
        tail = tl.exp2(tail - top[:, None])
        total += tl.sum(tail, 1)
    return main, tail, 1.0 / tl.maximum(total, 1.0)
