"""`modaltune evaluate` on small real files: own cases, seeds, rivals, another cohort, refusals."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from modaltune.cases_folder import CasesContent, CasesFolder, file_sha256, write_cases_folder
from modaltune.checkpoint import WEIGHTS
from modaltune.cli import app
from modaltune.cohort_embeddings import read_embeddings
from modaltune.errors import CheckpointError, CohortError, InputError
from modaltune.evaluated_cases import InputOptions, embed_cases, run_split, seen_cases
from modaltune.evaluation_report import class_names, report_markdown
from modaltune.probe_files import load_probes
from modaltune.result_rows import BootstrapOptions
from modaltune.run_evaluation import EvaluateRequest, EvaluateResult, evaluate_run
from modaltune.splits import Split
from modaltune.testing_cohort import TASKS, small_cohort, small_run
from modaltune.testing_embeddings import one_row
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train_run import run_training

POINTS = BootstrapOptions(resamples=0)


class Study(NamedTuple):
    """A cohort, three runs of it, and another cohort."""

    cases: CasesFolder
    runs: tuple[Path, ...]
    other: CasesFolder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    cases = small_cohort(folder / "breast", cases=70)
    runs = tuple(small_run(folder / f"seed{k}", cases, seed=k) for k in range(3))
    bladder = folder / "bladder"
    other = small_cohort(bladder, seed=1, cases=70, sites=("bladder",), prefix="B")
    return Study(cases, runs, other)


def _evaluate(study: Study, **options: Any) -> EvaluateResult:
    options = {"bootstrap": POINTS, "pictures": False, **options}
    return evaluate_run(EvaluateRequest(run=study.runs[0], **options))


def test_the_command(study: Study, tmp_path: Path) -> None:
    """The command on the run's own cases writes tables, pictures, predictions and probes."""
    out = tmp_path / "out"
    said = CliRunner().invoke(
        app, ["evaluate", str(study.runs[0]), "--out", str(out), "--bootstrap", "5", "--json"]
    )
    assert said.exit_code == 0, said.output
    read = json.loads(said.stdout)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "embeddings", "pictures", "predictions.parquet", "report.md", "evaluation.json",
        *(f"{table}.{kind}" for table in ("scores", "fits") for kind in ("csv", "md", "json")),
    }  # fmt: skip
    assert read["own_cases"]
    assert read["random_backbone"]
    assert read["scores"] == json.loads((out / "scores.json").read_text())
    drawn = {path.name for path in (out / "pictures").iterdir()}
    assert drawn == set(read["pictures"])
    for picture in ("roc_test_pooled", "forest_test", "kaplan_meier_test_survival_pooled",
                    "calibration_test_diagnosis_pooled", "embeddings_test_general",
                    "precision_recall_test_pooled"):  # fmt: skip
        assert {f"{picture}.png", f"{picture}.svg"} <= drawn
    report = (out / "report.md").read_text()
    assert "slide encoder of this model is random" in report
    assert "## Test cases" in report
    assert load_probes(study.runs[0]).info["cases_sha256"] == study.cases.sha256
    split = run_split(study.runs[0])
    assert split is not None
    predicted = pd.read_parquet(out / "predictions.parquet")
    one = predicted[(predicted["split"] == "test") & (predicted["task"] == "general")]
    gone = read["without_embedding"]["test"]
    assert sorted([*one["case_id"], *gone]) == list(split.test)


