"""What an extraction costs: FLOPs, least bytes and bytes that our kernels move, modelled.

The rule for caches: a second read is free only while everything that is touched between the two
reads fits half the device's L2. It decides four things:

* The groups of a block of rows read the same rows. They are neighbours in the grid, so what lies
  between is the rows that all programs in flight work on: 8 MB on an H100, far from all of x.
* Every block reads the weights (0.6 MB).
* The partial results of the blocks are written, and read by the merge right after.
* In the backward pass keys and values are written by one kernel and read by the next, and so on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from modaltune.kernels.extraction._head_groups import head_plan, partial_bytes

# One program a multiprocessor, as registers allow, on the largest device (B200).
_IN_FLIGHT = 148


class Cost(NamedTuple):
    """FLOPs and bytes of one call.

    Attributes:
        flops: Multiplications and additions that the result needs.
        least_bytes: Every input read once, every result written once.
        moved_bytes: What our kernels move through DRAM.
    """

    flops: float
    least_bytes: float
    moved_bytes: float


class _Sizes(NamedTuple):
    """Bytes of what is read and written; see `_sizes`."""

    x: float
    weights: float
    tokens: float
    constants: float
    partial: float
    kv: float
    exact: float
    blocks: int
    groups: int
    window: float


def _sizes(
    rows: int,
    queries: int,
    width: int,
    inner: int,
    heads: int,
    cases: int,
    size: int,
    block_rows: int,
) -> _Sizes:
    plan = head_plan(inner, heads)
    columns = plan.groups * plan.columns
    blocks = -(-rows // block_rows)
    return _Sizes(
        x=rows * width * size,
        weights=(2 * inner * width + 2 * inner + 2 * width) * size,
        tokens=cases * queries * inner * size,
        constants=8.0 * columns,
        partial=blocks * partial_bytes(queries, plan, size),
        kv=rows * columns * size,
        exact=4 * cases * queries * (inner + heads),
        blocks=blocks,
        groups=plan.groups,
        window=_IN_FLIGHT / plan.groups * block_rows * width * size,
    )


def extraction_cost(
    rows: int,
    queries: int,
    *,
    width: int = 768,
    inner: int = 192,
    heads: int = 12,
    cases: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    l2_bytes: int = 50 * 2**20,
    block_rows: int = 128,
    backward: bool = False,
) -> Cost:
    """Return the modelled cost of `extract`, forward or backward with every gradient.

    Args:
        rows: L, tiles of all cases.
        queries: G.
        width: D.
        inner: E.
        heads: H.
        cases: B.
        dtype: Of all tensors.
        l2_bytes: L2 of the device.
        block_rows: Rows of a program.
        backward: Model the backward pass instead of the forward one.
    """
    b = _sizes(rows, queries, width, inner, heads, cases, dtype.itemsize, block_rows)
    half = l2_bytes / 2

    def again(amount: float, between: float) -> float:
        """Bytes of a second read with `between` bytes touched since the first."""
        return amount if between > half else 0.0

    projection, attention = 4.0 * rows * width * inner, 4.0 * rows * queries * inner
    # Groups beyond the first read x again; blocks read the weights after the sums were taken.
    reading = b.x + (b.groups - 1) * again(b.x, b.window)
    reading += b.weights + b.constants
    reading += b.blocks * again(b.weights, b.window + b.weights)
    if not backward:
        least = b.x + b.weights + 2 * b.tokens
        moved = reading + b.partial + again(b.partial, b.partial) + 2 * b.tokens + b.exact
        return Cost(projection + attention, least, moved)
    # Keys and values again; scores, their gradients, dq, dk, dv; dx; weights.
    flops = 3 * projection + 2.5 * attention
    least = 2 * b.x + 2 * b.weights + 3 * b.tokens
    queries_part = 4.0 * b.blocks * queries * inner
    statistics = 4.0 * rows * (2 + 2 * heads) + 8.0 * b.blocks * b.kv / max(rows, 1)
    moved = reading + b.kv  # projection: k and v are written,
    moved += again(b.kv, b.x + b.kv) + b.kv + queries_part + statistics  # read, w written over,
    moved += again(queries_part, queries_part)
    moved += again(b.kv, b.kv) + again(b.x, b.x + b.kv) + again(statistics, b.kv) + b.x  # dx,
    moved += again(b.kv, b.x + b.kv) + again(b.x, b.x + b.kv) + b.weights  # and the weights
    return Cost(flops, least, moved + 3 * b.tokens + b.exact)
