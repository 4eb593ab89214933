"""Class metrics equal scikit-learn's, and say what is undefined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from modaltune.classification_metrics import (
    as_probabilities,
    auprc,
    auroc,
    brier_score,
    expected_calibration_error,
    per_class,
    predicted_classes,
    reliability,
)
from modaltune.errors import InputError


def _draw(seed: int, classes: int, n: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Draw informative probabilities with ties, rounded to tenths before they are normalised."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    scores = np.round(rng.random((n, classes)) + 0.5 * (truth[:, None] == range(classes)), 1) + 0.1
    return truth, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_binary_equals_scikit_learn(seed: int) -> None:
    truth, given = _draw(seed, 2)
    said = predicted_classes(given, np.arange(2))
    assert auroc(truth, given, (0, 1)) == pytest.approx(sk.roc_auc_score(truth, given[:, 1]))
    assert auprc(truth, given, (0, 1)) == pytest.approx(
        sk.average_precision_score(truth, given[:, 1])
    )
    assert brier_score(truth, given, (0, 1)) == pytest.approx(
        sk.brier_score_loss(truth, given[:, 1])
    )
    recall, precision, f1 = per_class(truth, said, (0, 1))
    np.testing.assert_allclose(recall, sk.recall_score(truth, said, average=None))
    np.testing.assert_allclose(precision, sk.precision_score(truth, said, average=None))
    np.testing.assert_allclose(f1, sk.f1_score(truth, said, average=None))


@pytest.mark.parametrize("seed", range(5))
def test_three_classes_equal_scikit_learn(seed: int) -> None:
    truth, given = _draw(seed, 3)
    labels = (4, 5, 7)
    named = np.array(labels)[truth]
    assert auroc(named, given, labels) == pytest.approx(
        sk.roc_auc_score(truth, given, multi_class="ovr", average="macro")
    )
    assert auprc(named, given, labels) == pytest.approx(
        sk.average_precision_score(np.eye(3)[truth], given, average="macro")
    )
    assert brier_score(named, given, labels) == pytest.approx(
        sk.brier_score_loss(truth, given, labels=[0, 1, 2], scale_by_half=False)
    )


@pytest.mark.parametrize("seed", range(3))
def test_reliability_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    said = rng.random(300)
    truth = (rng.random(300) < said**2).astype(int)
    given = np.stack([1 - said, said], axis=1)
    curve = reliability(truth, given, (0, 1))
    observed, predicted = calibration_curve(truth, said, n_bins=10)
    np.testing.assert_allclose(curve.observed, observed)
    np.testing.assert_allclose(curve.predicted, predicted)
    assert curve.counts.sum() == 300
    # E[p - p^2] over uniform p is 1/6; 300 cases place it within a few hundredths.
    assert curve.error == pytest.approx(1 / 6, abs=0.06)


def test_perfect_calibration_has_no_error() -> None:
    given = np.repeat([[0.75, 0.25], [0.25, 0.75]], 4, axis=0)
    truth = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    assert expected_calibration_error(truth, given, (0, 1)) == 0
    assert expected_calibration_error(1 - truth, given, (0, 1)) == pytest.approx(0.5)


def test_three_classes_are_calibrated_by_the_most_likely() -> None:
    given = np.array([[0.6, 0.3, 0.1]] * 5 + [[0.1, 0.1, 0.8]] * 5)
    truth = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 0])
    assert expected_calibration_error(truth, given, (0, 1, 2)) == pytest.approx(0.0)


def test_one_class_is_undefined_not_an_error() -> None:
    given = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert np.isnan(auroc([1, 1], given, (0, 1)))
    assert np.isnan(auprc([0, 0], given, (0, 1)))
    recall, precision, f1 = per_class([1, 1], [0, 1], (0, 1))
    np.testing.assert_allclose(recall, [np.nan, 0.5])
    np.testing.assert_allclose(precision, [0, 1])
    np.testing.assert_allclose(f1, [0, 2 / 3])


def test_mean_runs_over_the_classes_asked_for() -> None:
    truth, given = _draw(0, 3)
    kept = truth != 2
    truth, given = truth[kept], given[kept]
    assert np.isnan(auroc(truth, given, (0, 1, 2)))
    want = np.mean([sk.roc_auc_score(truth == k, given[:, k]) for k in (0, 1)])
    assert auroc(truth, given, (0, 1, 2), over=(0, 1)) == pytest.approx(want)


def test_no_case_is_undefined() -> None:
    none = np.zeros((0, 2))
    assert np.isnan(auroc([], none, (0, 1)))
    assert np.isnan(brier_score([], none, (0, 1)))
    assert np.isnan(expected_calibration_error([], none, (0, 1)))
    assert np.isnan(per_class([], np.zeros(0, int), (0, 1))).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0.5, 0.6]], r"must lie in 0-1 and sum to 1, got \[0.5, 0.6\] in row 0"),
        ([[0.5, 0.5], [1.5, -0.5]], "in row 1"),
        ([[0.5, 0.5], [float("nan"), 0.5]], "in row 1"),
        ([[1.0]], r"must have shape \[n, 2\]"),
    ],
)
def test_bad_probabilities(given: list[list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_probabilities(given, [0, 1])


@pytest.mark.shared
@pytest.mark.parametrize("name", ["case7_eval_binary", "case7_eval_3class"])
def test_golden_probabilities(shared_dir: Path, name: str) -> None:
    """On the published probes' stored probabilities, all metrics are scikit-learn's."""
    tensors = load_file(shared_dir / "golden" / f"{name}.safetensors")
    meta = json.loads((shared_dir / "golden" / f"{name}.json").read_text())
    truth = tensors["in/test.primary_class"].astype(np.int64)
    known = truth >= 0
    for task in meta["metrics"]:
        given = tensors[f"out/{task}.lr_proba"].astype(float)
        labels = list(range(given.shape[1]))
        true, own = truth[known], given[known]
        macro = own[:, 1] if len(labels) == 2 else own / own.sum(1, keepdims=True)
        positive = true if len(labels) == 2 else np.eye(len(labels))[true]
        assert auroc(true, own, labels) == pytest.approx(
            sk.roc_auc_score(true, macro, multi_class="ovr")
        )
        assert auprc(true, own, labels) == pytest.approx(
            sk.average_precision_score(positive, macro)
        )
        said = predicted_classes(own, np.array(labels))
        np.testing.assert_allclose(per_class(true, said, labels)[0],
                                   sk.recall_score(true, said, average=None))  # fmt: skip
        assert (said == tensors[f"out/{task}.lr_pred"][known]).all()
