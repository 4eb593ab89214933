"""Resampling of patients: bootstrap intervals, paired tests, spread over seeds.

A score maps how often each patient was drawn to a few numbers, for many resamples at once, so that
all metrics of a run, or the differences between two runs, are resampled on the same patients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from modaltune.errors import InputError
from modaltune.probes import Floats, Ints, check_rows

#: How often each of n patients was drawn, `[R, n]` -> scores `[R, k]`, NaN where undefined.
Score = Callable[[Floats], Floats]

_DRAWS_PER_RESAMPLE = 20  # then a score counts as not resamplable
_AT_ONCE = 250  # resamples, so that 10,000 patients take some tens of MiB


@dataclass(frozen=True)
class Resamples:
    """Scores of bootstrap resamples.

    Attributes:
        values: `[resamples, k]`; a column is NaN where the score is undefined on all cases.
        redrawn: Resamples drawn again because a score that all cases define was undefined in them,
            such as an AUROC of one class.
        complete: False when too many had to be drawn again; `values` are all NaN then.
    """

    values: Floats
    redrawn: int
    complete: bool

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Return the percentile interval, low `[k]` and high `[k]`."""
        tail = (1 - level) / 2
        low, high = np.quantile(self.values, [tail, 1 - tail], axis=0)
        return low, high

    def p_values(self) -> Floats:
        """Return `[k]` two-sided p values of "the score is 0": twice the smaller tail.

        The observed sample counts as one more resample, so that no p value is 0.
        """
        count = len(self.values) + 1
        below = (1 + (self.values <= 0).sum(0)) / count
        above = (1 + (self.values >= 0).sum(0)) / count
        p: Floats = np.minimum(2 * np.minimum(below, above), 1.0)
        p[np.isnan(self.values).any(0)] = np.nan
        return p


def bootstrap(
    score: Score,
    num_cases: int,
    *,
    strata: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Resamples:
    """Draw patients with replacement and score every draw.

    Args:
        score: Of counts. What is defined for all cases must be so in every resample: draws that
            miss a class or a death are drawn again, and counted.
        num_cases: Patients n, a row each.
        strata: `[n]` classes; patients are drawn within each, so that every resample has as many
            of each class as the data. Default: none.
        resamples: At least 1.
        seed: The same seed draws the same patients for any score.

    Raises:
        InputError: No patient, or an option is out of range.
    """
    if num_cases < 1 or resamples < 1:
        raise InputError(
            f"num_cases and resamples must be at least 1, got {num_cases} and {resamples}; score "
            "a split that has cases"
        )
    groups = _groups(num_cases, strata)
    needed = ~np.isnan(score(np.ones((1, num_cases)))[0])
    rng = np.random.default_rng(seed)
    values = np.full((resamples, len(needed)), np.nan)
    kept = redrawn = 0
    most = _DRAWS_PER_RESAMPLE * resamples
    while kept < resamples and redrawn < most:
        counts = _drawn_counts(rng, groups, num_cases, min(resamples - kept, _AT_ONCE))
        found = score(counts)
        found = found[~np.isnan(found[:, needed]).any(1)]
        redrawn += len(counts) - len(found)
        values[kept : kept + len(found), needed] = found[:, needed]
        kept += len(found)
    complete = kept == resamples
    return Resamples(values if complete else np.full_like(values, np.nan), redrawn, complete)


def _drawn_counts(
    rng: np.random.Generator, groups: list[Ints], num_cases: int, at_once: int
) -> Floats:
    """Draw each group with replacement; return how often each case was drawn `[at_once, n]`."""
    counts = np.empty((at_once, num_cases))
    for row in counts:
        drawn = np.concatenate([rng.choice(group, len(group)) for group in groups])
        row[:] = np.bincount(drawn, minlength=num_cases)
    return counts


def _groups(num_cases: int, strata: ArrayLike | None) -> list[Ints]:
    """Return the rows of each stratum."""
    rows = np.arange(num_cases)
    if strata is None:
        return [rows]
    owner = np.asarray(strata)
    check_rows(rows, owner, "strata")
    return [rows[owner == value] for value in np.unique(owner)]


def mean_score(scores: list[Score]) -> Score:
    """Return the mean of several scores of the same patients, such as of runs of several seeds."""
    return lambda counts: np.mean([score(counts) for score in scores], axis=0)


def difference(first: Score, second: Score) -> Score:
    """Return the first score minus the second, both of the same drawn patients."""
    return lambda counts: first(counts) - second(counts)


def permutation_p(
    score: Callable[[NDArray[np.bool_]], Floats],
    num_cases: int,
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> float:
    """Return the two-sided p value of a difference when two runs' predictions are exchangeable.

    Args:
        score: Differences `[P]` between the two runs after their predictions have been swapped for
            the cases marked in `[P, n]` bool.
        num_cases: Patients n.
        permutations: Random swaps, at least 1; the observed one counts as one more.
        seed: Of the swaps.

    Returns:
        NaN where the observed difference is undefined. Undefined swaps count as extreme ones.
    """
    observed = float(score(np.zeros((1, num_cases), bool))[0])
    if np.isnan(observed):
        return float("nan")
    rng = np.random.default_rng(seed)
    sizes = np.diff([*range(0, permutations, _AT_ONCE), permutations])
    found = np.concatenate([score(rng.random((size, num_cases)) < 0.5) for size in sizes])
    # Rounding must not make a swap that changes nothing look smaller than the observed one.
    extreme = np.isnan(found) | (np.abs(found) >= abs(observed) - 1e-12)
    return float((1 + extreme.sum()) / (1 + permutations))


@dataclass(frozen=True)
class DeLong:
    """DeLong's comparison of two AUROCs on the same cases.

    Attributes:
        first, second: The areas.
        standard_error: Of their difference.
        p_value: Two-sided; 1 where both scores rank alike.
    """

    first: float
    second: float
    standard_error: float
    p_value: float


def delong(positive: ArrayLike, first: ArrayLike, second: ArrayLike) -> DeLong:
    """Test whether two scores of the same cases have the same AUROC.

    Args:
        positive: `[n]` bool, the class to be found.
        first, second: `[n]` scores, higher = positive.

    Raises:
        InputError: Fewer than two cases of either class: no variance can be estimated.

    Source:
        DeLong et al. 1988, with the midranks of Sun and Xu 2014.
    """
    truth, scores = np.asarray(positive, bool), np.stack([np.asarray(first), np.asarray(second)])
    check_rows(truth, scores.T, "first and second")
    hits, misses = scores[:, truth], scores[:, ~truth]
    m, n = hits.shape[1], misses.shape[1]
    if min(m, n) < 2:
        raise InputError(
            f"positive must hold at least two cases of either class, got {m} and {n}; use the "
            "paired bootstrap instead"
        )
    ranks = rankdata(np.concatenate([hits, misses], axis=1), axis=1)
    # Share of negatives below each positive, and of positives above each negative.
    by_hit = (ranks[:, :m] - rankdata(hits, axis=1)) / n
    by_miss = 1 - (ranks[:, m:] - rankdata(misses, axis=1)) / m
    area = by_hit.mean(1)
    covariance = np.cov(by_hit) / m + np.cov(by_miss) / n
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    error = float(np.sqrt(max(variance, 0.0)))
    gap = float(area[0] - area[1])
    p = 2 * norm.sf(abs(gap) / error) if error > 0 else float(gap == 0)
    return DeLong(float(area[0]), float(area[1]), error, float(p))
