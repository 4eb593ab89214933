"""How much of each box of a grid a mask covers."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def box_shares(
    mask: npt.NDArray[np.bool_], x0: Float64, x1: Float64, y0: Float64, y1: Float64
) -> Float64:
    """Share of each box of a grid that a mask covers, exact for boxes with fractional edges.

    A mask pixel is a unit square of constant value, so the integral image, linear between its
    corners along each axis, gives the covered area exactly. Only its lines at the boxes' edges are
    made: all of it takes four times the mask's memory.

    Args:
        mask: bool [h, w].
        x0: float64 [columns], left edges in mask px, 0..w.
        x1: float64 [columns], right edges, > x0.
        y0: float64 [rows], top edges in mask px, 0..h.
        y1: float64 [rows], bottom edges, > y0.

    Returns:
        float64 [rows, columns], 0..1.
    """
    height, width = mask.shape
    below = np.unique(_below(np.concatenate([y0, y1]), height)[0])
    lines = np.union1d(below, below + 1)
    strips = _between(_integral_lines(mask, lines), lines, y0, y1, height)  # [rows, w + 1]
    columns = np.arange(width + 1)
    areas = _between(np.ascontiguousarray(strips.T), columns, x0, x1, width).T  # [rows, columns]
    shares = areas / np.outer(y1 - y0, x1 - x0)
    return np.clip(shares, 0.0, 1.0)


def _integral_lines(mask: npt.NDArray[np.bool_], lines: Int64) -> Int32:
    """Some lines of the integral image of a mask: int32 [k, w + 1] for ascending lines 0..h."""
    pixels = np.ascontiguousarray(mask).view(np.uint8)
    integral = np.zeros((len(lines), mask.shape[1] + 1), dtype=np.int32)
    for index, (start, stop) in enumerate(pairwise([0, *lines.tolist()])):
        if stop > start:
            sums = cv2.reduce(pixels[start:stop], 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
            integral[index, 1:] = sums[0]
    np.cumsum(integral, axis=0, out=integral)
    return np.cumsum(integral, axis=1, out=integral)


def _below(edges: Float64, last: int) -> tuple[Int64, Float64]:
    """Return the whole number 0..last - 1 below each edge, and the edge's distance from it."""
    edges = np.clip(edges, 0.0, float(last))
    below = np.minimum(edges.astype(np.int64), last - 1)
    return below, edges - below


def _between(
    cumulative: Float64 | Int32, lines: Int64, low: Float64, high: Float64, last: int
) -> Float64:
    """Difference of a cumulative sum at fractional lines high and low: [len(low), m].

    Its lines 0..`last` are there as far as needed: [k, m] at `lines`, with each the next one.
    """

    def at(edges: Float64) -> Float64:
        below, weight = _below(edges, last)
        place, weight = np.searchsorted(lines, below), weight[:, None]
        return cumulative[place] * (1.0 - weight) + cumulative[place + 1] * weight

    return at(high) - at(low)
