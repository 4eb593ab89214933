"""Tables of the antialiased resize: which pixels each kept output takes, and with what weight.

Output i of an axis that goes from `size` to `resized` px stands at c = (i + 1/2) s with
s = size / resized, and takes pixel j with a weight proportional to f((j + 1/2 - c) / max(s, 1)),
where f is the triangle (bilinear) or Keys' cubic with a = -1/2 (bicubic). The weights of an output
sum to one; pixels outside the tile take no part. Worked out in float64, rounded once to float32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Half the width of the filter, in output pixels where the axis shrinks.
_REACH = {"bilinear": 1.0, "bicubic": 2.0}


class Axis(NamedTuple):
    """One axis of a resize with a crop after it.

    Attributes:
        size: Length of the input in px.
        resized: Length after the resize in px.
        first: First output kept by the crop.
        kept: Number of outputs kept.
    """

    size: int
    resized: int
    first: int
    kept: int


def _filter(x: NDArray[np.float64], interpolation: str) -> NDArray[np.float64]:
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@cache
def axis_weights(axis: Axis, interpolation: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first pixel `[kept]` and the weights `[kept, taps]` of every kept output.

    All outputs have the same number of taps, and all taps lie inside the tile.

    Args:
        axis: Lengths and crop of the axis.
        interpolation: `bilinear` or `bicubic`.
    """
    if axis.size == axis.resized:
        return np.arange(axis.first, axis.first + axis.kept), np.ones((axis.kept, 1))
    scale = axis.size / axis.resized
    spread = max(scale, 1.0)
    centre = (axis.first + np.arange(axis.kept) + 0.5) * scale
    reach = _REACH[interpolation] * spread
    start = np.maximum(np.floor(centre - reach + 0.5), 0).astype(np.int64)
    end = np.minimum(np.floor(centre + reach + 0.5), axis.size).astype(np.int64)
    taps = int((end - start).max())
    first = np.minimum(start, axis.size - taps)
    pixel = first[:, None] + np.arange(taps)
    weight = _filter((pixel + 0.5 - centre[:, None]) / spread, interpolation)
    return first, weight / weight.sum(1, keepdims=True)


def dense_weights(axis: Axis, interpolation: str) -> Tensor:
    """Return the resize of one axis as a matrix `[kept, size]` float32; a crop alone is ones."""
    first, weight = axis_weights(axis, interpolation)
    kept, taps = weight.shape
    table = np.zeros((kept, axis.size), np.float32)
    table[np.arange(kept)[:, None], first[:, None] + np.arange(taps)] = weight
    return torch.from_numpy(table)


def block_spans(axis: Axis, interpolation: str, block: int) -> tuple[NDArray[np.int64], int]:
    """Return the first pixel that each block of kept outputs needs, and how many every block takes.

    Args:
        axis: Lengths and crop of the axis.
        interpolation: `bilinear` or `bicubic`.
        block: Outputs per block.
    """
    first, weight = axis_weights(axis, interpolation)
    kept, taps = weight.shape
    starts = first[::block]
    ends = first[np.minimum(np.arange(block - 1, kept + block - 1, block), kept - 1)] + taps
    span = int((ends - starts).max())
    return np.minimum(starts, axis.size - span), span


@cache
def column_tables(axis: Axis, interpolation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables of the pass along the rows, on a device.

    Returns:
        `first [kept]` int32, the first pixel of each output column, and `weight [taps, kept]`
        float32, tap by tap so that neighbouring columns lie side by side.
    """
    first, weight = axis_weights(axis, interpolation)
    return (
        torch.from_numpy(first.astype(np.int32)).to(device),
        torch.from_numpy(np.ascontiguousarray(weight.T, np.float32)).to(device),
    )


@cache
def row_tables(
    axis: Axis, interpolation: str, block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the tables of the pass along the columns, for blocks of output rows, on a device.

    Args:
        axis: Lengths and crop of the axis.
        interpolation: `bilinear` or `bicubic`.
        block: Output rows per block.
        device: Where the tables go.

    Returns:
        `first [blocks]` int32, the first input row that a block needs, and
        `weight [blocks, span, block]` float32, what each of the following `span` input rows adds
        to each output row; the last block's rows past the end weigh zero.
    """
    first, weight = axis_weights(axis, interpolation)
    kept, taps = weight.shape
    starts, span = block_spans(axis, interpolation, block)
    table = np.zeros((len(starts), span, block), np.float32)
    row = np.arange(kept)[:, None]
    table[row // block, first[:, None] + np.arange(taps) - starts[row // block], row % block] = (
        weight
    )
    return (
        torch.from_numpy(starts.astype(np.int32)).to(device),
        torch.from_numpy(table).to(device),
    )
