"""The ledger of an output folder: what every slide's state is, who works on it, what became of it.

`ledger.sqlite` lies in the output folder. Any number of processes open it with the same slides and
claim them one by one; each slide is finished once. Whatever is killed, and whenever, what is whole
on disk is kept and the rest is made again:

>>> with Ledger.open(out, recipe, items, features="features_x") as ledger, ledger.beating():
...     while (lease := ledger.claim()) is not None:
...         ledger.commit_done(lease, record_features(lease.features, embed(lease.item)))

A feature file is committed before its row (temporary file, fsync, rename, fsync of the folder, then
the row), so that a row never promises what is not there; a file without its row is adopted.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from modaltune.engine.cohort import SlideItem
from modaltune.engine.errors import LeaseLostError, LedgerError
from modaltune.engine.ledger_leases import (
    Heartbeat,
    Lease,
    LeaseTerms,
    Worker,
    ended_leases,
    new_token,
    take_over,
)
from modaltune.engine.ledger_opening import Opened, file_size, open_group
from modaltune.engine.ledger_reconcile import file_stamp
from modaltune.engine.ledger_report import SlideRow, reset_slides, slide_rows
from modaltune.engine.ledger_schema import BUSY_S, LEDGER_NAME, names_errors, transaction
from modaltune.engine.own_features import FileFacts, file_facts

__all__ = ["Lease", "LeaseTerms", "Ledger", "SlideRow"]

_START = (-1, float("-inf"), -1)
_SWEEP_EVERY_S = 1.0
# What is waiting, those that never failed anybody first, then by rank. The row values walk the
# index `claimable` from where the last claim was, past slides of other runs.
_NEXT = (
    "SELECT id, slide_id, attempts, queue_rank FROM slides "
    "WHERE set_id = ? AND status IN ('pending', 'failed') AND (attempts, queue_rank, id) > "
    "(?, ?, ?) AND EXISTS (SELECT 1 FROM temp.wanted w WHERE w.id = slides.id) "
    "ORDER BY attempts, queue_rank, id LIMIT 1"
)
# One statement, so that a slide which fails here and is claimed there is seen in either place.
_UNSETTLED = (
    "SELECT s.slide_id FROM leases l CROSS JOIN slides s ON s.id = l.slide WHERE s.set_id = ? "
    "AND EXISTS (SELECT 1 FROM temp.wanted w WHERE w.id = s.id) "
    "UNION ALL SELECT slide_id FROM slides WHERE set_id = ? AND status IN ('pending', 'failed') "
    "AND EXISTS (SELECT 1 FROM temp.wanted w WHERE w.id = slides.id)"
)


class Ledger:
    """An output folder's ledger, as one process with its list of slides sees it.

    Made by `Ledger.open`. May be used by several threads of the process that opened it.

    Attributes:
        path: The ledger's file.
        reconciled: What opening found on disk that the ledger did not know.
        terms: When leases run out and slides are given up.
    """

    def __init__(
        self, opened: Opened, out: Path, items: Sequence[SlideItem], terms: LeaseTerms
    ) -> None:
        self.path = out / LEDGER_NAME
        self.reconciled, self.terms = opened.reconciled, terms
        self._db, self._group = opened.db, opened.group
        self._folder = out / opened.group.folder
        self._items = {item.slide_id: item for item in items}
        self._worker = Worker.current()
        self._held: dict[str, Lease] = {}
        self._cursor: tuple[float, ...] = _START
        self._swept = 0.0
        self._mutex = threading.RLock()

    @classmethod
    def open(
        cls,
        out: str | Path,
        recipe: Mapping[str, Any],
        items: Sequence[SlideItem],
        *,
        features: str,
        new_recipe: bool = False,
        terms: LeaseTerms | None = None,
        weigh: Callable[[SlideItem], float] = file_size,
        scratch: Sequence[str] = ("overlays",),
        busy_s: float = BUSY_S,
    ) -> Ledger:
        """Open or make a folder's ledger, write the slides into it, and compare it with the disk.

        Args:
            out: The output folder.
            recipe: What features are made by (`modaltune.engine.recipes.feature_recipe`).
            items: The slides of this run, with distinct ids. Slides of other runs stay as they are.
            features: Name of the folder of feature files in `out`; each has a recipe of its own.
            new_recipe: Make finished slides of another recipe again instead of refusing.
            terms: When leases run out and slides are given up.
            weigh: How heavy a slide is; heavy ones come first. The size of its file unless given.
            scratch: Further folders in `out` that a killed writer may have left files in.
            busy_s: How long to wait for another process's transaction, seconds.

        Raises:
            RecipeChangedError: Finished slides were made by other settings, and `new_recipe` is
                False; its message names each setting. No finished slide was touched.
            LedgerError: The ledger can't be opened or written, or is something else.
            DiskFullError: There is no room for it.
        """
        terms = terms or LeaseTerms()
        opened = open_group(
            Path(out), recipe, items, features,
            new_recipe=new_recipe, terms=terms, weigh=weigh, scratch=scratch, busy_s=busy_s,
        )  # fmt: skip
        return cls(opened, Path(out), items, terms)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the leases still held and close the file."""
        with self._mutex:
            try:
                for lease in list(self._held.values()):
                    # The leases of a process that ends are taken over anyway.
                    with contextlib.suppress(LeaseLostError, LedgerError):
                        self.release(lease)
            finally:
                self._db.close()

    def claim(self) -> Lease | None:
        """Take the next slide of this run: new ones before failed ones, heavy ones first.

        Returns:
            A lease on it, or None if none is waiting just now: others may be at work, and fail
            (see `unsettled`).

        Raises:
            LedgerError: Another process changed the recipe, or the ledger can't be written.
        """
        # Whoever waits for others only looks: a claim that writes would keep them from writing.
        with self._reading():
            now = time.time()
            if self._next() is None:
                self._cursor = _START
                ended = ended_leases(self._db, self._group.row, now)
                if not ended and self._next() is None:
                    return None
        with self._writing(durable=False) as now:
            if now - self._swept >= _SWEEP_EVERY_S or self._cursor == _START:
                take_over(self._db, self._group.row, now, self.terms.max_deaths)
                self._swept = now
            row = self._next()
            return None if row is None else self._lease(row, now)

    def heartbeat(self, *leases: Lease) -> None:
        """Put off the end of leases, of all that are held unless some are named.

        A lease that another worker has taken over is marked `lost`.

        Raises:
            LeaseLostError: A named lease was taken over.
        """
        with self._writing(durable=False) as now:
            for lease in leases or tuple(self._held.values()):
                renewed = self._db.execute(
                    "UPDATE leases SET beat_at = ?, expires_at = ? WHERE token = ?",
                    (now, self._expiry(now), lease.token),
                ).rowcount
                if not renewed:
                    self._lose(lease)
        if any(lease.lost.is_set() for lease in leases):
            raise self._lost_error(next(lease for lease in leases if lease.lost.is_set()))

    def beating(self) -> Heartbeat:
        """Return a context manager that renews all leases from a thread, four times per `ttl_s`."""
        return Heartbeat(self.heartbeat, self.terms.ttl_s / 4)

    def commit_done(
        self,
        lease: Lease,
        facts: FileFacts | None = None,
        *,
        timings: Mapping[str, float] | None = None,
    ) -> SlideRow:
        """Write down that a slide's feature file is in place; survives a power cut from then on.

        Args:
            lease: The slide's lease; it ends.
            facts: What `modaltune.engine.store.record_features` returned; else read from the file.
            timings: Seconds by stage.

        Raises:
            LeaseLostError: Another worker has taken the slide over.
            FeatureFileError: The file is to be read, and is not a feature file.
        """
        facts = facts or file_facts(lease.features)
        stamp = file_stamp(lease.features)
        with self._writing(durable=True) as now:
            self._settle(lease)
            self._db.execute(
                "UPDATE slides SET status = ?, tiles = ?, reason = ?, reader = ?, "
                "payload_sha256 = ?, file_size = ?, file_mtime_ns = ?, judged = ?, timings = ?, "
                "finished_at = ?, updated_at = ? WHERE id = ?",
                ("done" if facts.tiles else "empty", *facts, *stamp, self._group.sha256,
                 json.dumps(dict(timings or {})), now, now, lease.row),
            )  # fmt: skip
            (row,) = slide_rows(self._db, "id = ?", (lease.row,))
        return row

    def commit_failed(self, lease: Lease, reason: str) -> SlideRow:
        """Write down that an attempt failed; the slide waits again, or is quarantined.

        Raises:
            LeaseLostError: Another worker has taken the slide over.
        """
        with self._writing(durable=True) as now:
            self._settle(lease)
            self._db.execute(
                "UPDATE slides SET failures = failures + 1, reason = ?, updated_at = ?, status = "
                "CASE WHEN failures + 1 >= ? THEN 'quarantined' ELSE 'failed' END WHERE id = ?",
                (reason, now, self.terms.max_attempts, lease.row),
            )
            (row,) = slide_rows(self._db, "id = ?", (lease.row,))
        return row

    def release(self, lease: Lease) -> None:
        """Give a slide back untouched, as if it had not been claimed.

        Raises:
            LeaseLostError: Another worker has taken the slide over.
        """
        with self._writing(durable=False) as now:
            self._settle(lease)
            self._db.execute(
                "UPDATE slides SET attempts = attempts - 1, updated_at = ?, status = "
                "CASE WHEN failures > 0 THEN 'failed' ELSE 'pending' END WHERE id = ?",
                (now, lease.row),
            )

    def retry(
        self,
        slide_ids: Sequence[str] | None = None,
        statuses: Sequence[str] = ("failed", "quarantined"),
    ) -> list[str]:
        """Let slides wait as if never tried: those named, or this set's of some statuses.

        Returns:
            The ids of the slides.

        Raises:
            InputError: A slide is unknown or in work.
        """
        with self._writing(durable=True) as now:
            return reset_slides(self._db, slide_ids, statuses, now, set_id=self._group.row)

    def counts(self) -> dict[str, int]:
        """Return how many of this run's slides there are by status."""
        with self._reading():
            rows = self._db.execute(
                "SELECT status, COUNT(*) FROM slides WHERE id IN (SELECT id FROM temp.wanted) "
                "GROUP BY status"
            ).fetchall()
        return {status: int(count) for status, count in rows}

    def rows(self) -> list[SlideRow]:
        """Return what the ledger says of each of this run's slides, in the run's order."""
        with self._reading():
            found = slide_rows(self._db, "id IN (SELECT id FROM temp.wanted)", ())
        by_id = {row.slide_id: row for row in found}
        return [by_id[slide_id] for slide_id in self._items]

    def unsettled(self) -> list[str]:
        """Return the ids of this run's slides that others are at work on or that wait again."""
        with self._reading():
            rows = self._db.execute(_UNSETTLED, (self._group.row, self._group.row)).fetchall()
        held = {lease.item.slide_id for lease in self._held.values()}
        return [slide_id for (slide_id,) in rows if slide_id not in held]

    @property
    def has_leases(self) -> bool:
        """Whether this process holds slides that it has not settled."""
        return bool(self._held)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._check_process()
        with self._mutex, names_errors(self.path):
            yield

    @contextlib.contextmanager
    def _writing(self, *, durable: bool) -> Iterator[float]:
        """Run a block as one transaction and give it the time."""
        with self._reading(), transaction(self._db, durable=durable):
            yield time.time()

    def _check_process(self) -> None:
        if os.getpid() != self._worker.pid:
            raise RuntimeError(
                "a Ledger must be used in the process that opened it, got a forked one; open it "
                "again in the child"
            )

    def _next(self) -> tuple[Any, ...] | None:
        return self._db.execute(_NEXT, (self._group.row, *self._cursor)).fetchone()

    def _lease(self, row: tuple[Any, ...], now: float) -> Lease:
        slide, slide_id, attempts, rank = row
        item = self._items[slide_id]
        (sha,) = self._db.execute(
            "SELECT recipe_sha256 FROM sets WHERE id = ?", (self._group.row,)
        ).fetchone()
        if sha != self._group.sha256:
            raise LedgerError(
                f"the recipe of {self._folder} must stay as it is while processes work by it, got "
                "another one from a process that began later; this one stops, run it again to see "
                "the difference"
            )
        token, who = new_token(), self._worker
        self._db.execute(
            "UPDATE slides SET status = 'running', attempts = attempts + 1, updated_at = ? "
            "WHERE id = ?",
            (now, slide),
        )
        self._db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                slide,
                token,
                who.host,
                who.machine,
                who.pid,
                who.started,
                now,
                now,
                now + self.terms.ttl_s,
            ),
        )
        self._cursor = (attempts, rank, slide)
        lease = Lease(item, self._folder / f"{slide_id}.h5", attempts + 1, token, slide, self)
        self._held[token] = lease
        return lease

    def _expiry(self, now: float) -> float:
        return now + self.terms.ttl_s

    def _settle(self, lease: Lease) -> None:
        """End a lease that this worker must still hold."""
        ended = self._db.execute("DELETE FROM leases WHERE token = ?", (lease.token,)).rowcount
        if not ended:
            self._lose(lease)
            raise self._lost_error(lease)
        self._held.pop(lease.token, None)

    def _lose(self, lease: Lease) -> None:
        lease.lost.set()
        self._held.pop(lease.token, None)

    def _lost_error(self, lease: Lease) -> LeaseLostError:
        return LeaseLostError(
            f"slide {lease.item.slide_id} must be held by the worker that settles it, got a lease "
            f"that has ended, or was taken over after {self.terms.ttl_s:g} s of silence; go on "
            "with the next slide"
        )
