"""Pieces that the extraction kernels share: projected rows, slices of heads, rows of queries.

Weights come packed by `extraction_fwd_weights_kernel`: `[groups * COLUMNS, D]`, a group being the
keys of its heads and then their values, HEAD_PAD columns each, zero where a head is padded.
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
def project(x_ptr, weight_ptr, rows, keep, stride_xn, width, eps,
            COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
            EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W' x of BLOCK_L rows for a group's columns, and the mean and 1 / deviation of the rows.

    Every row is read once: sums for the statistics are taken in the loop of the product, about the
    row's first value, so that the variance does not cancel.
    """
    k = tl.arange(0, BLOCK_K)  # [K]
    row_ptr = x_ptr + rows.to(tl.int64) * stride_xn  # [L]
    weight_row_ptr = weight_ptr + tl.arange(0, COLUMNS) * width  # [COLUMNS]
    shift = widen(tl.load(row_ptr, mask=keep, other=0.0), UPCAST).to(tl.float32)  # [L]
    product = tl.zeros([BLOCK_L, COLUMNS], tl.float32)
    sums = tl.zeros([BLOCK_L], tl.float32)
    squares = tl.zeros([BLOCK_L], tl.float32)
    for at in range(0, width, BLOCK_K):
        x_at = row_ptr[:, None] + (at + k)[None, :]  # [L, K]
        weight_at = weight_row_ptr[:, None] + (at + k)[None, :]  # [COLUMNS, K]
        if EVEN_K:
            x = tl.load(x_at, mask=keep[:, None], other=0.0)
            weight = tl.load(weight_at)
        else:
            inside = (at + k < width)[None, :]
            x = tl.load(x_at, mask=keep[:, None] & inside, other=0.0)
            weight = tl.load(weight_at, mask=inside & (tl.arange(0, COLUMNS) >= 0)[:, None],
                             other=0.0)  # fmt: skip
        x = widen(x, UPCAST)
        product = tl.dot(x, tl.trans(widen(weight, UPCAST)), product, input_precision=PRECISION)
        centred = x.to(tl.float32) - shift[:, None]  # [L, K]
        if not EVEN_K:
            centred = tl.where((at + k < width)[None, :], centred, 0.0)
        sums += tl.sum(centred, 1)
        squares += tl.sum(centred * centred, 1)
    mean = sums / width  # [L], about the shift
    variance = tl.maximum(squares / width - mean * mean, 0.0)
    return product, mean + shift, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def keys_and_values(x_ptr, packed_ptr, constants_ptr, rows, keep, group, stride_xn, width, eps,
                    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_L: tl.constexpr,
                    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """k and v of a group's heads [L, COLUMNS] in the type of x; mean and 1 / deviation [L]."""
    kv, mean, rstd = project(
        x_ptr, packed_ptr + group.to(tl.int64) * COLUMNS * width, rows, keep, stride_xn, width, eps,
        COLUMNS, BLOCK_L, BLOCK_K, EVEN_K, UPCAST, PRECISION,
    )  # fmt: skip
    columns = group * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    kv = (kv - mean[:, None] * tl.load(constants_ptr + columns)[None, :]) * rstd[:, None]
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
