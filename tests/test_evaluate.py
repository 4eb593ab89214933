"""Golden probes, metrics against brute force and scikit-learn, intervals, scores per task."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.metrics import balanced_accuracy_score

from modaltune.errors import CohortError, InputError
from modaltune.evaluate import (
    ProbeLabels,
    accuracy,
    balanced_accuracy,
    bootstrap_interval,
    fit_logistic,
    golden_evaluation,
    harrell_c_index,
    probe_tasks,
)

GOLDEN = ["case7_eval_3class", "case7_eval_binary"]
# Keys of the stored metrics that describe the reference's own cross-check, not an outcome.
ABOUT_THE_REFERENCE = {"one_vs_rest_identical_predictions", "one_vs_rest_max_coef_diff"}


def _golden(shared_dir: Path, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    folder = shared_dir / "golden"
    return load_file(folder / f"{name}.safetensors"), json.loads(
        (folder / f"{name}.json").read_text()
    )


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tensors(shared_dir: Path, name: str) -> None:
    tensors, meta = _golden(shared_dir, name)
    got = golden_evaluation(tensors, meta)
    stored = {key: value for key, value in tensors.items() if key.startswith("out/")}
    assert stored.keys() == {key for key in got if key.startswith("out/")}
    for key, value in stored.items():
        assert np.shape(got[key]) == value.shape
        if key.endswith("lr_pred"):
            assert (got[key] == value).all(), key
        else:
            np.testing.assert_allclose(got[key], value, atol=1e-4, rtol=0, err_msg=key)


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_metrics(shared_dir: Path, name: str) -> None:
    tensors, meta = _golden(shared_dir, name)
    got = golden_evaluation(tensors, meta)
    for task, metrics in meta["metrics"].items():
        for metric in metrics.keys() - ABOUT_THE_REFERENCE:
            tolerance = 1e-6 if "c_index" in metric else 1e-12
            assert got[f"metrics/{task}.{metric}"] == pytest.approx(metrics[metric], abs=tolerance)


@pytest.mark.shared
def test_golden_follows_options_and_inputs(shared_dir: Path) -> None:
    tensors, meta = _golden(shared_dir, "case7_eval_binary")
    base = golden_evaluation(tensors, meta)
    weaker = golden_evaluation(tensors, {**meta, "cox": {"penalizer": 1.0}})
    assert np.abs(weaker["out/0.cox_params"]).sum() < np.abs(base["out/0.cox_params"]).sum()
    tighter = golden_evaluation(tensors, {**meta, "logistic": {**meta["logistic"], "C": 0.01}})
    assert np.abs(tighter["out/0.lr_coef"]).sum() < np.abs(base["out/0.lr_coef"]).sum()
    with pytest.raises(InputError, match="must be liblinear and l2, got lbfgs and l2"):
        golden_evaluation(tensors, {"logistic": {"solver": "lbfgs"}})
    # A test case of class -1 counts as a class nobody predicts.
    flipped = {**tensors, "in/test.primary_class": tensors["in/test.primary_class"].copy()}
    right = np.flatnonzero(base["out/0.lr_pred"] == tensors["in/test.primary_class"])[0]
    flipped["in/test.primary_class"][right] = -1
    got = golden_evaluation(flipped, meta)
    assert got["metrics/0.test_accuracy"] == pytest.approx(base["metrics/0.test_accuracy"] - 1 / 60)
    assert got["metrics/0.test_balanced_accuracy"] < 0.7 * base["metrics/0.test_balanced_accuracy"]


pairs = st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=40)


@given(pairs)
def test_balanced_accuracy_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    true, pred = np.array(pairs).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(true, pred)
    assert balanced_accuracy(true, pred) == pytest.approx(expected)
    assert accuracy(true, pred) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_metrics_of_no_cases_are_undefined() -> None:
    assert np.isnan(accuracy([], []))
    assert np.isnan(balanced_accuracy([], []))
    assert np.isnan(harrell_c_index([], [], []))


cases = st.tuples(st.integers(0, 6), st.integers(0, 1), st.integers(-3, 3))


@settings(max_examples=50)
@given(st.lists(cases, min_size=1, max_size=20))
def test_c_index_equals_counting_pairs(cases: list[tuple[int, int, int]]) -> None:
    """A pair counts if the first case died before the other's time, or at it while it lived on."""
    points = comparable = 0.0
    for time_a, died_a, risk_a in cases:
        for time_b, died_b, risk_b in cases:
            if died_a and (time_a < time_b or (time_a == time_b and not died_b)):
                comparable += 1
                points += 1.0 if risk_a > risk_b else 0.5 * (risk_a == risk_b)
    durations, events, risk = np.array(cases, dtype=float).T
    got = harrell_c_index(durations, events, risk)
    assert got == pytest.approx(points / comparable) if comparable else np.isnan(got)
    # Cases with anything unknown are left out.
    extra = harrell_c_index(
        [*durations, 9.0, np.nan, 3.0], [*events, 1, 1, np.nan], [*risk, np.nan, 5, 5]
    )
    assert extra == pytest.approx(got, nan_ok=True)


