"""Kill `modaltune train` at random points, run it again, and compare with an unbroken run.

As in `benchmarks/crash.py` each run is a fork of a parent that has loaded everything and started
no thread, and goes through the command line. A run that was killed any number of times must end in
the very bytes of the unbroken one: weights, last checkpoint, and every loss in its metrics.

    python -m modaltune.benchmarks.train_crash [--kills 20] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modaltune.benchmarks.crash import ends_within, in_child, start, wait
from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.atomic import is_temporary
from modaltune.engine.errors import InputError

CSV_NAME = "train_crash.csv"
CHECKPOINT_STEPS = 3


@dataclass
class TrainCrashResult:
    """What the kills did.

    Attributes:
        kills: Runs that were killed at work.
        finished: Runs that were finished in between, and compared.
        before_checkpoint: Kills before the first checkpoint.
        in_epoch: Kills whose newest checkpoint lay within an epoch.
        between_epochs: Kills whose newest checkpoint lay between two.
        writing: Kills that left a file half written.
        steps_redone: Steps since the newest checkpoint, summed over kills.
        changed: Finished runs that differ from the unbroken one.
        steps: Of the unbroken run.
        unbroken_s: Seconds of the unbroken run.
    """

    kills: int = 0
    finished: int = 0
    before_checkpoint: int = 0
    in_epoch: int = 0
    between_epochs: int = 0
    writing: int = 0
    steps_redone: int = 0
    changed: int = 0
    steps: int = 0
    unbroken_s: float = 0.0


def preload() -> None:
    """Load what a training run loads, without computing anything."""
    import accelerate.state  # noqa: F401
    import torch

    import modaltune.train_run  # noqa: F401

    torch.set_num_threads(1)


def write_study(folder: Path, epochs: int) -> Path:
    """Write cases and a configuration with dropout, scheduler and validation; in a child.

    Returns:
        The TOML file.
    """

    def write() -> None:
        from modaltune.config_text import to_toml
        from modaltune.testing_training import tiny_run_config, write_training_cases

        cases = write_training_cases(folder / "study", parts=(15, 6, 0))
        sets = (
            f"training.epochs={epochs}",
            f"output.checkpoint_steps={CHECKPOINT_STEPS}",
            "model.trunk_dropout=true",
            "model.slide_encoder.dropout=0.2",
            "model.task_trunk=separate",
            "model.task_dropout=parity",
        )
        config = tiny_run_config([cases], folder / "out", *sets)
        (folder / "train.toml").write_text(to_toml(config), encoding="utf-8")

    child = os.fork()
    if child == 0:
        in_child(write, folder / "log")
    if wait(child):
        raise InputError(f"writing the study must succeed, got: {(folder / 'log').read_text()}")
    return folder / "train.toml"


def kill_runs(kills: int, seed: int, folder: Path, epochs: int = 3) -> TrainCrashResult:
    """Kill runs until `kills` of them died at work.

    Args:
        kills: How many.
        seed: Of the delays.
        folder: An empty folder to work in.
        epochs: Of a run.

    Returns:
        What happened; `changed` must be zero.

    Raises:
        InputError: A run that was not killed failed.
    """
    preload()
    config, result = write_study(folder, epochs), TrainCrashResult()
    begun = time.perf_counter()
    _finish(config, folder / "unbroken", folder / "log")
    result.unbroken_s = round(time.perf_counter() - begun, 3)
    want = _outcome(folder / "unbroken")
    result.steps = len(want["losses"])
    rng = np.random.default_rng(seed)
    while result.kills < kills:
        out = folder / f"out-{result.finished}"
        while result.kills < kills:
            child = start(_words(config, out), folder / "log")
            if ends_within(child, float(rng.uniform(0.1, 0.95) * result.unbroken_s)):
                break
            os.kill(child, signal.SIGKILL)
            wait(child)
            result.kills += 1
            _note(out, result)
            if (out / "run.json").is_file():
                break  # killed on its way out
        if not (out / "run.json").is_file():
            _finish(config, out, folder / "log")
        result.finished += 1
        result.changed += _outcome(out) != want
    return result


def _words(config: Path, out: Path) -> list[str]:
    return ["train", str(config), "--out", str(out), "--json"]


def _finish(config: Path, out: Path, log: Path) -> None:
    code = wait(start(_words(config, out), log))
    if code:
        raise InputError(f"a run that is not killed must exit 0, got {code}: {log.read_text()}")


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*.json"))


def _losses(out: Path) -> list[float]:
    found = []
    path = out / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        found += [record["loss"]] if record["kind"] == "step" else []
    return found


def _outcome(out: Path) -> dict[str, Any]:
    """Return what two runs must agree in, bit for bit."""
    return {
        "model": (out / "model.safetensors").read_bytes(),
        "last": _checkpoints(out)[-1].with_suffix(".safetensors").read_bytes(),
        "losses": _losses(out),
    }


def _note(out: Path, result: TrainCrashResult) -> None:
    """Note where a run was killed."""
    folder = out / "checkpoints"
    result.writing += folder.is_dir() and any(is_temporary(path) for path in folder.iterdir())
    written = _checkpoints(out)
    if not written:
        result.before_checkpoint += 1
        return
    state = json.loads(written[-1].read_text(encoding="utf-8"))
    result.in_epoch += state["step"] > 0
    result.between_epochs += state["step"] == 0
    result.steps_redone += max(0, len(_losses(out)) - state["steps"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kills from the command line and return the exit code: 1 if anything differed."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.train_crash",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="folder on the disk to use")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    try:
        results = results_folder(options.results)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            found = asdict(kill_runs(options.kills, options.seed, Path(name), options.epochs))
        row = {
            "time": timestamp(),
            "commit": commit_id(),
            "device": f"{cpu_model()}, {os.cpu_count()} cores",
            "seed": options.seed,
            "epochs": options.epochs,
            **found,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        if results is not None:
            append_row(results / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = (
        "{kills} kills in {finished} runs of {steps} steps: {changed} differ from the unbroken "
        "run; {before_checkpoint} before a checkpoint, {in_epoch} within an epoch, "
        "{between_epochs} between two, {writing} while writing one; {steps_redone} steps redone"
    )
    print(json.dumps(row) if options.json else line.format(**row))
    return 1 if row["changed"] else 0


if __name__ == "__main__":
    sys.exit(main())
