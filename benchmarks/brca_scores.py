"""Scores of the benchmark of genes alone: two tasks on the same patients, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from modaltune.engine.errors import InputError
from modaltune.evaluation import Evaluation
from modaltune.predictions import Predictions
from modaltune.probes import Floats, Ints
from modaltune.result_rows import (
    BootstrapOptions,
    DifferenceRow,
    ScoreRow,
    difference_rows,
    score_rows,
)
from modaltune.scorers import Scorer, class_scorer, survival_scorer

MEAN = "mean_of_two"
METRICS = ("balanced_accuracy", "c_index", MEAN, "auroc")


@dataclass(frozen=True)
class Said:
    """What one model says of the class and of the risk of cases."""

    classes: Predictions
    risk: Predictions


@dataclass(frozen=True)
class Judged:
    """A model as it is judged: what its seeds say.

    Attributes:
        name: Of the model.
        reading: What is read off: a task prompt, or how the model predicts.
        seeds: One per seed.
    """

    name: str
    reading: str
    seeds: tuple[Said, ...]


def said_by(
    evaluation: Evaluation, class_task: str, survival_task: str, part: str = "test"
) -> Said:
    """Return what probes say of a part of the split.

    Args:
        evaluation: Of one run.
        class_task: Prompt whose embedding the class is read off.
        survival_task: Prompt whose embedding the risk is read off.
        part: Of the split.

    Raises:
        InputError: There is no such prediction.
    """
    found = {}
    for kind, task in (("class", class_task), ("survival", survival_task)):
        own = [
            value
            for place, value in evaluation.predictions.items()
            if (place.split, place.task, place.kind) == (part, task, kind)
        ]
        if not own:
            raise InputError(
                f"evaluation must hold {kind} predictions of prompt {task!r}, got none; fit "
                "probes on cases with both classes and deaths"
            )
        found[kind] = own[0]
    return Said(found["class"], found["survival"])


def headline_scorer(said: Said, labels: pd.DataFrame, cases: Sequence[str]) -> Scorer:
    """Score `METRICS` on the cases that have a class and a follow-up, predicted both.

    Args:
        said: Of these cases and maybe others.
        labels: By case id: `primary_class`, `survival_months`, `event`.
        cases: Those to score.
    """
    one = class_scorer(said.classes, labels, cases)
    two = survival_scorer(said.risk, labels, None, cases)
    if one is None or two is None:
        raise InputError("said must hold classes and risks, got one of them; predict both")
    both = set(two.case_ids)
    ids = [case for case in one.case_ids if case in both]
    first, second = (_rows_of(scorer, ids) for scorer in (one, two))
    columns = [one.names.index(name) for name in ("balanced_accuracy", "auroc")]
    survival = two.names.index("c_index")

    def score(rows: Ints) -> Floats:
        decided, ranked = one.score(first[rows])[columns]
        ordered = two.score(second[rows])[survival]
        return np.array([decided, ordered, (decided + ordered) / 2, ranked])

    def resampled(counts: Floats) -> Floats:
        decided = one.resampled(_spread(counts, first, len(one.case_ids)))[:, columns]
        ordered = two.resampled(_spread(counts, second, len(two.case_ids)))[:, survival]
        both = (decided[:, 0] + ordered) / 2
        return np.stack([decided[:, 0], ordered, both, decided[:, 1]], axis=1)

    left = len(cases) - len(ids)
    return Scorer(
        METRICS,
        tuple(ids),
        score,
        resampled,
        one.strata[first],
        two.events[second],
        {"no class, follow-up or prediction": left} if left else {},
        {},
    )


def _rows_of(scorer: Scorer, ids: Sequence[str]) -> Ints:
    place = {case: row for row, case in enumerate(scorer.case_ids)}
    return np.array([place[case] for case in ids], dtype=np.int64)


def _spread(counts: Floats, rows: Ints, width: int) -> Floats:
    """Return counts `[R, width]` of all cases that a scorer knows, 0 for those not asked for."""
    every = np.zeros((len(counts), width), dtype=counts.dtype)
    every[:, rows] = counts
    return every


def scores(
    judged: Judged, labels: pd.DataFrame, cases: Sequence[str], options: BootstrapOptions
) -> list[ScoreRow]:
    """Return a row per metric: means over seeds, intervals over patients."""
    return score_rows([headline_scorer(s, labels, cases) for s in judged.seeds], options)


def differences(
    first: Judged,
    second: Judged,
    labels: pd.DataFrame,
    cases: Sequence[str],
    options: BootstrapOptions,
) -> list[DifferenceRow]:
    """Return a row per metric: the first model minus the second, paired by patient."""
    one, two = (
        [headline_scorer(s, labels, cases) for s in judged.seeds] for judged in (first, second)
    )
    return difference_rows(one, two, options)
