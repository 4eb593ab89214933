"""Both probes against first principles: zero gradients, another library, hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

from modaltune.errors import CohortError, InputError
from modaltune.probes import ProbeError, fit_cox, fit_logistic

Floats = NDArray[np.float64]


def _features(n: int, d: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_logistic_is_the_optimum_of_liblinears_objective(classes: int) -> None:
    """Gradient of |w|^2/2 + b^2/2 + C sum log(1 + exp(-y f)) must vanish, class by class."""
    x = _features(120, 6)
    y = np.random.default_rng(1).integers(-1, classes, 120)
    probe = fit_logistic(x, y, c=0.7)
    assert probe.converged
    assert probe.num_cases == (y >= 0).sum()
    assert probe.labels.tolist() == list(range(classes))
    x, y = x[y >= 0], y[y >= 0]
    positives = [1] if classes == 2 else range(classes)
    assert probe.coef.shape == (len(positives), 6)
    for row, label in enumerate(positives):
        sign = np.where(y == label, 1.0, -1.0)
        pull = 0.7 * sign * expit(-sign * (x @ probe.coef[row] + probe.intercept[row]))
        # liblinear stops at a relative gradient of 1e-4 (its default), about 0.01 here.
        assert probe.coef[row] - pull @ x == pytest.approx(np.zeros(6), abs=2e-2)
        assert probe.intercept[row] - pull.sum() == pytest.approx(0, abs=2e-2)


def test_logistic_probabilities_are_normalised_one_vs_rest() -> None:
    x = _features(90, 4)
    y = np.digitize(x[:, 0], [-0.5, 0.5])
    probe = fit_logistic(x, y)
    proba = probe.predict_proba(x)
    assert proba.sum(1) == pytest.approx(np.ones(90))
    for row in range(3):
        each = [
            1 / (1 + np.exp(-(x[row] @ w + b)))
            for w, b in zip(probe.coef, probe.intercept, strict=True)
        ]
        assert proba[row] == pytest.approx(np.array(each) / sum(each))
    assert (probe.predict(x) == proba.argmax(1)).all()
    assert (probe.predict(x) == y).mean() > 0.7


def test_logistic_two_classes_keep_their_own_labels() -> None:
    x = _features(60, 3)
    y = np.where(x[:, 1] > 0, 7, 4)
    probe = fit_logistic(x, y)
    assert set(probe.predict(x)) == {4, 7}
    assert (probe.predict(x) == y).mean() > 0.9
    assert logit(probe.predict_proba(x)[:, 1]) == pytest.approx(probe.decision(x)[:, 0])


def test_logistic_reports_an_iteration_limit_it_hit() -> None:
    x = _features(80, 5) * [1, 10, 100, 1000, 10000]
    assert not fit_logistic(x, (x[:, 0] > 0).astype(int), max_iter=1).converged


def test_logistic_extreme_features_give_probabilities() -> None:
    probe = fit_logistic(_features(60, 2), np.arange(60) % 3)
    proba = probe.predict_proba(np.array([[1e6, -1e6], [-1e6, 1e6]]))
    assert np.isfinite(proba).all()
    assert proba.sum(1) == pytest.approx([1, 1])


def _survival(x: Floats, seed: int = 2) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    time = rng.exponential(np.exp(-x[:, 0]))
    censoring = rng.exponential(2.0, len(x))
    # Rounded up, so that tied times occur.
    return np.ceil(20 * np.minimum(time, censoring)), (time <= censoring).astype(float)


def test_cox_without_penalty_equals_scikit_survival() -> None:
    x = _features(150, 4)
    time, died = _survival(x)
    assert len(np.unique(time)) < len(time)
    model = CoxPHSurvivalAnalysis(ties="efron", tol=1e-14)
    exact = model.fit(x, Surv.from_arrays(died.astype(bool), time)).coef_
    probe = fit_cox(x, time, died, penalizer=0.0)
    assert probe.converged
    # lifelines stops when the likelihood moves by less than 1e-9, so params are good to about
    # the root of that.
    assert probe.params == pytest.approx(exact, abs=3e-4)
    ratio = np.log(probe.partial_hazard(x)) - x @ exact
    assert ratio == pytest.approx(np.full(150, ratio[0]), abs=1e-3)


def test_cox_drops_rows_with_nan_and_nothing_else() -> None:
    x = _features(100, 3)
    time, died = _survival(x)
    holes = x.copy()
    holes[0, 1] = np.nan
    late, unknown = time.copy(), died.copy()
    late[1], unknown[2] = np.nan, np.nan
    probe = fit_cox(holes, late, unknown)
    clean = fit_cox(x[3:], time[3:], died[3:])
    assert probe.num_cases == clean.num_cases == 97
    assert probe.num_events == int(died[3:].sum())
    assert probe.params == pytest.approx(clean.params, rel=1e-12)
    hazard = probe.partial_hazard(holes)
    assert np.isnan(hazard[0])
    assert np.isfinite(hazard[1:]).all()
    assert probe.c_index(holes, late, unknown) == clean.c_index(x[3:], time[3:], died[3:])


def test_cox_gives_constant_features_no_weight() -> None:
    x = _features(100, 3)
    time, died = _survival(x)
    padded = np.insert(x, 1, 4.0, axis=1)
    probe, plain = fit_cox(padded, time, died), fit_cox(x, time, died)
    assert probe.params == pytest.approx(np.insert(plain.params, 1, 0.0), rel=1e-12)
    assert probe.partial_hazard(padded) == pytest.approx(plain.partial_hazard(x), rel=1e-12)
    assert probe.notes == ("1 features constant in training, left out",)
    assert probe.converged


def test_cox_reports_that_it_did_not_converge() -> None:
    x = _features(30, 2)
    time = np.random.default_rng(2).exponential(size=30)
    x[:, 0] = 100 * time  # complete separation: the likelihood has no maximum
    probe = fit_cox(x, time, np.ones(30), penalizer=0.0)
    assert not probe.converged
    assert any("failed to converge" in note for note in probe.notes)
    wide = _features(10, 20)
    with pytest.raises(ProbeError, match=r"must converge, got .* raise the penalizer \(now 0\)"):
        fit_cox(wide, time[:10], np.ones(10), penalizer=0.0)
    # More features than cases is worth a note, but the penalised fit did converge.
    assert fit_cox(wide, time[:10], np.ones(10), penalizer=0.1).converged


def test_cox_without_comparable_pairs_has_no_c_index() -> None:
    x = _features(60, 2)
    time, died = _survival(x)
    probe = fit_cox(x, time, died)
    assert np.isnan(probe.c_index(x, time, np.zeros(60)))
    assert np.isnan(probe.c_index(x[:0], [], []))
    assert 0.5 < probe.c_index(x, time, died) <= 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"y": [1] * 30}, ProbeError, r"at least two classes, got \[1\] over 30"),
        ({"y": [-1] * 30}, ProbeError, r"at least two classes, got \[\] over 0"),
        ({"y": [0, 1]}, InputError, "y must have one row per case, got 2 for 30"),
        ({"y": [0.5] * 30}, CohortError, "whole numbers from -1 up, one per case, got 0.5"),
        ({"y": [-2] * 30}, CohortError, "whole numbers from -1 up, one per case, got -2"),
        ({"y": [[0, 1]] * 15}, CohortError, r"one per case, got shape \[15, 2\]"),
        ({"x": [1.0] * 30}, InputError, r"x must have shape \[n, d\], got \[30\]"),
        (
            {"x": [[np.nan, 1.0]] * 30},
            InputError,
            "x must be finite, got 30 bad values, .* row 0",
        ),
    ],
)
def test_logistic_bad_input(changed: dict[str, object], error: type, message: str) -> None:
    arguments = {"x": _features(30, 2), "y": np.arange(30) % 2} | changed
    with pytest.raises(error, match=message):
        fit_logistic(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"durations": [-1.0, 2.0, 3.0]},
            CohortError,
            "durations must be 0 or more, got -1 in row 0",
        ),
        (
            {"durations": [1.0, 2.0]},
            CohortError,
            r"one number per case, got shapes \[2\] and \[3\]",
        ),
        (
            {"durations": [1.0, np.inf, 2.0]},
            CohortError,
            "durations must be 0 or more, got inf in row 1",
        ),
        ({"events": [1, 0, 2]}, CohortError, r"events must be 1 \(died\) or 0 .* got 2 in row 2"),
        (
            {"events": [0, 0, 0]},
            ProbeError,
            "got 0 deaths and 2 such features over 3",
        ),
        ({"x": [[1.0, 2.0]] * 3}, ProbeError, "got 2 deaths and 0 such features over 3"),
        ({"x": [[1.0, np.inf]] * 3}, InputError, "x must be finite, got 3 bad values"),
        ({"x": [[1.0, 2.0]] * 2}, InputError, "durations must have one row per case, got 3 for 2"),
        ({"penalizer": -0.1}, InputError, "penalizer must be 0 or more, got -0.1"),
    ],
)
def test_cox_bad_input(changed: dict[str, object], error: type, message: str) -> None:
    arguments = {"x": _features(3, 2), "durations": [1.0, 2.0, 3.0], "events": [1, 0, 1]} | changed
    with pytest.raises(error, match=message):
        fit_cox(**arguments)


def test_probes_refuse_features_of_another_width() -> None:
    x = _features(40, 3)
    with pytest.raises(InputError, match=r"x must have shape \[n, 3\], got \[5, 2\]"):
        fit_logistic(x, np.arange(40) % 2).predict(np.zeros((5, 2)))
    with pytest.raises(InputError, match=r"x must have shape \[n, 3\], got \[5, 2\]"):
        fit_cox(x, *_survival(x)).partial_hazard(np.zeros((5, 2)))
