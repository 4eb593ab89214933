"""Kill `modaltune embed` at random points, run it again, and compare with an unbroken run.

A parent loads everything but starts no thread; each run is a fork of it that goes through the
command line, so that a kill costs milliseconds of loading and not ten seconds. After every kill the
files that were whole are noted; when a cohort is finished, each must be the very file it was then
(nothing finished is done twice) and all must equal the unbroken run's, bit for bit. The cohort then
begins anew. Delays are drawn from a seed; where they strike is the scheduler's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.atomic import is_temporary
from modaltune.engine.errors import InputError
from modaltune.engine.ledger_report import read_status
from modaltune.engine.ledger_schema import LEDGER_NAME
from modaltune.engine.pyramid import write_pyramid

CSV_NAME = "crash.csv"
TILE_PX = 64
_FEATURES = "features_*/*.h5"


@dataclass(frozen=True)
class Cohort:
    """Small slides, a tiny encoder, and the command that embeds them.

    Attributes:
        folder: Where everything lies.
        encoder: What `--tile-encoder` is given.
        slides: The slide files.
        overlays: Whether the pictures are written too, which take most of the time.
    """

    folder: Path
    encoder: str
    slides: tuple[Path, ...]
    overlays: bool = False

    def words(self, out: Path) -> list[str]:
        """Return the words after `modaltune`."""
        return [
            "embed", *map(str, self.slides), "--out", str(out), "--tile-encoder", self.encoder,
            "--tile-px", str(TILE_PX), "--min-foreground", "0.5", "--json",
            "--overlays" if self.overlays else "--no-overlays",
        ]  # fmt: skip


@dataclass
class CrashResult:
    """What the kills did.

    Attributes:
        kills: Runs that were killed at work.
        finished: Cohorts that were finished in between, and compared.
        whole_at_kill: Slides that were whole on disk at a kill, summed over kills.
        in_flight: Slides that a killed run held, summed over kills; at most these are redone.
        redone: Whole slides that a later run made again.
        changed: Slides that differ from the unbroken run's.
        left_over: Temporary files of features and pictures that a finished run left.
        unbroken_s: Seconds of the unbroken run.
        by_stage: Kills by what the killed run had done: no ledger yet, no slide yet, some slides.
    """

    kills: int = 0
    finished: int = 0
    whole_at_kill: int = 0
    in_flight: int = 0
    redone: int = 0
    changed: int = 0
    left_over: int = 0
    unbroken_s: float = 0.0
    by_stage: dict[str, int] = field(
        default_factory=lambda: {"no ledger": 0, "no slide": 0, "slides": 0}
    )


def make_cohort(folder: Path, slides: int, seed: int, *, width: int = 32) -> Cohort:
    """Write slides of 4 to 36 tiles, and a transformers folder with a tiny random encoder.

    The encoder is written in a forked child: whoever computes with torch has threads, and must not
    fork.

    Args:
        folder: Where.
        slides: Their number.
        seed: Of sizes and pixels.
        width: Features per tile.
    """
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(slides):
        shape = (*(TILE_PX * rng.integers(2, 7, size=2)), 3)
        rgb = rng.integers(100, 190, shape, dtype=np.uint8)
        rgb[..., 1] //= 2
        path = folder / "slides" / f"slide-{number:02d}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.append(write_pyramid(path, rgb, mpp=0.5))
    child = os.fork()
    if child == 0:
        in_child(lambda: _write_encoder(folder / "encoder", width))
    _expect_success(child, "writing the encoder")
    return Cohort(folder, f"transformers:{folder / 'encoder'}", tuple(paths))


def start(words: Sequence[str], log: Path, *, most_bytes: int | None = None) -> int:
    """Run the command line in a fork of this process and return its id.

    Args:
        words: What follows `modaltune`.
        log: Where its output goes.
        most_bytes: Size that no file may exceed, as on a full disk.
    """
    child = os.fork()
    if child == 0:
        if most_bytes is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
        in_child(lambda: _command_line(words), log)
    return child


def wait(child: int) -> int:
    """Wait for a process and return its exit code, minus the signal's number if killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def preload() -> None:
    """Load what a run loads, without computing anything: forks then start at once."""
    import cucim  # noqa: F401
    import torch
    import transformers.models.dinov2.modeling_dinov2  # noqa: F401

    import modaltune.cli
    import modaltune.embedding  # noqa: F401

    torch.set_num_threads(1)


