"""What every benchmark shares: facts of the machine, the commit, and rows appended to a CSV."""

from __future__ import annotations

import csv
import datetime
import fcntl
import io
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from modaltune.engine.errors import InputError

UNKNOWN = "unknown"


def timestamp() -> str:
    """Return the time now, UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or UNKNOWN


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_id() -> str:
    """Return the commit this file was read from, `-dirty` if files differ, or `unknown`.

    An installed copy inside somebody else's repository is not of that repository's commit: git
    has to track the folder this file lies in.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return UNKNOWN
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return UNKNOWN
    return f"{commit}-dirty" if _git("status", "--porcelain") else commit


def results_folder(given: Path | None) -> Path | None:
    """Return where rows go: the folder given, `./benchmarks/results` if it exists, or None.

    Raises:
        InputError: The folder given does not exist.
    """
    if given is not None:
        if not given.is_dir():
            raise InputError(f"--results must be an existing folder, got {given}; create it first")
        return given
    default = Path("benchmarks") / "results"
    return default if default.is_dir() else None


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append one row to a CSV, with a header if the file is new.

    Two benchmarks that end at once don't mix their rows: the file is locked while one writes.

    Args:
        path: The file; its folder exists.
        row: Values by column; the columns and their order are those of the file.

    Raises:
        InputError: The file has other columns, or is no CSV that ends with a whole row.
    """
    with path.open("a+", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        header = next(csv.reader(io.StringIO(text)), None)
        if header is not None and header != list(row):
            raise InputError(
                f"{path} must have the columns {', '.join(row)}, got {', '.join(header)}; move the "
                "file away or give another folder with --results"
            )
        if text and not text.endswith("\n"):
            raise InputError(
                f"{path} must end with a whole row, got a cut one; repair its last line"
            )
        added = io.StringIO()
        writer = csv.DictWriter(added, fieldnames=list(row), lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerow(row)
        file.write(added.getvalue())
        file.flush()
        os.fsync(file.fileno())
