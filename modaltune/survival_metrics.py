"""Metrics of predicted risk and survival that account for censoring, from plain arrays.

The weights of Uno's c-index, of the time-dependent AUC and of the Brier score come from the
censoring of the training cases, truncated where too few of those are left to tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lifelines import KaplanMeierFitter
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from modaltune.errors import InputError
from modaltune.probes import Floats, ProbeError, as_survival, check_rows

with warnings.catch_warnings():
    # torchsurv compiles a function with torch.jit.script when it is imported.
    warnings.simplefilter("ignore")
    from torchsurv.metrics.brier_score import BrierScore
    from torchsurv.metrics.cindex import ConcordanceIndex
    from torchsurv.stats.kaplan_meier import KaplanMeierEstimator

LEAST_UNCENSORED = 0.05  # of the training cases; below, one case would weigh 20 and more
AUC_QUANTILES = (0.25, 0.5, 0.75)  # of the training times of death
BRIER_TIMES = 24


@dataclass(frozen=True)
class SurvivalReference:
    """What survival metrics need to know beforehand, from the training cases only.

    Attributes:
        times: `[k]` months at which the censoring curve steps, rising.
        uncensored: `[k]` probability of not being censored up to and including that time.
        tau: Months after which nothing is counted: the last training time at which at least 5 %
            of the cases would still be uncensored.
        auc_times: Months at which the time-dependent AUC is taken: quartiles of the training
            times of death.
        brier_times: Months over which the Brier score is integrated.
    """

    times: Floats
    uncensored: Floats
    tau: float
    auc_times: Floats
    brier_times: Floats

    @classmethod
    def fit(cls, durations: ArrayLike, events: ArrayLike) -> SurvivalReference:
        """Estimate censoring and choose times on the training cases; rows with NaN are left out.

        Raises:
            ProbeError: No death is known.
        """
        time, died = as_survival(durations, events)
        known = ~(np.isnan(time) | np.isnan(died))
        time, died = time[known], died[known] == 1
        if not died.any():
            raise ProbeError(
                f"events must hold a death to fit survival metrics, got none over {len(time)} "
                "cases; leave survival out, or follow the cases longer"
            )
        curve = KaplanMeierEstimator()
        curve(torch.as_tensor(died), _f64(time), censoring_dist=True)
        steps, left = curve.time.numpy(), curve.km_est.double().numpy()
        tau = float(steps[left >= LEAST_UNCENSORED].max())
        deaths = time[died & (time <= tau)] if (died & (time <= tau)).any() else time[died]
        first, last = np.quantile(deaths, [0.05, 0.95])
        return cls(
            steps,
            left,
            tau,
            np.unique(np.quantile(deaths, AUC_QUANTILES)),
            np.unique(np.linspace(first, min(last, tau), BRIER_TIMES)),
        )

    def weights(self, times: ArrayLike) -> Floats:
        """Return the inverse probability of being uncensored `[n]` at times; 0 where that is 0."""
        at = np.asarray(times, np.float64)
        index = np.searchsorted(self.times, at, side="right") - 1
        left = np.where(index < 0, 1.0, self.uncensored[np.maximum(index, 0)])
        return np.divide(1.0, left, out=np.zeros_like(left), where=left > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the reference as JSON values."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SurvivalReference:
        """Rebuild from `to_dict`."""
        arrays = {k: np.asarray(v, np.float64) for k, v in state.items() if k != "tau"}
        return cls(**arrays, tau=float(state["tau"]))


def uno_c_index(
    durations: ArrayLike, events: ArrayLike, risk: ArrayLike, reference: SurvivalReference
) -> float:
    """Return Uno's c-index, truncated at `reference.tau`; NaN if no pair can be compared.

    Args:
        durations: `[n]` months, without NaN.
        events: `[n]` 1 died, 0 censored.
        risk: `[n]`, a higher one should die sooner.
        reference: Of the training cases.

    Source:
        Uno et al. 2011.
    """
    time, died, score = _complete(durations, events, risk)
    if not _comparable(time, died, reference.tau):
        return float("nan")
    # Ranks for risks: torchsurv takes risks within 1e-8 of one another for tied.
    index = ConcordanceIndex()(
        _f64(rankdata(score, method="dense")),
        torch.as_tensor(died),
        _f64(time),
        weight=_f64(reference.weights(time)),
        tmax=_f64(reference.tau),
    )
    return float(index)


def dynamic_auc(
    durations: ArrayLike,
    events: ArrayLike,
    risk: ArrayLike,
    reference: SurvivalReference,
    times: ArrayLike,
) -> tuple[Floats, float]:
    """Return the cumulative/dynamic AUC at `times` `[k]` and its mean, weighted by the deaths.

    At each time, cases dead by then are told from cases alive after it. NaN at a time that has
    none of either; the mean runs over the others.

    Source:
        Hung and Chiang 2010; Lambert and Chevret 2016 for the mean.
    """
    time, died, score = _complete(durations, events, risk)
    at, weight = np.asarray(times, np.float64), reference.weights(time)
    area = np.full(len(at), np.nan)
    for k, t in enumerate(at):
        gone, alive = died & (time <= t) & (weight > 0), time > t
        if gone.any() and alive.any():
            told = gone | alive
            of_dead = np.where(gone, weight, 1.0)[told]
            area[k] = roc_auc_score(gone[told], score[told], sample_weight=of_dead)
    usable = ~np.isnan(area)
    if not usable.any():
        return area, float("nan")
    curve = KaplanMeierFitter().fit(time, died).survival_function_at_times(at[usable])
    deaths = -np.diff(curve.to_numpy(np.float64), prepend=1.0)
    return area, float(np.average(area[usable], weights=deaths))


def brier_curve(
    durations: ArrayLike,
    events: ArrayLike,
    survival: ArrayLike,
    reference: SurvivalReference,
    times: ArrayLike,
) -> Floats:
    """Return the censoring-weighted Brier score `[k]` of survival curves `[n, k]` at times.

    Source:
        Graf et al. 1999.
    """
    time, died, _ = _complete(durations, events, np.zeros(len(np.asarray(durations))))
    at, curves = np.asarray(times, np.float64), np.asarray(survival, np.float64)
    if curves.shape != (len(time), len(at)) or not np.isfinite(curves).all():
        raise InputError(
            f"survival must be finite and have shape [{len(time)}, {len(at)}], a curve per case, "
            f"got {list(curves.shape)}; predict at times within the training follow-up"
        )
    if len(time) == 1:  # torchsurv refuses a single case; the mean over two of the same is the same
        time, died, curves = (np.repeat(value, 2, axis=0) for value in (time, died, curves))
    score = BrierScore()(
        _f64(curves),
        torch.as_tensor(died),
        _f64(time),
        new_time=_f64(at),
        weight=_f64(reference.weights(time)),
        weight_new_time=_f64(reference.weights(at)),
    )
    return score.numpy()


def integrated_brier_score(
    durations: ArrayLike,
    events: ArrayLike,
    survival: ArrayLike,
    reference: SurvivalReference,
    times: ArrayLike,
) -> float:
    """Return the mean of `brier_curve` over time (trapezoids).

    NaN for fewer than two times, and where nobody died.
    """
    at = np.asarray(times, np.float64)
    if len(at) < 2 or not np.asarray(events).any():
        return float("nan")
    curve = brier_curve(durations, events, survival, reference, at)
    return float(np.trapezoid(curve, at) / (at[-1] - at[0]))


def _complete(
    durations: ArrayLike, events: ArrayLike, risk: ArrayLike
) -> tuple[Floats, Any, Floats]:
    """Return durations, bool events and risks; rows with NaN are the caller's to leave out."""
    time, died = as_survival(durations, events)
    score = np.asarray(risk, np.float64)
    check_rows(time, score, "risk")
    if np.isnan([time, died, score]).any():
        raise InputError(
            "durations, events and risk must be known here, got NaN; leave those cases out and "
            "count them"
        )
    return time, died == 1, score


def _comparable(time: Floats, died: Any, tau: float) -> bool:
    """Tell whether some case died before tau while another was still under observation."""
    if not (died & (time < tau)).any():
        return False
    first = time[died & (time < tau)].min()
    return bool((time > first).any() or (~died & (time == first)).any())


def _f64(values: ArrayLike) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))
