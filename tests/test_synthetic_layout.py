"""Where cells lie: no overlaps, nothing outside of what is allowed, rings around lumina."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from modaltune.synthetic_layout import (
    gland_contour,
    keep_allowed,
    ring_nuclei,
    scatter,
    scatter_discs,
    trace_files,
)


@pytest.fixture
def allowed() -> np.ndarray:
    mask = np.zeros((600, 700), bool)
    mask[100:500, 50:650] = True
    return mask


def test_scatter_stays_on_allowed_pixels_and_fills_them(allowed: np.ndarray) -> None:
    points = scatter(allowed, 4000, np.random.default_rng(0))
    assert points.shape == (4000, 2)
    assert points[:, 0].min() < 60
    assert points[:, 0].max() > 640
    assert ((points >= [50, 100]) & (points < [650, 500])).all()


def test_keep_allowed_drops_points_outside_of_mask_and_canvas(allowed: np.ndarray) -> None:
    points = np.array([[60.0, 120.0], [10.0, 120.0], [-5.0, 120.0], [60.0, 9999.0]])
    np.testing.assert_array_equal(keep_allowed(points, allowed), points[:1])


def test_discs_do_not_touch(allowed: np.ndarray) -> None:
    discs = scatter_discs(allowed, np.random.default_rng(1))
    assert len(discs) > 15
    upper = np.triu_indices(len(discs), 1)
    room = (discs[:, 2][:, None] + discs[:, 2][None, :])[upper]
    assert (pdist(discs[:, :2]) > room + 5).all()


def test_ring_lies_in_the_wall_and_points_at_the_lumen() -> None:
    rng = np.random.default_rng(2)
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    nuclei = ring_nuclei(np.array([200.0, 300.0]), circle, 50.0, 24.0, rng)
    away = nuclei[:, :2] - [200, 300]
    distance = np.hypot(*away.T)
    assert len(nuclei) >= 2 * np.pi * 39.5 / 12.3 - 1
    assert distance.min() > 50 - 26
    assert distance.max() < 50
    off = (nuclei[:, 2] - np.arctan2(away[:, 1], away[:, 0]) + np.pi / 2) % np.pi - np.pi / 2
    assert np.abs(off).max() < 0.9


def test_contours_are_closed_shapes_of_about_unit_size() -> None:
    rng = np.random.default_rng(3)
    radii = np.array([np.hypot(*gland_contour(rng).T) for _ in range(200)])
    assert 0.75 < radii.mean() < 1.05
    assert radii.min() > 0.1


def test_files_run_along_the_fibres_and_cells_keep_apart(allowed: np.ndarray) -> None:
    nuclei = trace_files(allowed, lambda x, y: 0.0, np.random.default_rng(4))
    assert len(nuclei) > 150
    assert ((nuclei[:, :2] > [40, 90]) & (nuclei[:, :2] < [660, 510])).all()
    offset = nuclei[:, None, :2] - nuclei[None, :, :2]
    distance = np.hypot(offset[..., 0], offset[..., 1])
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    step = offset[np.arange(len(nuclei)), nearest]
    # Along fibres that run in x, the next cell lies to the side far more often than above.
    assert (np.abs(step[:, 0]) > np.abs(step[:, 1])).mean() > 0.65
    assert np.median(distance.min(axis=1)) > 10


@pytest.mark.parametrize("shape", [(0, 0), (50, 50)])
def test_nothing_allowed_gives_nothing(shape: tuple[int, int]) -> None:
    nowhere, rng = np.zeros(shape, bool), np.random.default_rng(0)
    assert scatter(nowhere, 5, rng).shape == (0, 2)
    assert scatter_discs(nowhere, rng).shape == (0, 3)
    assert trace_files(nowhere, lambda x, y: 0.0, rng).shape == (0, 3)
