"""The ledger, timed: 100,000 slides reconciled with the disk, a claim, a commit.

Three things a run pays for. Opening: the manifest compared with the rows and the rows with the
folder, of a run that is finished, so that nothing has to be opened. Per slide: a claim, and the
commit of its row, once as it is (durable, with an fsync) and once without the fsync, whose
difference is the disk's. One fsync of a small file on the same disk is timed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine import ledger as ledger_module
from modaltune.engine.cohort import SlideItem
from modaltune.engine.errors import InputError
from modaltune.engine.ledger import Ledger
from modaltune.engine.ledger_manifest import RecipeSet, states
from modaltune.engine.ledger_reconcile import compare
from modaltune.engine.ledger_schema import connect, transaction
from modaltune.engine.own_features import file_facts
from modaltune.engine.recipes import recipe_sha256
from modaltune.testing_features import SMALL_RECIPE, small_features

CSV_NAME = "ledger.csv"
FEATURES = "features_small"
_PER_LINK = 50_000  # ext4 allows 65,000 names of one file


def linked_cohort(folder: Path, count: int) -> tuple[Path, list[SlideItem]]:
    """Make an output folder of a finished run: `count` names of a few small feature files.

    The files are names of one another, since writing each takes minutes; to a comparison by name,
    size and time that makes no difference. Their rows are written as `commit_done` writes them.

    Args:
        folder: Where the output folder goes.
        count: Number of slides.

    Returns:
        The output folder and its slides.
    """
    out = folder / "out"
    items = [
        SlideItem(folder / f"s{i}.svs", f"slide-{i:06d}", f"case-{i // 2}") for i in range(count)
    ]
    Ledger.open(out, SMALL_RECIPE, items, features=FEATURES, weigh=lambda item: 1.0).close()
    for start in range(0, count, _PER_LINK):
        first = small_features(out / FEATURES / f"{items[start].slide_id}.h5", items[start])
        for item in items[start + 1 : start + _PER_LINK]:
            os.link(first, out / FEATURES / f"{item.slide_id}.h5")
    sha = recipe_sha256(SMALL_RECIPE)
    with contextlib.closing(connect(out)) as db:
        stamps = []
        for item in items:
            stat = (out / FEATURES / f"{item.slide_id}.h5").stat()
            stamps.append((stat.st_size, stat.st_mtime_ns, sha, item.slide_id))
        with transaction(db, durable=True):
            db.executemany(
                "UPDATE slides SET status = 'done', tiles = 3, file_size = ?, file_mtime_ns = ?, "
                "judged = ? WHERE set_id = 1 AND slide_id = ?",
                stamps,
            )
    return out, items


def time_open(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Time opening a finished run's ledger; and of it reading the rows and comparing the disk.

    Raises:
        InputError: There was something to do, so that the time would be of something else.
    """
    out, items = linked_cohort(folder, count)
    group = RecipeSet(1, FEATURES, SMALL_RECIPE, recipe_sha256(SMALL_RECIPE))
    whole, disk = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        ledger = Ledger.open(out, SMALL_RECIPE, items, features=FEATURES)
        whole.append(time.perf_counter() - start)
        with ledger:
            counts, opened = ledger.counts(), ledger.reconciled.opened
        with contextlib.closing(connect(out)) as db:
            start = time.perf_counter()
            found, verdicts = compare(group, out / FEATURES, states(db, 1), new_recipe=False)
            disk.append(time.perf_counter() - start)
        if counts != {"done": count} or opened or verdicts or found.missing:
            raise InputError(f"the ledger must find {count} finished slides, got {counts}")
    shutil.rmtree(out)
    return {**_quantiles("open_s", whole, 4), **_quantiles("reconcile_s", disk, 4)}


def time_slides(folder: Path, count: int) -> dict[str, float]:
    """Time claims and commits, with files written in between, and fsyncs, interleaved."""
    items = [SlideItem(folder / f"s{i}.svs", f"s{i}", f"s{i}") for i in range(count)]
    spent: dict[str, list[float]] = {"claim": [], "commit": [], "commit_no_fsync": [], "fsync": []}
    folder.mkdir()
    probe = os.open(folder / "probe", os.O_CREAT | os.O_WRONLY)
    with Ledger.open(folder / "out", SMALL_RECIPE, items, features=FEATURES) as ledger:
        for number in range(count):
            start = time.perf_counter()
            lease = ledger.claim()
            spent["claim"].append(time.perf_counter() - start)
            if lease is None:
                raise InputError(f"the ledger must give {count} slides, got {number}")
            facts = file_facts(small_features(lease.features, lease.item))
            name = "commit_no_fsync" if number % 2 else "commit"
            ours = _no_fsync if number % 2 else transaction
            with patch.object(ledger_module, "transaction", ours):
                start = time.perf_counter()
                ledger.commit_done(lease, facts, timings={"read": 1.0, "encode": 2.0})
                spent[name].append(time.perf_counter() - start)
            os.write(probe, b"x" * 4096)
            start = time.perf_counter()
            os.fsync(probe)
            spent["fsync"].append(time.perf_counter() - start)
        counts = ledger.counts()
    os.close(probe)
    if counts != {"done": count}:
        raise InputError(f"the ledger must have {count} finished slides, got {counts}")
    row: dict[str, float] = {}
    for name, values in spent.items():
        row.update(_quantiles(f"{name}_ms", [1e3 * value for value in values], 3))
        row[f"{name}_mean_ms"] = round(float(np.mean([1e3 * value for value in values])), 3)
    return row


@contextlib.contextmanager
def _no_fsync(db: sqlite3.Connection, *, durable: bool) -> Iterator[None]:
    """Stand in for `transaction` where commits go without their fsync."""
    del durable
    with transaction(db, durable=False):
        yield


def _quantiles(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    stem, _, unit = name.rpartition("_")
    return {
        f"{stem}_p{p}_{unit}": round(float(np.percentile(values, p)), digits) for p in (20, 50, 80)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.ledger", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--slides", type=int, default=100_000, help="rows to reconcile")
    parser.add_argument("--commits", type=int, default=1000, help="slides to claim and commit")
    parser.add_argument("--rounds", type=int, default=7, help="times the ledger is opened")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        results = results_folder(options.results)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            row: dict[str, object] = {
                "time": timestamp(),
                "commit": commit_id(),
                "device": f"{cpu_model()}, {os.cpu_count()} cores",
                "sqlite": sqlite3.sqlite_version,
                "slides": options.slides,
                **time_open(Path(name), options.slides, options.rounds),
                "commits": options.commits,
                **time_slides(Path(name) / "slides", options.commits),
            }
        if results is not None:
            append_row(results / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = (
        "{slides} slides reconciled in {reconcile_p50_s} s, opened in {open_p50_s} s; claim "
        "{claim_mean_ms} ms, commit {commit_mean_ms} ms ({commit_no_fsync_mean_ms} ms without its "
        "fsync; one fsync {fsync_mean_ms} ms)"
    )
    print(json.dumps(row) if options.json else line.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
