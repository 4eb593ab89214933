"""The benchmark of genes alone: models on the same patients, on real cohorts and on other ones."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest

from modaltune.benchmarks import brca_choice, brca_genes, brca_runs
from modaltune.benchmarks.brca_plot import shown
from modaltune.benchmarks.brca_runs import OURS, Linear, components_of, train
from modaltune.benchmarks.brca_scores import METRICS, Judged, differences, said_by, scores
from modaltune.cases_folder import CasesFolder
from modaltune.engine.errors import InputError
from modaltune.evaluation import evaluate_cases
from modaltune.result_rows import BootstrapOptions
from modaltune.testing_cohort import small_cohort

TINY = ["training.epochs=2", "training.warmup_epochs=1", "training.validate_every=2"]
SETTINGS = {
    OURS: ("model.slide_encoder.width=16", "model.genes.width=4", "model.out_features=8"),
    "pathway_mlp": ("learner.kind=pathway_mlp", "learner.survival=cox",
                    "learner.settings.token_width=2", "learner.settings.width=4"),
    "gene_mixer": ("learner.kind=gene_mixer", "learner.settings.width=4",
                   "learner.settings.tokens=2", "learner.settings.out_width=8"),
}  # fmt: skip
DRAWS = BootstrapOptions(resamples=5)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every model small."""
    for module in (brca_runs, brca_genes, brca_choice):
        monkeypatch.setattr(module, "SETTINGS", SETTINGS)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CasesFolder:
    """A small cohort with genes."""
    return small_cohort(tmp_path_factory.mktemp("genes") / "small")


def with_other_genes(cases: CasesFolder, judged: list[str]) -> CasesFolder:
    """Open a cohort again and change the genes of some cases in memory."""
    again = CasesFolder.open(cases.path)
    genes = again.expression
    assert genes is not None
    genes.loc[judged] = genes.loc[judged].to_numpy() * 9
    return again


