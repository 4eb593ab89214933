"""What gated pooling costs: FLOPs, least bytes, and bytes that our kernels move (a model).

Bytes are those between memory and L2. A re-read is free only for the part of what is re-read that
fits half the L2: programs read their rows up and down in turn, so what was read last is met first.
"""

from __future__ import annotations

from typing import Any

from modaltune.kernels._tuning import nearest, shipped

# Rows up to this many bytes take the larger blocks (NARROW_BYTES of the kernels).
_NARROW_BYTES = 1536
# Programs of the forward kernel that a multiprocessor holds at a time; registers allow no more
# (`python -m modaltune.kernels.resources --op gated_pooling`).
_PROGRAMS_PER_SM = 1


def gated_pool_cost(
    tiles: int,
    width: int = 768,
    hidden: int = 256,
    heads: int = 1,
    *,
    itemsize: int = 2,
    cases: int = 1,
    backward: bool = False,
    needs_x: bool = True,
    l2_bytes: int = 50 * 2**20,
    multiprocessors: int = 132,
    capability: int = 90,
) -> dict[str, float]:
    """Return `flops`, `least_bytes` and `moved_bytes` of one call.

    Args:
        tiles: Rows N of all cases.
        width: D.
        hidden: K.
        heads: C.
        itemsize: Bytes per element: 2 or 4.
        cases: B.
        backward: The backward pass instead of the forward pass.
        needs_x: Whether the backward pass computes the gradient of x (frozen features: no).
        l2_bytes: L2 of the device. The defaults are an H100.
        multiprocessors: Of the device.
        capability: Of the device, such as 90; names the shipped configuration.
    """
    x = tiles * width * itemsize
    weights = 2 * hidden * width * itemsize
    pooled = cases * heads * width * itemsize
    scores = tiles * heads * 4
    gates = 4.0 * tiles * width * hidden  # FLOPs of both gates
    over_heads = 2.0 * tiles * heads * (hidden + width)
    if not backward:
        block = _config("fwd_partial", itemsize, width, capability)
        blocks = cases + tiles // block["BLOCK_L"]
        parts = blocks * heads * (width + 2) * 4
        again = -(-hidden // _block_k(block, hidden)) * x  # later passes over K, and pooling
        in_flight = min(x, multiprocessors * _PROGRAMS_PER_SM * block["BLOCK_L"] * width * itemsize)
        moved = x + again * _misses(in_flight, l2_bytes) + weights + scores + pooled
        moved += parts * (1 + _misses(parts, l2_bytes))
        return {
            "flops": gates + over_heads,
            "least_bytes": x + weights + scores + pooled,
            "moved_bytes": moved,
        }
    block = _config("bwd_gates", itemsize, 0, capability)
    splits = _config("bwd_weight", itemsize, 0, capability)["SPLITS"]
    # dv, du and x of a chunk of rows stay in L2 between the kernels; dv and du use one buffer
    # again and again, which is written back once at the end.
    row_bytes = (width + 2 * hidden) * itemsize
    chunk_rows = max(1, l2_bytes // 2 // (block["BLOCK_L"] * row_bytes)) * block["BLOCK_L"]
    buffer = min(tiles, chunk_rows) * 2 * hidden * itemsize
    sums = (cases + tiles // block["BLOCK_L"]) * (2 + heads) * hidden * 4
    partial = splits * 2 * hidden * width * 4
    chunks = -(-tiles // chunk_rows)
    again = 2 * (chunks - 1) * partial * _misses(partial, l2_bytes)
    least = x + 2 * weights + scores + 2 * pooled + (x if needs_x else 0)
    moved = least + buffer + sums * (1 + _misses(sums, l2_bytes)) + partial + again
    return {
        "flops": (3 if needs_x else 2) * gates + 3 * over_heads,
        "least_bytes": least,
        "moved_bytes": moved,
    }


def _misses(re_read: float, l2_bytes: int) -> float:
    """Return the share of a re-read that goes to memory."""
    return max(0.0, 1 - l2_bytes / 2 / re_read) if re_read else 0.0


def _config(part: str, itemsize: int, width: int, capability: int) -> dict[str, Any]:
    wide = ".wide" if width * itemsize > _NARROW_BYTES else ""
    name = f"gated_pool_{part}_kernel" + (".fp32" if itemsize == 4 else wide)
    return shipped("gated_pooling")[name][str(nearest(capability))]


def _block_k(block: dict[str, Any], hidden: int) -> int:
    """Return BLOCK_K as the launcher fits it to K."""
    size = block["BLOCK_K"]
    while hidden % size and size > 128:
        size //= 2
    return size
