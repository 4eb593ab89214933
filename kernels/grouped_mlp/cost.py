"""What the pathway networks cost: FLOPs, least bytes, and bytes that our kernels move (a model).

Rule for bytes: a re-read is free only for the part of what is re-read that fits half the L2. The
programs of one pathway (blocks of cases, shares of its outputs) run next to each other, so what
they read again is the weights of the pathways that are in flight, not of all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from modaltune.kernels._tuning import nearest, shipped

_PROGRAMS_PER_SM = 3  # the most that shared memory and registers allow (resources --op grouped_mlp)
_INDEX = 8  # bytes of a gene index
_SECTOR = 32  # bytes that a gathered value costs where it comes from memory


class Cost(NamedTuple):
    """Cost of one call.

    Attributes:
        flops: Of the products.
        special_ops: Exponentials.
        least_bytes: Every input read once, every output written once.
        moved_bytes: What the kernels move between memory and L2.
    """

    flops: float
    special_ops: float
    least_bytes: float
    moved_bytes: float


def _misses(re_read: float, l2_bytes: int) -> float:
    """Return the share of a re-read that goes to memory."""
    return max(0.0, 1 - l2_bytes / 2 / re_read) if re_read else 0.0


def _block(part: str, cases: int, itemsize: int, capability: int) -> dict[str, Any]:
    variant = ".fp32" if itemsize == 4 else ".many" if cases > 16 else ""
    name = f"pathway_mlp_{part}_kernel{variant}"
    return shipped("grouped_mlp")[name][str(nearest(capability))]


def pathway_mlp_cost(
    cases: int = 1,
    pathways: int = 331,
    memberships: int = 9731,
    genes: int = 4987,
    width: int = 256,
    *,
    itemsize: int = 2,
    backward: bool = False,
    needs_x: bool = False,
    l2_bytes: int = 50 * 2**20,
    multiprocessors: int = 132,
    capability: int = 90,
) -> Cost:
    """Return the cost of one call; the defaults are the published table on an H100.

    Args:
        cases: B.
        pathways: P.
        memberships: nnz, genes of all pathways.
        genes: M.
        width: d.
        itemsize: Bytes per element: 2 or 4.
        backward: The backward pass instead of the forward pass.
        needs_x: Whether the backward pass computes the gradient of expression.
        l2_bytes: L2 of the device.
        multiprocessors: Of the device.
        capability: Of the device, such as 90; names the shipped configuration.
    """
    first, second = memberships * width, pathways * width * width
    weights = (first + second + 2 * pathways * width) * itemsize
    x, tokens = cases * genes * itemsize, cases * pathways * width * itemsize
    index = memberships * _INDEX
    # Each pathway gathers its genes: what is not in L2 any more costs a sector each.
    again = max(0, cases * (memberships - genes)) * _SECTOR * _misses(x, l2_bytes)
    flops, special = 2.0 * cases * (first + second), 2.0 * cases * pathways * width
    block = _block("bwd" if backward else "fwd", cases, itemsize, capability)
    blocks = -(-cases // block["BLOCK_B"])
    least = x + index + weights + tokens
    if not backward:
        programs = blocks * block["SPLITS"]  # of one pathway
        in_flight = min(pathways, -(-multiprocessors * _PROGRAMS_PER_SM // programs))
        re_read = weights / pathways * in_flight
        shares = (first * (programs - 1) + second * (blocks - 1)) * itemsize
        return Cost(flops, special, least, least + again + shares * _misses(re_read, l2_bytes))
    least += weights + (x if needs_x else 0)
    moved = least + again
    if itemsize == 4:  # activations of a block of cases, through memory
        scratch = pathways * block["BLOCK_B"] * width * itemsize
        moved += scratch * (1 + _misses(scratch, l2_bytes))
    if blocks > 1:  # weights are read by each launch, and gradients summed in float32
        sums = weights / itemsize * 4
        moved += (blocks - 1) * (weights * _misses(weights, l2_bytes) + 2 * sums)
        if itemsize != 4:
            moved += 2 * sums
    if needs_x:
        by_member = cases * memberships * 4
        lists = memberships * 4 + genes * 4
        moved += by_member * (1 + _misses(by_member, l2_bytes)) + lists
    # Both layers again, both weights, back through layer 2; back through layer 1 for x alone.
    products = 3 * flops - (0 if needs_x else 2.0 * cases * first)
    return Cost(products, special, least, moved)
