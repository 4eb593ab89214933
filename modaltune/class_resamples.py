"""Class metrics of many bootstrap resamples at once, from how often each case was drawn.

Each equals the metric of `classification_metrics` or `evaluate` on the drawn rows. A case drawn
twice counts twice, which for ranks is a tie with itself: half a pair, as any tied pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modaltune.classification_metrics import NUM_BINS, Bools, probability_bins
from modaltune.probes import Floats, Ints
from modaltune.resampling import Score


def class_resamples(
    truth: Ints, probabilities: Floats, said: Ints, labels: Sequence[int], over: Sequence[int]
) -> Score:
    """Return a function of counts `[R, n]` that gives the columns of a class scorer `[R, k]`.

    Args:
        truth: `[n]` classes; those not in `labels` are never right.
        probabilities: `[n, C]`.
        said: `[n]` decisions.
        labels: `[C]` the class of each column.
        over: Classes that AUROC and AUPRC average over (three classes or more).
    """
    columns = list(labels)
    wanted = columns[1:] if len(columns) == 2 else list(over)
    ranked = [_ByScore(truth == k, probabilities[:, columns.index(k)]) for k in wanted]
    right = truth == said
    squared = ((probabilities - (truth[:, None] == np.asarray(columns))) ** 2).sum(1)
    squared = squared / 2 if len(columns) == 2 else squared
    index, predicted, came_true = probability_bins(truth, probabilities, columns)
    gaps = (index[:, None] == np.arange(NUM_BINS)) * (predicted - came_true)[:, None]
    every = np.unique(truth)

    def score(counts: Floats) -> Floats:
        drawn = counts.sum(1)
        areas = np.array([ranks.areas(counts) for ranks in ranked])  # [wanted, 2, R]
        ranking = areas.mean(0).T if len(ranked) else np.full((len(counts), 2), np.nan)
        of_class = counts @ (truth[:, None] == every)
        hits = counts @ (right[:, None] & (truth[:, None] == every))
        recall = _ratio(hits, of_class, np.nan)
        present = (of_class > 0).sum(1)
        balanced = np.nansum(recall, axis=1) / present
        fit = np.stack([counts @ squared / drawn, np.abs(counts @ gaps).sum(1) / drawn], axis=1)
        decisions = np.stack([counts @ right / drawn, balanced], axis=1)
        parts = _per_class(counts, truth, said, np.asarray(columns))
        return np.concatenate([ranking, decisions, fit, *parts], axis=1)

    return score


class _ByScore:
    """Cases in rising order of a score, so that sums over thresholds are cumulative sums."""

    def __init__(self, positive: Bools, score: Floats) -> None:
        self.order = np.argsort(score, kind="stable")
        self.starts = np.flatnonzero(np.diff(score[self.order], prepend=-np.inf))
        self.positive = positive[self.order]

    def areas(self, counts: Floats) -> Floats:
        """Return AUROC and average precision `[2, R]`; NaN where a side has no case."""
        own = counts[:, self.order]
        hits = np.add.reduceat(own * self.positive, self.starts, axis=1)
        misses = np.add.reduceat(own * ~self.positive, self.starts, axis=1)
        all_hits, all_misses = hits.sum(1), misses.sum(1)
        below = np.cumsum(misses, axis=1) - misses / 2
        above_hits = np.cumsum(hits[:, ::-1], axis=1)
        called = above_hits + np.cumsum(misses[:, ::-1], axis=1)
        precision = _ratio(above_hits, called, 0.0)  # 0 / 0 above the highest score that was drawn
        found = np.stack(
            [
                _ratio((hits * below).sum(1), all_hits * all_misses, np.nan),
                _ratio((hits[:, ::-1] * precision).sum(1), all_hits, np.nan),
            ]
        )
        found[:, (all_hits == 0) | (all_misses == 0)] = np.nan
        return found


def _per_class(
    counts: Floats, truth: Ints, said: Ints, columns: Ints
) -> tuple[Floats, Floats, Floats]:
    """Return recall, precision and F1 `[R, C]` each, as `classification_metrics.per_class`."""
    is_true, is_said = truth[:, None] == columns, said[:, None] == columns
    actual, decided, hits = counts @ is_true, counts @ is_said, counts @ (is_true & is_said)
    return (
        _ratio(hits, actual, np.nan),
        _ratio(hits, decided, 0.0),
        _ratio(2 * hits, actual + decided, np.nan),
    )


def _ratio(top: Floats, bottom: Floats, otherwise: float) -> Floats:
    """Return top / bottom, and `otherwise` where the bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), otherwise), where=bottom > 0)
