"""What a model says of each case: class probabilities, risk, survival; from probes or given.

A baseline that predicts directly enters the same tables: fill a `Predictions`, or write a table
that `read_predictions` understands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from modaltune.classification_metrics import as_probabilities
from modaltune.errors import CohortError, InputError
from modaltune.fitted_probes import POOLED, FittedProbes
from modaltune.probes import Floats, Ints
from modaltune.tables import name_few, naming_damage, repeated

_CLASS_COLUMN = re.compile(r"class_(\d+)")
_SURVIVAL_COLUMN = re.compile(r"survival_(\d+(?:\.\d+)?)m")


@dataclass(frozen=True)
class Predictions:
    """Predictions of n cases; None = this model makes none of the kind.

    Attributes:
        case_ids: The patients, each once.
        labels: `[C]` class of each probability column.
        probabilities: `[n, C]`; rows of NaN where a case has none.
        risk: `[n]`, higher dies sooner; NaN where a case has none.
        survival: `[n, k]` probability of living longer than `months`; rows of NaN where none.
        months: `[k]`.

    Raises:
        InputError: Shapes do not fit, a case is named twice, or probabilities are none.
    """

    case_ids: tuple[str, ...]
    labels: Ints | None = None
    probabilities: Floats | None = None
    risk: Floats | None = None
    survival: Floats | None = None
    months: Floats | None = None

    def __post_init__(self) -> None:
        if twice := repeated(self.case_ids):
            raise InputError(
                f"case_ids must name each case once, got several rows for {name_few(twice)}; "
                "combine the slides of a case first"
            )
        pairs = (("probabilities", self.labels), ("survival", self.months))
        for name, columns in pairs:
            value = getattr(self, name)
            if (value is None) != (columns is None):
                raise InputError(
                    "probabilities must come with labels and survival with months, got one "
                    f"without the other ({name}); give both or neither"
                )
            if value is not None and columns is not None:
                self._check_shape(name, value, (len(self.case_ids), len(columns)))
        if self.risk is not None:
            self._check_shape("risk", self.risk, (len(self.case_ids),))
        if self.probabilities is not None and self.labels is not None:
            known = ~np.isnan(self.probabilities).all(1)
            as_probabilities(self.probabilities[known], self.labels)

    @staticmethod
    def _check_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
        if np.shape(value) != shape:
            raise InputError(
                f"{name} must have shape {list(shape)}, a row per case, got "
                f"{list(np.shape(value))}; join rows by case id"
            )

    def take(self, case_ids: Sequence[str]) -> Predictions:
        """Return the predictions of some cases, in that order, joined by id.

        Raises:
            InputError: A case has none.
        """
        place = {case: row for row, case in enumerate(self.case_ids)}
        if missing := [case for case in case_ids if case not in place]:
            raise InputError(
                f"case_ids must have predictions, got {len(missing)} without, such as "
                f"{name_few(missing)}; predict them first"
            )
        rows = np.array([place[case] for case in case_ids], dtype=np.int64)

        def cut(value: Any) -> Any:
            return None if value is None else np.asarray(value)[rows]

        return Predictions(
            tuple(case_ids),
            self.labels,
            cut(self.probabilities),
            cut(self.risk),
            cut(self.survival),
            self.months,
        )


def predict_with(
    fitted: FittedProbes,
    case_ids: Sequence[str],
    embeddings: ArrayLike,
    task: str,
    scope: str = POOLED,
    months: ArrayLike | None = None,
) -> Predictions:
    """Read class probabilities, log hazard and survival off embeddings.

    Args:
        fitted: Probes of the run.
        case_ids: n patients.
        embeddings: `[n, T, d]`, of the same run.
        task: Whose column is read.
        scope: `POOLED` or a site.
        months: When to give survival; by default the times of the integrated Brier score, as far
            as the Cox probe's follow-up goes.

    Raises:
        InputError: Unknown task or scope, or shapes do not fit.
    """
    x = np.asarray(embeddings)
    if x.ndim != 3 or x.shape[:2] != (len(case_ids), len(fitted.tasks)):
        raise InputError(
            f"embeddings must have shape [{len(case_ids)}, {len(fitted.tasks)}, d], a row per "
            f"case, got {list(x.shape)}; embed the cases with the run that the probes belong to"
        )
    if scope not in fitted.scopes:
        raise InputError(
            f"scope must be one of {', '.join(fitted.scopes)}, got {scope!r}; pick one"
        )
    own, features = fitted.probes[task, scope], x[:, fitted.column(task)]
    parts: dict[str, Any] = {}
    if own.logistic is not None:
        parts["labels"] = own.logistic.labels
        parts["probabilities"] = own.logistic.predict_proba(features)
    if own.cox is not None and own.reference is not None:
        # The reference knows all training cases; the probe may have seen shorter follow-up.
        known = own.reference.brier_times[own.reference.brier_times <= own.cox.times[-1]]
        when = known if months is None else np.asarray(months, np.float64)
        parts["risk"] = own.cox.log_hazard(features)
        parts["months"], parts["survival"] = when, own.cox.survival(features, when)
    return Predictions(tuple(map(str, case_ids)), **parts)


def predict_sites(
    fitted: FittedProbes, case_ids: Sequence[str], embeddings: ArrayLike, task: str
) -> Predictions:
    """Return the probability of each of `fitted.sites`, numbered in that order.

    Raises:
        InputError: The run knows one site only.
    """
    if task not in fitted.site_probes:
        raise InputError(
            f"task must have a site classifier, got {task!r} of a run with the sites "
            f"{', '.join(fitted.sites) or 'none'}; only pan-cancer runs have one"
        )
    probe, x = fitted.site_probes[task], np.asarray(embeddings)
    given = probe.predict_proba(x[:, fitted.column(task)])
    return Predictions(tuple(map(str, case_ids)), probe.labels, given)


def survival_column(month: float) -> str:
    """Return the name of a column of survival, with all digits: a rounded month is another one."""
    return f"survival_{np.format_float_positional(month, trim='-')}m"


def predictions_table(predictions: Predictions) -> pd.DataFrame:
    """Return predictions as a table: `case_id`, `class_<k>`, `risk`, `survival_<months>m`."""
    columns: dict[str, Any] = {"case_id": list(predictions.case_ids)}
    if predictions.probabilities is not None and predictions.labels is not None:
        for k, label in enumerate(predictions.labels):
            columns[f"class_{label}"] = predictions.probabilities[:, k]
    if predictions.risk is not None:
        columns["risk"] = predictions.risk
    if predictions.survival is not None and predictions.months is not None:
        for k, month in enumerate(predictions.months):
            columns[survival_column(month)] = predictions.survival[:, k]
    return pd.DataFrame(columns)


def read_predictions(path: str | Path, task: str | None = None) -> Predictions:
    """Read the predictions of another model from CSV or Parquet.

    Args:
        path: Columns `case_id`, and of `class_<k>`, `risk`, `survival_<months>m` what there is;
            further columns are ignored.
        task: Rows of this prompt, if the table has a column `task`.

    Raises:
        CohortError: The file is damaged, or holds no predictions.
        InputError: Values break a rule.
    """
    path = Path(path)
    with naming_damage(path, "a readable table of predictions (CSV or Parquet)"):
        if path.suffix not in (".parquet", ".pq"):
            table = pd.read_csv(path, dtype={"case_id": str})
        else:
            try:
                table = pd.read_parquet(path)
            except ValueError as error:  # what pyarrow raises on foreign files
                raise OSError(str(error)) from error
    if "task" in table:
        prompts = [str(name) for name in table["task"].unique()]
        if task is None and len(prompts) > 1:
            raise CohortError(
                f"{path} must hold rows of one task prompt, got {name_few(prompts)}; keep those of "
                "one, or leave out the column task"
            )
        table = table if task is None else table[table["task"] == task]
    classes = sorted(int(m[1]) for c in table if (m := _CLASS_COLUMN.fullmatch(str(c))))
    curve = sorted(
        (float(m[1]), str(c)) for c in table if (m := _SURVIVAL_COLUMN.fullmatch(str(c)))
    )
    if "case_id" not in table or not (classes or "risk" in table):
        raise CohortError(
            f"{path} must have the column case_id and of class_<k>, risk, survival_<months>m at "
            f"least one of the first two, got {name_few(list(table.columns))}; rename its columns"
        )
    parts: dict[str, Any] = {}
    if classes:
        parts["labels"] = np.array(classes)
        parts["probabilities"] = _numbers(table, [f"class_{k}" for k in classes], path)
    if "risk" in table:
        parts["risk"] = _numbers(table, ["risk"], path)[:, 0]
    if curve:
        parts["months"] = np.array([month for month, _ in curve])
        parts["survival"] = _numbers(table, [name for _, name in curve], path)
    return Predictions(tuple(table["case_id"].astype(str)), **parts)


def _numbers(table: pd.DataFrame, columns: Sequence[str], path: Path) -> Floats:
    """Return columns `[n, k]` as float64, empty cells as NaN."""
    for name in columns:
        given = table[name]
        bad = given[pd.to_numeric(given, errors="coerce").isna() & given.notna()]
        if len(bad):
            raise CohortError(
                f"{path} must hold numbers or empty cells in class_<k>, risk and "
                f"survival_<months>m, got {bad.iloc[0]!r} in {name}; correct it"
            )
    return table[list(columns)].astype(np.float64).to_numpy()
