"""Bootstrap, DeLong and permutation: coverage, redraws, known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from modaltune.errors import InputError
from modaltune.resampling import bootstrap, delong, difference, mean_score, permutation_p


def test_interval_of_a_mean_is_normal() -> None:
    values = np.random.default_rng(0).normal(size=400)
    draws = bootstrap(lambda counts: counts @ values[:, None] / 400, 400, resamples=2000, seed=3)
    low, high = (float(end[0]) for end in draws.interval())
    half = norm.ppf(0.975) * values.std() / 20
    # 2,000 resamples place an end of the interval within about 6 % of its distance.
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert (draws.redrawn, draws.complete) == (0, True)
    again = bootstrap(lambda counts: counts @ values[:, None] / 400, 400, resamples=2000, seed=3)
    np.testing.assert_array_equal(draws.values, again.values)


def test_degenerate_draws_are_drawn_again_and_counted() -> None:
    """One positive of three: (2/3)^3 of the draws miss it, (1/3)^3 hold nothing else."""
    positive = np.array([True, False, False])

    def both_classes(counts: Any) -> Any:
        own = counts @ positive
        share = np.where((own > 0) & (own < 3), own / 3, np.nan)
        return np.stack([share, np.full(len(counts), np.nan)], axis=1)

    draws = bootstrap(both_classes, 3, resamples=900)
    assert np.isfinite(draws.values[:, 0]).all()
    assert np.isnan(draws.values[:, 1]).all()  # undefined from the start: nothing to redraw for
    lost = (8 + 1) / 27
    assert draws.redrawn == pytest.approx(900 * lost / (1 - lost), rel=0.2)
    kept = bootstrap(both_classes, 3, strata=positive, resamples=100)
    assert kept.redrawn == 0
    np.testing.assert_allclose(kept.values[:, 0], 1 / 3)


def test_what_cannot_be_resampled_ends() -> None:
    def once(counts: Any) -> Any:
        return np.where((counts == 1).all(1, keepdims=True), 1.0, np.nan)

    draws = bootstrap(once, 12, resamples=5)
    assert not draws.complete
    assert np.isnan(draws.values).all()
    assert draws.redrawn == 100
    with pytest.raises(InputError, match="must be at least 1, got 0 and 5"):
        bootstrap(once, 0, resamples=5)


def test_pairs_are_drawn_together() -> None:
    """Two scores that differ by a constant differ by it in every resample."""
    values = np.random.default_rng(1).normal(size=50)

    def of(shift: float) -> Any:
        return lambda counts: counts @ values[:, None] / 50 + shift

    draws = bootstrap(difference(of(0.3), of(0.1)), 50, resamples=50)
    np.testing.assert_allclose(draws.values, 0.2)
    assert draws.p_values()[0] == pytest.approx(2 / 51)
    seeds = bootstrap(mean_score([of(0.0), of(0.2), of(0.4)]), 50, resamples=50)
    one = bootstrap(of(0.2), 50, resamples=50)
    np.testing.assert_allclose(seeds.values, one.values)


def test_p_value_of_nothing_is_large() -> None:
    noise = np.random.default_rng(2).normal(size=200)
    noise -= noise.mean()
    draws = bootstrap(lambda counts: counts @ noise[:, None] / 200, 200, resamples=999)
    assert draws.p_values()[0] > 0.8


def _jackknife(truth: Any, gap: Any) -> float:
    """Variance of a U statistic by leaving cases out, the positives and the negatives each."""
    total = 0.0
    for group in (truth, ~truth):
        rows = np.flatnonzero(group)
        left = np.array([gap(np.delete(np.arange(len(truth)), row)) for row in rows])
        total += (len(rows) - 1) / len(rows) * ((left - left.mean()) ** 2).sum()
    return float(np.sqrt(total))


@pytest.mark.parametrize("seed", range(3))
def test_delong_equals_the_jackknife(seed: int) -> None:
    """For an AUROC both estimate the same components; they are the same number."""
    rng = np.random.default_rng(seed)
    truth = rng.random(80) < 0.3
    first = np.round(truth + rng.normal(size=80), 1)
    second = np.round(truth * 0.4 + rng.normal(size=80), 1)

    def gap(rows: Any) -> float:
        return float(
            roc_auc_score(truth[rows], first[rows]) - roc_auc_score(truth[rows], second[rows])
        )

    found = delong(truth, first, second)
    assert found.first == pytest.approx(roc_auc_score(truth, first))
    assert found.second == pytest.approx(roc_auc_score(truth, second))
    assert found.standard_error == pytest.approx(_jackknife(truth, gap), rel=1e-9)
    want = 2 * norm.sf(abs(found.first - found.second) / found.standard_error)
    assert found.p_value == pytest.approx(want)


def test_delong_edges() -> None:
    truth = np.array([0, 0, 1, 1], bool)
    score = np.array([0.1, 0.4, 0.3, 0.9])
    assert delong(truth, score, 2 * score + 1).p_value == 1
    with pytest.raises(InputError, match="at least two cases of either class, got 1 and 3"):
        delong([1, 0, 0, 0], score, score)


def test_permutation_is_exact_on_a_small_case() -> None:
    """Eight signs that all agree: two of 256 swaps are as extreme as what was seen."""
    gain = np.arange(1.0, 9)
    p = permutation_p(lambda swap: np.where(swap, -gain, gain).mean(1), 8, permutations=20000)
    assert p == pytest.approx(2 / 256, rel=0.3)
    same = permutation_p(lambda swap: np.zeros(len(swap)), 8, permutations=10)
    assert same == 1
    assert np.isnan(permutation_p(lambda swap: np.full(len(swap), np.nan), 8))
