"""`modaltune train` with a baseline: one run folder, which evaluation and prediction read."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import modaltune
from modaltune import CasesFolder, load_run, open_run
from modaltune.baseline_run import BaselineRun
from modaltune.baselines import BASELINES
from modaltune.cases_folder import CasesContent, write_cases_folder
from modaltune.cli import app
from modaltune.config_text import to_toml
from modaltune.errors import CheckpointError, CohortError, InputError
from modaltune.evaluate import balanced_accuracy, harrell_c_index
from modaltune.evaluated_cases import embed_cases
from modaltune.learner import embed_all
from modaltune.result_rows import BootstrapOptions
from modaltune.run_config import RunConfig
from modaltune.run_evaluation import EvaluateRequest, evaluate_run
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train_prepare import prepare
from modaltune.train_run import run_training
from modaltune.train_signals import TrainingStopped
from modaltune.train_watcher import RunWatcher

SMALL: dict[str, tuple[str, ...]] = {
    "linear_probe": (),
    "abmil": ("learner.settings={width=16, attention_width=8}",),
    "pathway_mlp": ("learner.settings={token_width=8, width=16}",),
    "gene_mixer": ("learner.settings={width=16, depth=1, tokens=4, out_width=16}",),
    "mcat": ("learner.settings={width=16, heads=2, hidden=16, layers=1}",),
    "late_fusion": ("learner.settings={image={width=16}, genes={token_width=8, width=16}}",),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_cases(tmp_path_factory.mktemp("study"), parts=(30, 12, 14))


def config(cases: Path, out: Path, kind: str, *sets: str) -> RunConfig:
    own = (f"learner.kind={kind}", *SMALL.get(kind, ()))
    return tiny_run_config([cases], out, "training.epochs=2", "training.lr=1e-2", *own, *sets)


@pytest.fixture(scope="module")
def runs(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a trained run folder of every kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("modaltune", *BASELINES):
        run_training(config(cases, folder / kind, kind))
    return {kind: folder / kind for kind in ("modaltune", *BASELINES)}


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.parametrize("kind", BASELINES)
def test_the_run_folder_holds_the_baseline(kind: str, runs: dict[str, Path], cases: Path) -> None:
    out = runs[kind]
    assert {path.name for path in out.iterdir()} >= {
        "run.json", "model.safetensors", "config.toml", "split.json", "metrics.jsonl",
        "checkpoints",
    }  # fmt: skip
    run = open_run(out)
    assert isinstance(run, BaselineRun)
    assert run.section == config(cases, out, kind).learner
    assert run.info["cases"][0]["sha256"] == CasesFolder.open(cases).sha256
    assert run.random_backbone == run.info["random_backbone"] == (kind == "linear_probe")
    ready = prepare(config(cases, out, kind))
    last = ready.run.model.state_dict()
    assert last.keys() == run.model.state_dict().keys()
    assert any(not torch.equal(v, last[k]) for k, v in run.model.state_dict().items())
    told = embed_cases(out).cases
    rows = [told.case_ids.index(case) for case in ready.train.case_ids]
    inside = embed_all(run.learner, ready.train, range(len(ready.train)), 3)
    np.testing.assert_allclose(told.embeddings[rows], inside, rtol=1e-4, atol=1e-5)
    risk = run.predict_embedded(ready.train.case_ids, inside).risk
    assert risk is not None
    assert run.info["risk_cut"] == pytest.approx(np.median(risk), rel=1e-5)
    with pytest.raises(CheckpointError, match=rf"got the baseline {kind}; open it with modaltune"):
        load_run(out)


def test_validation_judges_the_heads_and_their_loss(runs: dict[str, Path], cases: Path) -> None:
    out = runs["late_fusion"]
    found = records(out, "validation")
    chosen = json.loads((out / "run.json").read_text())["info"]["chosen"]
    run, ready = open_run(out), prepare(config(cases, out, "late_fusion"))
    assert isinstance(run, BaselineRun)
    val, targets = ready.val, ready.val.all_targets
    assert targets is not None
    said = run.learner.predict(val.batch(range(len(val))))
    assert said.probabilities is not None
    assert said.risk is not None
    best = found[chosen["epoch"] - 1]
    guess = said.probabilities.argmax(1).numpy()
    want = balanced_accuracy(targets.classes.numpy(), guess)
    assert best["balanced_accuracy"] == chosen["value"] == pytest.approx(want)
    index = harrell_c_index(targets.durations.numpy(), targets.events.numpy(), said.risk.numpy())
    assert best["c_index"] == pytest.approx(index)
    whole = run.learner.loss(run.model(val.batch(range(len(val)))), targets)
    assert best["loss"] == pytest.approx(float(whole.detach()), rel=1e-4)


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline with dropout and a Cox head; stopped within an epoch."""
    sets = ("learner.survival=cox", "training.cases_per_step=6", "output.checkpoint_steps=1")
    run_training(config(cases, tmp_path / "unbroken", "late_fusion", *sets))
    real = RunWatcher.step

    def step(self: RunWatcher, training: Any, *rest: Any) -> None:
        if training.epoch == 0 and training.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, training, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunWatcher, "step", step)
        with pytest.raises(TrainingStopped):
            run_training(config(cases, tmp_path / "run", "late_fusion", *sets))
    torch.manual_seed(77)  # what came between must not matter
    run_training(config(cases, tmp_path / "run", "late_fusion", *sets))
    one, two = (tmp_path / name / "model.safetensors" for name in ("run", "unbroken"))
    assert one.read_bytes() == two.read_bytes()
    run = open_run(tmp_path / "run")
    assert isinstance(run, BaselineRun)
    said = run.predict_embedded(["A"], np.zeros((1, 1, run.out_features)))
    assert said.survival is not None  # Cox's baseline was fitted after training
    assert np.isfinite(said.survival).all()
    assert (np.diff(said.survival[0]) <= 0).all()


