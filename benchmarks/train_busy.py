"""How much of a training loop's time is computing: cases of real size, read cold from disk.

    python -m modaltune.benchmarks.train_busy [--cases 24] [--tiles 2000] [--json]

Feature files of `--tiles` tiles, 1,536 wide, are written and put out of the page cache; a small
model is trained on them for two epochs. The same batches are then read alone, cold again, which
tells what the loop would wait without the thread that reads ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.errors import InputError
from modaltune.run_config import RunConfig

CSV_NAME = "train_busy.csv"
WIDTH = 1536
LEAST_BUSY = 0.95
# A model small enough for two cores, each case a step, every tile read.
_SETS = (
    "training.cases_per_step=1",
    "training.validate_every=1000",
    "model.slide_encoder.width=96",
    "model.slide_encoder.depth=2",
    "model.slide_encoder.ffn_width=192",
    "model.adapter.heads=4",
    "model.adapter.interactions=[[0, 0], [1, 1]]",
    "inputs.tile_limit=all",
)


def evict(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # only clean pages go
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure(folder: Path, cases: int, tiles: int, epochs: int = 2) -> dict[str, Any]:
    """Train on new cases and return how the time split.

    Args:
        folder: An empty folder to work in.
        cases: Training cases.
        tiles: Tiles of each slide.
        epochs: Of the training.

    Raises:
        InputError: The loss did not fall to a finite number: a wrong result is not timed.
    """
    import torch

    from modaltune.testing_training import tiny_run_config, write_training_cases
    from modaltune.train_run import run_training

    folders = write_training_cases(folder, parts=(cases, 2, 0), width=WIDTH, tiles=(tiles, tiles))
    config = tiny_run_config([folders], folder / "run", f"training.epochs={epochs}", *_SETS)
    evict(folder / "features")
    run_training(config)
    records = [
        json.loads(line)
        for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [record["loss"] for record in records if record["kind"] == "epoch"]
    if not losses[-1] < losses[0]:
        raise InputError(f"the loss must fall before a loop is timed, got {losses}")
    end = next(record for record in records if record["kind"] == "end")
    load_s = _load_alone(config, folder)
    wall = end["compute_s"] + end["waited_s"] + end["other_s"]
    return {
        "cases": cases,
        "tiles": tiles,
        "width": WIDTH,
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "wall_s": round(wall, 3),
        "compute_s": round(end["compute_s"], 3),
        "waited_s": round(end["waited_s"], 3),
        "other_s": round(end["other_s"], 3),
        "load_cold_s": round(load_s, 3),
        "tiles_per_s": round(end["tiles_per_s"]),
        "busy": round(end["busy"], 4),
        # Had every batch been read between two steps: the first epoch cold, later ones as cold.
        "busy_reading_between": round(end["compute_s"] / (wall + epochs * load_s), 4),
    }


def _load_alone(config: RunConfig, folder: Path) -> float:
    """Return the seconds that reading every training case takes, cold."""
    from modaltune.train_prepare import prepare

    ready = prepare(config).train
    evict(folder / "features")
    begun = time.perf_counter()
    for index in range(len(ready)):
        ready.batch([index])
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure from the command line and return the exit code: 1 below 95 % busy."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.train_busy",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="folder on the disk to use")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        results = results_folder(options.results)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            found = measure(Path(name), options.cases, options.tiles)
        row = {
            "time": timestamp(),
            "commit": commit_id(),
            "device": f"{cpu_model()}, {os.cpu_count()} cores",
            **found,
        }
        if results is not None:
            append_row(results / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = (
        "busy {busy:.1%} of {wall_s} s: computed {compute_s} s, waited {waited_s} s, wrote "
        "{other_s} s; reading between steps instead: {busy_reading_between:.1%}"
    )
    print(json.dumps(row) if options.json else line.format(**row))
    return 0 if row["busy"] >= LEAST_BUSY else 1


if __name__ == "__main__":
    sys.exit(main())
