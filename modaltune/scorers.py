"""Scores of predictions against labels: which cases count, which do not and why, which metrics.

A scorer is fixed on the cases it can score and maps rows of them to all its metrics, and likewise
counts of many resamples at once, so that intervals, comparisons and means over seeds resample the
same patients. No case leaves a metric without being counted in `left_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from modaltune.class_resamples import score_class_counts
from modaltune.classification_metrics import (
    auprc,
    auroc,
    brier_score,
    expected_calibration_error,
    per_class,
    predicted_classes,
)
from modaltune.errors import InputError
from modaltune.evaluate import accuracy, balanced_accuracy, harrell_c_index
from modaltune.predictions import Predictions
from modaltune.probes import Floats, Ints, as_survival
from modaltune.resampling import Score
from modaltune.survival_metrics import (
    SurvivalReference,
    dynamic_auc,
    integrated_brier_score,
    uno_c_index,
)
from modaltune.survival_resamples import score_survival_counts

BETTER_LOW = ("brier", "calibration_error", "integrated_brier")


@dataclass(frozen=True)
class Scorer:
    """All metrics of one kind on one set of cases.

    Attributes:
        names: Of the k metrics.
        case_ids: The n cases that are scored.
        score: Rows `[m]` -> `[k]`, by the libraries' metrics.
        resampled: How often each case was drawn `[R, n]` -> `[R, k]`, the same numbers much faster.
        strata: `[n]` class, or whether the case died.
        events: `[n]` 1 for a death, or for a case outside the first class.
        left_out: Reason -> cases that are not scored.
        notes: Metric -> what a reader has to know; under "" what concerns all.
        sites: `[n]` groups whose sizes every resample keeps; None for none.
    """

    names: tuple[str, ...]
    case_ids: tuple[str, ...]
    score: Callable[[Ints], Floats]
    resampled: Score
    strata: Ints
    events: Ints
    left_out: Mapping[str, int]
    notes: Mapping[str, str]
    sites: Ints | None = None

    @property
    def num_events(self) -> int:
        """Deaths, or cases outside the first class."""
        return int(self.events.sum())

    def note(self, name: str) -> str:
        """Return all notes that concern a metric."""
        return "; ".join(note for key in ("", name) if (note := self.notes.get(key)))


def class_scorer(
    predictions: Predictions,
    labels: pd.DataFrame,
    cases: Sequence[str] | None = None,
    foreign: Collection[str] = (),
) -> Scorer | None:
    """Score class probabilities: None if there are none.

    Args:
        predictions: Of any cases.
        labels: Indexed by case id, with column `primary_class` (-1 none).
        cases: Those to score, such as a split's test cases; all that are predicted by default.
        foreign: Cases whose class numbers mean other diagnoses than those of the predictions.
    """
    if predictions.probabilities is None or predictions.labels is None:
        return None
    ids, left_out = _scored(
        predictions,
        labels,
        cases,
        {"no probability": np.asarray(np.isnan(predictions.probabilities).any(1))},
        {
            "class of another site": np.asarray(labels.index.isin(list(foreign))),
            "no class (-1)": _column(labels, "primary_class", -1.0) < 0,
        },
    )
    own = predictions.take(ids)
    assert own.probabilities is not None  # narrows the type
    assert own.labels is not None
    truth = _column(labels.loc[list(ids)], "primary_class", -1.0).astype(np.int64)
    given, columns = own.probabilities, own.labels
    said = predicted_classes(given, columns)
    known = [int(k) for k in columns]
    present = [k for k in known if (truth == k).any()]

    def score(rows: Ints) -> Floats:
        true, probability, decided = truth[rows], given[rows], said[rows]
        recall, precision, f1 = per_class(true, decided, known)
        ranks = [m(true, probability, known, present) for m in (auroc, auprc)]
        fit = [m(true, probability, known) for m in (brier_score, expected_calibration_error)]
        decisions = [accuracy(true, decided), balanced_accuracy(true, decided)]
        return np.array([*ranks, *decisions, *fit, *recall, *precision, *f1])

    names = ["auroc", "auprc", "accuracy", "balanced_accuracy", "brier", "calibration_error"]
    names += [f"{part}_{k}" for part in ("recall", "precision", "f1") for k in known]
    return Scorer(
        tuple(names),
        ids,
        score,
        score_class_counts(truth, given, said, known, present),
        truth,
        (truth != known[0]).astype(np.int64),
        left_out,
        _class_notes(truth, known, present),
    )


def _class_notes(truth: Ints, known: list[int], present: list[int]) -> dict[str, str]:
    notes: dict[str, str] = {}
    if foreign := sorted(set(truth.tolist()) - set(known)):
        notes[""] = f"class {', '.join(map(str, foreign))} was not in training: always wrong"
    absent = [k for k in known if k not in present]
    if absent:
        gone = f"no case of class {', '.join(map(str, absent))}"
        binary = "undefined" if len(known) == 2 or len(present) < 2 else "mean over the others"
        notes["auroc"] = notes["auprc"] = f"{gone}: {binary}"
        notes["balanced_accuracy"] = f"{gone}: mean over the others"
        for k in absent:
            notes[f"recall_{k}"] = f"no case of class {k}: undefined"
    if len(known) > 2:
        notes["calibration_error"] = "of the most likely class"
    return notes


def survival_scorer(
    predictions: Predictions,
    labels: pd.DataFrame,
    reference: SurvivalReference | None,
    cases: Sequence[str] | None = None,
) -> Scorer | None:
    """Score risks and survival curves: None if no risk is predicted.

    Args:
        predictions: Of any cases; without curves there is no Brier score.
        labels: Indexed by case id, with columns `survival_months` and `event` (NaN none).
        reference: Of the training cases; without one only Harrell's c-index is given.
        cases: Those to score; all that are predicted by default.
    """
    if predictions.risk is None:
        return None
    ids, left_out = _scored(
        predictions,
        labels,
        cases,
        {"no risk": np.isnan(predictions.risk)},
        {
            "no survival time": np.isnan(_column(labels, "survival_months", np.nan)),
            "no vital status": np.isnan(_column(labels, "event", np.nan)),
        },
    )
    own, rows = predictions.take(ids), labels.loc[list(ids)]
    time, died = as_survival(
        _column(rows, "survival_months", np.nan), _column(rows, "event", np.nan)
    )
    assert own.risk is not None  # narrows the type
    risk = own.risk
    names, notes = ["c_index"], {}
    if not died.any():
        notes[""] = "nobody died: undefined"
    at, curves, months = np.zeros(0), None, np.zeros(0)
    if reference is not None:
        at = reference.auc_times
        names += ["uno_c_index", *area_names(at), "mean_auc"]
        notes |= _survival_notes(time, died, reference)
        if own.survival is not None:
            names.append("integrated_brier")
            curves, months, notes["integrated_brier"] = _curves_to_score(own, time, reference)

    def score(rows: Ints) -> Floats:
        values = [harrell_c_index(time[rows], died[rows], risk[rows])]
        if reference is not None:
            values.append(uno_c_index(time[rows], died[rows], risk[rows], reference))
            areas, mean = dynamic_auc(time[rows], died[rows], risk[rows], reference, at)
            values += [*areas, mean if not np.isnan(areas).all() else float("nan")]
        if reference is not None and curves is not None:
            values.append(
                integrated_brier_score(time[rows], died[rows], curves[rows], reference, months)
            )
        return np.array(values)

    events = died.astype(np.int64)
    resampled = score_survival_counts(time, died, risk, reference, curves, months)
    return Scorer(tuple(names), ids, score, resampled, events, events, left_out, notes)


def _survival_notes(time: Floats, died: Floats, reference: SurvivalReference) -> dict[str, str]:
    beyond = int((time > reference.tau).sum())
    late = int((died[time >= reference.tau] == 1).sum())
    note = f"truncated at {reference.tau:.1f} months, the last with 5 % of training uncensored"
    if beyond:
        note += f": {beyond} cases followed longer, {late} deaths there not counted"
    when = ", ".join(f"{t:.1f}" for t in reference.auc_times)
    notes = {"uno_c_index": note, "mean_auc": f"over the areas at {when} months"}
    for name, t in zip(area_names(reference.auc_times), reference.auc_times, strict=True):
        if not ((died == 1) & (time <= t)).any() or not (time > t).any():
            notes[name] = "nobody dead by then, or nobody followed longer: undefined"
    return notes


def area_names(times: Floats) -> list[str]:
    """Name the AUC at each time by its month, with as many decimals as it takes to differ."""
    for digits in range(4):
        names = [f"auc_{t:.{digits}f}m" for t in times]
        if len(set(names)) == len(names):
            break
    return names


def _curves_to_score(
    own: Predictions, time: Floats, reference: SurvivalReference
) -> tuple[Floats, Floats, str]:
    """Return the curves at the times the Brier score runs over, within everyone's follow-up.

    Returns:
        Curves `[n, m]`, months `[m]` (none where the score is undefined), and what to say of them.
    """
    nothing = np.zeros((len(time), 0)), np.zeros(0)
    if own.survival is None or own.months is None or not len(time):
        return *nothing, "no curve: undefined"
    first, last = reference.brier_times[[0, -1]]
    inside = (own.months >= first) & (own.months <= last) & (own.months < time.max())
    months, curves = own.months[inside], own.survival[:, inside]
    if len(months) < 2:
        return *nothing, f"fewer than two months from {first:.1f} to {last:.1f}: undefined"
    if unknown := int(np.isnan(curves).any(1).sum()):
        return *nothing, f"{unknown} cases without a whole curve: undefined"
    return curves, months, f"over {months[0]:.1f} to {months[-1]:.1f} months"


def _column(labels: pd.DataFrame, name: str, missing: float) -> Floats:
    return labels[name].fillna(missing).to_numpy(np.float64)


def _scored(
    predictions: Predictions,
    labels: pd.DataFrame,
    cases: Sequence[str] | None,
    unpredicted: Mapping[str, np.ndarray],
    unlabelled: Mapping[str, np.ndarray],
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Join by id; return the cases that have everything and count the others, a reason each."""
    if labels.index.has_duplicates:
        raise InputError("labels must have one row per case, got several; keep one of each")
    asked = predictions.case_ids if cases is None else tuple(cases)
    predicted = {case: row for row, case in enumerate(predictions.case_ids)}
    labelled = {str(case): row for row, case in enumerate(labels.index)}
    scored: list[str] = []
    left_out: dict[str, int] = {}

    def problem(case: str) -> str | None:
        if case not in predicted:
            return "no prediction"
        if case not in labelled:
            return "no label row"
        missing = [why for why, mask in unpredicted.items() if mask[predicted[case]]]
        missing += [why for why, mask in unlabelled.items() if mask[labelled[case]]]
        return missing[0] if missing else None

    for case in asked:
        why = problem(case)
        if why is None:
            scored.append(case)
        else:
            left_out[why] = left_out.get(why, 0) + 1
    return tuple(scored), left_out
