"""Pieces that the dilated attention kernels share: blocks of rows, lattices of branches, tiles.

Branch (w, r) of a head of group g visits the lattice g, g + r, g + 2r, ... of a sequence. In places
of that lattice it is plain attention inside consecutive segments of ceil(min(w, T) / r) places: a
row at position p stands at place p // r, and its keys are the places low .. high of its segment.

A block of rows is BLOCK_M / ROWS residues modulo `modulus` (a multiple of all dilations), ROWS
consecutive rows of each, of one head: the branches that visit a block are few and known beforehand.

Rows of a head are a pair (main, tail): MAIN columns, a power of two, and TAIL more (0 or a power of
two), which together reach the next multiple of 16 above the head width: 48 = 32 + 16. Without a
tail the second element repeats the first and is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Log-sum-exp, to base 2, of a branch that does not visit a row, as published: -1e8 log2(e).
NO_ATTENTION = tl.constexpr(-1e8 * 1.4426950408889634)
# Below every score, but finite: the difference of two of them is zero, not NaN.
LOWEST = tl.constexpr(-1e30)
# Past every place, with room for a block more.
NOWHERE = tl.constexpr(2**30)


@triton.jit
def program_block(classes, num_units, first_head, num_heads, heads_together):
    """Head, class of residues and unit of this program.

    `heads_together` heads go through all their blocks before the next ones start, so that their
    rows stay in L2; among them the classes that most branches visit come first.
    """
    pid = tl.program_id(0)
    per_head = classes * num_units
    bunch = pid // (heads_together * per_head)
    here = tl.minimum(heads_together, num_heads - bunch * heads_together)
    pid -= bunch * heads_together * per_head
    of_class = here * num_units
    within = pid % of_class
    head = first_head + bunch * heads_together + within // num_units
    return head, pid // of_class, within % num_units


@triton.jit
def block_rows(units_ptr, residues_ptr, modulus, classes, head, kind, unit,
               BLOCK_M: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Positions in their sequence [M], which of them exist [M]; begin and length of the sequence.

    units [n, 3]: first row of a unit of ROWS * modulus rows, first row and end of its sequence.
    residues [heads, classes, BLOCK_M / ROWS]: -1 where a class has fewer.
    """
    unit_ptr = units_ptr + 3 * unit
    first = tl.load(unit_ptr)
    begin = tl.load(unit_ptr + 1)
    length = tl.load(unit_ptr + 2) - begin
    i = tl.arange(0, BLOCK_M)  # [M]
    of_class = (head * classes + kind) * (BLOCK_M // ROWS)
    residue = tl.load(residues_ptr + of_class + i // ROWS)  # [M]
    position = first - begin + modulus * (i % ROWS) + residue  # [M]
    exists = (residue >= 0) & (position < length)  # [M]
    return position, exists, begin, length


@triton.jit
def branch(branches_ptr, index, head, num_heads, length):
    """Dilation, group of the head, places of a segment, places of the whole lattice."""
    segment = tl.load(branches_ptr + 2 * index)
    ratio = tl.load(branches_ptr + 2 * index + 1)
    group = head // tl.cdiv(num_heads, ratio)
    segment_places = tl.cdiv(tl.minimum(segment, length), ratio)
    places = tl.cdiv(tl.maximum(length - group, 0), ratio)
    return ratio, group, segment_places, places


@triton.jit
def row_segments(position, exists, ratio, group, segment_places, places):
    """Segment of the branch that each row is in [M], -1 where it visits none; zero keys added [M].

    Then the first and one past the last segment of the block.
    """
    visited = exists & (position % ratio == group)
    segment = position // ratio // segment_places
    first = tl.min(tl.where(visited, segment, NOWHERE), 0)
    pads = tl.where(visited, tl.maximum((segment + 1) * segment_places - places, 0), 0)
    segment = tl.where(visited, segment, -1)
    return segment, pads, first, tl.max(segment, 0) + 1


@triton.jit
def load_part(rows_ptr, keep, FROM: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """Columns FROM .. FROM + WIDTH of rows at rows_ptr [R]; zero where not `keep` [R]."""
    columns = FROM + tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    mask = keep[:, None]  # [R, 1]
    if FROM + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)
    tile = tl.load(rows_ptr[:, None] + columns, mask=mask, other=0.0)  # [R, WIDTH]
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_rows(rows_ptr, keep, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """Rows of a head as (main [R, MAIN], tail [R, TAIL]); zero where not `keep`, and past it."""
    main = load_part(rows_ptr, keep, 0, MAIN, HEAD_DIM, UPCAST)
    tail = main
    if TAIL:
        tail = load_part(rows_ptr, keep, MAIN, TAIL, HEAD_DIM, UPCAST)
    return main, tail


@triton.jit
def zero_rows(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Float32 accumulators of rows of a head."""
    main = tl.zeros([ROWS, MAIN], tl.float32)
    tail = main
    if TAIL:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return main, tail


@triton.jit
def store_part(rows_ptr, keep, tile, FROM: tl.constexpr, WIDTH: tl.constexpr,
               HEAD_DIM: tl.constexpr):  # fmt: skip
    """Store columns FROM .. FROM + WIDTH of the rows to `keep` [R]."""
    columns = FROM + tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    mask = keep[:, None] & (columns < HEAD_DIM)
    tl.store(rows_ptr[:, None] + columns, tile.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(rows_ptr, keep, tiles, factor, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr,
               TAIL: tl.constexpr):  # fmt: skip
    """Store `factor` (a scalar or [R, 1]) times the accumulators of rows of a head."""
    store_part(rows_ptr, keep, tiles[0] * factor, 0, MAIN, HEAD_DIM)
    if TAIL:
        store_part(rows_ptr, keep, tiles[1] * factor, MAIN, TAIL, HEAD_DIM)


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
def add_rows(acc, factor, rows, TAIL: tl.constexpr):
    """The accumulators acc [M, D] plus factor [M] times rows [M, D], row by row."""
    main = acc[0] + factor[:, None] * rows[0].to(tl.float32)
    tail = acc[1]
    if TAIL:
        tail += factor[:, None] * rows[1].to(tl.float32)
    return main, tail
