"""Tests between two sets of predictions of the same patients."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from modaltune.classification_metrics import predicted_classes
from modaltune.predictions import Predictions
from modaltune.probes import Floats
from modaltune.resampling import delong, permutation_p
from modaltune.scorers import class_scorer, survival_scorer
from modaltune.survival_resamples import swapped_c_index_gaps

LEAST_PER_CLASS = 2  # for DeLong's variance


def paired_tests(
    first: Predictions,
    second: Predictions,
    labels: pd.DataFrame,
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Test metrics of two models on the patients that both predict.

    Args:
        first, second: Predictions of the same classes.
        labels: Indexed by case id: `primary_class`, `survival_months`, `event`.
        permutations: Of the permutation tests, which swap the two models' predictions within
            patients (risks as ranks, since their scales differ).
        seed: Of the swaps.

    Returns:
        Metric -> test -> p value: `delong` of a binary AUROC, `permutation` of the balanced
        accuracy and of Harrell's c-index; what can't be tested is left out.
    """
    tests = _class_tests(first, second, labels, permutations, seed)
    return tests | _survival_tests(first, second, labels, permutations, seed)


def _class_tests(
    first: Predictions, second: Predictions, labels: pd.DataFrame, permutations: int, seed: int
) -> dict[str, dict[str, float]]:
    scorers = [class_scorer(p, labels) for p in (first, second)]
    if scorers[0] is None or scorers[1] is None:
        return {}
    both = set(scorers[1].case_ids)
    ids = [case for case in scorers[0].case_ids if case in both]
    one, two = first.take(ids), second.take(ids)
    if (
        not ids
        or one.labels is None
        or two.labels is None
        or one.probabilities is None
        or two.probabilities is None
        or not np.array_equal(one.labels, two.labels)
    ):
        return {}
    truth = labels.loc[ids, "primary_class"].to_numpy(np.int64)
    said = [predicted_classes(p, one.labels) for p in (one.probabilities, two.probabilities)]

    gain = (said[0] == truth) * 1.0 - (said[1] == truth)
    _, index, sizes = np.unique(truth, return_inverse=True, return_counts=True)
    gain /= len(sizes) * sizes[index]  # so that the sum is the gap in mean recall

    def gaps(swap: np.ndarray) -> Floats:
        return np.where(swap, -gain, gain).sum(1)

    p = permutation_p(gaps, len(ids), permutations=permutations, seed=seed)
    tests = {"balanced_accuracy": {"permutation": p}}
    positive = truth == one.labels[1]
    enough = min(positive.sum(), (~positive).sum()) >= LEAST_PER_CLASS
    if len(one.labels) == 2 and enough:
        found = delong(positive, one.probabilities[:, 1], two.probabilities[:, 1])
        tests["auroc"] = {"delong": found.p_value}
    return tests


def _survival_tests(
    first: Predictions, second: Predictions, labels: pd.DataFrame, permutations: int, seed: int
) -> dict[str, dict[str, float]]:
    scorers = [survival_scorer(p, labels, None) for p in (first, second)]
    if scorers[0] is None or scorers[1] is None:
        return {}
    both = set(scorers[1].case_ids)
    ids = [case for case in scorers[0].case_ids if case in both]
    if not ids:
        return {}
    own = labels.loc[ids]
    time, died = own["survival_months"].to_numpy(float), own["event"].to_numpy(float)
    ranks = [rankdata(np.asarray(p.take(ids).risk)) for p in (first, second)]

    gaps = swapped_c_index_gaps(time, died, ranks[0], ranks[1])
    p = permutation_p(gaps, len(ids), permutations=permutations, seed=seed)
    return {} if np.isnan(p) else {"c_index": {"permutation": p}}
