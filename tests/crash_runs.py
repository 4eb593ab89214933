"""Real runs that break, in one process that loads everything once; prints what happened as JSON.

Started by `test_crash.py`, not by pytest: pytest's process has computed with torch, and so has
threads that a fork would lose.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modaltune.benchmarks import crash
from modaltune.benchmarks.crash import Cohort, contents, make_cohort, preload, start, wait
from modaltune.engine.ledger_report import read_status, retry_slides

NUMBERS = ("kills", "finished", "whole_at_kill", "in_flight", "redone", "changed", "left_over")


def run(cohort: Cohort, out: Path, **options: Any) -> dict[str, Any]:
    """Run once to the end; exit code, output, and what lies in the output folder."""
    log = cohort.folder / f"{out.name}.log"
    code = wait(start(cohort.words(out), log, **options))
    left = [str(p.relative_to(out)) for p in out.rglob("*") if ".modaltune-tmp" in p.name]
    return {"code": code, "said": log.read_text(), "temporary": left, "files": contents(out)}


def full_disks(folder: Path) -> list[dict[str, Any]]:
    """Runs under limits of a file's size, each resumed without one."""
    cohort = make_cohort(folder, 5, seed=1, width=1536)
    whole = run(cohort, folder / "whole")
    sizes = sorted(len(content) for content in whole["files"].values())
    found = []
    limits = [(False, size) for size in (8_000, 60_000, sizes[0], sizes[-1] - 1)]
    for overlays, limit in (*limits, (True, sizes[-1] + 10_000)):
        out = folder / f"full-{limit}"
        asked = replace(cohort, overlays=overlays)
        before: dict[str, Any] = {}
        if limit == sizes[-1] - 1:  # some slides were finished while there was room
            before = run(replace(asked, slides=cohort.slides[:2]), out)["files"]
        broken = run(asked, out, most_bytes=limit)
        kept = broken["files"]
        resumed = run(asked, out)
        found.append(
            {
                "limit": limit,
                "code": broken["code"],
                "said": broken["said"],
                "temporary": broken["temporary"],
                "before": len(before),
                "kept": len(kept),
                "kept_before": before.items() <= kept.items(),
                "kept_is_right": kept.items() <= whole["files"].items(),
                "resumed_code": resumed["code"],
                "resumed_is_right": resumed["files"] == whole["files"],
                "statuses": [row.status for row in rows(out)],
            }
        )
    return found


def rows(out: Path) -> list[Any]:
    """All slides of a ledger."""
    import contextlib

    from modaltune.engine.ledger_report import slide_rows
    from modaltune.engine.ledger_schema import connect_readonly

    with contextlib.closing(connect_readonly(out)) as db:
        return slide_rows(db, "1", ())


def eight_processes(folder: Path) -> dict[str, Any]:
    """Eight runs on one folder at once."""
    cohort = make_cohort(folder, 16, seed=2)
    alone = run(cohort, folder / "alone")
    out = folder / "shared"
    logs = [folder / f"worker-{i}.log" for i in range(8)]
    codes = [wait(child) for child in [start(cohort.words(out), log) for log in logs]]
    reports = [json.loads(log.read_text()[log.read_text().index("{") :]) for log in logs]
    return {
        "codes": codes,
        "said": [log.read_text() for log in logs if any(codes)],
        "done": [report["counts"]["done"] for report in reports],
        "finished": [report["counts"]["done"] + report["counts"]["kept"] for report in reports],
        "attempts": [row.attempts for row in rows(out)],
        "same": contents(out) == alone["files"],
    }


def truncated_slide(folder: Path) -> dict[str, Any]:
    """A cohort with a slide that is cut short, which is then mended."""
    cohort = make_cohort(folder, 5, seed=3)
    alone = run(cohort, folder / "alone")
    bad, out = cohort.slides[2], folder / "out"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) * 6 // 10])
    broken = run(cohort, out)
    (status,) = read_status(out)
    again = run(cohort, out)
    bad.write_bytes(whole)
    retried = retry_slides(out)
    mended = run(cohort, out)
    others = {name: content for name, content in alone["files"].items() if bad.stem not in name}
    return {
        "bad": bad.stem,
        "code": broken["code"],
        "said": broken["said"],
        "counts": status.counts,
        "problems": [asdict(row) for row in status.problems],
        "others_same": broken["files"] == others,
        "again_code": again["code"],
        "retried": retried,
        "mended_code": mended["code"],
        "mended_same": mended["files"] == alone["files"],
    }


def killed_runs(folder: Path, kills: int) -> dict[str, Any]:
    """Many runs that are killed, by the script that does a hundred."""
    folder.mkdir()
    words = ["--kills", str(kills), "--seed", "7", "--slides", "12", "--no-overlays"]
    code = crash.main([*words, "--folder", str(folder), "--results", str(folder)])
    with (folder / crash.CSV_NAME).open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    numbers = {name: int(row[name]) for name in NUMBERS}
    return {"code": code, **numbers, "beside": sorted(os.listdir(folder))}


def main(folder: Path, kills: int) -> None:
    """Run everything below a folder and print the JSON."""
    preload()
    found = {
        "full": full_disks(folder / "full"),
        "shared": eight_processes(folder / "eight"),
        "truncated": truncated_slide(folder / "truncated"),
        "killed": killed_runs(folder / "kills", kills),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
