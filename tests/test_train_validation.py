"""Validation during training: the loss of the validation cases, and which epoch is kept by it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from modaltune.checkpoint import Run
from modaltune.errors import InputError
from modaltune.learner import ModalTuneLearner
from modaltune.processes import make_accelerator
from modaltune.targets import Targets, distillation_loss
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.text_embeddings import PrecomputedText
from modaltune.train import Training
from modaltune.train_checkpoint import read_checkpoint
from modaltune.train_prepare import prepare
from modaltune.train_run import run_training
from modaltune.train_validation import validation_of
from modaltune.train_watcher import Choice
from modaltune.validation import validate_heads


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_cases(tmp_path_factory.mktemp("study"))


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def some_text(cases: Path, path: Path, absent: int) -> str:
    """Write the text embeddings without those of some validation cases; return the setting."""
    text = PrecomputedText.load(cases.parent / "text.safetensors").embeddings
    gone = [f"P{number:03d}" for number in range(10, 10 + absent)]
    PrecomputedText({case: rows for case, rows in text.items() if case not in gone}).save(path)
    return f"text.embeddings={str(path)!r}"


@pytest.mark.parametrize("absent", [0, 2, 6])
def test_the_loss_is_of_the_validated_prompt_over_cases_that_have_text(
    absent: int, cases: Path, tmp_path: Path
) -> None:
    embeddings = some_text(cases, tmp_path / "text.safetensors", absent)
    ready = prepare(tiny_run_config([cases], tmp_path / "run", embeddings))
    assert isinstance(ready.run, Run)
    learner = ready.learner
    assert isinstance(learner, ModalTuneLearner)
    section = ready.config.training
    training = Training.begin(learner, section, make_accelerator(learner, section))
    found = validation_of(ready)(training)
    model = ready.run.model.eval()
    for name, part in (("loss", ready.val), ("train_loss", ready.train)):
        targets = part.all_targets
        assert targets is not None
        assert targets.text is not None
        known = [i for i in range(len(part)) if not bool(targets.text[i].isnan().any())]
        if part is ready.val:
            assert len(known) == len(part) - absent
        if not known:
            assert found[name] is None
            continue
        with torch.no_grad():
            outputs = model(part.batch(known), [0])
        want = float(distillation_loss(outputs, targets.text[known][:, :1]).mean())
        assert found[name] == pytest.approx(want, rel=1e-4)
    assert not math.isclose(found["train_loss"], found["loss"] or 0)


def test_the_loss_is_logged_shown_and_may_choose_the_epoch(cases: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w"))
    sets = ("training.choose_by=loss", "training.epochs=8", "training.lr=0.05")
    run = run_training(tiny_run_config([cases], tmp_path / "run", *sets), console=console)
    losses = [record["loss"] for record in records(tmp_path / "run", "validation")]
    chosen = run.info["chosen"]
    assert (chosen["by"], chosen["value"]) == ("loss", min(losses))
    assert chosen["epoch"] == losses.index(min(losses)) + 1
    assert chosen["epoch"] < 8  # else what follows says nothing
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / f"{chosen['checkpoint']}.json")
    state = run.model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in best.model_state().items())
    shown = console.export_text()
    assert all(f"validation loss {loss:.3f}" in shown for loss in losses)
    default = run_training(tiny_run_config([cases], tmp_path / "default"))
    assert default.info["chosen"]["by"] == "balanced_accuracy"


def test_choosing_by_loss_needs_text_of_validation_cases(cases: Path, tmp_path: Path) -> None:
    embeddings = some_text(cases, tmp_path / "text.safetensors", 6)
    with pytest.raises(InputError, match=r"training.choose_by .* got 'loss' without a text embed"):
        prepare(tiny_run_config([cases], tmp_path, embeddings, "training.choose_by=loss"))


def test_less_loss_is_better() -> None:
    choice = Choice()
    offers = [0.5, 0.6, 0.5, None, 0.4, 0.45]
    kept = [choice.offer({"loss": v}, e + 1, "loss") for e, v in enumerate(offers)]
    assert kept == [True, False, True, False, True, False]
    assert (choice.by, choice.value, choice.epoch, choice.stale) == ("loss", 0.4, 5, 1)
    by_index = Choice()
    assert by_index.offer({"balanced_accuracy": 0.9, "c_index": 0.5}, 1, "c_index")
    assert by_index.by == "c_index"
    instead = Choice()  # the figure asked for is not there
    assert instead.offer({"loss": None, "balanced_accuracy": 0.5}, 1, "loss")
    assert instead.by == "balanced_accuracy"
    # ... and is, later on: what was chosen for want of it gives way, and a gap changes nothing.
    assert instead.offer({"loss": 0.3, "balanced_accuracy": 0.4}, 2, "loss")
    assert not instead.offer({"loss": None, "balanced_accuracy": 0.9}, 3, "loss")
    assert (instead.by, instead.value, instead.epoch) == ("loss", 0.3, 2)


def test_heads_are_judged_site_by_site() -> None:
    """Two sites, each ranked and classified perfectly; the second site's risks lie above all."""
    months = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    classes = torch.tensor([0, 1, 1, 0, 0, -1])
    targets = Targets(None, classes, months, torch.ones(6))
    risk = np.array([3.0, 2.0, 1.0, 9.0, 8.0, 7.0])
    said = np.eye(2)[[0, 1, 1, 0, 1, 0]]
    one = validate_heads(said, risk, targets, [0] * 6)
    assert one["c_index"] == pytest.approx(6 / 15)
    assert "sites" not in one
    two = validate_heads(said, risk, targets, [0, 0, 0, 1, 1, 1])
    assert two["c_index"] == 1.0
    assert two["balanced_accuracy"] == pytest.approx((1.0 + 0.5) / 2)
    assert two["sites"]["1"]["balanced_accuracy"] == 0.5