def test_bootstrap_of_a_mean_has_the_normal_width() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_interval(np.mean, values, resamples=2000, seed=3)
    half = 1.96 * values.std() / np.sqrt(400)
    # 2,000 resamples place a 95 % end within about 6 % of its own distance.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.12 * half)
    assert (interval.level, interval.resamples) == (0.95, 2000)
    assert interval == bootstrap_interval(np.mean, values, resamples=2000, seed=3)
    assert interval != bootstrap_interval(np.mean, values, resamples=2000, seed=4)
    narrow = bootstrap_interval(np.mean, values, resamples=2000, seed=3, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * half / 1.96, rel=0.1)


def test_bootstrap_draws_patients_whole() -> None:
    patients = np.array(["c", "a", "c", "b", "a", "c"])
    sizes = {"a": 2, "b": 1, "c": 3}
    seen = []

    def look(ids: NDArray[Any], row: NDArray[Any]) -> float:
        drawn = 0
        for name, size in sizes.items():
            rows = row[ids == name]
            assert len(rows) % size == 0
            assert set(rows) in (set(), set(np.flatnonzero(patients == name)))
            drawn += len(rows) // size
        seen.append(drawn)
        return 0.0

    bootstrap_interval(look, patients, np.arange(6), patients=patients, resamples=50)
    assert seen == [3] * 50


