"""Counts of drawn cases give the class metrics of the drawn rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modaltune.class_resamples import class_resamples
from modaltune.classification_metrics import (
    auprc,
    auroc,
    brier_score,
    expected_calibration_error,
    per_class,
    predicted_classes,
)
from modaltune.evaluate import accuracy, balanced_accuracy


def _plain(truth: Any, given: Any, said: Any, labels: list[int], over: list[int]) -> list[float]:
    return [
        auroc(truth, given, labels, over),
        auprc(truth, given, labels, over),
        accuracy(truth, said),
        balanced_accuracy(truth, said),
        brier_score(truth, given, labels),
        expected_calibration_error(truth, given, labels),
        *np.concatenate(per_class(truth, said, labels)),
    ]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 25),
    classes=st.integers(2, 4),
    rare=st.booleans(),
    digits=st.sampled_from([1, 6]),
)
def test_counts_equal_drawn_rows(seed: int, n: int, classes: int, rare: bool, digits: int) -> None:
    """With ties, with classes that few or no drawn cases have, and with one nobody predicts."""
    rng = np.random.default_rng(seed)
    share = np.array([0.9, *[0.1 / classes] * classes]) if rare else np.ones(classes + 1)
    truth = rng.choice(classes + 1, n, p=share / share.sum())
    labels = list(range(classes))
    given = np.round(rng.dirichlet(np.ones(classes), n), digits)
    said = predicted_classes(given, np.array(labels))
    over = [k for k in labels if (truth == k).any()]
    drawn = [np.arange(n), *(rng.integers(0, n, n) for _ in range(3)), rng.integers(0, n, 2)]
    counts = np.stack([np.bincount(rows, minlength=n).astype(float) for rows in drawn])
    want = [_plain(truth[rows], given[rows], said[rows], labels, over) for rows in drawn]
    got = class_resamples(truth, given, said, labels, over)(counts)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


def test_a_case_drawn_twice_counts_twice() -> None:
    truth, given = np.array([1, 0, 0]), np.array([[0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    said = predicted_classes(given, np.array([0, 1]))
    found = class_resamples(truth, given, said, [0, 1], [0, 1])(np.array([[1.0, 3, 1], [2, 0, 0]]))
    assert found[0, 0] == 3 / 4  # of four negatives, three lie below
    assert np.isnan(found[1, 0])
    assert found[0, 2] == 3 / 5  # the three copies are the only ones decided right
