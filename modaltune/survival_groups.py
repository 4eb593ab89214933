"""Low and high risk: groups by a cut of the training cases, and how their survival differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from numpy.typing import ArrayLike, NDArray

from modaltune.errors import InputError
from modaltune.probes import Floats, as_survival, check_rows

GROUPS = ("low", "high")


@dataclass(frozen=True)
class SurvivalCurve:
    """A Kaplan-Meier curve with its 95 % band.

    Attributes:
        times: `[k]` months, beginning with 0.
        surviving, low, high: `[k]` 0-1.
        durations, events: `[n]` of the cases behind it.
        median: Months until half have died; infinite if that is not reached.
    """

    times: Floats
    surviving: Floats
    low: Floats
    high: Floats
    durations: Floats
    events: Floats
    median: float

    def at_risk(self, months: ArrayLike) -> NDArray[np.int64]:
        """Return how many cases are still under observation at each time."""
        return (self.durations[None] >= np.asarray(months, np.float64)[:, None]).sum(1)


@dataclass(frozen=True)
class RiskGroups:
    """Cases split by predicted risk.

    Attributes:
        names: Of the groups that have cases, in rising risk.
        curves: One per name.
        cut: Risk above which a case is at high risk, from the training cases.
        p_value: Of the log-rank test between the groups; NaN if there is one group only or nobody
            died.
    """

    names: tuple[str, ...]
    curves: tuple[SurvivalCurve, ...]
    cut: float
    p_value: float


def kaplan_meier(durations: ArrayLike, events: ArrayLike) -> SurvivalCurve:
    """Return the Kaplan-Meier curve of cases `[n]` without NaN."""
    time, died = as_survival(durations, events)
    fitted = KaplanMeierFitter().fit(time, died)
    band = fitted.confidence_interval_.to_numpy()
    return SurvivalCurve(
        fitted.survival_function_.index.to_numpy(np.float64),
        fitted.survival_function_.iloc[:, 0].to_numpy(np.float64),
        band[:, 0],
        band[:, 1],
        time,
        died,
        float(fitted.median_survival_time_),
    )


def group_of(risk: ArrayLike, cut: float) -> list[str]:
    """Return the group of each risk: "high" above the cut, else "low"; "" where NaN."""
    return [
        "" if np.isnan(value) else GROUPS[int(value > cut)] for value in np.asarray(risk, float)
    ]


def risk_groups(durations: ArrayLike, events: ArrayLike, risk: ArrayLike, cut: float) -> RiskGroups:
    """Split cases at a cut that was fixed beforehand and compare their survival.

    Args:
        durations: `[n]` months, without NaN.
        events: `[n]` 1 died, 0 censored.
        risk: `[n]` on the scale of the cut.
        cut: Median risk of the training cases.

    Raises:
        InputError: Lengths differ, a value is NaN, or no case.
    """
    time, died = as_survival(durations, events)
    score = np.asarray(risk, np.float64)
    check_rows(time, score, "risk")
    if not len(time) or np.isnan([time, died, score]).any() or np.isnan(cut):
        raise InputError(
            f"risk_groups must get known values of at least one case, got {len(time)} cases and "
            "perhaps NaN; leave out cases without follow-up or risk"
        )
    owner = pd.Series(group_of(score, cut))
    names = tuple(name for name in GROUPS if (owner == name).any())
    curves = tuple(kaplan_meier(time[owner == name], died[owner == name]) for name in names)
    return RiskGroups(names, curves, float(cut), log_rank_p(curves))


def log_rank_p(curves: Sequence[SurvivalCurve]) -> float:
    """Return the p value of the log-rank test between groups; NaN for one group or no death."""
    time = np.concatenate([curve.durations for curve in curves])
    died = np.concatenate([curve.events for curve in curves])
    group = np.repeat(np.arange(len(curves)), [len(curve.durations) for curve in curves])
    if len(curves) < 2 or not died.any():
        return float("nan")
    return float(multivariate_logrank_test(time, group, died).p_value)