def test_bootstrap_counts_undefined_resamples() -> None:
    def needs_a_death(events: NDArray[Any]) -> float:
        return float("nan") if not events.any() else 1.0

    interval = bootstrap_interval(needs_a_death, [1, 0, 0], resamples=500)
    # All three draws miss the one death with probability (2/3)^3 = 0.30.
    assert 0.62 * 500 < interval.resamples < 0.78 * 500
    assert (interval.low, interval.high) == (1.0, 1.0)
    nothing = bootstrap_interval(needs_a_death, [0, 0], resamples=10)
    assert np.isnan([nothing.low, nothing.high]).all()
    assert nothing.resamples == 0


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (([1, 2], [1]), {}, "arrays and patients must have one row per case, got 1 for 2"),
        (([1, 2],), {"patients": [1]}, "arrays and patients must have one row per case, got 1"),
        (([],), {}, "arrays must have at least one row, got 0"),
        (([1],), {"resamples": 0}, "resamples must be at least 1 .* got 0 and 0.95"),
        (([1],), {"level": 1.0}, "level between 0 and 1, got 1000 and 1.0"),
    ],
)
def test_bootstrap_bad_input(arrays: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bootstrap_interval(lambda *a: 0.0, *arrays, **options)


def _planted(n: int, seed: int) -> tuple[NDArray[Any], ProbeLabels]:
    """Task 0 knows the class, task 1 the risk, task 2 nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3, 5))
    classes = (x[:, 0, 0] > 0.8).astype(int)
    classes[: n // 10] = -1
    time = rng.exponential(np.exp(-2 * x[:, 1, 0]))
    died = rng.integers(0, 4, n) > 0
    return x, ProbeLabels(classes, time, died.astype(float))


def test_probe_tasks_finds_what_is_planted_where() -> None:
    (train_x, train), (test_x, test) = _planted(200, 0), _planted(120, 1)
    by_class, by_risk, noise = probe_tasks(train_x, train, test_x, test, resamples=100)
    assert by_class.balanced_accuracy > 0.85 > 0.65 > noise.balanced_accuracy
    assert by_risk.c_index > 0.75 > 0.65 > by_class.c_index
    assert [r.task for r in (by_class, by_risk, noise)] == [0, 1, 2]
    assert by_class.num_classified == 108
    assert by_class.num_survival == 120
    assert by_class.intervals["c_index"].low < by_class.c_index < by_class.intervals["c_index"].high
    for result in (by_class, by_risk, noise):
        assert result.notes == ()
        for name in ("accuracy", "balanced_accuracy", "c_index"):
            low, high = result.intervals[name].low, result.intervals[name].high
            assert low <= getattr(result, name) <= high


def test_probe_tasks_unclassified_test_cases() -> None:
    (train_x, train), (test_x, test) = _planted(150, 2), _planted(100, 3)
    dropped = probe_tasks(train_x, train, test_x, test, resamples=0)[0]
    counted = probe_tasks(train_x, train, test_x, test, resamples=0, count_unclassified=True)[0]
    predicted = fit_logistic(train_x[:, 0], train.classes).predict(test_x[:, 0])
    known = test.classes >= 0
    assert dropped.accuracy == (predicted == test.classes)[known].mean()
    assert counted.accuracy == (predicted == test.classes).mean()
    assert counted.balanced_accuracy == pytest.approx(dropped.balanced_accuracy * 2 / 3)
    assert (dropped.num_classified, counted.num_classified) == (90, 100)
    assert dropped.intervals == {}


def test_probe_tasks_says_why_a_score_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    (train_x, train), (test_x, test) = _planted(60, 4), _planted(40, 5)
    blank = np.full(60, np.nan)
    unlabelled = ProbeLabels(np.full(60, -1), train.durations, train.events)
    result = probe_tasks(train_x, unlabelled, test_x, test, resamples=10)[1]
    assert np.isnan([result.accuracy, result.balanced_accuracy]).all()
    assert result.logistic is None
    assert result.c_index > 0.5
    assert result.intervals.keys() == {"c_index"}
    assert "at least two classes" in result.notes[0]
    assert "task 1: y must hold at least two classes" in caplog.text
    unfollowed = ProbeLabels(train.classes, blank, blank)
    result = probe_tasks(train_x, unfollowed, test_x, test, resamples=10)[0]
    assert np.isnan(result.c_index)
    assert result.cox is None
    assert result.balanced_accuracy > 0.5
    assert "got 0 deaths" in result.notes[0]


def test_probe_tasks_bad_input() -> None:
    (x, labels), (other, _) = _planted(40, 6), _planted(40, 7)
    with pytest.raises(InputError, match=r"\[N, T, d\] .* got \[40, 3, 5\] and \[40, 2, 5\]"):
        probe_tasks(x, labels, other[:, :2], labels)
    with pytest.raises(InputError, match="test labels must have one row per case, got 40 for 39"):
        probe_tasks(x, labels, other[1:], labels)
    broken = other.copy()
    broken[7, 1, 0] = np.nan
    with pytest.raises(InputError, match=r"test_x\[:, 1\] must be finite, got 1 bad .* row 7"):
        probe_tasks(x, labels, broken, labels)
    with pytest.raises(CohortError, match="classes must have one entry per duration, got 1 and 2"):
        ProbeLabels(np.array([0]), np.array([1.0, 2.0]), np.array([1.0, 0.0]))
