"""Everything that evaluation fits on the training cases, kept with a run so that nothing refits.

Per task prompt and scope (all cases, and each site of a pan-cancer run) there is a logistic probe,
a Cox probe with its baseline survival, the median risk of the training cases, and what survival
metrics need. A folder holds them as `probes.json` and `probes.safetensors`. No pickle.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from modaltune.errors import InputError
from modaltune.probes import (
    CoxProbe,
    Floats,
    Ints,
    LogisticProbe,
    ProbeError,
    as_features,
    check_rows,
    fit_cox,
    fit_logistic,
)
from modaltune.survival_metrics import SurvivalReference

logger = logging.getLogger(__name__)

POOLED = "pooled"  # the scope of all cases together


@dataclass(frozen=True)
class SavedCox:
    """A Cox probe as numbers: what it takes to predict, without the library that fitted it.

    Attributes:
        params: `[d]` log hazard ratio per unit of each feature.
        offset: Log hazard of a case of zeros, relative to the mean training case.
        times: `[k]` months of the training follow-up, rising.
        cumulative_hazard: `[k]` of the mean training case (Breslow).
        converged, notes, num_cases, num_events, penalizer: As of `CoxProbe`.
    """

    params: Floats
    offset: float
    times: Floats
    cumulative_hazard: Floats
    converged: bool
    notes: tuple[str, ...]
    num_cases: int
    num_events: int
    penalizer: float

    @classmethod
    def of(cls, probe: CoxProbe) -> SavedCox:
        """Take what is needed out of a fitted probe."""
        baseline = probe.fitter.baseline_cumulative_hazard_
        zeros = np.zeros((1, len(probe.params)))
        return cls(
            probe.params,
            float(np.log(probe.partial_hazard(zeros)[0])),
            baseline.index.to_numpy(np.float64),
            baseline.iloc[:, 0].to_numpy(np.float64),
            probe.converged,
            probe.notes,
            probe.num_cases,
            probe.num_events,
            probe.penalizer,
        )

    def log_hazard(self, x: ArrayLike) -> Floats:
        """Return the log hazard `[n]` relative to the mean training case; higher dies sooner."""
        features = as_features("x", x, width=len(self.params))
        risk: Floats = features @ self.params + self.offset
        return risk

    def survival(self, x: ArrayLike, months: ArrayLike) -> Floats:
        """Return the probability `[n, m]` of living longer than each of `m` months.

        NaN after the last training time: nothing is known of it.
        """
        at = np.asarray(months, np.float64)
        index = np.searchsorted(self.times, at, side="right") - 1
        hazard = np.where(index < 0, 0.0, self.cumulative_hazard[np.maximum(index, 0)])
        hazard = np.where(at > self.times[-1], np.nan, hazard)
        return np.exp(-hazard * np.exp(self.log_hazard(x))[:, None])


@dataclass(frozen=True)
class ScopeProbes:
    """What is fitted for one task prompt and one scope; None where training could not carry it.

    Attributes:
        logistic: Of the class; None in the pooled scope of several sites, whose class numbers mean
            different diagnoses.
        cox: Of the risk.
        risk_cut: Median log hazard of the training cases that the Cox probe was fitted on.
        reference: For survival metrics.
        notes: Why something is missing, and what the fits complained about.
    """

    logistic: LogisticProbe | None
    cox: SavedCox | None
    risk_cut: float | None
    reference: SurvivalReference | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedProbes:
    """All probes of a run.

    Attributes:
        tasks: Names of the task prompts, a column of the embeddings each.
        sites: Sites with training cases, sorted; empty if none is named.
        probes: By task and scope (`POOLED`, and each site if there are several).
        site_probes: By task, which site a case is of; empty unless there are several.
        info: Provenance, JSON values.
    """

    tasks: tuple[str, ...]
    sites: tuple[str, ...]
    probes: Mapping[tuple[str, str], ScopeProbes]
    site_probes: Mapping[str, LogisticProbe] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scopes(self) -> tuple[str, ...]:
        """`POOLED`, then the sites of a run of several."""
        return (POOLED, *self.sites) if len(self.sites) > 1 else (POOLED,)

    def column(self, task: str) -> int:
        """Return the column of a task prompt.

        Raises:
            InputError: There is no such prompt.
        """
        if task not in self.tasks:
            raise InputError(f"task must be one of {', '.join(self.tasks)}, got {task!r}; pick one")
        return self.tasks.index(task)


def fit_probes(
    embeddings: ArrayLike,
    tasks: Sequence[str],
    labels: pd.DataFrame,
    *,
    followed: pd.DataFrame | None = None,
    penalizer: float = 0.1,
    info: Mapping[str, Any] | None = None,
) -> FittedProbes:
    """Fit everything that evaluation and prediction need, on training cases.

    Args:
        embeddings: `[n, T, d]`, frozen.
        tasks: T names.
        labels: n rows in the order of the embeddings, with columns `primary_class` (-1 none),
            `survival_months` and `event` (NaN none), and optionally `site`.
        followed: Rows of the same columns that censoring weights and times of survival metrics come
            from: all training cases, so that runs that read different cases are scored alike.
            Default: `labels`.
        penalizer: L2 penalty of the Cox probe; the published one is 0.1.
        info: Provenance to keep.

    Raises:
        InputError: Shapes do not fit, or an embedding is not finite.

    Source:
        METHOD 4.4, 4.5 and 4.7.
    """
    x = _by_task(embeddings, tasks)
    check_rows(x, labels, "labels")
    followed = labels if followed is None else followed
    site = site_names(labels)
    sites = tuple(sorted(set(site) - {""}))
    is_pan = len(sites) > 1
    fitted: dict[tuple[str, str], ScopeProbes] = {}
    site_probes: dict[str, LogisticProbe] = {}
    for column, task in enumerate(tasks):
        own = as_features(f"embeddings[:, {column}]", x[:, column])
        fitted[task, POOLED] = _fit_scope(own, labels, followed, penalizer, with_class=not is_pan)
        for name in sites if is_pan else ():
            rows = site == name
            seen = followed[site_names(followed) == name]
            fitted[task, name] = _fit_scope(own[rows], labels[rows], seen, penalizer)
        if is_pan:
            numbers = np.array([sites.index(s) if s else -1 for s in site])
            site_probes[task] = fit_logistic(own, numbers)
    return FittedProbes(tuple(tasks), sites, fitted, site_probes, dict(info or {}))


def _by_task(embeddings: ArrayLike, tasks: Sequence[str]) -> NDArray[Any]:
    x = np.asarray(embeddings)
    if x.ndim != 3 or x.shape[1] != len(tasks):
        raise InputError(
            f"embeddings must have shape [n, {len(tasks)}, d], a column per task prompt, got "
            f"{list(x.shape)}; embed the cases with this run"
        )
    return x


def site_names(labels: pd.DataFrame) -> Any:
    """Return the site `[n]` of each row as text, "" where unknown."""
    if "site" not in labels:
        return np.full(len(labels), "", dtype=object)
    return labels["site"].fillna("").astype(str).to_numpy(dtype=object)


def _fit_scope(
    x: Floats,
    labels: pd.DataFrame,
    followed: pd.DataFrame,
    penalizer: float,
    *,
    with_class: bool = True,
) -> ScopeProbes:
    notes: list[str] = []
    logistic = cox = cut = reference = None
    durations = labels["survival_months"].to_numpy(np.float64)
    events = labels["event"].to_numpy(np.float64)
    if with_class:
        try:
            logistic = fit_logistic(x, labels["primary_class"].to_numpy())
            notes += [] if logistic.converged else ["logistic probe stopped before it converged"]
        except ProbeError as error:
            notes.append(str(error))
    try:
        probe = fit_cox(x, durations, events, penalizer)
        cox = SavedCox.of(probe)
        reference = SurvivalReference.fit(followed["survival_months"], followed["event"])
        known = ~(np.isnan(durations) | np.isnan(events))
        cut = float(np.median(cox.log_hazard(x[known])))
        notes += probe.notes
    except ProbeError as error:
        notes.append(str(error))
    if notes:
        logger.info("probes: %s", "; ".join(notes))
    return ScopeProbes(logistic, cox, cut, reference, tuple(notes))


def classes_of(labels: pd.DataFrame) -> Ints:
    """Return the classes `[n]` of labelled rows, -1 where none."""
    return labels["primary_class"].fillna(-1).to_numpy(np.int64)