def kill_runs(
    kills: int, seed: int, folder: Path, slides: int = 24, *, overlays: bool = False
) -> CrashResult:
    """Kill runs until `kills` of them died at work.

    Args:
        kills: How many.
        seed: Of slides and delays.
        folder: An empty folder to work in.
        slides: Slides of the cohort.
        overlays: Whether runs write pictures, too.

    Returns:
        What happened; `redone`, `changed` and `left_over` must be zero.

    Raises:
        InputError: A run that was not killed failed.
    """
    preload()
    cohort = replace(make_cohort(folder, slides, seed), overlays=overlays)
    result = CrashResult()
    begun = time.perf_counter()
    _finish(cohort, folder / "unbroken")
    result.unbroken_s = round(time.perf_counter() - begun, 3)
    want = contents(folder / "unbroken")
    if len(want) != slides:
        raise InputError(f"the unbroken run must make {slides} files, got {len(want)}")
    rng = np.random.default_rng(seed)
    while result.kills < kills:
        out = folder / f"out-{result.finished}"
        noted: dict[str, tuple[int, int]] = {}
        while result.kills < kills:
            child = start(cohort.words(out), folder / "log")
            if ends_within(child, float(rng.uniform(0, 0.6 * result.unbroken_s))):
                break
            os.kill(child, signal.SIGKILL)
            wait(child)
            result.kills += 1
            _note(out, noted, result)
        _finish(cohort, out)
        result.finished += 1
        _judge(out, noted, want, result)
    return result


def ends_within(child: int, seconds: float) -> bool:
    """Wait for a process for some time; whether it ended, which must be in success."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            if os.waitstatus_to_exitcode(status):
                raise InputError(f"a run must exit 0, got {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.002)
    return False


def _finish(cohort: Cohort, out: Path) -> None:
    log = cohort.folder / "log"
    code = wait(start(cohort.words(out), log))
    if code:
        raise InputError(f"a run that is not killed must exit 0, got {code}: {log.read_text()}")


def _stamps(out: Path) -> dict[str, tuple[int, int]]:
    """Return identity and time of change of every feature file."""
    found = {}
    for path in out.glob(_FEATURES):
        if not path.name.startswith("."):
            stat = path.stat()
            found[path.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def contents(out: Path) -> dict[str, bytes]:
    """Return the bytes of every feature file in an output folder, by name."""
    return {p.name: p.read_bytes() for p in out.glob(_FEATURES) if not p.name.startswith(".")}


def _note(out: Path, noted: dict[str, tuple[int, int]], result: CrashResult) -> None:
    """Note what was whole when a run was killed; a file noted before must not have changed."""
    now = _stamps(out)
    result.redone += sum(now.get(name) != stamp for name, stamp in noted.items())
    noted.update(now)
    result.whole_at_kill += len(now)
    if not (out / LEDGER_NAME).exists():
        result.by_stage["no ledger"] += 1
        return
    result.by_stage["slides" if now else "no slide"] += 1
    for one in read_status(out):
        result.in_flight += len(one.running)


def _judge(
    out: Path, noted: dict[str, tuple[int, int]], want: dict[str, bytes], result: CrashResult
) -> None:
    """Compare a finished folder with what was noted and with the unbroken run."""
    now, got = _stamps(out), contents(out)
    result.redone += sum(now.get(name) != stamp for name, stamp in noted.items())
    result.changed += sum(got.get(name) != content for name, content in want.items())
    result.changed += len(got.keys() - want.keys())
    result.left_over += sum(is_temporary(path) for path in out.glob("*/.*"))
    (one,) = read_status(out)
    if one.counts["done"] != len(want) or one.running:
        raise InputError(f"the ledger must have {len(want)} finished slides, got {one.counts}")


def _write_encoder(folder: Path, width: int) -> None:
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    ).save_pretrained(folder)


def _command_line(words: Sequence[str]) -> None:
    from modaltune.cli import app

    app(list(words), prog_name="modaltune")


def in_child(work: object, log: Path | None = None) -> None:
    """Do something in a forked child and end it, whatever happens; never returns."""
    code = 1
    try:
        if log is not None:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(target, 1)
            os.dup2(target, 2)
        work()  # type: ignore[operator]
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _expect_success(child: int, what: str) -> None:
    code = wait(child)
    if code:
        raise InputError(f"{what} must succeed in a child process, got exit code {code}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kills from the command line and return the exit code: 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.crash", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument(
        "--overlays", action=argparse.BooleanOptionalAction, default=True, help="write pictures too"
    )
    parser.add_argument("--folder", type=Path, help="folder on the disk to use")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    try:
        results = results_folder(options.results)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            found = asdict(
                kill_runs(
                    options.kills, options.seed, Path(name), options.slides,
                    overlays=options.overlays,
                )
            )  # fmt: skip
        stages = found.pop("by_stage")
        row = {
            "time": timestamp(),
            "commit": commit_id(),
            "device": f"{cpu_model()}, {os.cpu_count()} cores",
            "seed": options.seed,
            "slides": options.slides,
            "overlays": options.overlays,
            **found,
            **{f"killed_{stage.replace(' ', '_')}": count for stage, count in stages.items()},
            "seconds": round(time.perf_counter() - begun, 1),
        }
        if results is not None:
            append_row(results / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = (
        "{kills} kills in {finished} cohorts of {slides} slides: {redone} whole slides done again, "
        "{changed} differ from the unbroken run, {left_over} temporary files left; {in_flight} "
        "slides were in flight"
    )
    print(json.dumps(row) if options.json else line.format(**row))
    return 1 if row["redone"] or row["changed"] or row["left_over"] else 0


if __name__ == "__main__":
    sys.exit(main())
