"""How a stream of slides works by the ledger: what is next, and what an exception means.

A stream needs two things: `leases` to take slides until all of the run's are finished by somebody,
and `settles` around the work on each. `Ledger.rows` is then what became of all of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from modaltune.engine.errors import DiskFullError, InputError, LeaseLostError, LedgerError
from modaltune.engine.ledger import Lease, Ledger
from modaltune.engine.ledger_report import SlideRow

logger = logging.getLogger(__name__)

_POLL_S = 0.25


def leases(ledger: Ledger, *, poll_s: float = _POLL_S) -> Iterator[Lease | None]:
    """Yield slides to work on until none of the run's is waiting or in work anywhere.

    Slides that other processes hold are waited for: one of them may fail, or die, and its slide is
    then done here.

    Args:
        ledger: The open ledger.
        poll_s: Seconds between two looks while only others are at work.

    Yields:
        A lease; or None where nothing waits but slides of this very process are in work, which may
        fail and wait again: settle one before asking for more. A stream that does one slide at a
        time never sees None.
    """
    told = False
    while True:
        lease = ledger.claim()
        if lease is not None:
            yield lease
            continue
        if ledger.has_leases:
            yield None
            continue
        others = ledger.unsettled()
        if not others:
            return
        if not told:
            logger.info("waiting for %d slides that other processes work on", len(others))
            told = True
        time.sleep(poll_s)


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
