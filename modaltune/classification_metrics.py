"""Metrics of class predictions: ranking, decisions and calibration, from plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from modaltune.errors import InputError
from modaltune.probes import Floats, Ints, as_classes, check_rows

Bools = NDArray[np.bool_]

NUM_BINS = 10  # of equal width, for reliability curves: nothing about them is fitted


@dataclass(frozen=True)
class Reliability:
    """How often events happen that are given a certain probability.

    Attributes:
        predicted: `[b]` mean probability of each bin that has cases.
        observed: `[b]` share of its cases in which the prediction came true.
        counts: `[b]` cases.
    """

    predicted: Floats
    observed: Floats
    counts: Ints

    @property
    def error(self) -> float:
        """The expected calibration error: gaps of the bins, weighted by their cases."""
        gaps = np.abs(self.predicted - self.observed)
        return float(gaps @ self.counts / self.counts.sum()) if len(gaps) else float("nan")


def as_probabilities(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """Return probabilities as float64 `[n, C]`.

    Raises:
        InputError: Another shape, values outside 0-1, or rows that do not sum to 1.
    """
    given = np.asarray(probabilities, np.float64)
    if given.ndim != 2 or given.shape[1] != len(np.asarray(labels)) or given.shape[1] < 2:
        raise InputError(
            f"probabilities must have shape [n, {len(np.asarray(labels))}], a column per class and "
            f"at least two, got {list(given.shape)}; give the probability of every class"
        )
    off = ~((given >= 0) & (given <= 1)).all(1) | ~(np.abs(given.sum(1) - 1) < 1e-3)
    if off.any():
        row = int(off.argmax())
        raise InputError(
            f"probabilities must lie in 0-1 and sum to 1, got {given[row].tolist()} in row {row}; "
            "normalise them, or leave the case out"
        )
    return given


def predicted_classes(probabilities: Floats, labels: Ints) -> Ints:
    """Return the most likely class `[n]`; of equal ones the first, as the probes decide."""
    return labels[probabilities.argmax(1)]


def auroc(
    classes: ArrayLike,
    probabilities: ArrayLike,
    labels: Sequence[int],
    over: Sequence[int] | None = None,
) -> float:
    """Return the area under the ROC curve: of the second of two classes, else macro one-vs-rest.

    Args:
        classes: `[n]` true classes.
        probabilities: `[n, C]`.
        labels: `[C]` the class of each column.
        over: Classes to average over (three or more); all of `labels` by default.

    Returns:
        NaN where a class to be averaged over has no case, or no other class has one.
    """
    return _one_vs_rest(_rank_auc, classes, probabilities, labels, over)


def auprc(
    classes: ArrayLike,
    probabilities: ArrayLike,
    labels: Sequence[int],
    over: Sequence[int] | None = None,
) -> float:
    """Return the average precision, binary or macro one-vs-rest; arguments as of `auroc`."""
    return _one_vs_rest(average_precision_score, classes, probabilities, labels, over)


def _rank_auc(positive: Bools, score: Floats) -> float:
    """Return the AUROC by ranks (Mann-Whitney), a fifth of the time of scikit-learn's curve."""
    hits = int(positive.sum())
    above = rankdata(score)[positive].sum() - hits * (hits + 1) / 2
    return float(above / (hits * (len(positive) - hits)))


def _one_vs_rest(
    metric: Callable[[Bools, Floats], float],
    classes: ArrayLike,
    probabilities: ArrayLike,
    labels: Sequence[int],
    over: Sequence[int] | None,
) -> float:
    truth, columns = as_classes(classes), list(labels)
    given = np.asarray(probabilities, np.float64)
    check_rows(truth, given, "probabilities")
    wanted = columns[1:] if len(columns) == 2 else list(columns if over is None else over)
    values = []
    for label in wanted:
        positive = truth == label
        if not 0 < positive.sum() < len(positive):
            return float("nan")
        values.append(metric(positive, given[:, columns.index(label)]))
    return float(np.mean(values)) if values else float("nan")


def brier_score(classes: ArrayLike, probabilities: ArrayLike, labels: Sequence[int]) -> float:
    """Return the mean squared error of the probabilities; NaN if n = 0.

    Of two classes, of the second one (0 to 1); of more, summed over the classes (0 to 2).
    """
    truth, given = as_classes(classes), np.asarray(probabilities, np.float64)
    check_rows(truth, given, "probabilities")
    if not len(truth):
        return float("nan")
    squared = ((given - (truth[:, None] == np.asarray(labels))) ** 2).sum(1).mean()
    return float(squared / 2 if len(labels) == 2 else squared)


def reliability(
    classes: ArrayLike, probabilities: ArrayLike, labels: Sequence[int], bins: int = NUM_BINS
) -> Reliability:
    """Return the reliability curve over `bins` bins of equal width.

    Of two classes, of the probability of the second; of more, of the most likely class.
    """
    truth, given = as_classes(classes), np.asarray(probabilities, np.float64)
    check_rows(truth, given, "probabilities")
    index, said, came_true = probability_bins(truth, given, labels, bins)
    counts = np.bincount(index, minlength=bins)
    used = counts > 0
    mean = [np.bincount(index, w, bins)[used] / counts[used] for w in (said, came_true * 1.0)]
    return Reliability(mean[0], mean[1], counts[used].astype(np.int64))


def probability_bins(
    truth: Ints, probabilities: Floats, labels: Sequence[int], bins: int = NUM_BINS
) -> tuple[Ints, Floats, Bools]:
    """Return each case's bin, the probability it was given, and whether that came true `[n]`."""
    columns = np.asarray(labels)
    if len(columns) == 2:
        said, came_true = probabilities[:, 1], truth == columns[1]
    else:
        said = probabilities.max(1, initial=0.0)
        came_true = truth == predicted_classes(probabilities, columns)
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges[1:-1], said), 0, bins - 1)
    return index.astype(np.int64), said, came_true


def expected_calibration_error(
    classes: ArrayLike, probabilities: ArrayLike, labels: Sequence[int], bins: int = NUM_BINS
) -> float:
    """Return the error of `reliability`; NaN if n = 0."""
    return reliability(classes, probabilities, labels, bins).error


def per_class(
    classes: ArrayLike, predicted: ArrayLike, labels: Sequence[int]
) -> tuple[Floats, Floats, Floats]:
    """Return recall, precision and F1 `[C]` each.

    Recall of a class without a case is NaN. Precision of a class that is never predicted is 0; so
    is its F1, unless it has no case either (NaN).
    """
    truth, said, columns = as_classes(classes), np.asarray(predicted), np.asarray(labels)
    check_rows(truth, said, "predicted")
    is_true, is_said = truth[:, None] == columns, said[:, None] == columns
    actual, decided = is_true.sum(0), is_said.sum(0)
    right = (is_true & is_said).sum(0)
    recall = np.divide(right, actual, out=np.full(len(columns), np.nan), where=actual > 0)
    precision = np.divide(right, decided, out=np.zeros(len(columns)), where=decided > 0)
    precision = precision if len(truth) else np.full(len(columns), np.nan)
    both = actual + decided
    f1 = np.divide(2 * right, both, out=np.full(len(columns), np.nan), where=both > 0)
    return recall, precision, f1
