"""Shares of boxes: their area, pixel by pixel, and the bits that the whole integral image gives."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modaltune.engine.mask_shares import box_shares

Float64 = npt.NDArray[np.float64]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), height=st.integers(1, 17), width=st.integers(1, 17))
def test_shares_equal_area_brute_force(seed: int, height: int, width: int) -> None:
    """Sum over mask pixels of the overlap area with the box, exact, pixel by pixel."""
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < 0.5
    x = np.sort(rng.uniform(0, width, (5, 2)), axis=1)
    y = np.sort(rng.uniform(0, height, (4, 2)), axis=1)
    x[0], y[0] = (0, width), (0, height)
    shares = box_shares(mask, x[:, 0], x[:, 1], y[:, 0], y[:, 1])
    for i, (top, bottom) in enumerate(y):
        for j, (left, right) in enumerate(x):
            area = sum(
                max(0.0, min(right, c + 1) - max(left, c))
                * max(0.0, min(bottom, r + 1) - max(top, r))
                for r, c in zip(*np.nonzero(mask), strict=True)
            )
            expected = area / ((right - left) * (bottom - top))
            assert shares[i, j] == pytest.approx(expected, abs=1e-9)


def from_whole_integral(
    mask: npt.NDArray[np.bool_], x0: Float64, x1: Float64, y0: Float64, y1: Float64
) -> Float64:
    """The same from all lines of the integral image."""

    def between(cumulative: npt.NDArray[Any], low: Float64, high: Float64) -> npt.NDArray[Any]:
        last = len(cumulative) - 1
        below = [np.minimum(edge.astype(np.int64), last - 1) for edge in (low, high)]
        at = [
            cumulative[b] * (1.0 - (edge - b)[:, None]) + cumulative[b + 1] * (edge - b)[:, None]
            for b, edge in zip(below, (low, high), strict=True)
        ]
        return at[1] - at[0]

    strips = between(np.asarray(cv2.integral(mask.view(np.uint8))), y0, y1)
    areas = between(np.ascontiguousarray(strips.T), x0, x1).T
    return np.clip(areas / np.outer(y1 - y0, x1 - x0), 0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    is_whole=st.booleans(),
)
def test_bits_are_those_of_the_whole_integral_image(
    seed: int, height: int, width: int, is_whole: bool
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.random()
    edges = []
    for side in (width, height):
        low = rng.uniform(0, side, 30)
        low = np.floor(low) if is_whole else low
        edges += [low, np.minimum(low + rng.uniform(0.001, side, 30), side)]
    np.testing.assert_array_equal(box_shares(mask, *edges), from_whole_integral(mask, *edges))
