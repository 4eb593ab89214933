"""Scores of frozen embeddings: linear probes per task prompt, metrics, bootstrap intervals.

Both probes are fitted on the training split alone and scored on the other, task by task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lifelines.utils import concordance_index
from numpy.typing import ArrayLike, NDArray

from modaltune.errors import CohortError, InputError
from modaltune.probes import (
    CoxProbe,
    Floats,
    Ints,
    LogisticProbe,
    ProbeError,
    as_classes,
    as_features,
    as_survival,
    check_rows,
    fit_cox,
    fit_logistic,
)

logger = logging.getLogger(__name__)

# Metric name -> the metric and the arrays it is computed from, one row per test patient.
Parts = dict[str, tuple[Callable[..., float], tuple[NDArray[Any], ...]]]

__all__ = [
    "CoxProbe",
    "Interval",
    "LogisticProbe",
    "ProbeError",
    "ProbeLabels",
    "ProbeResult",
    "accuracy",
    "balanced_accuracy",
    "bootstrap_interval",
    "fit_cox",
    "fit_logistic",
    "golden_evaluation",
    "harrell_c_index",
    "probe_tasks",
]


@dataclass(frozen=True)
class ProbeLabels:
    """What the probes predict, one entry per case.

    Attributes:
        classes: `[n]` int; -1 = not classified, never fitted.
        durations: `[n]` float months to death or last follow-up; NaN = unknown, left out.
        events: `[n]` float, 1 = died, 0 = censored; NaN = unknown, left out.

    Raises:
        CohortError: Lengths differ, a duration is negative or an event is neither 0 nor 1.
    """

    classes: Ints
    durations: Floats
    events: Floats

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", as_classes(self.classes))
        durations, events = as_survival(self.durations, self.events)
        object.__setattr__(self, "durations", durations)
        object.__setattr__(self, "events", events)
        if len(self.classes) != len(durations):
            raise CohortError(
                f"classes must have one entry per duration, got {len(self.classes)} and "
                f"{len(durations)}; join labels by case id, with -1 and NaN where unknown"
            )

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval.

    Attributes:
        low, high: ends of the interval; NaN if the metric was defined in no resample.
        level: its coverage, for example 0.95.
        resamples: resamples in which the metric was defined.
    """

    low: float
    high: float
    level: float
    resamples: int


@dataclass(frozen=True)
class ProbeResult:
    """Test scores of one task prompt's embedding; NaN where a probe could not be fitted or scored.

    Attributes:
        task: index of the task prompt.
        accuracy, balanced_accuracy: of the logistic probe over `num_classified` test cases.
        c_index: Harrell's, of the Cox probe over `num_survival` test cases.
        intervals: metric name -> bootstrap interval over patients; empty if none was asked for.
        logistic, cox: the probes, None where the training cases could not carry one.
        notes: why a score is missing, and what the fits complained about.
    """

    task: int
    accuracy: float
    balanced_accuracy: float
    c_index: float
    num_classified: int
    num_survival: int
    intervals: Mapping[str, Interval]
    logistic: LogisticProbe | None
    cox: CoxProbe | None
    notes: tuple[str, ...]


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Return the share of equal entries of two `[n]` class arrays; NaN if n = 0."""
    true, pred = np.asarray(y_true), np.asarray(y_pred)
    check_rows(true, pred, "y_pred")
    return float((true == pred).mean()) if len(true) else float("nan")


def balanced_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Return the mean recall over the classes that occur in `y_true` `[n]`; NaN if n = 0."""
    true, pred = np.asarray(y_true), np.asarray(y_pred)
    check_rows(true, pred, "y_pred")
    recalls = [float((pred[true == label] == label).mean()) for label in np.unique(true)]
    return float(np.mean(recalls)) if recalls else float("nan")


def harrell_c_index(durations: ArrayLike, events: ArrayLike, risk: ArrayLike) -> float:
    """Return Harrell's c-index: a higher `risk` `[n]` should die sooner.

    Rows with NaN are left out; NaN if no pair of cases can be compared.
    """
    time, died = as_survival(durations, events)
    score = np.asarray(risk, dtype=np.float64)
    check_rows(time, score, "risk")
    known = ~(np.isnan(time) | np.isnan(died) | np.isnan(score))
    try:
        return float(concordance_index(time[known], -score[known], died[known]))
    except ZeroDivisionError:
        return float("nan")


