"""What tile normalisation costs: FLOPs, least bytes and bytes that our kernels move, modelled."""

from __future__ import annotations

from typing import NamedTuple

import torch

from modaltune.kernels.tile_norm._resampling import Axis, axis_weights, block_spans
from modaltune.kernels.tile_norm.reference import crop_origin, resized_size

# DRAM is read in sectors of this many bytes, so the cut edges of a row cost up to two more.
_SECTOR = 32


class Cost(NamedTuple):
    """FLOPs and bytes of one call.

    Attributes:
        flops: Multiplications and additions that the result needs.
        least_bytes: Every pixel that the result depends on read once, the result written once.
        moved_bytes: What our kernels move through DRAM.
    """

    flops: float
    least_bytes: float
    moved_bytes: float


def _sectors(first: int, last: int) -> int:
    """Return the bytes of the sectors that bytes `first .. last` of an aligned row touch."""
    return (last // _SECTOR - first // _SECTOR + 1) * _SECTOR


def tile_norm_cost(
    n: int,
    height: int,
    width: int,
    *,
    resize_px: int | None = None,
    crop_px: int | None = None,
    interpolation: str = "bicubic",
    dtype: torch.dtype = torch.float16,
    l2_bytes: int = 50 * 2**20,
    block_rows: int = 16,
) -> Cost:
    """Return the modelled cost of `normalize_tiles`; the layout of the result changes nothing.

    Blocks of output rows of one tile read some input rows twice. They run side by side, so the
    second read comes from L2, unless a tile is larger than half of it.

    Args:
        n: Number of tiles.
        height: Height of a tile in px.
        width: Width of a tile in px.
        resize_px: Shorter edge after the resize in px, or None.
        crop_px: Side of the centre crop in px, or None.
        interpolation: `bilinear` or `bicubic`.
        dtype: Of the result.
        l2_bytes: L2 of the device.
        block_rows: Output rows of a program of the resize.
    """
    rows, columns = resized_size(height, width, resize_px)
    side = crop_px if crop_px is not None else rows
    top, left = crop_origin((rows, columns), side)
    first_y, weight_y = axis_weights(Axis(height, rows, top, side), interpolation)
    first_x, weight_x = axis_weights(Axis(width, columns, left, side), interpolation)
    taps_y, taps_x = weight_y.shape[1], weight_x.shape[1]
    used_rows = int(first_y.max()) + taps_y - int(first_y.min())
    used_columns = int(first_x.max()) + taps_x - int(first_x.min())
    outputs = 3 * side * side
    written = outputs * dtype.itemsize
    flops = 2 * outputs
    read_rows = used_rows
    if (rows, columns) != (height, width):
        flops += 2 * taps_y * outputs + 2 * taps_x * 3 * side * used_rows
        if 3 * height * width > l2_bytes / 2:
            starts, span = block_spans(Axis(height, rows, top, side), interpolation, block_rows)
            read_rows = len(starts) * span
    first = 3 * int(first_x.min())
    line = _sectors(first, first + 3 * used_columns - 1)
    least = 3 * used_rows * used_columns + written
    return Cost(n * flops, n * least, n * (read_rows * line + written))