def test_what_is_printed(study: Study) -> None:
    said = CliRunner().invoke(
        app,
        ["evaluate", str(study.runs[0]), "--bootstrap", "0", "--no-pictures",
         "--compare", str(study.runs[1])],
        env={"COLUMNS": "200"},
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "uno c index" in said.stdout
    assert "seed0 minus seed1: test cases, seeds 1 and 1" in said.stdout
    assert re.search(r"c index +│ [+-]0\.\d{3} +│", said.stdout)  # without resamples no interval
    assert "random, not pretrained" in said.stdout


@pytest.mark.parametrize("what", ["no test cases", "no labels"])
def test_nothing_to_score_on_test_cases_is_said(study: Study, tmp_path: Path, what: str) -> None:
    own = study.other
    split, clinical = own.split(), own.clinical.copy()
    if what == "no labels":
        clinical.loc[:, "primary_class"] = -1
        clinical.loc[:, ["survival_months", "event"]] = np.nan
    else:
        split = Split((*split.train, *split.test), split.val, ())
    content = CasesContent(clinical, own.expression, own.pathways, None, [split])
    cases = write_cases_folder(tmp_path / "cases", content)
    words = ["--bootstrap", "0", "--cases", str(cases.path), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, ["evaluate", str(study.runs[0]), *words])
    assert said.exit_code == 0, said.output
    assert "no test case has a class or a survival time" in said.stdout.replace("\n", " ")


def test_embeddings_are_made_once(study: Study, tmp_path: Path) -> None:
    first = embed_cases(study.runs[0], cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    table = read_embeddings(kept)
    assert table.tasks == TASKS
    stamp = kept.stat().st_mtime_ns
    again = embed_cases(study.runs[0], cache=tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first.cases.embeddings, again.cases.embeddings)
    assert first.modalities == again.modalities
    assert set(first.modalities.values()) == {("slide",), ("genes",), ("slide", "genes")}
    assert set(study.cases.case_ids) - set(first.cases.case_ids)  # neither slide nor genes
    embed_cases(study.runs[1], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_seeds_and_rivals(study: Study, tmp_path: Path) -> None:
    alone = _evaluate(study)
    own = study.runs[0] / "evaluation"
    table = pd.read_parquet(own / "predictions.parquet")
    given = tmp_path / "given.csv"
    table[table["task"] == "survival"].to_csv(given, index=False)
    found = _evaluate(
        study,
        seeds=study.runs[1:],
        compare=((study.runs[1],), (given,)),
        bootstrap=BootstrapOptions(resamples=2),
    )
    runs = found.scores["run"].unique()
    assert list(runs) == ["seed0", "seed1", "seed2", "seed0 and 2 more seeds", "given"]
    assert not found.scores.duplicated(["run", "split", "task", "scope", "kind", "metric"]).any()
    mean = found.scores[found.scores["run"] == "seed0 and 2 more seeds"]
    row = one_row(mean, split="test", task="survival", metric="c_index")
    assert row["seeds"] == 3
    assert row["value"] == pytest.approx(
        np.mean([float(v) for v in row["values"].split()]), abs=1e-4
    )
    where = {"split": "test", "task": "survival", "metric": "c_index"}
    assert one_row(found.scores[found.scores["run"] == "seed0"], **where)["value"] == pytest.approx(
        one_row(alone.scores, **where)["value"]
    )
    direct = found.scores[found.scores["run"] == "given"]
    assert one_row(direct, split="test", metric="c_index")["value"] == pytest.approx(
        one_row(alone.scores, **where)["value"]
    )
    assert set(found.comparison["second"]) == {"seed1", "given"}
    told = json.loads((own / "evaluation.json").read_text())
    assert told["run_folder"] == str(study.runs[0].resolve())
    assert told["cases_folders"] == [str(study.cases.path.resolve())]
    assert told["compare"] == [[str(study.runs[1].resolve())], [str(given.resolve())]]
    weights = [file_sha256(run / WEIGHTS) for run in study.runs]
    assert [run.get("weights_sha256") for run in told["runs"]] == [*weights, None]
    assert told["runs"][3]["sha256"] == file_sha256(given)
    assert told["weights_sha256"] == weights[0]
    assert told["fold"] is None
    report = (own / "report.md").read_text()
    assert "slide encoder of seed0, seed1, seed2 is random" in report
    assert set(found.comparison["seeds"]) == {"3 and 1"}
    assert "## Differences, first minus second" in (own / "report.md").read_text()
    with pytest.raises(InputError, match=r"seeds must be different runs, got .*seed1 more than"):
        _evaluate(study, seeds=(study.runs[1], study.runs[1]))
    with pytest.raises(InputError, match=r"seeds must be different runs, got .*seed0 more than"):
        _evaluate(study, seeds=study.runs[:1])


def test_another_cohort(study: Study) -> None:
    """Its own probes by default, or everything fitted on the first cohort."""
    _evaluate(study)
    before = (study.runs[0] / "probes.json").read_bytes()
    found = _evaluate(study, cases=(study.other.path,))
    out = study.runs[0] / "evaluation-bladder"
    assert out / "scores.csv" in found.written
    assert load_probes(out).sites == ("bladder",)
    assert (study.runs[0] / "probes.json").read_bytes() == before
    assert not found.summary["own_cases"]
    with pytest.raises(CheckpointError, match="got no fitted probes"):
        _evaluate(study, cases=(study.other.path,), probes="run", seeds=study.runs[2:])
    fitted = _evaluate(study._replace(runs=study.runs[2:]))
    first = _evaluate(study, cases=(study.other.path,), probes="run", compare=((study.runs[2],),))
    where = {"split": "test", "task": "survival", "metric": "c_index"}
    alone = evaluate_run(
        EvaluateRequest(run=study.runs[2], cases=(study.other.path,), probes="run",
                        bootstrap=POINTS, pictures=False)
    )  # fmt: skip
    # Each run speaks through its own probes, of the first cohort: a rival as the run.
    assert fitted.summary["own_cases"]
    beside = one_row(first.scores[first.scores["run"] == "seed2"], **where)["value"]
    assert beside == one_row(alone.scores, **where)["value"]
    first = replace(first, scores=first.scores[first.scores["run"] == "seed0"])
    row = one_row(first.scores, split="test", task="general", metric="auroc")
    assert row["n"] == 0
    assert "class of another site" in row["left_out"]
    other = one_row(first.scores, split="test", task="survival", metric="c_index")
    own = one_row(found.scores, split="test", task="survival", metric="c_index")
    assert other["n"] == own["n"] > 0
    assert other["value"] != own["value"]


def test_a_table_is_weighed_as_the_run_it_is_set_beside(study: Study, tmp_path: Path) -> None:
    """With the run's own probes, weights and times of a rival table are of the same cases."""
    _evaluate(study)
    others = {"cases": (study.other.path,), "probes": "run"}
    alone = _evaluate(study, **others)
    table = pd.read_parquet(study.runs[0] / "evaluation-bladder" / "predictions.parquet")
    table[table["task"] == "survival"].to_csv(tmp_path / "given.csv", index=False)
    beside = _evaluate(study, **others, compare=((tmp_path / "given.csv",),))
    scores = beside.scores[beside.scores["run"] == "given"]
    for metric in ("uno_c_index", "mean_auc", "integrated_brier"):
        own = one_row(alone.scores, split="test", task="survival", metric=metric)
        given = one_row(scores, split="test", metric=metric)
        assert given["value"] == own["value"]
        assert given["note"] == own["note"]
        row = one_row(beside.comparison, split="test", task="survival", metric=metric)
        assert row["difference"] == 0


def test_several_folders_are_several_sites(study: Study, tmp_path: Path) -> None:
    """A run of two cohorts: probes per site and pooled, and a classifier of the site."""
    folders = (study.cases.path, study.other.path)
    found = _evaluate(study, cases=folders)
    out = study.runs[0] / "evaluation-breast+bladder"
    assert load_probes(out).sites == ("bladder", "breast")
    scopes = set(found.scores["scope"])
    assert scopes == {"pooled", "bladder", "breast", "mean of sites"}
    again = embed_cases(study.runs[0], cases=folders[::-1], cache=study.runs[0] / "embeddings")
    assert again.cases_sha256 == found.summary["cases_sha256"]
    assert len(again.split.test) == len(study.cases.split().test) + len(study.other.split().test)
    table = pd.read_parquet(out / "predictions.parquet")
    own = table[(table["task"] == "survival") & (table["scope"] != "pooled")]
    own.to_csv(tmp_path / "given.csv", index=False)
    beside = _evaluate(study, cases=folders, compare=((tmp_path / "given.csv",),))
    given = beside.scores[beside.scores["run"] == "given"]
    assert set(given["scope"]) == scopes
    assert set(given[given["scope"] == "pooled"]["kind"]) == {"survival"}
    for scope in ("breast", "bladder", "mean of sites"):
        for metric in ("auroc", "c_index"):
            row = one_row(
                beside.comparison, split="test", task="survival", scope=scope, metric=metric
            )
            assert row["difference"] == 0


def test_genes_of_another_source(study: Study, tmp_path: Path) -> None:
    cache = study.runs[0] / "embeddings"
    by_run = embed_cases(study.runs[0], cases=(study.other.path,), cache=cache)
    scaled = InputOptions(genes_scaled_by="cases")
    by_cases = embed_cases(study.runs[0], cases=(study.other.path,), options=scaled)
    assert not np.allclose(by_run.cases.embeddings, by_cases.cases.embeddings)
    # Scaling knows the training part only: other values of a test case move that case alone.
    moved = tmp_path / "moved"
    shutil.copytree(study.other.path, moved)
    (case,) = [c for c in by_run.split.test if "genes" in by_run.modalities.get(c, ())][:1]
    table = pd.read_parquet(moved / "expression.parquet").set_index("case_id")
    table.loc[case] += 50
    table.reset_index().to_parquet(moved / "expression.parquet")
    folder = CasesFolder.open(moved, verify=False)
    described = json.loads((moved / "cases.json").read_text())

    described["files"]["expression.parquet"] = file_sha256(moved / "expression.parquet")
    (moved / "cases.json").write_text(json.dumps(described))
    assert folder.path == moved
    changed = embed_cases(study.runs[0], cases=(moved,), options=scaled)
    differs = np.abs(changed.cases.embeddings - by_cases.cases.embeddings).max((1, 2)) > 1e-7
    assert [c for c, d in zip(changed.cases.case_ids, differs, strict=True) if d] == [case]


def test_genes_that_the_other_table_lacks(study: Study, tmp_path: Path) -> None:
    table = study.other.expression
    assert table is not None
    lacking = tmp_path / "lacking"
    shutil.copytree(study.other.path, lacking)
    table.drop(columns="G4").reset_index().to_parquet(lacking / "expression.parquet")

    described = json.loads((lacking / "cases.json").read_text())
    described["files"]["expression.parquet"] = file_sha256(lacking / "expression.parquet")
    (lacking / "cases.json").write_text(json.dumps(described))
    for scaled_by in ("run", "cases"):
        with pytest.raises(CohortError, match=r"1 missing \(G4\)"):
            embed_cases(study.runs[0], cases=(lacking,), options=InputOptions(scaled_by))
    filled = embed_cases(
        study.runs[0], cases=(lacking,), options=InputOptions(missing_genes="mean")
    )
    assert len(filled.cases.case_ids) > 60


def test_features_that_were_moved_before_training_are_found(tmp_path: Path) -> None:
    cases = write_training_cases(tmp_path / "cohort")
    moved = (tmp_path / "cohort" / "features").rename(tmp_path / "moved")
    sets = (f"cases.features={json.dumps(str(moved))}", "training.epochs=2")
    run_training(tiny_run_config([cases], tmp_path / "run", *sets))
    for given in ((), (cases,)):  # the run's own cases, named or not
        embedded = embed_cases(tmp_path / "run", cases=given)
        assert embedded.is_own
        assert sum("slide" in used for used in embedded.modalities.values()) > 10


def test_a_device_that_is_not_there_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"device must be cpu, cuda or cuda:N, got 'gpu'"):
        _evaluate(study, device="gpu")
    with pytest.raises(InputError, match=r"device must be one of the .* GPUs that torch sees"):
        _evaluate(study, device="cuda:99")


def test_refusals(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study.runs[0], copy, ignore=shutil.ignore_patterns("evaluation*"))
    split = json.loads((copy / "split.json").read_text())
    split["train"], split["test"] = split["test"], split["train"]
    (copy / "split.json").write_text(json.dumps(split))
    with pytest.raises(CohortError, match=r"must be new to every run, got .* trained on"):
        _evaluate(study, compare=((copy,),))
    with pytest.raises(CohortError, match=r"must be new to run .* got .* trained on"):
        embed_cases(copy, fold=0)
    (copy / "probes.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="got no fitted probes"):
        evaluate_run(EvaluateRequest(run=copy, probes="run"))
    _evaluate(study)
    for name in ("probes.json", "probes.safetensors"):
        shutil.copy(study.runs[0] / name, study.runs[1] / name)
    with pytest.raises(CheckpointError, match="got probes of other weights"):
        evaluate_run(EvaluateRequest(run=study.runs[1], probes="run"))
    described = json.loads((copy / "run.json").read_text())
    described["info"] = {}
    (copy / "run.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="--cases must be given, since run"):
        embed_cases(copy)


def test_a_test_case_that_chose_the_epoch_is_refused() -> None:
    """Validation picked the epoch that a run kept: as test cases they would flatter it."""
    own = Split(("a", "b"), ("c",), ("d", "e"))
    assert seen_cases(own, own) == set()
    assert seen_cases(own, Split(("a", "b"), ("d",), ("c", "e"))) == {"c"}
    assert seen_cases(own, Split(("d",), ("a",), ("b",))) == {"a", "b"}
    assert seen_cases(own, Split(("d", "e"), ("c",), ())) == set()
    assert seen_cases(None, own) == set()


def test_names_of_classes_and_what_a_report_warns_of(study: Study) -> None:
    described = {"classes": {"from": "f", "names": {"BRCA": {"0": "ductal", "1": "lobular"}}}}
    folder = replace(study.cases, description=described)
    assert class_names([folder]) == ("ductal", "lobular")
    assert class_names([folder, folder]) == ()
    assert class_names([study.cases]) == ()
    summary = {
        "run": "r", "cases": "c", "split": {"test": 3}, "probes": "run",
        "bootstrap": {"resamples": 5}, "without_embedding": {"test": []},
        "runs": [{"name": "r", "random_backbone": False, "fit_on": "published"}],
    }  # fmt: skip
    empty = pd.DataFrame(columns=["run", "task", "scope", "kind", "split", "metric"])
    page = report_markdown(summary, empty, pd.DataFrame(), pd.DataFrame())
    assert "of this model saw validation and test cases" in page
    rivals = [
        {"name": "r", "random_backbone": False, "fit_on": "train"},
        {"name": "s", "random_backbone": True, "fit_on": "train"},
        {"name": "t", "random_backbone": True, "fit_on": "published"},
        {"name": "table", "path": "table.csv"},
    ]
    page = report_markdown({**summary, "runs": rivals}, empty, pd.DataFrame(), pd.DataFrame())
    assert "**The slide encoder of s, t is random, not pretrained.**" in page
    assert "bins of t saw validation and test cases" in page
    page = report_markdown({**summary, "runs": rivals[:1]}, empty, pd.DataFrame(), pd.DataFrame())
    assert "saw validation" not in page
    assert "random" not in page
