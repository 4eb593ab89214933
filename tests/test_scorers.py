"""Scorers: joined by id, every case counted, no class or death in the test set, comparisons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from modaltune.evaluate import harrell_c_index
from modaltune.model_comparison import paired_tests
from modaltune.predictions import Predictions
from modaltune.result_rows import (
    BootstrapOptions,
    DifferenceRow,
    ScoreRow,
    difference_rows,
    mean_over,
    score_rows,
)
from modaltune.scorers import Scorer, area_names, class_scorer, survival_scorer
from modaltune.survival_metrics import SurvivalReference

FAST = BootstrapOptions(resamples=40)


def _labels(n: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    death, leaving = rng.exponential(40, n), rng.uniform(5, 100, n)
    table = {
        "primary_class": rng.integers(0, 2, n),
        "survival_months": np.ceil(np.minimum(death, leaving)),
        "event": (death <= leaving).astype(float),
    }
    return pd.DataFrame(table, index=[f"P{k:02d}" for k in range(n)])


def _said(labels: pd.DataFrame, seed: int = 1, skill: float = 1.0) -> Predictions:
    rng = np.random.default_rng(seed)
    own = 1 / (
        1 + np.exp(-skill * (2 * labels["primary_class"] - 1) - rng.normal(size=len(labels)))
    )
    risk = -skill * np.log(labels["survival_months"].fillna(20.0)) + rng.normal(size=len(labels))
    months = np.array([10.0, 20, 30, 40])
    curves = np.exp(-np.outer(np.exp(risk - risk.mean()), months / 60))
    return Predictions(
        tuple(labels.index), np.array([0, 1]), np.stack([1 - own, own], axis=1),
        risk.to_numpy(), curves, months,
    )  # fmt: skip


def _values(scorer: Scorer | None) -> dict[str, float]:
    assert scorer is not None
    return dict(zip(scorer.names, scorer.score(np.arange(len(scorer.case_ids))), strict=True))


def _by_name(rows: list[Any]) -> dict[str, Any]:
    return {row.metric: row for row in rows}


def test_joined_by_id_whatever_the_order() -> None:
    labels = _labels()
    said = _said(labels)
    mixed = said.take([f"P{k:02d}" for k in np.random.default_rng(3).permutation(60)])
    one, two = _values(class_scorer(said, labels)), _values(class_scorer(mixed, labels[::-1]))
    assert one == pytest.approx(two)
    own = said.probabilities
    assert own is not None
    assert one["auroc"] == pytest.approx(roc_auc_score(labels["primary_class"], own[:, 1]))
    assert one["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels["primary_class"], own[:, 1] > 0.5)
    )
    reference = SurvivalReference.fit(labels["survival_months"], labels["event"])
    one = _values(survival_scorer(said, labels, reference))
    two = _values(survival_scorer(mixed, labels[::-1], reference))
    assert one == pytest.approx(two, abs=1e-10)  # sums in another order
    assert one["c_index"] == harrell_c_index(labels["survival_months"], labels["event"], said.risk)


def test_every_case_is_scored_or_counted() -> None:
    labels = _labels()
    labels.iloc[:3, 0] = -1
    labels.iloc[2:6, 1] = np.nan
    labels.iloc[6, 2] = np.nan
    full = _said(labels)
    assert full.probabilities is not None
    assert full.risk is not None
    full.probabilities[10] = np.nan
    full.risk[11:13] = np.nan
    said = full.take(list(labels.index[:-5]))
    labels = labels.drop(index="P20")
    asked = [f"P{k:02d}" for k in range(60)]
    scorer = class_scorer(said, labels, asked, foreign=["P30"])
    assert scorer is not None
    assert scorer.left_out == {
        "no class (-1)": 3, "no probability": 1, "no prediction": 5, "no label row": 1,
        "class of another site": 1,
    }  # fmt: skip
    assert len(scorer.case_ids) + sum(scorer.left_out.values()) == 60
    scorer = survival_scorer(said, labels, None, asked)
    assert scorer is not None
    assert scorer.left_out == {
        "no survival time": 4, "no vital status": 1, "no risk": 2, "no prediction": 5,
        "no label row": 1,
    }  # fmt: skip
    assert len(scorer.case_ids) + sum(scorer.left_out.values()) == 60


def test_times_of_the_auc_have_names_that_differ() -> None:
    assert area_names(np.array([3.2, 12.0, 30.4])) == ["auc_3m", "auc_12m", "auc_30m"]
    assert area_names(np.array([3.2, 3.4, 30.0])) == ["auc_3.2m", "auc_3.4m", "auc_30.0m"]


def test_a_brier_score_that_is_undefined_says_why() -> None:
    labels = _labels()
    reference = SurvivalReference.fit(labels["survival_months"], labels["event"])
    said = _said(labels)
    assert said.survival is not None
    said.survival[3:5] = np.nan
    rows = _by_name(score_rows([_need(survival_scorer(said, labels, reference))], FAST))
    assert np.isnan(rows["integrated_brier"].value)
    assert rows["integrated_brier"].note == "2 cases without a whole curve: undefined"
    assert rows["c_index"].low < rows["c_index"].value < rows["c_index"].high


def test_counts_and_rows_agree_whatever_a_scorer_is_made_of() -> None:
    """Reordered, cut to some metrics, and as a mean over sites."""
    labels = _labels(90)
    reference = SurvivalReference.fit(labels["survival_months"], labels["event"])
    said, ids = _said(labels), list(labels.index)
    sites = [_need(survival_scorer(said, labels, reference, c)) for c in (ids[:40], ids[40:])]
    mean = mean_over(sites)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 40, 40), rng.integers(40, 90, 50)])
    counts = np.bincount(rows, minlength=90)[None].astype(float)
    np.testing.assert_allclose(mean.resampled(counts)[0], mean.score(rows), atol=1e-10)
    short = _said(labels).take(ids[10:])
    two = [_need(class_scorer(p, labels)) for p in (said, short)]
    found = score_rows(two, FAST)
    only = _need(class_scorer(said.take(ids[10:]), labels))
    alone = score_rows([only], FAST)
    assert [row.n for row in found[:1]] == [80]
    assert found[0].value == pytest.approx(alone[0].value)
    assert (found[0].low, found[0].high) == pytest.approx((alone[0].low, alone[0].high))


def test_one_class_and_no_death() -> None:
    labels = _labels()
    labels["primary_class"] = 1
    labels["event"] = 0.0
    rows = _by_name(score_rows([_need(class_scorer(_said(_labels()), labels))], FAST))
    assert np.isnan(rows["auroc"].value)
    assert rows["auroc"].note == "no case of class 0: undefined"
    assert np.isnan(rows["recall_0"].value)
    assert 0 <= rows["recall_1"].low <= rows["recall_1"].value <= rows["recall_1"].high
    reference = SurvivalReference.fit(_labels()["survival_months"], _labels()["event"])
    rows = _by_name(score_rows([_need(survival_scorer(_said(_labels()), labels, reference))], FAST))
    for name in ("c_index", "uno_c_index", "mean_auc", "integrated_brier"):
        assert np.isnan(rows[name].value)
        assert rows[name].note.startswith("nobody died: undefined")


def _need(scorer: Scorer | None) -> Scorer:
    assert scorer is not None
    return scorer


def test_no_case_at_all_is_a_row() -> None:
    labels = _labels(4)
    labels["primary_class"] = -1
    rows = score_rows([_need(class_scorer(_said(_labels(4)), labels))], FAST)
    assert {row.n for row in rows} == {0}
    assert all(np.isnan(row.value) for row in rows)
    assert rows[0].left_out == {"no class (-1)": 4}


def test_a_class_that_training_lacked() -> None:
    labels = _labels()
    said = _said(labels)
    labels.iloc[:5, 0] = 2
    scorer = _need(class_scorer(said, labels))
    assert scorer.note("accuracy") == "class 2 was not in training: always wrong"
    assert "recall_2" not in scorer.names


def test_followed_beyond_training() -> None:
    labels = _labels()
    train = labels[labels["survival_months"] < 30]
    reference = SurvivalReference.fit(train["survival_months"], train["event"])
    scorer = _need(survival_scorer(_said(labels), labels, reference))
    beyond = int((labels["survival_months"] > reference.tau).sum())
    assert f"{beyond} cases followed longer" in scorer.note("uno_c_index")
    assert f"truncated at {reference.tau:.1f} months" in scorer.note("uno_c_index")
    assert len(scorer.case_ids) == 60
    assert np.isfinite(_values(scorer)["uno_c_index"])


def test_seeds_are_averaged_on_the_same_patients() -> None:
    labels = _labels()
    runs = [_need(class_scorer(_said(labels, seed), labels)) for seed in (1, 2, 3)]
    rows = _by_name(score_rows(runs, FAST))
    each = [_values(run)["auroc"] for run in runs]
    row: ScoreRow = rows["auroc"]
    assert row.value == pytest.approx(np.mean(each))
    assert row.spread == pytest.approx(np.std(each, ddof=1))
    assert row.seeds == pytest.approx(tuple(each))
    assert row.low < row.value < row.high
    assert "at least 3" not in row.note
    assert "2 seeds; at least 3 are needed" in score_rows(runs[:2], FAST)[0].note
    fewer = _need(class_scorer(_said(labels, 3).take(list(labels.index[:40])), labels))
    row = score_rows([*runs[:2], fewer], FAST)[0]
    assert (row.n, row.left_out) == (40, {"not scored by every run": 20})


def test_paired_difference() -> None:
    labels = _labels(80)
    good, bad = _said(labels, 1, 2.0), _said(labels, 2, 0.0)
    rows = _by_name(
        difference_rows(
            [_need(class_scorer(good, labels))], [_need(class_scorer(bad, labels))], FAST
        )
    )
    row: DifferenceRow = rows["auroc"]
    assert row.difference == pytest.approx(row.first - row.second)
    assert 0 < row.low < row.difference < row.high
    assert row.p_value == pytest.approx(2 / 41)
    same = difference_rows(
        [_need(class_scorer(good, labels))], [_need(class_scorer(good, labels[::-1]))], FAST
    )
    assert {(r.difference, r.low, r.high, r.p_value) for r in same} == {(0, 0, 0, 1)}
    some = bad.take(list(labels.index[10:]))
    row = difference_rows(
        [_need(class_scorer(good, labels))], [_need(class_scorer(some, labels))], FAST
    )[0]
    assert (row.n, row.unpaired) == (70, 10)


def test_brier_scores_over_other_months_are_not_compared() -> None:
    labels = _labels(80)
    said = _said(labels)
    assert said.survival is not None
    assert said.months is not None
    fewer = replace(said, survival=said.survival[:, :-1], months=said.months[:-1])
    reference = SurvivalReference.fit(labels["survival_months"], labels["event"])
    one, two = (_need(survival_scorer(p, labels, reference)) for p in (said, fewer))
    assert one.note("integrated_brier") != two.note("integrated_brier")
    same = _by_name(difference_rows([one], [one], FAST))["integrated_brier"]
    assert (same.difference, same.p_value, same.note) == (0, 1, one.note("integrated_brier"))
    for sides in (([one], [two]), ([one, two], [one])):
        rows = _by_name(difference_rows(*sides, FAST))
        row = rows["integrated_brier"]
        assert np.isnan([row.difference, row.low, row.high, row.p_value]).all()
        assert np.isfinite([row.first, row.second]).all()
        assert row.note.endswith("over different months: not compared")
        assert np.isfinite(rows["uno_c_index"].difference)


def test_seeds_over_other_months_have_no_mean() -> None:
    labels = _labels(80)
    said = _said(labels)
    assert said.survival is not None
    assert said.months is not None
    fewer = replace(said, survival=said.survival[:, :-1], months=said.months[:-1])
    reference = SurvivalReference.fit(labels["survival_months"], labels["event"])
    one, two = (_need(survival_scorer(p, labels, reference)) for p in (said, fewer))
    rows = _by_name(score_rows([one, two], FAST))
    row = rows["integrated_brier"]
    assert np.isnan([row.value, row.low, row.high]).all()
    assert np.isfinite(row.seeds).all()
    assert one.note("integrated_brier") in row.note
    assert two.note("integrated_brier") in row.note
    assert "over different months: no mean" in row.note
    assert np.isfinite([rows["c_index"].value, rows["c_index"].low]).all()
    assert np.isfinite(_by_name(score_rows([one, one], FAST))["integrated_brier"].value)


def test_areas_at_other_times_are_said_to_be() -> None:
    """Two runs weighed by other training cases: their mean AUC is over other times."""
    labels = _labels(80)
    said = _said(labels)
    some = labels.iloc[:50]
    fits = [SurvivalReference.fit(t["survival_months"], t["event"]) for t in (labels, some)]
    assert list(fits[0].auc_times) != list(fits[1].auc_times)
    one, two = (_need(survival_scorer(said, labels, fit)) for fit in fits)
    when = [", ".join(f"{t:.1f}" for t in fit.auc_times) for fit in fits]
    row = _by_name(difference_rows([one], [two], FAST))["mean_auc"]
    assert row.note == (
        f"first: over the areas at {when[0]} months; second: over the areas at {when[1]} months"
    )


def test_runs_that_lack_a_metric_are_compared_on_the_others() -> None:
    labels = _labels(80)
    said = _said(labels)
    bare = replace(said, survival=None, months=None)
    reference = SurvivalReference.fit(labels["survival_months"], labels["event"])
    whole, less = (_need(survival_scorer(p, labels, reference)) for p in (said, bare))
    for rows in (
        score_rows([whole, less], FAST),
        score_rows([less, whole], FAST),
        difference_rows([whole], [whole, less], FAST),
        difference_rows([less, whole], [whole], FAST),
    ):
        assert [row.metric for row in rows] == list(less.names)


def test_too_few_patients_to_resample_is_said_of_differences() -> None:
    ids = [f"P{k}" for k in range(12)]
    labels = pd.DataFrame({"primary_class": [*range(10), 0, 1]}, index=ids)
    rng = np.random.default_rng(0)
    said = [
        Predictions(tuple(ids), np.arange(10), rng.dirichlet(np.ones(10), 12)) for _ in range(2)
    ]
    one, two = (_need(class_scorer(p, labels)) for p in said)
    row = difference_rows([one], [two], FAST)[0]
    assert np.isnan(row.low)
    assert row.note == score_rows([one], FAST)[0].note == "too few patients to resample"
    assert difference_rows([one], [two], BootstrapOptions(0))[0].note == ""


def test_paired_tests_find_the_better_model() -> None:
    labels = _labels(80)
    labels.iloc[:2, 0] = -1
    good, bad = _said(labels, 1, 2.0), _said(labels, 2, 0.0)
    tests = paired_tests(good, bad, labels, permutations=99)
    assert tests["auroc"]["delong"] < 0.01
    assert tests["balanced_accuracy"]["permutation"] < 0.05
    assert tests["c_index"]["permutation"] < 0.05
    same = paired_tests(good, good.take(good.case_ids[::-1]), labels, permutations=9)
    assert {p for test in same.values() for p in test.values()} == {1.0}
    others = Predictions(good.case_ids, np.array([0, 2]), good.probabilities)
    assert paired_tests(good, others, labels) == {}


def test_mean_over_sites_keeps_their_sizes() -> None:
    labels = _labels()
    parts = [labels.iloc[:20], labels.iloc[20:]]
    own = [_need(class_scorer(_said(part), part)) for part in parts]
    mean = mean_over(own)
    want = np.mean([_values(scorer)["auroc"] for scorer in own])
    assert _values(mean)["auroc"] == pytest.approx(want)
    row = _by_name(score_rows([mean], FAST))["auroc"]
    assert (row.n, row.note) == (60, "mean over 2 sites")
    assert row.low < row.value < row.high


def test_strata_are_kept_within_sites() -> None:
    labels = _labels()
    parts = [labels.iloc[:20], labels.iloc[20:]]
    own = [_need(class_scorer(_said(part), part)) for part in parts]
    drawn: list[Any] = []
    mean = mean_over(own)

    def seen(counts: Any) -> Any:
        drawn.append(counts)
        return mean.resampled(counts)

    strata = np.concatenate([own[0].strata, 10 + own[1].strata])
    for stratified in (False, True):
        drawn.clear()
        score_rows([replace(mean, resampled=seen)], replace(FAST, stratified=stratified))
        counts = np.concatenate(drawn[1:])  # the first is every patient once
        assert (counts[:, :20].sum(1) == 20).all()
        sizes = np.stack([counts[:, strata == k].sum(1) for k in np.unique(strata)])
        assert (sizes.std(1) == 0).all() == stratified
