"""Slides to features, the whole command: ModalTune against slide2vec and LazySlide.

Every side is a process of its own, started as a user starts it, on the same two slides and tiles
with the same weights. Timed are the command from its start to its end, imports and all, and the
second slide by itself, when the first one has loaded whatever is loaded once. Tools come with three
encoders: eager PyTorch as they come, ModalTune's ONNX Runtime session inside them, and one that
costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modaltune.benchmarks.decode_slides import default_source
from modaltune.benchmarks.end_to_end_slide import Workplace, default_folder, prepare
from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.benchmarks.process_tree import Finished, run_measured
from modaltune.engine.encoders.agreement import MIN_COSINE, measure_agreement
from modaltune.engine.errors import InputError

CSV_NAME = "end_to_end.csv"
OURS = "modaltune"
RIVALS = ("slide2vec", "lazyslide")
ENCODERS = ("torch", "session", "null")
# How many times as fast as a rival we aim to be, by its encoder: the whole command, or where no
# user runs such a command, the second slide.
BARS = {
    ("slide2vec", "torch"): 3.0,
    ("slide2vec", "session"): 1.2,
    ("lazyslide", "session"): 1.2,
    ("slide2vec", "null"): 4.0,
    ("lazyslide", "null"): 4.0,
}
JUDGED = {"torch": "wall_ratio", "session": "wall_ratio", "null": "slide_ratio"}
PEAK_BAR_MIB = 1536
# Workers of its own that each rival takes where more than its default may be faster: with one
# reading thread slide2vec starts a loader per core.
MORE_WORKERS = {"slide2vec": 1, "lazyslide": 2}
_WATCH_S = 0.1
_PIXELS_APART = 3.0  # grey levels in the mean that two JPEG decoders may differ by


@dataclass(frozen=True)
class Side:
    """A tool with an encoder; `workers` 0 is its default."""

    tool: str
    encoder: str
    python: str
    workers: int = 0

    @property
    def name(self) -> str:
        """Its name."""
        return f"{self.tool} {self.encoder}"


@dataclass(frozen=True)
class Outcome:
    """One run of a side.

    Attributes:
        finished: What the command cost.
        slide_s: Seconds of the second slide.
        tiles: Its tiles.
        version: Of the tool.
        features: float32 [n, d], and their corners int64 [n, 2]; only where they were asked for.
    """

    finished: Finished
    slide_s: float
    tiles: int
    version: str
    features: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None


def sides(pythons: dict[str, str], encoders: Sequence[str] = ENCODERS) -> list[Side]:
    """Return ours, and the rivals whose environments are given, with some kinds of encoder."""
    ours = ["session"] if {"torch", "session"} & set(encoders) else []
    ours += ["null"] if "null" in encoders else []
    return [Side(OURS, encoder, sys.executable) for encoder in ours] + [
        Side(tool, encoder, pythons[tool])
        for tool in RIVALS
        if tool in pythons
        for encoder in encoders
    ]


def run_side(side: Side, place: Workplace, *, check: bool) -> Outcome:
    """Run one side to its end.

    Args:
        side: The tool and its encoder.
        place: Slide and encoder.
        check: Whether to keep its features and watch its memory; neither is timed.

    Raises:
        InputError: It failed; the end of what it said is in the message.
    """
    folder = place.folder / side.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = [side.python, *_script(side, place, folder, check)]
    finished = _run(side, words, folder, check)
    if side.tool == OURS and side.encoder == "session":
        # The script has timed the second slide; a user runs the command.
        slides = [str(place.small_slide), str(place.slide)]
        words = [side.python, "-m", "modaltune.cli", "embed", *slides, "--no-overlays", "--out"]
        finished = _run(side, [*words, str(folder / "out")], folder, check)
    found = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    kept = None
    if check:
        with np.load(folder / "features.npz") as saved:
            kept = saved["features"], saved["coords"]
    return Outcome(finished, found["seconds"], found["tiles"], found["version"], kept)


def _run(side: Side, words: list[str], folder: Path, check: bool) -> Finished:
    """Run a command of a side.

    Raises:
        InputError: It failed.
    """
    log = folder / "log"
    finished = run_measured(
        words, log=log, environment=_environment(side), folder=folder,
        watch_s=_WATCH_S if check else None,
    )  # fmt: skip
    if finished.code:
        said = " ".join(log.read_text(errors="replace").split())[-300:]
        raise InputError(f"{side.name} must end with status 0, got {finished.code}: {said}")
    return finished


def _script(side: Side, place: Workplace, folder: Path, check: bool) -> list[str]:
    """Write the job of a script, and return the words that run it."""
    job = {
        **place.job(side.tool, side.encoder),
        "workers": side.workers,
        "out": str(folder / "out"),
        "answer": str(folder / "answer.json"),
        "save": str(folder / "features.npz") if check else "",
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    if side.tool == OURS:
        return ["-m", "modaltune.benchmarks.end_to_end_ours", str(folder / "job.json")]
    script = Path(__file__).resolve().with_name("end_to_end_rival.py")
    return [str(script), str(folder / "job.json")]


def _environment(side: Side) -> dict[str, str]:
    """Ours imports what this process does; a rival must not find modules of ours.

    Threads of OpenMP sleep while they wait, as ModalTune has them do: on a machine that others use
    too, eager PyTorch takes several times as long where they spin.
    """
    path = "" if side.tool != OURS else os.pathsep.join(p or os.getcwd() for p in sys.path)
    mine = {"PYTHONSAFEPATH": "1", "PYTHONPATH": path, "GOMP_SPINCOUNT": "0"}
    return {**os.environ, **mine}


def agreement(side: Side, got: Outcome, want: Outcome) -> float:
    """Return how a side's features agree with ours on the same tiles.

    Returns:
        The least cosine of a tile; of the encoder that does nothing, the mean difference of the
        pixels it passes on, in grey levels.

    Raises:
        InputError: The tiles or features are others.
    """
    if got.features is None or want.features is None:
        raise InputError(f"features of {side.name} must be kept to be compared, got none")
    (a, a_coords), (b, b_coords) = got.features, want.features
    a_order, b_order = np.lexsort(a_coords.T), np.lexsort(b_coords.T)
    if not np.array_equal(a_coords[a_order], b_coords[b_order]):
        raise InputError(
            f"{side.name} must take the {len(b_coords)} tiles that {OURS} takes, got "
            f"{len(a_coords)}, not all of them the same"
        )
    a, b = a[a_order], b[b_order]
    if side.encoder == "null":
        apart = float(np.abs(a - b).mean())
        if apart > _PIXELS_APART:
            raise InputError(f"{side.name} must pass on the same pixels, got {apart:.1f} apart")
        return apart
    found = measure_agreement(torch.from_numpy(a), torch.from_numpy(b))
    if not found.passes("fp32"):
        raise InputError(
            f"{side.name} must give our features with cosine >= {MIN_COSINE['fp32']}, got "
            f"{found.cosine:.6f} (relative error {found.relative_error:.2g})"
        )
    return found.cosine


@dataclass
class Checked:
    """A side that may be timed, and what its first runs showed."""

    side: Side
    agreement: float
    peak_mib: float
    version: str


def check(all_sides: Sequence[Side], place: Workplace) -> list[Checked]:
    """Run every side, compare features, and choose the number of workers of the rivals' sides.

    A rival that can't take part, or whose features are others, is named and left out.

    Raises:
        InputError: Ours fails.
    """
    ours: dict[str, Outcome] = {}
    found: list[Checked] = []
    for side in all_sides:
        try:
            outcome = run_side(side, place, check=True)
            want = ours.setdefault("null" if side.encoder == "null" else "session", outcome)
            agrees = agreement(side, outcome, want)
            more = replace(side, workers=MORE_WORKERS.get(side.tool, 0))
            if more != side and side.encoder != "torch":
                other = run_side(more, place, check=True)
                if other.slide_s < outcome.slide_s:
                    side, outcome = more, other
        except InputError as error:
            if side.tool == OURS:
                raise
            print(f"{side.name} is left out: {error}", file=sys.stderr)
            continue
        peak = outcome.finished.peak_mib or 0.0
        found.append(Checked(side, agrees, peak, outcome.version))
        print(f"{side.name}: {outcome.slide_s:.1f} s, {peak:.0f} MiB", file=sys.stderr)
    return found


def measure(all_sides: Sequence[Side], place: Workplace, rounds: int) -> list[dict[str, Any]]:
    """Check all sides, then time them in turns; one row per side."""
    checked = check(all_sides, place)
    times: dict[str, list[Outcome]] = {one.side.name: [] for one in checked}
    load = [os.getloadavg()[0]]
    for turn in range(rounds):
        shift = turn % len(checked)
        for one in checked[shift:] + checked[:shift]:
            times[one.side.name].append(run_side(one.side, place, check=False))
        load.append(os.getloadavg()[0])
    return rows(checked, times, place, max(load))


def rows(
    checked: Sequence[Checked],
    times: dict[str, list[Outcome]],
    place: Workplace,
    load: float,
) -> list[dict[str, Any]]:
    """Turn runs into rows."""
    shared = {
        "time": timestamp(), "commit": commit_id(),
        "device": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores", "load": round(load, 1),
        "slide": place.slide.name,
    }  # fmt: skip

    def quantile(name: str, share: float) -> float:
        return float(np.quantile([run.finished.wall_s for run in times[name]], share))

    def median(name: str) -> dict[str, float]:
        runs = times[name]
        return {
            "wall_s": quantile(name, 0.5),
            "slide_s": float(np.median([run.slide_s for run in runs])),
            "cpu_s": float(np.median([run.finished.cpu_s for run in runs])),
        }

    found = []
    for one in checked:
        side, runs = one.side, times[one.side.name]
        figures = median(side.name)
        ours = median(f"{OURS} {'null' if side.encoder == 'null' else 'session'}")
        found.append(
            {
                **shared,
                "tiles": place.tiles,
                "tool": side.tool,
                "version": one.version,
                "encoder": side.encoder,
                "workers": side.workers or "default",
                "rounds": len(runs),
                "wall_s_p20": round(quantile(side.name, 0.2), 2),
                "wall_s_p80": round(quantile(side.name, 0.8), 2),
                **{key: round(value, 2) for key, value in figures.items()},
                "tiles_per_s": round(place.tiles / figures["wall_s"], 1),
                "slide_tiles_per_s": round(runs[0].tiles / figures["slide_s"], 1),
                "peak_mib": round(one.peak_mib),
                "agreement": round(one.agreement, 7),
                **{f"{key[:-2]}_ratio": round(figures[key] / ours[key], 2) for key in figures},
                "bar": BARS.get((side.tool, side.encoder), ""),
            }
        )
    return found


def missed_bars(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return which bars some rows miss, in words."""
    said = []
    for row in found:
        name = f"{row['tool']} {row['encoder']}"
        if row["bar"] and row[JUDGED[row["encoder"]]] < row["bar"]:
            said.append(
                f"{name}: command {row['wall_ratio']} x, second slide {row['slide_ratio']} x, "
                f"processor time {row['cpu_ratio']} x; bar {row['bar']}"
            )
        if row["tool"] == OURS and row["peak_mib"] > PEAK_BAR_MIB:
            said.append(f"{name}: {row['peak_mib']} MiB, bar {PEAK_BAR_MIB}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.end_to_end",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("slide", nargs="?", type=Path, help="H&E slide to take tissue from")
    for tool in RIVALS:
        parser.add_argument(f"--{tool}", metavar="PYTHON", help="python of its environment")
    parser.add_argument(
        "--encoder", action="append", choices=ENCODERS, help="only these inside rivals"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    parser.add_argument("--plot", type=Path, help="PNG to draw of each side's last row")
    options = parser.parse_args(arguments)
    pythons = {tool: getattr(options, tool) for tool in RIVALS if getattr(options, tool)}
    try:
        folder = results_folder(options.results)
        place = prepare(default_folder(), options.slide or default_source())
        found = measure(sides(pythons, options.encoder or ENCODERS), place, options.rounds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in found:
        if folder is not None:
            append_row(folder / CSV_NAME, row)
        line = "{tool:10} {encoder:8} {wall_s:>7} s  {tiles_per_s:>7} tiles/s  x {wall_ratio}"
        print(json.dumps(row) if options.json else line.format(**row), flush=True)
    missed = missed_bars(found)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    if options.plot:
        from modaltune.benchmarks.end_to_end_plot import plot_rows, read_rows

        kept = found if folder is None else read_rows(folder / CSV_NAME)
        plot_rows(kept, options.plot)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
