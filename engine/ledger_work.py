"""How a stream of slides works by the ledger: what is next, and what an exception means.

A stream needs two things: `Claims` to take slides from, and `settles` around what is done with each
that comes out. `Ledger.rows` is then what became of all of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from modaltune.engine.decode_jobs import SlideRequest
from modaltune.engine.errors import DiskFullError, InputError, LeaseLostError, LedgerError
from modaltune.engine.ledger import Lease, Ledger
from modaltune.engine.ledger_report import SlideRow

logger = logging.getLogger(__name__)

_POLL_S = 0.25


class Claims:
    """Slides that the ledger gives this process: a stream's source.

    It ends when none of the run's slides waits or is in work anywhere: those that other processes
    hold are waited for, since one of them may fail, or die, and its slide is then done here.

    Attributes:
        held: Leases by slide, until the stream's caller settles them.
        since: When each was claimed.
    """

    def __init__(self, ledger: Ledger, overlays: Path | None, *, poll_s: float = _POLL_S) -> None:
        self.held: dict[str, Lease] = {}
        self.since: dict[str, float] = {}
        self._ledger, self._overlays = ledger, overlays
        self._looked, self._poll_s = float("-inf"), poll_s

    def take(self) -> SlideRequest | None:
        """Claim a slide; after none was left, look again only after a while."""
        if time.monotonic() - self._looked < self._poll_s:
            return None
        lease = self._ledger.claim()
        if lease is None:
            self._looked = time.monotonic()
            return None
        item = lease.item
        self.held[item.slide_id], self.since[item.slide_id] = lease, time.monotonic()
        overlay = self._overlays and self._overlays / f"{item.slide_id}.png"
        return SlideRequest(item.slide_id, item.path, base_mpp=item.base_mpp, overlay=overlay)

    def is_ended(self) -> bool:
        """Whether no slide of the run waits or is in work, here or elsewhere."""
        if self._ledger.has_leases:
            return False
        return not self._ledger.unsettled()


@contextlib.contextmanager
def settles(
    ledger: Ledger, lease: Lease, on_failed: Callable[[SlideRow], None] | None = None
) -> Iterator[None]:
    """Turn what the work on one slide raises into that slide's fate.

    A fault of the slide (`InputError`) is an attempt that failed, and the run goes on. A full disk
    or a broken ledger is nobody's fault: the slide is given back and the run ends. So does an
    interrupt. Any other exception is a fault of ours: it counts as an attempt, so that the slide
    can't stop every later run too, and goes up.

    Args:
        ledger: The open ledger.
        lease: The slide; settle it with `commit_done` inside the block.
        on_failed: Called with the row of a failed slide.
    """
    try:
        yield
    except LeaseLostError as error:
        logger.warning("%s", error)
    except (DiskFullError, LedgerError):
        with contextlib.suppress(LeaseLostError, LedgerError, DiskFullError):
            ledger.release(lease)
        raise
    except InputError as error:
        _failed(ledger, lease, str(error), on_failed)
    except Exception as error:
        _failed(ledger, lease, f"{type(error).__name__}: {error}", on_failed)
        raise
    except BaseException:
        with contextlib.suppress(LeaseLostError):
            ledger.release(lease)
        raise


def _failed(
    ledger: Ledger, lease: Lease, reason: str, on_failed: Callable[[SlideRow], None] | None
) -> None:
    slide_id = lease.item.slide_id
    try:
        row = ledger.commit_failed(lease, reason)
    except LeaseLostError as error:
        logger.warning("%s", error)
        return
    if row.status == "quarantined":
        logger.error(
            "slide %s is quarantined after %d attempts: %s", slide_id, row.attempts, reason
        )
    else:
        logger.warning("slide %s failed and is tried again: %s", slide_id, reason)
    if on_failed is not None:
        on_failed(row)
