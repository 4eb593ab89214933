"""Seconds and peak memory of building the published-size model and of a three-task forward.

    python -m modaltune.benchmarks.model_memory [--tiles 10000] [--only build|forward] [--json]

Each measurement runs in a fresh process, whose peak resident memory is taken whole: importing torch
(stated as its own row) is included. The build's seconds start after the imports. Bars: build in
5 s and 1.5 GiB; three task prompts at 10,000 tiles in 5 GiB. The exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    from modaltune import ModalTune

CSV_NAME = "model_memory.csv"
BUILD_SECONDS, BUILD_MIB = 5.0, 1536.0
FORWARD_MIB, FORWARD_TILES = 5120.0, 10_000
# METHOD 7: the published parameters, and 3,584 for the memberships its checkpoint lacks.
TRAINABLE, FROZEN = 33_524_890 + 3_584, 86_330_880
MEASUREMENTS = ("import", "build", "forward")


@dataclass(frozen=True)
class Bar:
    """The most a measurement may take; None where nothing is asked of it."""

    seconds: float | None = None
    mib: float | None = None

    def status(self, seconds: float, mib: float) -> str:
        """Return `pass`, `missed`, or `no bar`."""
        pairs = [(seconds, self.seconds), (mib, self.mib)]
        asked = [got <= most for got, most in pairs if most is not None]
        if not asked:
            return "no bar"
        return "pass" if all(asked) else "missed"


def _imported() -> dict[str, Any]:
    started = time.perf_counter()
    import torch

    from modaltune import published_size
    from modaltune.testing import peak_memory_mib

    del published_size  # importing it is what counts
    return {
        "seconds": time.perf_counter() - started,
        "peak_mib": peak_memory_mib(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _built() -> tuple[ModalTune, dict[str, Any]]:
    from modaltune.published_size import published_size_model
    from modaltune.testing import peak_memory_mib

    facts = _imported()
    started = time.perf_counter()
    model = published_size_model()
    seconds = time.perf_counter() - started
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad == flag)
        for flag in (True, False)
    ]
    if counts != [TRAINABLE, FROZEN]:
        raise RuntimeError(
            f"the model must have {TRAINABLE:,} trainable and {FROZEN:,} frozen parameters, got "
            f"{counts[0]:,} and {counts[1]:,}: this is not the published size"
        )
    return model, {**facts, "seconds": seconds, "peak_mib": peak_memory_mib()}


def _forward(tiles: int) -> dict[str, Any]:
    import torch

    from modaltune.published_size import random_cases
    from modaltune.testing import peak_memory_mib

    model, facts = _built()
    model.eval()
    batch = random_cases(model, tiles)
    started = time.perf_counter()
    with torch.no_grad():
        out = model(batch)
    seconds = time.perf_counter() - started
    if out.shape != (1, 3, 256) or not bool(torch.isfinite(out).all()):
        raise RuntimeError(f"the forward must give finite [1, 3, 256], got {list(out.shape)}")
    return {**facts, "seconds": seconds, "peak_mib": peak_memory_mib()}


def measure(what: str, tiles: int) -> dict[str, Any]:
    """Run one measurement in this process: `import`, `build` or `forward`.

    Returns:
        `seconds`, `peak_mib` of the process so far, `torch` version and `threads`.
    """
    if what == "import":
        return _imported()
    return _built()[1] if what == "build" else _forward(tiles)


def in_fresh_process(what: str, tiles: int) -> dict[str, Any]:
    """Run one measurement in a new process and return what it says.

    Raises:
        RuntimeError: The process failed (also when the system killed it for its memory).
    """
    code = (
        "import json, sys; from modaltune.benchmarks.model_memory import measure; "
        "print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, what, str(tiles)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"measuring {what} failed with exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def bar_of(what: str, tiles: int) -> Bar:
    """Return the issue's bar for a measurement."""
    if what == "build":
        return Bar(BUILD_SECONDS, BUILD_MIB)
    return Bar(mib=FORWARD_MIB) if what == "forward" and tiles <= FORWARD_TILES else Bar()


def run(tiles: int, wanted: Sequence[str]) -> list[dict[str, object]]:
    """Measure and return one row per measurement, as the CSV has them."""
    rows = []
    for what in wanted:
        found = in_fresh_process(what, tiles)
        seconds, mib = round(found["seconds"], 3), round(found["peak_mib"], 1)
        rows.append(
            {
                "time": timestamp(),
                "commit": commit_id(),
                "device": f"{cpu_model()}, {found['threads']} threads",
                "torch": found["torch"],
                "what": what,
                "tiles": tiles if what == "forward" else 0,
                "seconds": seconds,
                "peak_mib": mib,
                "status": bar_of(what, tiles).status(seconds, mib),
            }
        )
    return rows


def _print_table(rows: Sequence[dict[str, object]], saved: Path | None) -> None:
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}")
    print(f"{'what':<10}{'tiles':>8}{'seconds':>10}{'peak MiB':>11}  {'bar':<18}status")
    for row in rows:
        bar = bar_of(str(row["what"]), int(str(row["tiles"])))
        limits = [(bar.seconds, "s"), (bar.mib, "MiB")]
        said = ", ".join(f"{most:g} {unit}" for most, unit in limits if most is not None) or "-"
        print(
            f"{row['what']:<10}{row['tiles']:>8}{row['seconds']:>10}{row['peak_mib']:>11}  "
            f"{said:<18}{row['status']}"
        )
    print("Peaks are of whole processes: importing torch, the first row, is part of the others.")
    print(f"rows appended to {saved}" if saved else "rows not saved: give a folder with --results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code: 0, 1 missed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.model_memory",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--tiles", type=int, default=FORWARD_TILES, help="tiles of the forward")
    parser.add_argument("--only", choices=("build", "forward"), help="one measurement of the two")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of {CSV_NAME}; ./benchmarks/results if it exists, else no row is saved",
    )
    options = parser.parse_args(arguments)
    if options.tiles < 1:
        parser.error(f"--tiles must be at least 1, got {options.tiles}")
    try:
        folder = results_folder(options.results)
        rows = run(options.tiles, ["import", options.only] if options.only else MEASUREMENTS)
        saved = None if folder is None else folder / CSV_NAME
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
