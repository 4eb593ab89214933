"""Survival metrics of many bootstrap resamples at once, from how often each case was drawn.

With counts w, pairs that can be compared M and pairs in the right order C (a tie in risk: 1/2), a
c-index is wᵀCw / wᵀMw. Copies of a case are tied in time and thus no pair, as in the metrics of
`survival_metrics` on the drawn rows, which these equal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from modaltune.probes import Floats
from modaltune.resampling import Score
from modaltune.survival_metrics import SurvivalReference


def survival_resamples(
    durations: Floats,
    events: Floats,
    risk: Floats,
    reference: SurvivalReference | None,
    curves: Floats | None = None,
    months: Floats | None = None,
) -> Score:
    """Return a function of counts `[R, n]` that gives the columns of a survival scorer `[R, k]`.

    Args:
        durations, events, risk: `[n]` without NaN.
        reference: Of the training cases; without one there is only Harrell's c-index.
        curves: `[n, m]` survival at `months` `[m]`, for the Brier score.
        months: Times of the curves.
    """
    order = np.argsort(durations, kind="stable")
    time, died, score = durations[order], events[order] == 1, risk[order]
    pairs = _Pairs(time, died, score)
    area = None if reference is None else _Areas(time, died, score, reference)
    squares = None
    if reference is not None and curves is not None and months is not None:
        squares = _integrated(time, died, curves[order], reference, months)
    weights = [np.ones(len(time))]
    if reference is not None:
        weights.append(np.where(time < reference.tau, reference.weights(time) ** 2, 0.0))

    def columns(counts: Floats) -> Floats:
        own = counts[:, order]
        found = [pairs.c_indices(own, np.stack(weights))]
        if area is not None:
            found.append(area.at(own))
        if squares is not None:
            dead = (own @ died > 0)[:, None]
            found.append(np.where(dead, (own @ squares / own.sum(1))[:, None], np.nan))
        return np.concatenate(found, axis=1)

    return columns


def swapped_c_index_gaps(
    durations: Floats, events: Floats, first: Floats, second: Floats
) -> Callable[[NDArray[np.bool_]], Floats]:
    """Return the c-index of one risk minus the other's, after swapping them for marked cases.

    Args:
        durations, events: `[n]` without NaN.
        first, second: `[n]` risks on one scale.

    Returns:
        A function of marks `[P, n]` that gives the differences `[P]`; NaN if no pair can be
        compared.
    """
    died = events == 1
    comparable = _comparable(durations, died)
    pairs = float(comparable.sum())
    risks = (first, second)
    right = [[_right(a[died], b, comparable) for b in risks] for a in risks]

    def concordant(of_second: NDArray[np.float32]) -> Floats:
        of_first = 1 - of_second
        total = np.zeros(len(of_second))
        for own, row in zip((of_first, of_second), right, strict=True):
            others = of_first @ row[0].T + of_second @ row[1].T
            total += (own[:, died] * others).sum(1, dtype=np.float64)
        return total

    def gaps(swap: NDArray[np.bool_]) -> Floats:
        if not pairs:
            return np.full(len(swap), np.nan)
        marked = swap.astype(np.float32)
        return (concordant(marked) - concordant(1 - marked)) / pairs

    return gaps


def _comparable(time: Floats, died: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return `[deaths, n]`: who was still under observation when a case died.

    Of cases at the very time of a death, those censored there outlived it.
    """
    own = time[died][:, None]
    return (time > own) | ((time == own) & ~died)


