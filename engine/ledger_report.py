"""Looking at a ledger, and letting slides be tried again: what the command line shows and does."""

from __future__ import annotations

import contextlib
import difflib
import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from modaltune.engine.errors import InputError
from modaltune.engine.ledger_leases import Worker
from modaltune.engine.ledger_manifest import FRESH
from modaltune.engine.ledger_schema import (
    LEDGER_NAME,
    connect,
    connect_readonly,
    names_errors,
    transaction,
)

STATUSES = ("pending", "running", "done", "empty", "failed", "quarantined")
_RATE_WINDOW_S = 3600.0
LeaseState = Literal["alive", "gone", "expired"]


@dataclass(frozen=True)
class SlideRow:
    """What the ledger says of one slide.

    Attributes:
        slide_id: The slide.
        case_id: Its patient.
        path: Its file.
        base_mpp: Microns per level-0 px that were given, None if read from the file.
        features: Its feature file, relative to the output folder.
        status: One of `STATUSES`.
        attempts: How often it was begun and not given back.
        reason: Why it is empty, failed, quarantined or waiting again.
        reader: Which reader decoded it.
        tiles: Number of tiles.
        timings: Seconds by stage.
        payload_sha256: Checksum of features and coordinates, as in the feature file.
        updated_at: Last change, seconds since 1970.
    """

    slide_id: str
    case_id: str
    path: str
    base_mpp: float | None
    features: str
    status: str
    attempts: int
    reason: str
    reader: str
    tiles: int
    timings: dict[str, float]
    payload_sha256: str
    updated_at: float


@dataclass(frozen=True)
class LeaseRow:
    """Who works on a slide.

    Attributes:
        slide_id: The slide.
        host: The machine.
        pid: The process.
        age_s: Seconds since the claim.
        silent_s: Seconds since the last heartbeat.
        state: `alive` as far as is known, `gone` (the process has ended) or `expired`; of the
            latter two the next worker takes the slide over.
    """

    slide_id: str
    host: str
    pid: int
    age_s: float
    silent_s: float
    state: LeaseState


@dataclass(frozen=True)
class SetStatus:
    """The state of one encoder's features.

    Attributes:
        features: Name of their folder.
        recipe: What they are made by.
        counts: Slides by status.
        tiles: Tiles of finished slides.
        slides_per_h: Rate over the last hour of work; None below two slides.
        running: Leases.
        problems: Slides that failed or are quarantined.
    """

    features: str
    recipe: dict[str, Any]
    counts: dict[str, int]
    tiles: int
    slides_per_h: float | None
    running: tuple[LeaseRow, ...]
    problems: tuple[SlideRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)


_FIELDS = tuple(field.name for field in fields(SlideRow))


