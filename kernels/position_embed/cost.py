"""What positions cost: least bytes and bytes that our kernel moves (a model)."""

from __future__ import annotations

from typing import NamedTuple

from modaltune.kernels._tuning import nearest, shipped

_CELL = 16  # bytes of two int64 coordinates
_LISTED = 16  # bytes of a block's entry in the work list
_OPERATIONS = 16  # additions and multiplications per value: its half of sine and cosine, and x


class Cost(NamedTuple):
    """Cost of one call.

    Attributes:
        flops: Additions and multiplications, none of them on tensor cores.
        least_bytes: Every input read once, every output written once.
        moved_bytes: What the kernel moves between memory and L2.
    """

    flops: float
    least_bytes: float
    moved_bytes: float


def embed_positions_cost(
    rows: int,
    width: int = 768,
    cases: int = 1,
    *,
    itemsize: int = 2,
    l2_bytes: int = 50 * 2**20,
    capability: int = 90,
) -> Cost:
    """Return the cost of one call.

    Blocks of columns run one after another over all rows and read the cells again: free as far as
    they fit half the L2.

    Args:
        rows: Tiles N of all cases.
        width: D.
        cases: B.
        itemsize: Bytes per element: 2 or 4.
        l2_bytes: L2 of the device.
        capability: Of the device, such as 90; names the shipped configuration.
    """
    name = "position_embed_fwd_kernel" + (".fp32" if itemsize == 4 else "")
    block = shipped("position_embed")[name][str(nearest(capability))]
    cells, cls = rows * _CELL, width * itemsize
    least = (2 * rows + cases) * width * itemsize + cells + cls
    passes = -(-width // (4 * block["BLOCK_Q"]))
    listed = (cases + (rows + cases) // block["BLOCK_L"]) * _LISTED
    again = (passes - 1) * (cells + listed)
    misses = max(0.0, 1 - l2_bytes / 2 / (cells + listed)) if rows else 0.0
    frequencies = width // 4 * 8
    moved = least + listed + frequencies + again * misses
    return Cost(float(_OPERATIONS * rows * width), least, moved)
