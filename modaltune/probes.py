"""The linear probes: logistic regression for the class, a Cox model for the risk.

An embedding is judged by what a linear model reads off it. Both probes are fitted on frozen
features exactly as published (METHOD 4.4), and keep what is needed to score other cases.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter
from lifelines.exceptions import ConvergenceError
from lifelines.exceptions import ConvergenceWarning as CoxWarning
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning as LogisticWarning
from sklearn.linear_model import LogisticRegression

from modaltune.errors import CohortError, InputError

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What lifelines says about the data rather than about the fit; any other warning of its Newton
# steps counts as "did not converge", so that a reworded one errs on the side of caution.
_COX_ADVICE = ("more variables than samples", "very low variance")


class ProbeError(InputError):
    """The cases given can't carry this probe: one class only, no death, no convergence."""


@dataclass(frozen=True)
class LogisticProbe:
    """One-vs-rest logistic regression (two classes: a single one).

    Attributes:
        labels: `[k]` int classes in rising order.
        coef: `[k, d]` per class against the rest; `[1, d]` for the second of two classes.
        intercept: `[k]` or `[1]`; penalised, as liblinear does.
        converged: every fit stopped before its iteration limit.
        num_cases: classified cases it was fitted on.
    """

    labels: Ints
    coef: Floats
    intercept: Floats
    converged: bool
    num_cases: int

    def decision(self, x: ArrayLike) -> Floats:
        """Return the log-odds `[n, k]` (`[n, 1]` for two classes) of features `[n, d]`."""
        features = as_features("x", x, width=self.coef.shape[1])
        scores: Floats = features @ self.coef.T + self.intercept
        return scores

    def predict(self, x: ArrayLike) -> Ints:
        """Return the most likely class `[n]` of features `[n, d]`."""
        scores = self.decision(x)
        best = (scores[:, 0] > 0).astype(np.int64) if len(self.labels) == 2 else scores.argmax(1)
        return self.labels[best]

    def predict_proba(self, x: ArrayLike) -> Floats:
        """Return probabilities `[n, k]`: one-vs-rest ones, made to sum to 1 as liblinear does."""
        scores = self.decision(x)
        each = expit(scores)
        if len(self.labels) == 2:
            return np.concatenate([1 - each, each], axis=1)
        total = each.sum(1, keepdims=True)
        uniform = np.full_like(each, 1 / len(self.labels))
        return np.divide(each, total, out=uniform, where=total > 0)


@dataclass(frozen=True)
class CoxProbe:
    """A penalised Cox model of lifelines.

    Attributes:
        params: `[d]` log hazard ratio per unit of each feature; 0 where constant in training.
        converged: Newton's steps ended as they should; if not, `notes` says what lifelines said.
        notes: warnings of the fit and features left out.
        num_cases: cases it was fitted on, after dropping rows with NaN.
        num_events: deaths among them.
        penalizer: L2 penalty.
        fitter: the lifelines model behind it, over the features that vary.
    """

    params: Floats
    converged: bool
    notes: tuple[str, ...]
    num_cases: int
    num_events: int
    penalizer: float
    fitter: CoxPHFitter = field(repr=False, compare=False)

    def partial_hazard(self, x: ArrayLike) -> Floats:
        """Return the hazard `[n]` relative to the mean training case; NaN where features are."""
        features = as_features("x", x, width=len(self.params), allow_nan=True)
        frame = self._frame(features)
        known = frame.notna().all(axis=1).to_numpy()
        out = np.full(len(features), np.nan)
        if known.any():
            out[known] = self.fitter.predict_partial_hazard(frame[known]).to_numpy()
        return out

    def c_index(self, x: ArrayLike, durations: ArrayLike, events: ArrayLike) -> float:
        """Return Harrell's c-index over the rows without NaN; NaN if no pair can be compared."""
        features = as_features("x", x, width=len(self.params), allow_nan=True)
        time, died = as_survival(durations, events)
        check_rows(features, time, "durations")
        frame = self._frame(features).assign(duration=time, event=died).dropna()
        if frame.empty:
            return float("nan")
        try:
            return float(self.fitter.score(frame, scoring_method="concordance_index"))
        except ZeroDivisionError:
            return float("nan")

    def _frame(self, features: Floats) -> pd.DataFrame:
        """Name columns as in training and keep those that the fitter knows."""
        named = pd.DataFrame(features, columns=_feature_names(len(self.params)))
        return named[list(self.fitter.params_.index)]


