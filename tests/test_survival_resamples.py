"""Counts of drawn cases give the numbers that the plain metrics give for the drawn rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modaltune.evaluate import harrell_c_index
from modaltune.survival_metrics import (
    SurvivalReference,
    dynamic_auc,
    integrated_brier_score,
    uno_c_index,
)
from modaltune.survival_resamples import survival_resamples, swapped_c_index_gaps

MONTHS = np.array([3.0, 7, 12, 20])


def _cohort(rng: np.random.Generator, n: int, *, deaths: float, grid: int) -> tuple[Any, Any, Any]:
    """Months, events and risks on a grid: the coarser, the more ties."""
    time = np.ceil(rng.exponential(15, n) * grid) / grid
    risk = np.round(rng.normal(size=n) * grid) / grid
    return time, (rng.random(n) < deaths).astype(float), risk


def _plain(
    time: Any, died: Any, risk: Any, reference: SurvivalReference, curves: Any
) -> list[float]:
    areas, mean = dynamic_auc(time, died, risk, reference, reference.auc_times)
    return [
        harrell_c_index(time, died, risk),
        uno_c_index(time, died, risk, reference),
        *areas,
        mean,
        integrated_brier_score(time, died, curves, reference, MONTHS),
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    deaths=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    grid=st.sampled_from([1, 4, 1000]),
)
def test_counts_equal_drawn_rows(seed: int, n: int, deaths: float, grid: int) -> None:
    rng = np.random.default_rng(seed)
    train = _cohort(rng, 40, deaths=0.4, grid=grid)
    train[1][0] = 1
    reference = SurvivalReference.fit(train[0], train[1])
    time, died, risk = _cohort(rng, n, deaths=deaths, grid=grid)
    curves = np.exp(-np.outer(np.exp(risk), MONTHS / 20))
    score = survival_resamples(time, died, risk, reference, curves, MONTHS)
    drawn = [np.arange(n), *(rng.integers(0, n, n) for _ in range(3)), rng.integers(0, n, 2)]
    counts = np.stack([np.bincount(rows, minlength=n).astype(float) for rows in drawn])
    want = [_plain(time[rows], died[rows], risk[rows], reference, curves[rows]) for rows in drawn]
    np.testing.assert_allclose(score(counts), want, rtol=0, atol=1e-10)
    alone = survival_resamples(time, died, risk, None)(counts)
    np.testing.assert_array_equal(alone, np.array(want)[:, :1])


def test_copies_of_a_case_are_no_pair() -> None:
    """Of three draws of one death and one of a survivor, three pairs can be compared."""
    reference = SurvivalReference.fit([1.0, 2, 3, 4, 5, 6], [1, 1, 1, 0, 0, 0])
    score = survival_resamples(
        np.array([1.0, 4, 1]), np.array([1.0, 0, 0]), np.array([0.0, 1, 0]), reference
    )
    found = score(np.array([[3.0, 1, 0], [3, 0, 0], [0, 2, 2], [3, 1, 2]]))
    # The case that was censored when the first one died outlived it, with an equal risk.
    np.testing.assert_allclose(found[:, 0], [0.0, np.nan, np.nan, (3 * 2 / 2) / (3 * 1 + 3 * 2)])


@pytest.mark.parametrize("grid", [1, 1000])
def test_swapped_gaps_equal_swapped_risks(grid: int) -> None:
    rng = np.random.default_rng(grid)
    time, died, first = _cohort(rng, 40, deaths=0.4, grid=grid)
    second = np.round(first + rng.normal(size=40), 1)
    swaps = rng.random((20, 40)) < 0.5
    swaps[0] = False
    want = [
        harrell_c_index(time, died, np.where(swap, second, first))
        - harrell_c_index(time, died, np.where(swap, first, second))
        for swap in swaps
    ]
    got = swapped_c_index_gaps(time, died, first, second)(swaps)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    nobody = swapped_c_index_gaps(time, np.zeros(40), first, second)(swaps)
    assert np.isnan(nobody).all()
