"""Peak memory that `modaltune plan` predicts, beside what fresh processes need.

    python -m modaltune.benchmarks.memory_plan --tiles 1000 2000 [--mode forward|train] [--json]

Published size and real input sizes, random weights. Every measurement runs in a process of its own,
whose peak resident memory is taken whole; a training step is taken twice, so that the moments of
the optimiser exist. The bar: predictions within 15 %. The exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.errors import InputError

if TYPE_CHECKING:
    from modaltune import ModalTuneConfig
    from modaltune.memory_plan import Setting

CSV_NAME = "memory_plan.csv"
BAR = 0.15
STEPS = 2


def run_setting(config_json: str, setting_json: str, tiles: int) -> dict[str, Any]:
    """Run one setting in this process; return `seconds` and `peak_mib` of the process."""
    import torch

    from modaltune import ModalTuneConfig
    from modaltune.learner import ModalTuneLearner, Targets
    from modaltune.published_size import published_size_model, random_cases
    from modaltune.testing import peak_memory_mib
    from modaltune.train import TrainConfig, make_optimizer, train_step

    setting = json.loads(setting_json)
    model = published_size_model(ModalTuneConfig.model_validate_json(config_json))
    model.adjust(task_trunk=setting["task_trunk"], recompute=setting.get("recompute", "none"))
    batch = random_cases(model, tiles)
    started = time.perf_counter()
    if setting["mode"] == "forward":
        model.eval()
        with torch.no_grad():
            model(batch)
    else:
        model.train()
        recipe = TrainConfig(task_backward=setting["task_backward"])
        learner = ModalTuneLearner(model, recipe)
        optimizer = make_optimizer(learner, recipe)
        shape = (1, len(model.config.tasks), model.config.out_features)
        targets = Targets.of_text(torch.nn.functional.normalize(torch.randn(shape), dim=-1))
        for _ in range(STEPS):
            train_step(learner, optimizer, [(batch, targets)])
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_mib": peak_memory_mib(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def in_fresh_process(config: ModalTuneConfig, setting: Setting, tiles: int) -> dict[str, Any]:
    """Run one setting in a new process and return what it says.

    Raises:
        RuntimeError: The process failed (also when the system killed it for its memory).
    """
    code = (
        "import json, sys; from modaltune.benchmarks.memory_plan import run_setting; "
        "print(json.dumps(run_setting(sys.argv[1], sys.argv[2], int(sys.argv[3]))))"
    )
    words = [config.model_dump_json(), json.dumps(setting.to_dict()), str(tiles)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"measuring {setting} failed with exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(
    config: ModalTuneConfig, wanted: Sequence[Setting], tiles: int
) -> list[dict[str, object]]:
    """Predict and measure settings at one number of tiles; return one row each."""
    from modaltune.memory_plan import MemoryPlan
    from modaltune.published_size import published_size_model

    plan = MemoryPlan(published_size_model(config), tiles)
    rows = []
    for setting in wanted:
        found = in_fresh_process(config, setting, tiles)
        predicted = plan.peak_mib(setting)
        ratio = predicted / found["peak_mib"]
        rows.append(
            {
                "time": timestamp(),
                "commit": commit_id(),
                "device": f"{cpu_model()}, {found['threads']} threads",
                "torch": found["torch"],
                "depth": sum(b - a + 1 for a, b in config.adapter.interactions),
                "tiles": tiles,
                "mode": setting.mode,
                "task_trunk": setting.task_trunk,
                "task_backward": setting.task_backward,
                "recompute": setting.recompute,
                "seconds": round(found["seconds"], 3),
                "measured_mib": round(found["peak_mib"], 1),
                "predicted_mib": round(predicted, 1),
                "ratio": round(ratio, 4),
                "status": "pass" if abs(ratio - 1) <= BAR else "missed",
            }
        )
    return rows


def _print_table(rows: Sequence[dict[str, object]], saved: Path | None) -> None:
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}")
    columns = {"tiles": 7, "mode": 9, "task_trunk": 11, "task_backward": 12, "recompute": 13}
    columns |= {"seconds": 10, "measured_mib": 14, "predicted_mib": 15, "ratio": 8, "status": 8}
    print("".join(f"{name:>{width}}" for name, width in columns.items()))
    for row in rows:
        print("".join(f"{row[name]!s:>{width}}" for name, width in columns.items()))
    print(f"rows appended to {saved}" if saved else "rows not saved: give a folder with --results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code: 0, 1 missed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.memory_plan",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--tiles", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--mode", choices=("forward", "train"), help="one of the two")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of {CSV_NAME}; ./benchmarks/results if it exists, else no row is saved",
    )
    options = parser.parse_args(arguments)
    if min(options.tiles) < 2:
        parser.error(f"--tiles must be at least 2, got {min(options.tiles)}")
    from modaltune import ModalTuneConfig
    from modaltune.memory_plan import MODES, settings

    config = ModalTuneConfig()
    modes = [options.mode] if options.mode else MODES
    wanted = [s for mode in modes for s in settings(mode, len(config.tasks))]
    try:
        folder = results_folder(options.results)
        saved = None if folder is None else folder / CSV_NAME
        rows = []
        for tiles in options.tiles:
            rows += compare(config, wanted, tiles)
        if saved is not None:
            for row in rows:
                append_row(saved, row)
    except InputError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"rows": rows, "saved": None if saved is None else str(saved)}))
    else:
        _print_table(rows, saved)
    return int(any(row["status"] == "missed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