def fit_logistic(
    x: ArrayLike,
    y: ArrayLike,
    *,
    c: float = 1.0,
    max_iter: int = 200,
    seed: int = 0,
    intercept_scaling: float = 1.0,
) -> LogisticProbe:
    """Fit the published logistic probe: liblinear, L2, one class against the rest.

    Args:
        x: `[n, d]` features.
        y: `[n]` integer classes; cases of class -1 are left out.
        c: Inverse of the L2 penalty.
        max_iter: Iteration limit of liblinear.
        seed: Its random state.
        intercept_scaling: Value of liblinear's constant feature; its weight is penalised, too.

    Raises:
        InputError: Shapes do not fit or a feature is not finite.
        ProbeError: Fewer than two classes.

    Source:
        METHOD 4.4 and 4.5.
    """
    features, classes = as_features("x", x), as_classes(y)
    check_rows(features, classes, "y")
    features, classes = features[classes >= 0], classes[classes >= 0]
    labels = np.unique(classes)
    if len(labels) < 2:
        raise ProbeError(
            f"y must hold at least two classes, got {labels.tolist()} over {len(classes)} "
            "classified cases; add cases of another class or leave the logistic probe out"
        )
    # One binary fit per class is what liblinear does inside; scikit-learn >= 1.8 refuses to.
    positives = labels[1:] if len(labels) == 2 else labels
    fits, converged = [], True
    for label in positives:
        model = LogisticRegression(
            solver="liblinear",
            C=c,
            max_iter=max_iter,
            random_state=seed,
            intercept_scaling=intercept_scaling,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fits.append(model.fit(features, classes == label))
        converged &= not any(issubclass(w.category, LogisticWarning) for w in caught)
    if not converged:
        logger.warning("logistic probe: liblinear stopped at %d iterations", max_iter)
    coef = np.concatenate([fit.coef_ for fit in fits])
    intercept = np.concatenate([fit.intercept_ for fit in fits])
    return LogisticProbe(labels, coef, intercept, converged, len(classes))


def fit_cox(
    x: ArrayLike, durations: ArrayLike, events: ArrayLike, penalizer: float = 0.1
) -> CoxProbe:
    """Fit the published Cox probe (lifelines, L2 penalty).

    Args:
        x: `[n, d]` features.
        durations: `[n]` times to death or last follow-up, months.
        events: `[n]`, 1 = died, 0 = censored.
        penalizer: L2 penalty, 0 for none. Rows with NaN anywhere are dropped. Features that are
            constant over the rest carry nothing and get the coefficient 0.

    Raises:
        InputError: Shapes do not fit, a feature is infinite, a duration negative.
        ProbeError: No death, no feature that varies, or Newton's steps broke down.

    Source:
        METHOD 4.4 and 4.5.
    """
    if not penalizer >= 0:
        raise InputError(f"penalizer must be 0 or more, got {penalizer}; the published one is 0.1")
    features = as_features("x", x, allow_nan=True)
    time, died = as_survival(durations, events)
    check_rows(features, time, "durations")
    names = _feature_names(features.shape[1])
    frame = pd.DataFrame(features, columns=names).assign(duration=time, event=died).dropna()
    deaths = int(frame["event"].sum())
    varying = [name for name in names if frame[name].nunique() > 1]
    if not deaths or not varying:
        raise ProbeError(
            f"the Cox probe must have a death and a feature that varies, got {deaths} deaths and "
            f"{len(varying)} such features over {len(frame)} complete cases; add followed-up cases"
        )
    fitter, notes = _newton(frame[[*varying, "duration", "event"]], penalizer)
    converged = all(any(advice in note for advice in _COX_ADVICE) for note in notes)
    if not converged:
        logger.warning("Cox probe (penalizer %g) did not converge: %s", penalizer, notes)
    if len(varying) < len(names):
        notes = (*notes, f"{len(names) - len(varying)} features constant in training, left out")
    params = fitter.params_.reindex(names, fill_value=0.0).to_numpy(dtype=np.float64)
    return CoxProbe(params, converged, notes, len(frame), deaths, penalizer, fitter)


def _newton(frame: pd.DataFrame, penalizer: float) -> tuple[CoxPHFitter, tuple[str, ...]]:
    """Fit lifelines' Cox model; return it and what it warned about, a line each."""
    fitter = CoxPHFitter(penalizer=penalizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitter.fit(frame, duration_col="duration", event_col="event")
        except (ConvergenceError, np.linalg.LinAlgError) as error:
            raise ProbeError(
                f"the Cox probe must converge, got {str(error).split('. ')[0]!r} over "
                f"{len(frame)} cases; raise the penalizer (now {penalizer:g})"
            ) from error
    said = [str(w.message) for w in caught if issubclass(w.category, CoxWarning)]
    return fitter, tuple(" ".join(message.split()) for message in said)


def _feature_names(width: int) -> list[str]:
    return [f"x{k}" for k in range(width)]


def as_features(
    name: str, x: ArrayLike, *, width: int | None = None, allow_nan: bool = False
) -> Floats:
    """Return features as float64 `[n, d]`.

    Raises:
        InputError: Another shape, another width than `width`, or values that are not finite.
    """
    features = np.asarray(x, dtype=np.float64)
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        wanted = "[n, d]" if width is None else f"[n, {width}]"
        raise InputError(
            f"{name} must have shape {wanted}, got {list(features.shape)}; "
            "pass one row of features per case"
        )
    bad = np.isinf(features) if allow_nan else ~np.isfinite(features)
    if bad.any():
        raise InputError(
            f"{name} must be finite, got {int(bad.sum())} bad values, the first in row "
            f"{int(bad.any(1).argmax())}; embed these cases again"
        )
    return features


def as_classes(y: ArrayLike) -> Ints:
    """Return classes as int64 `[n]`, -1 = not classified.

    Raises:
        CohortError: Not one-dimensional, not whole numbers, or below -1.
    """
    given = np.asarray(y, dtype=np.float64)
    bad = given[~((given >= -1) & (given == np.floor(given)) & np.isfinite(given))]
    if given.ndim != 1 or len(bad):
        got = f"{bad[0]:g}" if len(bad) else f"shape {list(given.shape)}"
        raise CohortError(
            f"classes must be whole numbers from -1 up, one per case, got {got}; "
            "write -1 for a case that is not classified"
        )
    return given.astype(np.int64)


def as_survival(durations: ArrayLike, events: ArrayLike) -> tuple[Floats, Floats]:
    """Return durations and events as float64 `[n]` each, NaN = unknown.

    Raises:
        CohortError: Lengths differ, a duration is negative or infinite, an event neither 0 nor 1.
    """
    time, died = np.asarray(durations, np.float64), np.asarray(events, np.float64)
    if time.ndim != 1 or time.shape != died.shape:
        raise CohortError(
            f"durations and events must be one number per case, got shapes {list(time.shape)} and "
            f"{list(died.shape)}; write NaN where unknown"
        )
    if (bad := (time < 0) | np.isinf(time)).any():
        raise CohortError(
            f"durations must be 0 or more, got {time[bad][0]:g} in row {int(bad.argmax())}; "
            "correct the dates or write NaN"
        )
    if (bad := ~np.isnan(died) & (died != 0) & (died != 1)).any():
        raise CohortError(
            f"events must be 1 (died) or 0 (censored), got {died[bad][0]:g} in row "
            f"{int(bad.argmax())}; write NaN where unknown"
        )
    return time, died


def check_rows(first: ArrayLike, second: ArrayLike, name: str) -> None:
    """Raise InputError unless both have as many rows; `name` is what the second one is."""
    if len(np.asarray(first)) != len(np.asarray(second)):
        raise InputError(
            f"{name} must have one row per case, got {len(np.asarray(second))} for "
            f"{len(np.asarray(first))}; join rows by case id"
        )