def bootstrap_interval(
    metric: Callable[..., float],
    *arrays: ArrayLike,
    patients: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of `metric(*arrays)` under resampling of whole patients.

    Args:
        metric: Maps resampled arrays to a number; NaN = undefined in this resample, left out.
        arrays: Each `[n, ...]`, rows belonging together.
        patients: `[n]` ids; rows of one patient are drawn together. Default: a patient per row.
        resamples: Number of resamples, at least 1.
        level: Coverage between 0 and 1.
        seed: Of the resampling; the same seed gives the same interval.

    Raises:
        InputError: Lengths differ, no row, or an option is out of range.
    """
    rows = [np.asarray(array) for array in arrays]
    owners = np.arange(len(rows[0])) if patients is None else np.asarray(patients)
    for other in (*rows, owners):
        check_rows(rows[0], other, "arrays and patients")
    if not len(owners):
        raise InputError("arrays must have at least one row, got 0; score a split that has cases")
    if resamples < 1 or not 0 < level < 1:
        raise InputError(
            f"resamples must be at least 1 and level between 0 and 1, got {resamples} and {level}"
        )
    _, owner = np.unique(owners, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(owner))[:-1])
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, len(members), len(members))
        index = np.concatenate([members[k] for k in drawn])
        values[i] = metric(*(array[index] for array in rows))
    defined = values[~np.isnan(values)]
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (np.nan, np.nan)
    return Interval(float(low), float(high), level, len(defined))


def probe_tasks(
    train_x: ArrayLike,
    train: ProbeLabels,
    test_x: ArrayLike,
    test: ProbeLabels,
    *,
    penalizer: float = 0.1,
    count_unclassified: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[ProbeResult, ...]:
    """Fit both probes per task prompt on the training cases and score them on the test cases.

    Args:
        train_x: `[N, T, d]` embeddings, a task prompt per column.
        train: Labels of the N cases.
        test_x: `[M, T, d]`.
        test: Labels of the M cases.
        penalizer: Of the Cox probe.
        count_unclassified: Count test cases of class -1 as a class nobody predicts, as the
            published scripts do; by default they are left out.
        resamples: Bootstrap resamples of test patients for 95 % intervals, 0 for none.
        seed: Of the bootstrap.

    Raises:
        InputError: Shapes do not fit or an embedding is not finite.
    """
    fitted, scored = np.asarray(train_x), np.asarray(test_x)
    if fitted.ndim != 3 or scored.ndim != 3 or fitted.shape[1:] != scored.shape[1:]:
        raise InputError(
            "train_x and test_x must have shapes [N, T, d] and [M, T, d], got "
            f"{list(fitted.shape)} and {list(scored.shape)}; embed both with one model"
        )
    check_rows(fitted, train.classes, "train labels")
    check_rows(scored, test.classes, "test labels")
    results = []
    for task in range(fitted.shape[1]):
        splits = (
            as_features(f"train_x[:, {task}]", fitted[:, task]),
            as_features(f"test_x[:, {task}]", scored[:, task]),
        )
        result, parts = _probe_one(task, splits, (train, test), penalizer, count_unclassified)
        if resamples:
            intervals = {
                name: bootstrap_interval(metric, *arrays, resamples=resamples, seed=seed)
                for name, (metric, arrays) in parts.items()
                if len(arrays[0])
            }
            result = replace(result, intervals=intervals)
        results.append(result)
    return tuple(results)


def _probe_one(
    task: int,
    splits: tuple[Floats, Floats],
    labels: tuple[ProbeLabels, ProbeLabels],
    penalizer: float,
    count_unclassified: bool,
) -> tuple[ProbeResult, Parts]:
    """Return the scores of one task without intervals, and per metric what to resample."""
    (x, held_out), (train, test) = splits, labels
    notes: list[str] = []
    parts: Parts = {}
    logistic: LogisticProbe | None = None
    cox: CoxProbe | None = None
    classified = np.full(len(test), count_unclassified) | (test.classes >= 0)
    followed = ~(np.isnan(test.durations) | np.isnan(test.events))
    try:
        logistic = fit_logistic(x, train.classes)
        pair = (test.classes[classified], logistic.predict(held_out[classified]))
        parts["accuracy"], parts["balanced_accuracy"] = (accuracy, pair), (balanced_accuracy, pair)
    except ProbeError as error:
        notes.append(str(error))
    try:
        cox = fit_cox(x, train.durations, train.events, penalizer)
        risk = cox.partial_hazard(held_out[followed])
        survival = (test.durations[followed], test.events[followed], risk)
        parts["c_index"] = (harrell_c_index, survival)
        notes.extend(cox.notes)
    except ProbeError as error:
        notes.append(str(error))
    if missing := [note for note in notes if cox is None or note not in cox.notes]:
        logger.warning("task %d: %s", task, "; ".join(missing))
    scores = {name: metric(*arrays) for name, (metric, arrays) in parts.items()}
    return ProbeResult(
        task=task,
        accuracy=scores.get("accuracy", float("nan")),
        balanced_accuracy=scores.get("balanced_accuracy", float("nan")),
        c_index=scores.get("c_index", float("nan")),
        num_classified=int(classified.sum()),
        num_survival=int(followed.sum()),
        intervals={},
        logistic=logistic,
        cox=cox,
        notes=tuple(notes),
    ), parts


def golden_evaluation(
    tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
) -> dict[str, NDArray[Any] | float]:
    """Recompute a golden case of kind `evaluation`.

    Args:
        tensors: The stored inputs, `in/x_{train,test}` `[n, T, d]` and `in/{train,test}.*` `[n]`.
        meta: The case's JSON; its options of both probes are followed.

    Returns:
        Every stored `out/<task>.*` tensor, and `metrics/<task>.<name>` for the scores of the
        JSON's `metrics`. Test cases of class -1 stay in and count as a class nobody predicts, as
        published; test cases with NaN are left out of the hazards and the c-index.

    Raises:
        InputError: The case asks for another probe than liblinear's L2 logistic regression.
    """
    options = {"solver": "liblinear", "penalty": "l2", **meta.get("logistic", {})}
    if (options["solver"], options["penalty"]) != ("liblinear", "l2"):
        raise InputError(
            "logistic.solver and logistic.penalty must be liblinear and l2, got "
            f"{options['solver']} and {options['penalty']}; METHOD 4.4 defines no other probe"
        )
    x = {split: tensors[f"in/x_{split}"] for split in ("train", "test")}
    labels = {
        split: ProbeLabels(
            tensors[f"in/{split}.primary_class"],
            tensors[f"in/{split}.durations"],
            tensors[f"in/{split}.vital_status"],
        )
        for split in x
    }
    train, test = labels["train"], labels["test"]
    out: dict[str, NDArray[Any] | float] = {}
    for task in range(x["train"].shape[1]):
        logistic = fit_logistic(
            x["train"][:, task],
            train.classes,
            c=options.get("C", 1.0),
            max_iter=options.get("max_iter", 200),
            seed=options.get("random_state", 0),
            intercept_scaling=options.get("intercept_scaling", 1.0),
        )
        cox = fit_cox(
            x["train"][:, task],
            train.durations,
            train.events,
            penalizer=meta.get("cox", {}).get("penalizer", 0.1),
        )
        predicted = logistic.predict(x["test"][:, task])
        known = ~(np.isnan(test.durations) | np.isnan(test.events))
        out[f"out/{task}.lr_coef"] = logistic.coef
        out[f"out/{task}.lr_intercept"] = logistic.intercept
        out[f"out/{task}.lr_pred"] = predicted
        out[f"out/{task}.lr_proba"] = logistic.predict_proba(x["test"][:, task])
        out[f"out/{task}.cox_params"] = cox.params
        out[f"out/{task}.cox_partial_hazard_test"] = cox.partial_hazard(x["test"][known, task])
        out[f"metrics/{task}.test_accuracy"] = accuracy(test.classes, predicted)
        out[f"metrics/{task}.test_balanced_accuracy"] = balanced_accuracy(test.classes, predicted)
        for split, cases in labels.items():
            out[f"metrics/{task}.{split}_c_index"] = cox.c_index(
                x[split][:, task], cases.durations, cases.events
            )
    return out
