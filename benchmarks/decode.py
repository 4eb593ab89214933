"""Decoding, timed at the consumer's end against raw cuCIM, hs2p, OpenSlide and other readers."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from modaltune.benchmarks.decode_slides import (
    CASES,
    TILE_PX,
    Case,
    default_folder,
    default_source,
    write_slides,
)
from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.decode import (
    DecodeOptions,
    SlideDone,
    SlideFailed,
    SlideFound,
    SlideRequest,
    TileBlock,
    TileDecoder,
    TileOptions,
)
from modaltune.engine.errors import InputError
from modaltune.engine.readers import open_slide
from modaltune.engine.tiling import TileGrid, read_tiles

CSV_NAME = "decode.csv"
WORKERS = 2
RIVALS = ("cucim", "hs2p-groups", "hs2p-single", "openslide", "tiffslide", "fastslide")
OURS, HALF, ON_GPU = "modaltune", "modaltune half-scale", "modaltune on a GPU"
# Tiles compared with a rival's.
_COMPARED = 16

Rgb = npt.NDArray[np.uint8]


class Rival:
    """A rival reader in a process of its own environment; `absent` says why it can't take part."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        script = Path(__file__).resolve().with_name("decode_rival.py")
        self._process = subprocess.Popen(
            [python, str(script), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # The script's folder holds modules of ours that libraries must not find.
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": ""},
        )
        greeting = self._answer()
        self.version = str(greeting.get("version", ""))
        self.absent = str(greeting.get("absent", greeting.get("error", "")))

    def _answer(self) -> dict[str, Any]:
        """Read one line of the process."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        return json.loads(line) if line else {"error": "the process ended"}

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Hand over a job and wait for the answer."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(json.dumps(job) + "\n")
                self._process.stdin.flush()
        except OSError as error:
            return {"error": str(error)}
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Rival:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def our_blocks(decoder: TileDecoder, path: Path, grid: TileGrid) -> Iterator[TileBlock | float]:
    """Decode one grid; yield the time when decoding began, then the blocks.

    Raises:
        InputError: The slide failed, or a tile is bad.
    """
    request = SlideRequest("slide", path, grid.base_mpp, grid=grid)
    for event in decoder.stream([request]):
        if isinstance(event, SlideFound):
            yield time.perf_counter()
        elif isinstance(event, TileBlock):
            yield event
        elif isinstance(event, SlideFailed):
            raise InputError(event.reason)
        elif isinstance(event, SlideDone) and event.bad_tiles:
            raise InputError(f"{event.bad_tiles} bad tiles")


def our_seconds(decoder: TileDecoder, path: Path, grid: TileGrid) -> float:
    """Time one grid from the survey's end to the last block in the consumer's hands."""
    start, count = 0.0, 0
    for item in our_blocks(decoder, path, grid):
        if isinstance(item, float):
            start = item
            continue
        with item:
            count += len(item)
    seconds = time.perf_counter() - start
    if count != len(grid):
        raise InputError(f"{len(grid)} tiles wanted, {count} delivered")
    return seconds


def our_difference(decoder: TileDecoder, path: Path, grid: TileGrid) -> float:
    """Mean absolute difference from `read_tiles` over all tiles; 0 means equal bit for bit."""
    with open_slide(path, base_mpp=grid.base_mpp) as slide:
        reference = np.stack(list(read_tiles(slide, grid)))
    total = 0.0
    for item in our_blocks(decoder, path, grid):
        if isinstance(item, TileBlock):
            with item:
                total += difference(item.tiles, reference[item.indices]) * len(item)
    return total / len(grid)


def difference(a: Rgb, b: Rgb) -> float:
    """Mean absolute difference of two images of one shape, 0..255."""
    return float(np.abs(a.astype(np.int16) - b).mean())


def rival_difference(rival: Rival, job: dict[str, Any], path: Path, grid: TileGrid) -> float | str:
    """Mean absolute difference of a rival's first tiles from ours, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "tiles.npy"
        answer = rival.ask({**job, "coords": job["coords"][:_COMPARED], "save": str(target)})
        if "error" in answer:
            return str(answer["error"])
        theirs = np.load(target)
    with open_slide(path, base_mpp=grid.base_mpp) as slide:
        tiles = read_tiles(slide, grid)
        ours = np.stack([next(tiles) for _ in range(len(theirs))])
    return difference(ours, theirs)


def our_options(case: Case, *, on_gpu: bool) -> dict[str, DecodeOptions]:
    """Return our ways to decode a case, the default first."""
    found = {OURS: DecodeOptions(TileOptions(), WORKERS)}
    if case.codec == "jpeg" and case.read_px == 2 * TILE_PX:
        found[HALF] = replace(found[OURS], half_scale_jpeg=True)
    if on_gpu and case.codec == "jpeg":  # the one that cuCIM decodes there
        found[ON_GPU] = replace(found[OURS], device="cuda")
    return found


def measure(
    case: Case, path: Path, rivals: list[Rival], rounds: int, *, on_gpu: bool = False
) -> list[dict[str, Any]]:
    """Check, then time everything on one case, in turns; one row per reader.

    Args:
        case: What is read.
        path: Its slide.
        rivals: Readers that take part.
        rounds: Timed turns of each.
        on_gpu: Whether our decoder takes part on a GPU, too.

    Raises:
        InputError: Our pixels are wrong.
    """
    grid = case.grid()
    job = {
        "path": str(path), "coords": grid.coords.tolist(), "read_px": case.read_px,
        "tile_px": TILE_PX, "base_mpp": case.base_mpp, "workers": WORKERS,
    }  # fmt: skip
    differences: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        decoders = {
            name: stack.enter_context(TileDecoder(options))
            for name, options in our_options(case, on_gpu=on_gpu).items()
        }
        for name, decoder in decoders.items():
            differences[name] = our_difference(decoder, path, grid)
        if differences[OURS] != 0:
            raise InputError(f"{case.name}: our tiles differ from read_tiles; not timed")
        present = []
        for rival in rivals:
            found = rival_difference(rival, job, path, grid)
            if isinstance(found, str):
                print(f"{case.name}: {rival.name}: {found}", file=sys.stderr)
            else:
                differences[rival.name] = found
                present.append(rival)
        for turn in range(rounds + 1):  # the first warms up
            for name, decoder in decoders.items():
                took = our_seconds(decoder, path, grid)
                seconds.setdefault(name, []).extend([took] if turn else [])
            for rival in present:
                answer = rival.ask(job)
                if "seconds" in answer:
                    took = float(answer["seconds"])
                    seconds.setdefault(rival.name, []).extend([took] if turn else [])
    versions = {rival.name: rival.version for rival in rivals}
    return _rows(case, len(grid), seconds, differences, versions)


def _rows(
    case: Case,
    tiles: int,
    seconds: dict[str, list[float]],
    differences: dict[str, float],
    versions: dict[str, str],
) -> list[dict[str, Any]]:
    """Turn times into rows."""
    shared = {
        "time": timestamp(), "commit": commit_id(),
        "device": f"{cpu_model()}, {WORKERS} workers of {os.cpu_count()} cores",
        "case": case.name, "codec": case.codec, "file_tile": case.file_tile,
        "base_mpp": case.base_mpp, "offset_px": case.offset_px, "slide_px": case.slide_px,
        "tiles": tiles,
    }  # fmt: skip
    ours = importlib.metadata.version("cucim-cu13")
    medians = {name: tiles / float(np.median(times)) for name, times in seconds.items() if times}
    return [
        {
            **shared,
            "impl": name,
            "version": versions.get(name, f"cuCIM {ours}"),
            "rounds": len(seconds[name]),
            # A fifth of the rounds was slower than p20.
            "tiles_per_s_p20": round(tiles / float(np.quantile(seconds[name], 0.8)), 1),
            "tiles_per_s_p50": round(median, 1),
            "tiles_per_s_p80": round(tiles / float(np.quantile(seconds[name], 0.2)), 1),
            "ours_over_this": round(medians[OURS] / median, 3),
            "bar": case.bar(name) or "",
            "difference": round(differences[name], 4),
        }
        for name, median in medians.items()
    ]


def open_rivals(stack: contextlib.ExitStack, pythons: Sequence[str]) -> list[Rival]:
    """Start each rival with the first interpreter that has it; the absent ones are said."""
    rivals = []
    for name in RIVALS:
        reasons = []
        for python in pythons:
            rival = stack.enter_context(Rival(name, python))
            if not rival.absent:
                rivals.append(rival)
                break
            reasons.append(rival.absent)
        else:
            print(f"{name}: absent ({'; '.join(reasons)})", file=sys.stderr)
    return rivals


def run(
    cases: tuple[Case, ...],
    source: Path,
    pythons: Sequence[str],
    rounds: int,
    *,
    on_gpu: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Time the cases one after the other; yields the rows of each.

    Raises:
        InputError: The source slide is missing, or our pixels are wrong.
    """
    if not source.is_file():
        raise InputError(f"slide must be an existing file, got {source}; give one as the argument")
    paths = write_slides(cases, source, default_folder())
    with contextlib.ExitStack() as stack:
        rivals = open_rivals(stack, pythons)
        for case in cases:
            yield measure(case, paths[case], rivals, rounds, on_gpu=on_gpu)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.decode",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("slide", nargs="?", type=Path, help="H&E slide to make a mosaic of")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--rivals", action="append", default=[], help="python of an environment with rivals"
    )
    parser.add_argument("--gpu", action="store_true", help="decode JPEG on a GPU, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    parser.add_argument("--plot", type=Path, help="PNG to draw from the rows of this run")
    options = parser.parse_args(arguments)
    cases = tuple(case for case in CASES if options.case in case.name)
    rows = []
    try:
        folder = results_folder(options.results)
        pythons = [*options.rivals, sys.executable]
        source = options.slide or default_source()
        for found in run(cases, source, pythons, options.rounds, on_gpu=options.gpu):
            rows += found
            for row in found:
                if folder is not None:
                    append_row(folder / CSV_NAME, row)
                line = "{case:32} {impl:22} {tiles_per_s_p50:>9} tiles/s  x {ours_over_this}"
                print(json.dumps(row) if options.json else line.format(**row), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.plot:
        from modaltune.benchmarks.decode_plot import plot_rows

        plot_rows(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