@pytest.mark.shared
def test_a_real_cohort_from_its_files_to_the_tables(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(brca_genes.STUDIES, "blca-cbioportal", ())
    options = argparse.Namespace(tcga=shared_dir / "data" / "tcga", out=tmp_path, seeds=[0],
                                 set=TINY, bootstrap=5, at_home=True)  # fmt: skip
    ((cases, models),) = brca_genes.study("blca-cbioportal", options)
    rows, gaps = brca_genes.rows_of("blca-cbioportal", cases, models, options)
    names = {row["model"] for row in rows}
    assert names == {brca_genes.LINEAR.name, brca_genes.ORIENTATION.name, *SETTINGS}
    assert {row["cases"] for row in rows} == {74}  # published test cases that have expression
    assert {row["metric"] for row in rows} == set(METRICS)
    assert {row["rival"] for row in gaps} == names - {OURS}
    drawn = [row for row in shown(rows) if row["model"] == OURS]
    assert len(drawn) == 3
    assert {row["reading"] for row in drawn} == {models[0].reading}
    monkeypatch.setattr(brca_runs, "run_training", None)  # nothing is trained again
    ((_, again),) = brca_genes.study("blca-cbioportal", options)
    assert (
        brca_genes.rows_of("blca-cbioportal", cases, again, options)[0][0]["value"]
        == (rows[0]["value"])
    )


def test_components_know_the_training_cases_only(cohort: CasesFolder) -> None:
    genes = cohort.expression
    assert genes is not None
    train = [case for case in genes.index if case in cohort.split().train]
    judged = [case for case in genes.index if case not in cohort.split().train]
    whole = components_of(cohort, Linear(3))
    again = components_of(with_other_genes(cohort, judged), Linear(3))
    np.testing.assert_array_equal(whole.take(train), again.take(train))
    assert not np.array_equal(whole.take(judged), again.take(judged))


def test_components_of_another_cohort_do_not_see_this_one(
    cohort: CasesFolder, tmp_path: Path
) -> None:
    other = small_cohort(tmp_path / "other", seed=5, prefix="Q")
    here = components_of(other, Linear(3, None), source=cohort)
    assert here.case_ids == tuple(other.expression.index)  # type: ignore[union-attr]
    own = components_of(other, Linear(3, None))
    assert not np.allclose(np.abs(here.embeddings), np.abs(own.embeddings), atol=1e-3)


def test_runs_are_kept_and_taken_to_another_cohort(
    cohort: CasesFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brca_genes, "LINEAR", Linear(3))
    other = small_cohort(tmp_path / "other", seed=5, prefix="Q")
    options = argparse.Namespace(seeds=[0, 1], set=TINY, bootstrap=5)
    models = brca_genes.models_elsewhere(cohort, other, tmp_path / "runs", options)
    names = [model.name for model in models]
    assert names[:3] == [OURS] * 3
    linear = ["linear, 3 components of small", "linear, 3 components"]
    assert names[3:] == [*linear, "pathway_mlp", "gene_mixer"]
    assert all(len(model.seeds) == 2 for model in models if model.name in SETTINGS)
    run = tmp_path / "runs" / "modaltune-0"
    assert train(OURS, cohort, run, 0, TINY) == run
    with pytest.raises(InputError, match=r"others in training\.seed; give another --out"):
        train(OURS, cohort, run, 1, TINY)


def test_a_difference_is_that_of_the_means_over_seeds(cohort: CasesFolder) -> None:
    split, labels = cohort.split(), cohort.clinical
    found = [
        evaluate_cases(components_of(cohort, Linear(count)), split, parts=("test",))
        for count in (2, 3, 4)
    ]
    said = [said_by(evaluation, "genes", "genes") for evaluation in found]
    two, one = Judged("two", "genes", tuple(said[:2])), Judged("one", "genes", (said[2],))
    rows = {row.metric: row for row in scores(two, labels, split.test, DRAWS)}
    mean = (rows["balanced_accuracy"].value + rows["c_index"].value) / 2
    assert rows["mean_of_two"].value == pytest.approx(mean)
    assert len(rows["auroc"].seeds) == 2
    other = {row.metric: row for row in scores(one, labels, split.test, DRAWS)}
    for gap in differences(two, one, labels, split.test, DRAWS):
        assert gap.difference == pytest.approx(rows[gap.metric].value - other[gap.metric].value)
        assert gap.low <= gap.high


def test_settings_are_chosen_without_the_test_cases(
    cohort: CasesFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, known = set(cohort.split().test), set()
    for split in brca_choice.folds(cohort, repeats=1):
        assert not set(split.train) & set(split.val)
        assert not test & {*split.train, *split.val}
        known |= set(split.val)
    genes = cohort.expression
    assert genes is not None
    assert known == {*cohort.split().train, *cohort.split().val} & set(genes.index)
    folder = brca_choice.folds_folder(cohort, 1)
    assert not test & set(folder.case_ids)
    assert folder.num_folds == brca_choice.FOLDS


@pytest.mark.parametrize("model", ["modaltune", "linear", "pathway_mlp"])
def test_a_choice_is_a_row_over_folds(
    model: str, cohort: CasesFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brca_choice, "build", lambda *_: cohort)
    arguments = ["none", "--out", str(tmp_path), "--model", model, "--repeats", "1",
                 "--components", "3", "--epochs", "1", "2", "--results", str(tmp_path)]  # fmt: skip
    arguments += [part for one in TINY for part in ("--set", one)]
    assert brca_choice.main(arguments) == 0
    with (tmp_path / brca_choice.CSV_NAME).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == {OURS: 6, "linear": 1, "pathway_mlp": 2}[model]
    assert {row["folds"] for row in rows} == {"5"}
    for row in rows:
        both = (float(row["balanced_accuracy"]) + float(row["c_index"])) / 2
        assert float(row["mean_of_two"]) == pytest.approx(both, abs=2e-4)
