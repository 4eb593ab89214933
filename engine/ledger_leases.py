"""Leases: who works on a slide, whether that process still lives, and the beat that says so."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from modaltune.engine.errors import DiskFullError, InputError, LedgerError

if TYPE_CHECKING:
    from modaltune.engine.cohort import SlideItem
    from modaltune.engine.ledger import Ledger

logger = logging.getLogger(__name__)

_PROC = Path("/proc")


@dataclass(frozen=True)
class LeaseTerms:
    """When leases run out and slides are given up.

    Attributes:
        ttl_s: Seconds without a heartbeat after which a lease may be taken over; clocks of machines
            that share a folder must agree better than that. Of a process of this machine that has
            ended, a lease is taken over at once.
        max_attempts: Failures after which a slide is quarantined.
        max_deaths: Processes that died at a slide after which it is quarantined; more than of the
            former, since a process may be killed for no fault of the slide.

    Raises:
        InputError: A number is too small.
    """

    ttl_s: float = 120.0
    max_attempts: int = 3
    max_deaths: int = 10

    def __post_init__(self) -> None:
        for name, least in (("ttl_s", 0.001), ("max_attempts", 1), ("max_deaths", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Worker:
    """A process, told apart from all others.

    Attributes:
        host: Name of the machine, for people.
        machine: The running system and its space of process ids: where `pid` means something.
        pid: Process id.
        started: Start of the process in clock ticks since boot; None where the system won't say.
    """

    host: str
    machine: str
    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Worker:
        """Return this process."""
        pid = os.getpid()
        known = _process(pid)
        return cls(socket.gethostname(), _machine(), pid, known[1] if known else None)

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False of one on another machine."""
        if self.machine != _machine():
            return False
        if not (_PROC / "self" / "stat").exists():
            return not _answers(self.pid)
        known = _process(self.pid)
        if known is None:
            return True
        state, started = known
        # A killed process stays as a zombie until its parent looks; a reused id started later.
        return state in "ZX" or (self.started is not None and started != self.started)


@functools.cache
def _machine() -> str:
    """Name the running system and the space of process ids in it, as containers differ in it."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{os.uname().sysname}"


def _process(pid: int) -> tuple[str, int] | None:
    """Return state and start time of a process, None if there is none or no way to tell."""
    try:
        # The name in parentheses may hold anything; the state follows the last one.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True, eq=False)
class Lease:
    """The right to make one slide's features, until it is settled or runs out.

    Attributes:
        item: The slide.
        features: Where its features go.
        attempt: 1 for the first claim of this slide; work that a dead process left counts.
        token: What the ledger knows this lease by.
        row: The slide's row in the ledger.
        lost: Set once the heartbeat finds that another worker took the slide over: stop.
    """

    item: SlideItem
    features: Path
    attempt: int
    token: str
    row: int
    ledger: Ledger = field(repr=False)
    lost: threading.Event = field(default_factory=threading.Event, repr=False)

    def heartbeat(self) -> None:
        """Put off this lease's end to a whole time-to-live from now.

        Raises:
            LeaseLostError: Another worker has taken the slide over.
        """
        self.ledger.heartbeat(self)


def new_token() -> str:
    """Return a token that nobody else has."""
    return secrets.token_hex(16)


class Ended(NamedTuple):
    """A lease whose holder is dead or silent.

    Attributes:
        slide: The slide's row.
        slide_id: The slide.
        deaths: How many processes died at the slide, or went silent.
        reason: What happened, in words.
        is_first: Whether it is the oldest of its holder's leases, the one that it died at; a stream
            holds others that it has only begun.
    """

    slide: int
    slide_id: str
    deaths: int
    reason: str
    is_first: bool


def ended_leases(db: sqlite3.Connection, set_id: int, now: float) -> list[Ended]:
    """Return the leases of a set that dead processes hold and those that ran out."""
    ended, holders = [], set()
    for slide, slide_id, deaths, expires_at, *who in db.execute(
        "SELECT l.slide, s.slide_id, s.attempts - s.failures, l.expires_at, l.host, l.machine, "
        "l.pid, l.started FROM leases l JOIN slides s ON s.id = l.slide WHERE s.set_id = ? "
        "ORDER BY l.claimed_at",
        (set_id,),
    ):
        worker = Worker(*who)
        if expires_at < now:
            how = "was silent for too long"
        elif worker.is_gone():
            how = "died"
        else:
            continue
        said = f"process {worker.pid} on {worker.host} {how} at it"
        ended.append(Ended(slide, slide_id, deaths, said, worker not in holders))
        holders.add(worker)
    return ended


def take_over(db: sqlite3.Connection, set_id: int, now: float, max_deaths: int) -> None:
    """End the leases of dead processes and those that ran out; inside a transaction.

    The slide that a process died at, the oldest that it held, waits again after those that killed
    nobody; after `max_deaths` it is quarantined: it kills whoever reads it. The others wait as if
    they had not been claimed.
    """
    for lease in ended_leases(db, set_id, now):
        if not lease.is_first:
            db.execute("DELETE FROM leases WHERE slide = ?", (lease.slide,))
            db.execute(
                "UPDATE slides SET attempts = attempts - 1, updated_at = ?, status = "
                "CASE WHEN failures > 0 THEN 'failed' ELSE 'pending' END WHERE id = ?",
                (now, lease.slide),
            )
            continue
        status = "quarantined" if lease.deaths >= max_deaths else "pending"
        reason = f"{lease.reason} (time {lease.deaths} of {max_deaths})"
        db.execute("DELETE FROM leases WHERE slide = ?", (lease.slide,))
        db.execute(
            "UPDATE slides SET status = ?, reason = ?, updated_at = ? WHERE id = ?",
            (status, reason, now, lease.slide),
        )
        logger.warning("slide %s is taken over: %s", lease.slide_id, reason)


class Heartbeat:
    """A thread that keeps a worker's leases alive for as long as the block runs.

    Args:
        beat: Renews all leases.
        every_s: Seconds between two beats.
    """

    def __init__(self, beat: Callable[[], Any], every_s: float) -> None:
        self._beat, self._every_s = beat, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._beat()
            except (LedgerError, DiskFullError) as error:
                # The next beat may get through; if none does, the leases run out, which is safe.
                logger.warning("the ledger's heartbeat missed a beat: %s", error)