def test_evaluation_scores_heads_and_embedding(
    runs: dict[str, Path], cases: Path, tmp_path: Path
) -> None:
    points = BootstrapOptions(resamples=0)
    request = EvaluateRequest(
        run=runs["late_fusion"], bootstrap=points, pictures=False, out=tmp_path / "a",
        compare=((runs["modaltune"],), (runs["linear_probe"],)),
    )  # fmt: skip
    found = evaluate_run(request)
    own = found.scores[found.scores["run"] == "late_fusion"]
    assert set(own["task"]) == {"direct", "embedding"}
    test = list(CasesFolder.open(cases).split().test)
    table = pd.read_parquet(tmp_path / "a" / "predictions.parquet")
    heads = table[(table["task"] == "direct") & (table["split"] == "test")].set_index("case_id")
    clinical = CasesFolder.open(cases).clinical
    truth = clinical["primary_class"].loc[list(heads.index)].to_numpy(int)
    (row,) = own[
        (own["task"] == "direct")
        & (own["split"] == "test")
        & (own["metric"] == "balanced_accuracy")
    ].to_dict(orient="records")
    guess = (heads["class_1"] > heads["class_0"]).to_numpy(int)
    assert row["value"] == pytest.approx(balanced_accuracy(truth, guess))
    assert set(heads.index) <= set(test)
    assert {"auroc", "c_index", "integrated_brier"} <= set(own[own["task"] == "direct"]["metric"])
    # Its heads are compared with every prompt of ModalTune; what a linear probe says with both.
    pairs = found.comparison.groupby("second")["task"].unique()
    assert set(pairs["modaltune"]) == {"general", "diagnosis", "survival"}
    assert set(pairs["linear_probe"]) == {"direct", "embedding"}
    back = evaluate_run(
        EvaluateRequest(
            run=runs["modaltune"], bootstrap=points, pictures=False, out=tmp_path / "b",
            compare=((runs["late_fusion"],),),
        )
    ).comparison  # fmt: skip
    keys = ["split", "task", "scope", "kind", "metric"]
    one = found.comparison[found.comparison["second"] == "modaltune"].set_index(keys)["difference"]
    two = back.set_index(keys)["difference"]
    pd.testing.assert_series_equal(one.sort_index(), -two.sort_index())