def _right(own: Floats, other: Floats, comparable: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return `[deaths, n]`: 1 where a comparable pair is in the right order, 1/2 where tied."""
    order = (own[:, None] > other) + 0.5 * (own[:, None] == other)
    # Sums of halves are exact in float32 up to 8 million cases, and its products are the faster.
    return np.asarray(order * comparable, np.float32)


class _Pairs:
    """Pairs of a death and a case that outlived it; all arrays in rising order of time."""

    def __init__(self, time: Floats, died: NDArray[np.bool_], risk: Floats) -> None:
        comparable = _comparable(time, died)
        self.died = died
        self.comparable = comparable.astype(np.float32)
        self.right = _right(risk[died], risk, comparable)

    def c_indices(self, counts: Floats, weights: Floats) -> Floats:
        """Return `[R, s]` c-indices with s weights of the deaths `[s, n]`; NaN without a pair."""
        drawn = counts.astype(np.float32)
        own = counts[:, self.died]
        right = own * (drawn @ self.right.T)
        pairs = own * (drawn @ self.comparable.T)
        top, bottom = (part @ weights[:, self.died].T for part in (right, pairs))
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


class _Areas:
    """Cumulative/dynamic AUC at the reference's times; all arrays in rising order of time."""

    def __init__(
        self, time: Floats, died: NDArray[np.bool_], risk: Floats, reference: SurvivalReference
    ) -> None:
        self.by_risk = np.argsort(risk, kind="stable")
        rank = rankdata(risk, method="dense")[self.by_risk]
        self.starts = np.flatnonzero(np.diff(rank, prepend=0))
        self.weights = reference.weights(time)
        dead = died & (self.weights > 0)
        self.gone = dead[:, None] & (time[:, None] <= reference.auc_times)  # [n, k]
        self.alive = time[:, None] > reference.auc_times  # [n, k]
        self.died = died
        self.steps = np.flatnonzero(np.diff(time, prepend=-np.inf))
        self.step_at = np.searchsorted(time[self.steps], reference.auc_times, side="right")

    def at(self, counts: Floats) -> Floats:
        """Return the areas and their mean `[R, k + 1]`; NaN where a side has no case."""
        usable = (counts @ self.gone > 0) & (counts @ self.alive > 0)
        areas = np.stack([self._area(counts, k) for k in range(self.gone.shape[1])], axis=1)
        areas[~usable] = np.nan
        # Usable times are neighbours, and nobody has died by those before them.
        survival = np.concatenate([np.ones((len(counts), 1)), self._survival(counts)], axis=1)
        deaths = np.where(usable, -np.diff(survival, axis=1), 0.0)
        total = deaths.sum(1)
        mean = np.divide(
            np.where(usable, areas * deaths, 0.0).sum(1),
            total,
            out=np.full(len(counts), np.nan),
            where=total > 0,
        )
        return np.concatenate([areas, mean[:, None]], axis=1)

    def _area(self, counts: Floats, k: int) -> Floats:
        drawn = counts[:, self.by_risk]
        cases = drawn * (self.gone[:, k] * self.weights)[self.by_risk]
        cases = np.add.reduceat(cases, self.starts, axis=1)
        controls = np.add.reduceat(drawn * self.alive[self.by_risk, k], self.starts, axis=1)
        below = np.cumsum(controls, axis=1) - controls / 2
        total = cases.sum(1) * controls.sum(1)
        return np.divide(
            (cases * below).sum(1), total, out=np.full(len(counts), np.nan), where=total > 0
        )

    def _survival(self, counts: Floats) -> Floats:
        """Return the Kaplan-Meier curve of each resample at the times of the areas `[R, k]`."""
        deaths = np.add.reduceat(counts * self.died, self.steps, axis=1)
        leaving = np.add.reduceat(counts, self.steps, axis=1)
        at_risk = np.cumsum(leaving[:, ::-1], axis=1)[:, ::-1]
        left = 1 - np.divide(deaths, at_risk, out=np.zeros_like(deaths), where=at_risk > 0)
        curve = np.cumprod(left, axis=1)
        return np.concatenate([np.ones((len(counts), 1)), curve], axis=1)[:, self.step_at]


def _integrated(
    time: Floats,
    died: NDArray[np.bool_],
    curves: Floats,
    reference: SurvivalReference,
    months: Floats,
) -> Floats:
    """Return each case's part in the integrated Brier score `[n]`."""
    if len(months) < 2:
        return np.full(len(time), np.nan)
    gone = died[:, None] & (time[:, None] <= months)
    alive = time[:, None] > months
    squares = curves**2 * gone * reference.weights(time)[:, None]
    squares += (1 - curves) ** 2 * alive * reference.weights(months)
    return np.asarray(np.trapezoid(squares, months, axis=1) / (months[-1] - months[0]))
