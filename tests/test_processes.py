"""Two processes through torchrun give what one process gives with accumulation 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modaltune.config_text import to_toml
from modaltune.errors import InputError
from modaltune.learner import ModalTuneLearner
from modaltune.processes import SCALER_START, make_accelerator
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train import TrainConfig, Training, train_step
from modaltune.train_checkpoint import newest_checkpoint, restore, write_checkpoint
from modaltune.train_prepare import prepare
from modaltune.train_run import run_training


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "step"]


@pytest.mark.slow
def test_two_processes_equal_two_accumulated_batches(tmp_path: Path) -> None:
    cases = write_training_cases(tmp_path, parts=(9, 4, 0))
    # No dropout, which each process draws for itself; and a denominator of AdamW in which the
    # rounding of a gradient that is zero on paper is not blown up to a whole step.
    sets = ("model.genes.dropout=0.0", "model.adapter.drop_path_rate=0.0", "training.eps=1e-3")
    config = tiny_run_config([cases], tmp_path / "two", *sets, "training.cases_per_step=4")
    (tmp_path / "train.toml").write_text(to_toml(config))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "modaltune", "train"]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "train.toml"), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epochs"] == 3  # said once
    one = tiny_run_config(
        [cases], tmp_path / "one", *sets, "training.cases_per_step=4", "training.accumulation=2"
    )
    run_training(one)
    # 9 cases in steps of 4: in the last step one process has no case at all.
    assert len(losses(tmp_path / "one")) == 9
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    start = prepare(one).run.model.state_dict()
    moved = [name for name in start if not torch.equal(start[name], ours[name])]
    assert len(moved) > 20
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


# The signal reaches one process, and only when the checkpoint of the epoch is written.
_LATE_SIGNAL = """
import os, sys
from pathlib import Path
from modaltune.testing_training import tiny_run_config
from modaltune.train_run import run_training
from modaltune.train_signals import TrainingStopped
from modaltune.train_watcher import RunWatcher

folder, write = Path(sys.argv[1]), RunWatcher._write

def late(self, training, steps):
    write(self, training, steps)
    if os.environ["RANK"] == "1" and training.epoch == 1:
        self.stop.requested = True

RunWatcher._write = late
try:
    run_training(tiny_run_config([folder / "cases"], folder / "run", "training.cases_per_step=4"))
except TrainingStopped as stopped:
    (folder / f"stopped-{os.environ['RANK']}").write_text(str(stopped.steps))
"""


@pytest.mark.slow
def test_a_signal_to_one_process_at_the_end_of_an_epoch_stops_both(tmp_path: Path) -> None:
    write_training_cases(tmp_path, parts=(9, 4, 0))
    script = tmp_path / "late.py"
    script.write_text(_LATE_SIGNAL)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    saved = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.state["epoch"] == 1


def test_half_precision_needs_what_can_train_in_it(tmp_path: Path) -> None:
    cases = write_training_cases(tmp_path, parts=(4, 2, 0))
    learner = ModalTuneLearner(prepare(tiny_run_config([cases], tmp_path / "run")).run.model)
    with pytest.raises(InputError, match="precision must be no or bf16 on a CPU, got fp16"):
        make_accelerator(learner, TrainConfig(precision="fp16"))
    assert make_accelerator(learner, TrainConfig(precision="bf16")).mixed_precision == "bf16"
    assert make_accelerator(learner, TrainConfig()).mixed_precision == "no"
    assert SCALER_START == 32768


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    cases = write_training_cases(tmp_path, parts=(6, 2, 0))
    run_training(tiny_run_config([cases], tmp_path / "full", "training.epochs=1"))
    half = run_training(
        tiny_run_config([cases], tmp_path / "half", "training.epochs=1", "training.precision=bf16")
    )
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    a, b = losses(tmp_path / "full"), losses(tmp_path / "half")
    assert a != b  # products ran in bfloat16
    assert b == pytest.approx(a, rel=0.05)


def test_a_gradient_scaler_changes_no_step_skips_an_overflow_and_is_saved(tmp_path: Path) -> None:
    """What fp16 adds on a GPU, tried with torch's scaler for CPUs."""
    cases = write_training_cases(tmp_path, parts=(4, 2, 0))
    config = tiny_run_config([cases], tmp_path / "run", "training.loss_factor=1e5")
    weights, trainings = [], []
    for is_scaled in (False, True):
        ready = prepare(config)
        learner = ModalTuneLearner(ready.run.model, config.training)
        accelerator = make_accelerator(learner, config.training)
        if is_scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALER_START)
        training = Training.begin(learner, config.training, accelerator)
        part = (ready.train.batch([0, 1]), ready.train.targets([0, 1]))
        train_step(learner, training.optimizer, [part], accelerator)
        weights.append([p.clone() for p in learner.trainable_parameters()])
        trainings.append(training)
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-8)
    scaler = training.accelerator.scaler
    scaler.update(2.0**127)  # gradients in the thousands times this are infinite
    train_step(learner, training.optimizer, [part], accelerator)
    for now, before in zip(learner.trainable_parameters(), weights[1], strict=True):
        assert torch.equal(now, before)
    assert scaler.get_scale() == 2.0**126
    write_checkpoint(tmp_path / "checkpoints", training, 2, {})
    saved = newest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    scaler.update(8.0)
    restore(saved, training)
    assert scaler.get_scale() == 2.0**126
