"""Checkpoints: whole or not used, the last and the best kept, and nothing changed unnoticed."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modaltune.cli import app
from modaltune.config_text import to_toml
from modaltune.errors import CheckpointError
from modaltune.learner import ModalTuneLearner
from modaltune.run_config import RunConfig, load_run_config
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train import Training
from modaltune.train_checkpoint import (
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    restore,
    write_checkpoint,
)
from modaltune.train_prepare import prepare
from modaltune.train_run import run_training
from modaltune.train_signals import TrainingStopped
from modaltune.train_watcher import Choice, RunWatcher


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_cases(tmp_path_factory.mktemp("study"), parts=(9, 6, 0))


def config(cases: Path, out: Path, *sets: str) -> RunConfig:
    # Everything that draws at random is on.
    drawn = (
        "model.trunk_dropout=true",
        "model.slide_encoder.dropout=0.2",
        "inputs.tile_limit=every_epoch",
        "inputs.max_tiles=4",
    )
    return tiny_run_config([cases], out, "output.checkpoint_steps=1", *drawn, *sets)


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunWatcher.step

    def step(self: RunWatcher, training: Any, *rest: Any) -> None:
        if training.epoch * 5 + training.step >= steps:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, training, *rest)

    monkeypatch.setattr(RunWatcher, "step", step)


def records(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k in ("kind", "steps", "loss", "lr")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def unbroken(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run_training(config(cases, out))
    return out


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    cases: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for steps in (2, 5, 6):  # within an epoch, at its end, within the next
        with monkeypatch.context() as patch:
            stop_after(steps, patch)
            with pytest.raises(TrainingStopped) as stopped:
                run_training(config(cases, out))
        assert stopped.value.steps == steps
        random.seed(77)
        np.random.seed(77)
        torch.manual_seed(77)  # what came between must not matter
    run_training(config(cases, out))
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert records(out) == records(unbroken)  # each step once


def test_every_generator_goes_on_where_it_was(cases: Path, tmp_path: Path) -> None:
    settings = config(cases, tmp_path / "run")

    def begun() -> Training:
        learner = ModalTuneLearner(prepare(settings).run.model, settings.training)
        return Training.begin(learner, settings.training)

    training = begun()
    training.epoch, training.step, training.loss_sum = 1, 2, 0.1 + 0.2
    torch.rand(3, generator=training.order)
    training.epoch_order = training.order.get_state()
    path = write_checkpoint(tmp_path / "checkpoints", training, 12, {"a": [1, None]})
    assert path is not None

    def draws() -> list[float]:
        return [
            random.gauss(0, 1), float(np.random.normal()), float(np.random.randint(9)),
            float(torch.rand(1)), float(torch.randn(1)),
        ]  # fmt: skip

    random.gauss(0, 1), np.random.normal()  # leaves a second number behind, for the next draw
    path = write_checkpoint(tmp_path / "checkpoints", training, 13, {})
    want = draws()
    again = begun()
    random.seed(5)
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.path == path
    restore(saved, again)
    assert draws() == want
    assert (again.epoch, again.step, again.loss_sum) == (1, 2, 0.1 + 0.2)
    assert torch.equal(again.epoch_order, training.epoch_order)
    again.accelerator = type("Two", (), {"num_processes": 2})()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"processes must be 1, .*, got 2; start as many"):
        restore(saved, again)


@pytest.mark.parametrize("torn", ["json cut", "json bit", "tensors cut", "tensors gone"])
def test_a_torn_checkpoint_is_never_loaded(
    torn: str, cases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(cases, tmp_path / "run")
    learner = ModalTuneLearner(prepare(settings).run.model, settings.training)
    training = Training.begin(learner, settings.training)
    folder = tmp_path / "checkpoints"
    for steps in (1, 2):
        write_checkpoint(folder, training, steps, {"steps": steps})
    last = folder / "step-000000002.json"
    tensors = last.with_suffix(".safetensors")
    if torn == "json cut":
        last.write_text(last.read_text()[:-40])
    elif torn == "json bit":
        last.write_text(last.read_text().replace('"epoch": 0', '"epoch": 1'))
    elif torn == "tensors cut":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        tensors.unlink()
    # Asked for by name, as the best epoch's is, it has no earlier one to stand in for it.
    with pytest.raises(CheckpointError, match=r"must be whole, got .*; restore the file, or train"):
        read_checkpoint(last)
    with caplog.at_level(logging.WARNING):
        saved = newest_checkpoint(folder)
    assert saved is not None
    assert saved.state["steps"] == 1
    assert "step-000000002.json is passed over for an earlier one" in caplog.text


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    for steps in range(1, 7):
        for ending in (".json", ".safetensors"):
            (tmp_path / f"step-{steps:09d}{ending}").write_text("x")
    (tmp_path / ".step-000000007.0123456789abcdef.modaltune-tmp.json").write_text("x")
    prune_checkpoints(tmp_path, 2, "step-000000003")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-00000000{n}{ending}" for n in (3, 5, 6) for ending in (".json", ".safetensors")
    ]


def test_the_best_epoch_is_what_a_run_holds(unbroken: Path) -> None:
    kept = sorted(p.stem for p in (unbroken / "checkpoints").glob("*.json"))
    chosen = json.loads((unbroken / "run.json").read_text())["info"]["chosen"]
    assert chosen["checkpoint"] in kept
    assert len(kept) <= 3
    found = [r for r in map(json.loads, (unbroken / "metrics.jsonl").read_text().splitlines())
             if r["kind"] == "validation"]  # fmt: skip
    best = max(r["balanced_accuracy"] for r in found)
    last_best = max(i for i, r in enumerate(found) if r["balanced_accuracy"] == best)
    assert (chosen["value"], chosen["epoch"]) == (best, last_best + 1)
    own = load_file(unbroken / "model.safetensors")
    saved = read_checkpoint(unbroken / "checkpoints" / f"{chosen['checkpoint']}.json")
    for name, tensor in saved.model_state().items():
        assert torch.equal(own[name], tensor), name


def test_equal_is_as_good_and_the_later_one_is_kept() -> None:
    choice = Choice()
    offers = [0.5, 0.6, 0.6, None, 0.4]
    kept = [choice.offer({"balanced_accuracy": v}, e + 1) for e, v in enumerate(offers)]
    assert kept == [True, True, True, False, False]
    assert (choice.epoch, choice.stale) == (3, 3)
    fallback = Choice()
    assert fallback.offer({"balanced_accuracy": None, "c_index": 0.7}, 1)
    assert not fallback.offer({"balanced_accuracy": None, "c_index": 0.6}, 2)
    # The figure asked for takes over as soon as there is one.
    assert fallback.offer({"balanced_accuracy": 0.9, "c_index": 0.6}, 3)
    assert not fallback.offer({"balanced_accuracy": 0.8, "c_index": 0.9}, 4)
    nothing = Choice()
    assert nothing.offer({}, 1)
    assert nothing.offer({}, 2)
    assert (nothing.epoch, nothing.stale) == (2, 0)  # nothing to wait for: no early stop


def test_a_changed_configuration_is_refused_by_name(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(TrainingStopped):
            run_training(config(cases, out))
    before = sorted(p.name for p in (out / "checkpoints").iterdir())
    other = config(cases, out, "training.lr=0.5", "model.genes.dropout=0.0")
    with pytest.raises(CheckpointError, match=r"got another model.genes.dropout, training.lr; put"):
        run_training(other)
    moved = write_training_cases(tmp_path / "other", parts=(9, 6, 0), seed=1)
    changed = config(moved, out, f"text.embeddings={str(cases.parent / 'text.safetensors')!r}")
    with pytest.raises(CheckpointError, match=r"another cases.folders, cases, frozen_weights"):
        run_training(changed)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before
    last = config(cases, out, "output.keep_last=5")  # how much is kept is free
    run_training(last)
    assert load_run_config(out / "config.toml") == last


def test_a_run_goes_on_with_cases_that_were_moved(
    cases: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = tmp_path / "study", tmp_path / "run"
    shutil.copytree(cases.parent, study)
    text = f"text.embeddings={str(cases.parent / 'text.safetensors')!r}"
    with monkeypatch.context() as patch:
        patch.chdir(study)
        stop_after(3, patch)
        with pytest.raises(TrainingStopped):
            run_training(config(Path("cases"), out, text))
    study.rename(tmp_path / "elsewhere")
    run = run_training(config(tmp_path / "elsewhere" / "cases", out, text))
    assert run.info["cases"][0]["path"] == str(tmp_path / "elsewhere" / "cases")
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_may_begin_anew_with_other_settings(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunWatcher, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(config(cases, out))
    assert load_run_config(out / "config.toml") == config(cases, out)
    other = config(cases, out, "training.lr=0.5", "training.epochs=1")
    run_training(other)
    assert load_run_config(out / "config.toml") == other


def test_a_stopped_command_says_how_to_go_on(
    cases: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.toml"
    path.write_text(to_toml(config(cases, tmp_path / "run")))
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        patch.setattr("sys.argv", ["modaltune", "train", str(path)])
        stopped = CliRunner().invoke(app, ["train", str(path)])
    assert stopped.exit_code == 130
    said = " ".join(stopped.stderr.split())
    assert (
        f"stopped after 4 steps; a checkpoint is written. To go on: modaltune train {path}" in said
    )
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    assert "the slide encoder of this model is random" in done.stdout
    run = tmp_path / "run" / "model.safetensors"
    assert run.read_bytes() == (unbroken / "model.safetensors").read_bytes()
