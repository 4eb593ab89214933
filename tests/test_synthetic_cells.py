"""Stamps: the right size, the right way round, and nothing where they would leave the map."""

from __future__ import annotations

import numpy as np
import pytest

from modaltune.synthetic_cells import (
    blend,
    disc_stamp,
    nucleus_bank,
    paint_capillary,
    smooth_noise,
    stamp_nuclei,
)


def long_axis(stamp: np.ndarray) -> float:
    """Direction of largest spread of a stamp, rad in 0-pi, from x towards y."""
    y, x = np.mgrid[: stamp.shape[0], : stamp.shape[1]] - 16.0
    spread = np.cov(np.stack([x.ravel(), y.ravel()]), aweights=stamp.ravel())
    return float(np.arctan2(*np.linalg.eigh(spread)[1][::-1, 1]) % np.pi)


@pytest.fixture(scope="module")
def bank() -> np.ndarray:
    return nucleus_bank(np.random.default_rng(0), 9.0, 3.0, 1.5, 0.2)


def test_nuclei_turn_by_equal_angles(bank: np.ndarray) -> None:
    for k in range(bank.shape[0]):
        off = long_axis(bank[k].mean(0)) - np.pi * k / bank.shape[0]
        assert abs((off + np.pi / 2) % np.pi - np.pi / 2) < 0.1


def test_nuclei_have_the_size_and_density_asked_for(bank: np.ndarray) -> None:
    area = (bank > 0.5 * bank.max()).sum(axis=(2, 3)).mean()
    assert area == pytest.approx(np.pi * 9 * 3, rel=0.3)
    assert 1.2 < bank.max() < 1.5 * 1.7 + 1e-6
    assert bank[..., 0, :].max() < 0.05


def test_stamped_nuclei_follow_their_angle_and_push_eosin_back(bank: np.ndarray) -> None:
    haematoxylin, eosin = np.zeros((60, 90), np.float32), np.ones((60, 90), np.float32)
    rng = np.random.default_rng(1)
    stamp_nuclei(haematoxylin, eosin, bank, np.array([[50.0, 25.0, np.pi / 4]]), rng)
    patch = haematoxylin[25 - 16 : 25 + 17, 50 - 16 : 50 + 17]
    assert patch.sum() == haematoxylin.sum() > 0
    assert long_axis(patch) == pytest.approx(np.pi / 4, abs=0.15)
    assert eosin[25, 50] < 0.7
    assert eosin[5, 5] == 1


@pytest.mark.parametrize("at", [(3, 30), (30, 3), (88, 30), (30, 58), (-40, 30)])
def test_what_would_leave_the_map_is_not_painted(bank: np.ndarray, at: tuple[int, int]) -> None:
    haematoxylin, eosin = np.zeros((60, 90), np.float32), np.ones((60, 90), np.float32)
    nuclei = np.array([[*at, 0.0]])
    stamp_nuclei(haematoxylin, eosin, bank, nuclei, np.random.default_rng(0))
    blend(eosin, disc_stamp(5.0), *at, 0.3)
    assert haematoxylin.max() == 0
    assert eosin.min() == 1


def test_a_blended_disc_reaches_its_value_inside_its_radius_only() -> None:
    canvas = np.zeros((80, 80), np.float32)
    blend(canvas, disc_stamp(8.0), 40, 30, 0.5)
    assert canvas[30, 40] == pytest.approx(0.5, abs=1e-3)
    assert canvas[30, 48] == pytest.approx(0.25, abs=0.01)
    assert canvas[30, 55] < 0.01


@pytest.mark.parametrize("at", [(100.0, 100.0), (5.0, 195.0)])
def test_a_capillary_is_pale_with_red_cells(at: tuple[float, float]) -> None:
    haematoxylin, eosin = np.full((2, 200, 200), 0.5, np.float32)
    paint_capillary(eosin, haematoxylin, np.array(at), 0.7, np.random.default_rng(2))
    assert haematoxylin.min() == pytest.approx(0.03, abs=0.01)
    assert haematoxylin.max() == 0.5
    changed = np.argwhere(haematoxylin < 0.5)
    assert np.abs(changed - at[::-1]).max() < 30
    if at == (100.0, 100.0):
        assert eosin.max() > 0.9


def test_noise_is_smooth_and_of_unit_variance() -> None:
    noise = smooth_noise(np.random.default_rng(3), (200, 300), 2.0)
    assert noise.shape == (200, 300)
    assert noise.std() == pytest.approx(1, abs=1e-3)
    assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] > 0.85
