"""What dilated attention costs: FLOPs, least bytes and bytes that our kernels move, modelled.

A re-read is free only while what is re-read fits half the L2 of the device. The kernels go through
as many heads at a time as fit there, so as a rule every tensor passes through DRAM once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from modaltune.kernels.dilated_attn._blocks import block_layout, residue_classes, visits
from modaltune.kernels.dilated_attn.reference import branch_shape

# DRAM is read and written in sectors of this many bytes.
_SECTOR = 32


class Cost(NamedTuple):
    """FLOPs and bytes of one call.

    Attributes:
        flops: Multiplications and additions that the result needs: two products per row and key
            forward, five backward.
        least_bytes: Every input read once, every output written once.
        moved_bytes: What our kernels move through DRAM.
        kernel_flops: What our kernels calculate: whole blocks, and three products more backward.
    """

    flops: float
    least_bytes: float
    moved_bytes: float
    kernel_flops: float


def _pairs(
    length: int, heads: int, segment_lengths: tuple[int, ...], ratios: tuple[int, ...]
) -> int:
    """Return how many (row, key) pairs all heads of a sequence have."""
    found = 0
    for segment, ratio in zip(segment_lengths, ratios, strict=True):
        w, n, _ = branch_shape(length, segment, ratio)
        per_group = math.ceil(heads / ratio)
        for head in range(heads):
            group = head // per_group
            full, tail = (len(range(group, rows, ratio)) for rows in (w, length - (n - 1) * w))
            found += (n - 1) * full**2 + tail**2
    return found


def _walked(
    length: int,
    heads: int,
    segment_lengths: tuple[int, ...],
    ratios: tuple[int, ...],
    block_m: int,
    block_n: int,
) -> int:
    """Return how many keys the blocks of rows of a sequence go through, in whole blocks."""
    modulus, rows = block_layout(heads, segment_lengths, ratios, block_m)
    classes = residue_classes(heads, segment_lengths, ratios, modulus, block_m // rows)
    found = 0
    for head, of_head in enumerate(classes):
        for residues in of_head:
            seen = [visits(head, heads, c, ratios) for c in residues if c >= 0]
            for b, (segment, ratio) in enumerate(zip(segment_lengths, ratios, strict=True)):
                if modulus > 1 and not any(visited[b] for visited in seen):
                    continue
                places = math.ceil(min(segment, length) / ratio)
                for start in range(0, length, modulus * rows):
                    last = min(start + modulus * rows, length) - 1
                    first, end = start // ratio // places, last // ratio // places + 1
                    found += (end - first) * math.ceil(places / block_n) * block_n
    return found


def dilated_attn_cost(
    lengths: Sequence[int],
    *,
    heads: int = 16,
    head_dim: int = 48,
    segment_lengths: tuple[int, ...] = (1024, 5792, 32768, 185363, 1048576),
    dilation_ratios: tuple[int, ...] = (1, 2, 4, 8, 16),
    dtype: torch.dtype = torch.bfloat16,
    l2_bytes: int = 50 * 2**20,
    backward: bool = False,
    block_m: int = 128,
    block_n: int = 64,
) -> Cost:
    """Return the modelled cost of `dilated_attention`; the default branches are the published ones.

    Args:
        lengths: Rows of each sequence.
        heads: Number of heads.
        head_dim: Columns of a head.
        segment_lengths: Rows per segment, one per branch.
        dilation_ratios: Dilation per branch.
        dtype: Of the tensors.
        l2_bytes: L2 of the device.
        backward: Cost of the backward pass instead.
        block_m: Rows of a program.
        block_n: Keys of a step.
    """
    branches = (segment_lengths, dilation_ratios)
    lengths = [length for length in lengths if length > 0]
    rows = sum(lengths)
    pairs = sum(_pairs(length, heads, *branches) for length in lengths)
    walked = sum(_walked(length, heads, *branches, block_m, block_n) for length in lengths)
    padded = math.ceil(head_dim / 16) * 16
    element = dtype.itemsize
    tensors, products, resident = (7, 5, 4) if backward else (4, 2, 2)
    tensor = rows * heads * head_dim * element
    # Rows of a head are read apart from those of its neighbours.
    sectors = math.ceil(head_dim * element / _SECTOR) * _SECTOR
    moved = tensors * rows * heads * sectors
    if resident * rows * sectors > l2_bytes / 2:
        # Not even one head stays in L2: every block reads its keys from DRAM.
        moved += (4 if backward else 2) * walked * sectors
    lse = 4 * rows * heads
    # Written by the forward pass; read by the backward one, which writes delta for itself.
    moved += lse
    if backward:
        moved += sum(4 * heads * math.ceil(n / r) for n in lengths for r in dilation_ratios)
    return Cost(
        flops=2 * products * head_dim * pairs,
        least_bytes=tensors * tensor + (lse if backward else 0),
        moved_bytes=moved,
        kernel_flops=2 * (8 if backward else 2) * padded * walked * block_m,
    )
