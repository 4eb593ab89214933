"""Evaluation of embeddings: golden probes, nothing of the test set is fitted on, sites, cohorts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from modaltune.errors import CohortError, InputError
from modaltune.evaluation import (
    DIRECT,
    MEAN_OF_SITES,
    EmbeddedCases,
    Evaluation,
    Place,
    evaluate_cases,
    evaluate_predictions,
    fit_on,
)
from modaltune.evaluation_tables import (
    comparison_table,
    headline_table,
    score_table,
)
from modaltune.fitted_probes import POOLED
from modaltune.probe_files import save_probes
from modaltune.result_rows import BootstrapOptions
from modaltune.splits import Split
from modaltune.testing_embeddings import TASKS, embedded_study, one_row

POINTS = BootstrapOptions(resamples=0)
FAST = BootstrapOptions(resamples=8)


@pytest.fixture(scope="module")
def study() -> tuple[EmbeddedCases, Split, Evaluation]:
    cases, split = embedded_study()
    return cases, split, evaluate_cases(cases, split, name="mine")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["case7_eval_binary", "case7_eval_3class"])
def test_golden_scores(shared_dir: Path, name: str) -> None:
    """The published figures come out of the whole evaluation, joined by id in another order."""
    tensors = load_file(shared_dir / "golden" / f"{name}.safetensors")
    meta = json.loads((shared_dir / "golden" / f"{name}.json").read_text())
    tables, values, parts = [], [], {}
    for part in ("train", "test"):
        count = len(tensors[f"in/x_{part}"])
        ids = [f"{part}{k}" for k in range(count)]
        columns = {
            "primary_class": tensors[f"in/{part}.primary_class"].astype(int),
            "survival_months": tensors[f"in/{part}.durations"].astype(float),
            "event": tensors[f"in/{part}.vital_status"].astype(float),
        }
        tables.append(pd.DataFrame(columns, index=ids))
        values.append(tensors[f"in/x_{part}"])
        parts[part] = tuple(ids)
    clinical = pd.concat(tables)
    tasks = tuple(meta["metrics"])
    cases = EmbeddedCases(
        tuple(clinical.index[::-1]), np.concatenate(values)[::-1], tasks, clinical
    )
    found = evaluate_cases(cases, Split(parts["train"], (), parts["test"]), parts=("test",))
    scores = score_table(found, POINTS)
    excluded = int((tensors["in/test.primary_class"] < 0).sum())
    for task, metrics in meta["metrics"].items():
        row = one_row(scores, task=task, metric="c_index")
        assert row["value"] == pytest.approx(metrics["test_c_index"], abs=1e-6)
        row = one_row(scores, task=task, metric="balanced_accuracy")
        assert row["n"] == len(parts["test"]) - excluded
        if not excluded:  # the published script counts class -1 as a class nobody predicts
            assert row["value"] == pytest.approx(metrics["test_balanced_accuracy"])
            row = one_row(scores, task=task, metric="accuracy")
            assert row["value"] == pytest.approx(metrics["test_accuracy"])


@pytest.mark.parametrize("sites", [("breast",), ("breast", "kidney")])
def test_nothing_is_fitted_on_the_other_cases(sites: tuple[str, ...], tmp_path: Path) -> None:
    """Labels, follow-up, sites and embeddings of validation and test change no byte of what is
    fitted: probes, baseline survival, risk cut, censoring weights, times of the metrics."""
    cases, split = embedded_study(sites=sites)
    rng = np.random.default_rng(5)
    judged = [*split.val, *split.test]
    other = cases.clinical.copy()
    for column in other:
        other.loc[judged, column] = rng.permutation(other.loc[judged, column].to_numpy())
    x = cases.embeddings.copy()
    rows = [cases.case_ids.index(case) for case in judged]
    x[rows] = rng.permutation(x[rows]) * 5
    shuffled = EmbeddedCases(cases.case_ids, x, TASKS, other)
    first, second = evaluate_cases(cases, split), evaluate_cases(shuffled, split)
    assert first.fitted is not None
    assert second.fitted is not None
    save_probes(tmp_path / "a", first.fitted)
    save_probes(tmp_path / "b", second.fitted)
    for name in ("probes.json", "probes.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert [g.cut for g in first.groups.values()] == [g.cut for g in second.groups.values()]
    # And the scores did change: it was the same place that was shuffled.
    where = {"split": "test", "task": "diagnosis", "metric": "auroc", "scope": sites[0]}
    where["scope"] = POOLED if len(sites) == 1 else sites[0]
    where["kind"] = "class"
    one, two = (one_row(score_table(e, POINTS), **where)["value"] for e in (first, second))
    assert one > 0.8
    assert two < 0.75


def test_shuffled_training_labels_are_at_chance() -> None:
    cases, split = embedded_study(n=400)
    rng = np.random.default_rng(0)
    clinical = cases.clinical.copy()
    for column in ("primary_class", "survival_months", "event"):
        train = list(split.train)
        clinical.loc[train, column] = rng.permutation(clinical.loc[train, column].to_numpy())
    found = evaluate_cases(replace(cases, clinical=clinical), split, parts=("test",))
    scores = score_table(found, POINTS)
    shown = scores[scores["metric"].isin(["auroc", "c_index"])]["value"]
    # 150 test cases: two standard deviations of an AUROC at chance are about 0.1.
    assert (abs(shown - 0.5) < 0.16).all()


def test_the_right_prompt_finds_what_it_holds(study: Any) -> None:
    scores = score_table(study[2], FAST)
    headline = headline_table(scores)
    assert list(headline["task"]) == list(TASKS)
    auroc = {t: one_row(scores, split="test", task=t, metric="auroc")["value"] for t in TASKS}
    index = {t: one_row(scores, split="test", task=t, metric="c_index")["value"] for t in TASKS}
    assert max(auroc, key=auroc.__getitem__) == "diagnosis"
    assert max(index, key=index.__getitem__) == "survival"
    row = one_row(scores, split="test", task="survival", metric="c_index")
    assert 0.6 < row["low"] < row["value"] < row["high"]
    assert headline["c_index"][2] == f"{row['value']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
    groups = one_row(scores, split="test", task="survival", metric="log_rank_p")
    assert groups["value"] < 0.01
    assert "cut at the training median" in groups["note"]


def test_every_test_case_is_in_every_metric(study: Any) -> None:
    cases, split, found = study
    for place, scorer in found.scorers.items():
        assert len(scorer.case_ids) + sum(scorer.left_out.values()) == len(split.parts[place.split])
    some = EmbeddedCases(cases.case_ids[:120], cases.embeddings[:120], TASKS, cases.clinical)
    less = evaluate_cases(some, split)
    gone = set(cases.case_ids[120:])
    assert set(less.missing["test"]) == set(split.test) & gone
    for place, scorer in less.scorers.items():
        left = scorer.left_out["no prediction"]
        assert left == len(set(split.parts[place.split]) & gone)


def test_several_sites() -> None:
    cases, split = embedded_study(n=240, sites=("breast", "kidney"))
    found = evaluate_cases(cases, split, parts=("test",))
    assert Place("test", "general", POOLED, "class") not in found.scorers
    scores = score_table(found, FAST)
    site = one_row(scores, task="general", kind="site", metric="balanced_accuracy")
    assert site["value"] > 0.85
    each = [
        one_row(scores, task="diagnosis", scope=s, metric="auroc") for s in ("breast", "kidney")
    ]
    mean = one_row(scores, task="diagnosis", scope=MEAN_OF_SITES, metric="auroc")
    assert mean["value"] == pytest.approx(np.mean([row["value"] for row in each]))
    assert mean["n"] == sum(row["n"] for row in each)
    pooled = one_row(scores, task="survival", scope=POOLED, metric="c_index")
    assert pooled["n"] > max(row["n"] for row in each)
    assert "site_balanced_accuracy" in headline_table(scores)


def test_direct_predictions_for_several_sites() -> None:
    """What embeddings get: classes per site, since a number means another diagnosis in each."""
    cases, split = embedded_study(n=240, sites=("breast", "kidney"))
    found = evaluate_cases(cases, split, parts=("test",))
    pooled = found.predictions[Place("test", "survival", POOLED, "survival")]
    classes = [found.predictions[Place("test", "survival", s, "class")] for s in _sites(found)]
    ids = [case for part in classes for case in part.case_ids]
    chances = [part.probabilities for part in classes]
    assert all(c is not None for c in chances)
    said = replace(
        pooled.take(ids), labels=classes[0].labels, probabilities=np.concatenate(chances)
    )
    direct = evaluate_predictions(
        said, cases.clinical, split, name="rival", parts=("test",), sites=("kidney", "breast")
    )
    mine, theirs = score_table(found, POINTS), score_table(direct, POINTS)
    assert set(theirs["scope"]) == {POOLED, "breast", "kidney", MEAN_OF_SITES}
    assert set(theirs[theirs["scope"] == POOLED]["kind"]) == {"survival"}
    for scope in ("breast", "kidney", MEAN_OF_SITES):
        for metric in ("auroc", "balanced_accuracy", "brier"):
            own = one_row(mine, task="survival", scope=scope, metric=metric)
            given = one_row(theirs, scope=scope, metric=metric)
            assert (given["value"], given["n"]) == (own["value"], own["n"])
    # Weights and times of a site are those of its training cases, for whatever predicts there.
    own = one_row(mine, task="survival", scope="kidney", metric="mean_auc")
    assert one_row(theirs, scope="kidney", metric="mean_auc")["note"] == own["note"]
    table = comparison_table([found], [direct], POINTS)
    row = one_row(table, task="survival", scope=MEAN_OF_SITES, metric="auroc")
    assert row["difference"] == 0
    alone = evaluate_predictions(
        said, cases.clinical, split, name="rival", parts=("test",), sites=("kidney",)
    )
    row = one_row(score_table(alone, POINTS), metric="auroc")
    assert row["scope"] == POOLED
    assert "class of another site" in row["left_out"]


def _sites(found: Evaluation) -> tuple[str, ...]:
    assert found.fitted is not None
    return found.fitted.sites


def test_another_cohort_with_the_probes_of_the_first() -> None:
    """Classes of another site mean other diagnoses and are not scored; risks are."""
    cases, split = embedded_study()
    fitted = fit_on(cases, split.train)
    other, parts = embedded_study(sites=("bladder",), seed=3)
    found = evaluate_cases(other, parts, fitted=fitted, parts=("test",))
    assert found.fitted is fitted
    scores = score_table(found, POINTS)
    row = one_row(scores, task="diagnosis", metric="auroc")
    assert row["n"] == 0
    assert row["left_out"] == f"class of another site: {len(parts.test)}"
    assert one_row(scores, task="survival", metric="c_index")["value"] > 0.65
    same = evaluate_cases(cases, split, fitted=fitted, parts=("test",))
    assert one_row(score_table(same, POINTS), task="diagnosis", metric="auroc")["n"] > 0
    renamed = replace(other, tasks=("a", "b", "c"))
    with pytest.raises(InputError, match="must be probes of the task prompts a, b, c"):
        evaluate_cases(renamed, parts, fitted=fitted)


def test_direct_predictions_enter_the_same_tables(study: Any) -> None:
    cases, split, found = study
    place = Place("test", "diagnosis", POOLED, "class")
    said = found.predictions[place]
    direct = evaluate_predictions(said, cases.clinical, split, name="rival", parts=("test",))
    mine = score_table(found, POINTS)
    theirs = score_table(direct, POINTS)
    for metric in ("auroc", "brier", "c_index", "uno_c_index", "integrated_brier"):
        own = one_row(mine, split="test", task="diagnosis", metric=metric)
        given = one_row(theirs, split="test", task=DIRECT, metric=metric)
        assert given["value"] == own["value"]
        assert given["n"] == own["n"]
    assert direct.groups == {}  # no prediction for training cases: no cut
    table = comparison_table([found], [direct], FAST)
    row = one_row(table, split="test", task="diagnosis", metric="auroc")
    assert (row["difference"], row["p_delong"]) == (0, 1)
    assert one_row(table, split="test", task="general", metric="auroc")["difference"] < 0


@pytest.mark.parametrize("sites", [("breast",), ("breast", "kidney")])
def test_runs_that_read_other_cases_are_weighed_alike(sites: tuple[str, ...]) -> None:
    """Censoring weights and times come from all training cases, embedded or not."""
    cases, split = embedded_study(n=240, sites=sites)
    months = cases.clinical.loc[list(split.train), "survival_months"]
    gone = set(months[months > months.median()].index[::2])
    kept = [case for case in cases.case_ids if case not in gone]
    some = EmbeddedCases(tuple(kept), cases.take(kept), TASKS, cases.clinical)
    fits = [fit_on(c, split.train) for c in (cases, some)]
    for place, own in fits[0].probes.items():
        other = fits[1].probes[place]
        assert own.reference is not None
        assert other.reference is not None
        assert own.reference.to_dict() == other.reference.to_dict()
        assert own.risk_cut != other.risk_cut
    pair = [evaluate_cases(c, split) for c in (cases, some)]
    table = comparison_table(pair[:1], pair[1:], POINTS)
    assert not table["note"].str.contains("first:").any()


def test_a_run_of_shorter_follow_up_keeps_its_brier_score() -> None:
    """Over the months that it knows, and with no difference to a run that knows more."""
    cases, split = embedded_study(n=240)
    months = cases.clinical.loc[list(split.train), "survival_months"]
    gone = set(months[months > months.quantile(0.7)].index)
    kept = [case for case in cases.case_ids if case not in gone]
    some = EmbeddedCases(tuple(kept), cases.take(kept), TASKS, cases.clinical)
    pair = [evaluate_cases(c, split, parts=("test",)) for c in (cases, some)]
    table = comparison_table(pair[:1], pair[1:], POINTS)
    row = one_row(table, task="survival", metric="integrated_brier")
    assert np.isfinite([row["first_value"], row["second_value"]]).all()
    assert np.isnan(row["difference"])
    assert "over different months: not compared" in row["note"]
    assert np.isfinite(one_row(table, task="survival", metric="uno_c_index")["difference"])


def test_classes_of_a_site_that_training_lacks_are_not_scored() -> None:
    """Whoever fitted the probes: class numbers mean other diagnoses there."""
    cases, split = embedded_study()
    clinical = cases.clinical.copy()
    away = list(split.test[:5])
    clinical.loc[away, "site"] = "kidney"
    found = evaluate_cases(replace(cases, clinical=clinical), split, parts=("test",))
    scorer = found.scorers[Place("test", "diagnosis", POOLED, "class")]
    assert scorer.left_out["class of another site"] == len(away)
    assert not set(scorer.case_ids) & set(away)


def test_bad_input() -> None:
    cases, split = embedded_study(20)
    with pytest.raises(InputError, match=r"must have shape \[20, 3, d\], got \[20, 2, 6\]"):
        replace(cases, embeddings=cases.embeddings[:, :2])
    with pytest.raises(InputError, match="must name each case once"):
        replace(cases, case_ids=("P000", *cases.case_ids[:-1]))
    with pytest.raises(CohortError, match="event"):
        replace(cases, clinical=cases.clinical.drop(columns="event"))
    with pytest.raises(CohortError, match="train must hold cases with embeddings, got none of 1"):
        evaluate_cases(cases, Split(("nobody",), (), split.test))
