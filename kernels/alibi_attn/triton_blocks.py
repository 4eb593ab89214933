"""Pieces that the ALiBi attention kernels share: rows of a head, distances, the work list.

Rows of a head are a pair (main, tail): MAIN columns, a power of two, and TAIL more (0 or a power of
two), which together reach the next multiple of 16 above the head width: 48 = 32 + 16. Without a
tail the second element repeats the first and is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_part(base, stride, valid, ROWS: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
              HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Columns FROM .. FROM + WIDTH of ROWS rows; zero past row `valid` and past HEAD_DIM."""
    rows = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = FROM + tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    pointers = base + rows * stride + cols  # [ROWS, WIDTH]
    if MASKED:
        tile = tl.load(pointers, mask=(rows < valid) & (cols < HEAD_DIM), other=0.0)
    elif FROM + WIDTH > HEAD_DIM:
        tile = tl.load(pointers, mask=(rows >= 0) & (cols < HEAD_DIM), other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_rows(base, stride, valid, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
              MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """ROWS rows of a head from `base` on, as (main [ROWS, MAIN], tail [ROWS, TAIL])."""
    main = load_part(base, stride, valid, ROWS, 0, MAIN, HEAD_DIM, MASKED, UPCAST)
    tail = main
    if TAIL:
        tail = load_part(base, stride, valid, ROWS, MAIN, TAIL, HEAD_DIM, MASKED, UPCAST)
    return main, tail


@triton.jit
def zero_rows(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Float32 accumulators of ROWS rows of a head."""
    main = tl.zeros([ROWS, MAIN], tl.float32)
    tail = main
    if TAIL:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return main, tail


@triton.jit
def store_part(base, stride, valid, tile, ROWS: tl.constexpr, FROM: tl.constexpr,
               WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """Store columns FROM .. FROM + WIDTH of the rows before `valid`."""
    rows = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    cols = FROM + tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    keep = (rows < valid) & (cols < HEAD_DIM)
    tl.store(base + rows * stride + cols, tile.to(base.dtype.element_ty), mask=keep)


@triton.jit
def store_rows(base, stride, valid, tiles, factor, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
               MAIN: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Store `factor` (a scalar or [ROWS, 1]) times the accumulators of rows of a head."""
    store_part(base, stride, valid, tiles[0] * factor, ROWS, 0, MAIN, HEAD_DIM)
    if TAIL:
        store_part(base, stride, valid, tiles[1] * factor, ROWS, MAIN, TAIL, HEAD_DIM)


@triton.jit
def load_vector(base, valid, other, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """ROWS numbers [ROWS] from `base` on; `other` past `valid`."""
    rows = tl.arange(0, ROWS)
    if MASKED:
        return tl.load(base + rows, mask=rows < valid, other=other)
    else:
        return tl.load(base + rows)


@triton.jit
def distances(point, base, num_rows, valid, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Distances [M, ROWS] in cells from points (x [M], y [M]) to ROWS rows from `base` on."""
    dx = point[0][:, None] - load_vector(base, valid, 0.0, ROWS, MASKED)[None, :]  # [M, ROWS]
    dy = point[1][:, None] - load_vector(base + num_rows, valid, 0.0, ROWS, MASKED)[None, :]
    return tl.sqrt(dx * dx + dy * dy)


@triton.jit
def scores(a, b, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Products a b^T [M, N] of rows of a head."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)  # [M, N]
    if TAIL:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)
    return total


@triton.jit
def add_product(acc, weights, rows, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """The accumulators acc [M, D] plus weights [M, N] times rows [N, D] of a head."""
    weights = weights.to(rows[0].dtype)
    main = tl.dot(weights, rows[0], acc[0], input_precision=PRECISION)  # [M, MAIN]
    tail = acc[1]
    if TAIL:
        tail = tl.dot(weights, rows[1], tail, input_precision=PRECISION)  # [M, TAIL]
    return main, tail


@triton.jit
def work_item(work_ptr):
    """This program's first row, and the first and one past the last row of its sequence."""
    item_ptr = work_ptr + 3 * tl.program_id(0)
    return tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)


@triton.jit
def sections(begin, end, num_prefix, BLOCK: tl.constexpr):
    """First tile row, end of the full blocks of tile rows, number of masked blocks beside them."""
    tiles = tl.minimum(begin + num_prefix, end)
    full_end = tiles + (end - tiles) // BLOCK * BLOCK
    return tiles, full_end, tl.cdiv(tiles - begin, BLOCK) + tl.cdiv(end - full_end, BLOCK)


@triton.jit
def masked_block(step, begin, tiles, full_end, end, BLOCK: tl.constexpr):
    """First row, rows left and factor of distances of masked block `step`.

    The blocks of prefix rows come first, and then the ragged end. Prefix rows have no position:
    the factor is 0 for them and 1 for tile rows.
    """
    is_prefix = step < tl.cdiv(tiles - begin, BLOCK)
    first = tl.where(is_prefix, begin + step * BLOCK, full_end)
    left = tl.where(is_prefix, tiles, end) - first
    return first, left, tl.where(is_prefix, 0.0, 1.0)