def slide_rows(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> list[SlideRow]:
    """Return the slides that an SQL condition picks, by id."""
    rows, columns = [], ", ".join(_FIELDS)
    for row in db.execute(f"SELECT {columns} FROM slides WHERE {where} ORDER BY slide_id", values):
        named = dict(zip(_FIELDS, row, strict=True))
        rows.append(SlideRow(**{**named, "timings": json.loads(named["timings"])}))
    return rows


def read_status(out: str | Path) -> list[SetStatus]:
    """Read the ledger of an output folder without changing anything; runs may be going on.

    Raises:
        LedgerError: There is none, or it can't be read.
    """
    out = Path(out)
    with contextlib.closing(connect_readonly(out)) as db, names_errors(out / LEDGER_NAME):
        sets = db.execute("SELECT id, folder, recipe FROM sets ORDER BY folder").fetchall()
        return [_set_status(db, *row) for row in sets]


def retry_slides(
    out: str | Path,
    slide_ids: Sequence[str] | None = None,
    statuses: Sequence[str] = ("failed", "quarantined"),
) -> list[str]:
    """Let slides of an output folder be tried again, from the first attempt.

    Args:
        out: The output folder.
        slide_ids: The slides, whatever their status; finished ones are made again.
        statuses: All slides of these statuses, if no slides are named.

    Returns:
        Their ids.

    Raises:
        InputError: There is no ledger, a slide is unknown, or one is in work.
    """
    out = Path(out)
    connect_readonly(out).close()  # a retry never makes a ledger
    with (
        contextlib.closing(connect(out)) as db,
        names_errors(out / LEDGER_NAME),
        transaction(db, durable=True),
    ):
        return reset_slides(db, slide_ids, statuses, time.time())


def reset_slides(
    db: sqlite3.Connection,
    slide_ids: Sequence[str] | None,
    statuses: Sequence[str],
    now: float,
    *,
    set_id: int | None = None,
) -> list[str]:
    """Let slides wait as if never tried, in one set or in all; inside a transaction.

    Returns:
        Their ids.

    Raises:
        InputError: A slide is unknown or in work.
    """
    rows = db.execute(
        "SELECT id, slide_id, status FROM slides WHERE ? IS NULL OR set_id = ? ORDER BY slide_id",
        (set_id, set_id),
    ).fetchall()
    if slide_ids is None:
        chosen = [row for row in rows if row[2] in statuses]
    else:
        _check_known(slide_ids, {row[1] for row in rows})
        chosen = [row for row in rows if row[1] in set(slide_ids)]
    busy = [slide_id for _, slide_id, status in chosen if status == "running"]
    if busy:
        raise InputError(
            f"slides to retry must not be in work, got {', '.join(busy[:5])}; wait, or end the "
            "process that `modaltune status` names"
        )
    db.executemany(
        f"UPDATE slides SET {FRESH}, updated_at = ? WHERE id = ?", [(now, row[0]) for row in chosen]
    )
    return sorted({slide_id for _, slide_id, _ in chosen})


def _check_known(slide_ids: Sequence[str], known: set[str]) -> None:
    for slide_id in slide_ids:
        if slide_id not in known:
            close = difflib.get_close_matches(slide_id, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; look with `modaltune status`"
            raise InputError(f"--slide must be a slide of the ledger, got {slide_id!r}{hint}")


def _set_status(db: sqlite3.Connection, set_id: int, folder: str, recipe: str) -> SetStatus:
    counts = dict.fromkeys(STATUSES, 0)
    counts.update(
        db.execute(
            "SELECT status, COUNT(*) FROM slides WHERE set_id = ? GROUP BY status", (set_id,)
        ).fetchall()
    )
    (tiles,) = db.execute(
        "SELECT COALESCE(SUM(tiles), 0) FROM slides WHERE set_id = ?", (set_id,)
    ).fetchone()
    problems = slide_rows(db, "set_id = ? AND status IN ('failed', 'quarantined')", (set_id,))
    return SetStatus(
        features=folder,
        recipe=json.loads(recipe),
        counts=counts,
        tiles=int(tiles),
        slides_per_h=_rate(db, set_id),
        running=_leases(db, set_id),
        problems=tuple(problems),
    )


def _rate(db: sqlite3.Connection, set_id: int) -> float | None:
    """Return slides per hour over the hour before the last slide was finished."""
    count, first, last = db.execute(
        "SELECT COUNT(*), MIN(finished_at), MAX(finished_at) FROM slides WHERE set_id = ? AND "
        "finished_at > (SELECT MAX(finished_at) FROM slides WHERE set_id = ?) - ?",
        (set_id, set_id, _RATE_WINDOW_S),
    ).fetchone()
    # n finishes bound n - 1 spans of work.
    return (count - 1) / (last - first) * 3600 if count > 1 and last > first else None


def _leases(db: sqlite3.Connection, set_id: int) -> tuple[LeaseRow, ...]:
    now, found = time.time(), []
    for slide_id, claimed_at, beat_at, expires_at, *who in db.execute(
        "SELECT s.slide_id, l.claimed_at, l.beat_at, l.expires_at, l.host, l.machine, l.pid, "
        "l.started FROM leases l JOIN slides s ON s.id = l.slide WHERE s.set_id = ? "
        "ORDER BY l.claimed_at",
        (set_id,),
    ):
        worker = Worker(*who)
        state: LeaseState = "alive"
        if worker.is_gone():
            state = "gone"
        elif expires_at < now:
            state = "expired"
        found.append(
            LeaseRow(slide_id, worker.host, worker.pid, now - claimed_at, now - beat_at, state)
        )
    return tuple(found)
