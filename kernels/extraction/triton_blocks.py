"""Pieces that the extraction kernels share: weights, projected rows, slices of heads, queries.

Columns are those of the projection in another order: a group of PER_GROUP heads has COLUMNS of
them, the keys of its heads and then their values, HEAD_PAD each, zero where a head is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(tile, UPCAST: tl.constexpr):
    """The tile, in float32 where the interpreter could not compute in its own type."""
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def source_rows(columns, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
                PER_GROUP: tl.constexpr):  # fmt: skip
    """Row of the projection that each column is, and whether it is one rather than padding."""
    half: tl.constexpr = PER_GROUP * HEAD_PAD
    group = columns // (2 * half)
    within = columns % (2 * half)
    is_value = within // half
    head = group * PER_GROUP + within // HEAD_PAD % PER_GROUP
    d = within % HEAD_PAD
    is_real = (d < HEAD_DIM) & (head < NUM_HEADS)
    return tl.where(is_real, (is_value * NUM_HEADS + head) * HEAD_DIM + d, 0), is_real


@triton.jit
def folded(weight_ptr, norm_weight_ptr, stride_we, source, is_real, k, width,
           IS_PADDED: tl.constexpr, IS_EVEN: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """W' of some columns [COLUMNS] at some places [K] of the width, in the dtype of W."""
    weight_at = weight_ptr + source.to(tl.int64)[:, None] * stride_we + k[None, :]  # [COLUMNS, K]
    inside = k < width  # [K]
    if IS_EVEN:
        scale = tl.load(norm_weight_ptr + k)  # [K]
        if IS_PADDED:
            weight = tl.load(weight_at, mask=is_real[:, None] & (k >= 0)[None, :], other=0.0)
        else:
            weight = tl.load(weight_at)
    else:
        scale = tl.load(norm_weight_ptr + k, mask=inside, other=0.0)
        weight = tl.load(weight_at, mask=is_real[:, None] & inside[None, :], other=0.0)
    scaled = widen(weight, UPCAST).to(tl.float32) * widen(scale, UPCAST).to(tl.float32)[None, :]
    return widen(scaled.to(weight_ptr.dtype.element_ty), UPCAST)


@triton.jit
def project(x_ptr, weight_ptr, norm_weight_ptr, rows, keep, columns, stride_xn, stride_we, width,
            eps, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
            PER_GROUP: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
            EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W' x of BLOCK_L rows for a group's columns; mean, 1 / deviation, and mean as multiplied.

    Sums for the statistics are taken in the loop of the product, about the mean of a row's first
    BLOCK_K values, so that the variance does not cancel. Float32 rows are multiplied without it, so
    that a large mean costs no digits there.
    """
    COLUMNS: tl.constexpr = 2 * PER_GROUP * HEAD_PAD
    IS_PADDED: tl.constexpr = HEAD_DIM != HEAD_PAD or NUM_HEADS % PER_GROUP != 0
    k = tl.arange(0, BLOCK_K)  # [K]
    row_ptr = x_ptr + rows.to(tl.int64) * stride_xn  # [L]
    source, is_real = source_rows(columns, NUM_HEADS, HEAD_DIM, HEAD_PAD, PER_GROUP)
    x_at = row_ptr[:, None] + k[None, :]  # [L, K]
    first = tl.load(x_at, mask=keep[:, None] & (k < width)[None, :], other=0.0)
    shift = tl.sum(widen(first, UPCAST).to(tl.float32), 1) / tl.minimum(width, BLOCK_K)  # [L]
    product = tl.zeros([BLOCK_L, COLUMNS], tl.float32)
    sums = tl.zeros([BLOCK_L], tl.float32)
    squares = tl.zeros([BLOCK_L], tl.float32)
    for at in range(0, width, BLOCK_K):
        x_at = row_ptr[:, None] + (at + k)[None, :]  # [L, K]
        if EVEN_K:
            x = tl.load(x_at, mask=keep[:, None], other=0.0)
        else:
            x = tl.load(x_at, mask=keep[:, None] & (at + k < width)[None, :], other=0.0)
        x = widen(x, UPCAST)
        weight = folded(
            weight_ptr, norm_weight_ptr, stride_we, source, is_real, at + k, width, IS_PADDED,
            EVEN_K, UPCAST,
        )  # fmt: skip
        centred = x.to(tl.float32) - shift[:, None]  # [L, K]
        if not EVEN_K:
            centred = tl.where((at + k < width)[None, :], centred, 0.0)
        if x_ptr.dtype.element_ty == tl.float32:
            x = centred
        product = tl.dot(x, tl.trans(weight), product, input_precision=PRECISION)
        sums += tl.sum(centred, 1)
        squares += tl.sum(centred * centred, 1)
    mean = sums / width  # [L], about the shift
    variance = tl.maximum(squares / width - mean * mean, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)  # [L]
    if x_ptr.dtype.element_ty == tl.float32:
        return product, mean + shift, rstd, mean
    else:
        return product, mean + shift, rstd, mean + shift


@triton.jit
def keys_and_values(x_ptr, weight_ptr, norm_weight_ptr, constants_ptr, rows, keep, group, stride_xn,
                    stride_we, width, eps, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                    HEAD_PAD: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
                    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
                    UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """k and v of a group's heads [L, COLUMNS] in the type of x; mean and 1 / deviation [L]."""
    COLUMNS: tl.constexpr = 2 * PER_GROUP * HEAD_PAD
    columns = group * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    kv, mean, rstd, rest = project(
        x_ptr, weight_ptr, norm_weight_ptr, rows, keep, columns, stride_xn, stride_we, width, eps,
        NUM_HEADS, HEAD_DIM, HEAD_PAD, PER_GROUP, BLOCK_L, BLOCK_K, EVEN_K, UPCAST, PRECISION,
    )  # fmt: skip
    kv = (kv - rest[:, None] * tl.load(constants_ptr + columns)[None, :]) * rstd[:, None]
    kv += tl.load(constants_ptr + GROUPS * COLUMNS + columns)[None, :]
    if not UPCAST:
        kv = kv.to(x_ptr.dtype.element_ty)
    return kv, mean, rstd


@triton.jit
def slices(tile, ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The PARTS tiles [ROWS, WIDTH] that stand side by side in `tile`, in order."""
    if PARTS == 1:
        return (tile,)
    else:
        halves = tl.reshape(tile, [ROWS, 2, PARTS * WIDTH // 2])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))  # [ROWS, PARTS * WIDTH / 2]
        return slices(left, ROWS, PARTS // 2, WIDTH) + slices(right, ROWS, PARTS // 2, WIDTH)


@triton.jit
def head_rows(base, stride, head, num_queries, FROM: tl.constexpr, ROWS: tl.constexpr,
              NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """Rows FROM .. FROM + ROWS of one head of a [G, E] matrix; zero outside it."""
    rows = FROM + tl.arange(0, ROWS)  # [ROWS]
    d = tl.arange(0, HEAD_PAD)  # [HEAD_PAD]
    keep = (rows < num_queries)[:, None] & ((d < HEAD_DIM) & (head < NUM_HEADS))[None, :]
    at = base + rows[:, None] * stride + (head * HEAD_DIM + d)[None, :]  # [ROWS, HEAD_PAD]
    return widen(tl.load(at, mask=keep, other=0.0), UPCAST)