def test_pictures_name_what_stands_in_place_of_a_prompt(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    evaluate_run(EvaluateRequest(run=runs["mcat"], bootstrap=BootstrapOptions(0), out=tmp_path))
    drawn = {path.stem: path.read_text() for path in (tmp_path / "pictures").glob("*.svg")}
    assert "mcat: direct predictions" in drawn["calibration_test_direct_pooled"]
    assert "probes on the embedding" in drawn["calibration_test_embedding_pooled"]
    assert "kaplan_meier_test_direct_pooled" in drawn


def test_the_linear_probe_is_read_by_the_published_probes(
    runs: dict[str, Path], cases: Path, tmp_path: Path
) -> None:
    out = runs["linear_probe"]
    found = evaluate_run(
        EvaluateRequest(run=out, bootstrap=BootstrapOptions(0), pictures=False, out=tmp_path)
    )
    assert set(found.scores["task"]) == {"direct"}
    assert set(found.fits["task"]) == {"direct"}
    values = {r["balanced_accuracy"] for r in records(out, "validation")}
    assert len(values) == 1  # of the frozen embedding, whatever the heads learned


def test_class_heads_say_nothing_of_another_cancer(runs: dict[str, Path], tmp_path: Path) -> None:
    opened = CasesFolder.open(write_training_cases(tmp_path, parts=(12, 6, 8), prefix="Q"))
    clinical = opened.clinical.assign(site="bladder")
    slides = pq.read_table(opened.path / "slides.parquet").to_pandas()
    parts = CasesContent(clinical, opened.expression, opened.pathways, slides, [opened.split()])
    other = write_cases_folder(tmp_path / "bladder", parts).path
    found = evaluate_run(
        EvaluateRequest(
            run=runs["pathway_mlp"], cases=(other,), bootstrap=BootstrapOptions(0), pictures=False
        )
    ).scores
    test = found[found["split"] == "test"].set_index(["task", "metric"])
    assert test.loc[("direct", "balanced_accuracy"), "n"] == 0
    assert "class of another site" in test.loc[("direct", "balanced_accuracy"), "left_out"]
    assert test.loc[("direct", "c_index"), "n"] > 0
    assert test.loc[("embedding", "balanced_accuracy"), "n"] > 0  # its probes were fitted there


def test_a_class_that_training_lacks_counts_as_unlabelled(cases: Path, tmp_path: Path) -> None:
    opened = CasesFolder.open(cases)
    strange = opened.clinical["primary_class"].copy()
    strange[opened.split().val[0]] = 2
    clinical = opened.clinical.assign(primary_class=strange)
    parts = CasesContent(
        clinical, opened.expression, opened.pathways,
        pq.read_table(cases / "slides.parquet").to_pandas(), [opened.split()],
    )  # fmt: skip
    folder = write_cases_folder(tmp_path / "cases", parts).path
    run_training(config(folder, tmp_path / "run", "pathway_mlp"))
    assert all(math.isfinite(v["loss"]) for v in records(tmp_path / "run", "validation"))


@pytest.mark.parametrize("kind", ["mcat", "linear_probe"])
def test_new_cases_are_predicted(
    kind: str, runs: dict[str, Path], cases: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions.parquet"
    words = ["predict", str(runs[kind]), "--cases", str(cases), "--out", str(out), "--json"]
    if kind == "linear_probe":
        request = EvaluateRequest(run=runs[kind], bootstrap=BootstrapOptions(0), pictures=False)
        evaluate_run(request)  # fits the probes
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["tasks"] == ["direct"]
    table = pd.read_parquet(out)
    ready = prepare(config(cases, tmp_path / "run", kind))
    run = open_run(runs[kind])
    assert isinstance(run, BaselineRun)
    if kind == "mcat":
        direct = run.learner.predict(ready.val.batch([0, 1]))
        rows = table.set_index("case_id").loc[list(ready.val.case_ids[:2])]
        assert direct.probabilities is not None
        assert direct.risk is not None
        np.testing.assert_allclose(rows["class_1"], direct.probabilities[:, 1], rtol=1e-4)
        np.testing.assert_allclose(rows["risk"], direct.risk, rtol=1e-4)
        high = np.where(rows["risk"] > run.info["risk_cut"], "high", "low")
        assert list(rows["risk_group"]) == list(high)
        curve = [name for name in table if name.startswith("survival_")]
        assert len(curve) == 4
        assert (table[curve].diff(axis=1).iloc[:, 1:] <= 0).all(axis=None)
    embedded = np.stack(table["embedding"])
    assert embedded.shape == (len(table), run.out_features)
    assert table["random_backbone"].eq(kind == "linear_probe").all()


def test_heads_are_those_asked_for(cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "classes"
    run_training(config(cases, out, "pathway_mlp", "learner.survival=none"))
    run = open_run(out)
    assert isinstance(run, BaselineRun)
    said = run.predict_embedded(["A"], np.zeros((1, 1, run.out_features)))
    assert said.risk is None
    assert said.probabilities is not None
    out = tmp_path / "survival"
    sets = ("learner.classes=false", "learner.bins=3")
    run_training(config(cases, out, "pathway_mlp", *sets))
    info = json.loads((out / "run.json").read_text())["info"]
    assert info["chosen"]["by"] == "c_index"
    run = open_run(out)
    assert isinstance(run, BaselineRun)
    said = run.predict_embedded(["A"], np.zeros((1, 1, run.out_features)))
    assert said.probabilities is None
    assert said.survival is not None
    assert said.survival.shape == (1, 3)
    with pytest.raises(InputError, match=r"cases_per_step must bring 2 deaths per batch"):
        prepare(config(cases, out, "pathway_mlp", "learner.survival=cox"))
    other = write_training_cases(tmp_path / "other", seed=3, prefix="Q")
    both = tiny_run_config([cases, other], out, "learner.kind=pathway_mlp")
    with pytest.raises(InputError, match=r"learner.classes must be false for several cases folder"):
        prepare(both)


def test_what_the_cases_lack_is_said(
    cases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = CasesFolder.open(cases)
    slides = pq.read_table(cases / "slides.parquet").to_pandas()
    for name, content, kind, message in (
        (
            "genes", (opened.expression, opened.pathways, slides.iloc[:0]), "abmil",
            r"learner.kind = abmil needs feature files .* got none; .* choose another learner.kind",
        ),
        (
            "slides", (None, None, slides), "mcat",
            r"learner.kind = mcat needs expression and pathways .* choose another learner.kind",
        ),
    ):  # fmt: skip
        parts = CasesContent(opened.clinical, *content, [opened.split(0)])
        folder = write_cases_folder(tmp_path / name, parts).path
        with pytest.raises(CohortError, match=message):
            prepare(config(folder, tmp_path / "run", kind))
    with caplog.at_level(logging.WARNING):
        prepare(config(cases, tmp_path / "run", "abmil", "inputs.clinical=default"))
    assert "abmil reads no clinical values: inputs.clinical is not used" in caplog.text


def test_nothing_outside_the_training_split_changes_what_is_fitted(
    cases: Path, tmp_path: Path
) -> None:
    opened = CasesFolder.open(cases)
    split, clinical = opened.split(0), opened.clinical.copy()
    outside = [*split.val, *split.test]
    clinical.loc[outside, "survival_months"] = np.linspace(500, 900, len(outside))
    clinical.loc[outside, "primary_class"] = 2
    slides = pq.read_table(cases / "slides.parquet").to_pandas()
    parts = CasesContent(clinical, opened.expression, opened.pathways, slides, [split])
    folder = write_cases_folder(tmp_path / "other", parts).path
    sets = ("learner.balanced=true",)
    one, two = (
        prepare(config(where, tmp_path / "run", "late_fusion", *sets)) for where in (cases, folder)
    )
    assert one.run.preprocessing.to_dict() == two.run.preprocessing.to_dict()
    state = two.run.model.state_dict()
    assert state.keys() == one.run.model.state_dict().keys()
    for name, tensor in one.run.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert isinstance(one.run, BaselineRun)
    assert isinstance(two.run, BaselineRun)
    torch.testing.assert_close(one.run.learner.class_weights, two.run.learner.class_weights)


def test_the_command_trains_a_baseline(cases: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(to_toml(config(cases, tmp_path / "run", "modaltune")))
    words = ["train", str(path), "--set", "learner.kind=abmil", "--set", "training.epochs=1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "abmil"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["learner"] == "abmil"
    assert told["chosen"]["by"] == "balanced_accuracy"
    assert not told["random_backbone"]
    assert modaltune.open_run(tmp_path / "abmil").out_features == 500  # the paper's
