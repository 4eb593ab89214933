"""Opening a ledger for a run: recipe and slides in, dead workers' slides freed, the disk read."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modaltune.engine.ledger_leases import LeaseTerms, take_over
from modaltune.engine.ledger_manifest import (
    RecipeSet,
    SlideState,
    register,
    settle_recipe,
    states,
)
from modaltune.engine.ledger_reconcile import Reconciled, compare, record, remove_temporaries
from modaltune.engine.ledger_schema import LEDGER_NAME, connect, names_errors, transaction

if TYPE_CHECKING:
    from modaltune.engine.cohort import SlideItem


class Opened(NamedTuple):
    """A ledger in agreement with a run's slides and with the disk.

    Attributes:
        db: The connection; its table `temp.wanted` holds the rows of the run's slides.
        group: The run's set.
        reconciled: What the disk changed.
    """

    db: sqlite3.Connection
    group: RecipeSet
    reconciled: Reconciled


def file_size(item: SlideItem) -> float:
    """Weigh a slide by the bytes of its file; 0 if there is none."""
    try:
        return float(item.path.stat().st_size)
    except OSError:
        return 0.0


def open_group(
    out: Path,
    recipe: Mapping[str, Any],
    items: Sequence[SlideItem],
    features: str,
    *,
    new_recipe: bool,
    terms: LeaseTerms,
    weigh: Callable[[SlideItem], float],
    scratch: Sequence[str],
    busy_s: float,
) -> Opened:
    """Do what `modaltune.engine.ledger.Ledger.open` says; arguments and errors are its own."""
    db = connect(out, busy_s=busy_s)
    try:
        with names_errors(out / LEDGER_NAME):
            now = time.time()
            with transaction(db, durable=True):
                group = settle_recipe(db, features, recipe, new_recipe=new_recipe, now=now)
                take_over(db, group.row, now, terms.max_deaths)
                known = states(db, group.row)
                if register(db, group, items, known, weigh, new_recipe=new_recipe, now=now):
                    known = states(db, group.row)
            own = {item.slide_id: known[item.slide_id] for item in items}
            reconciled = _reconcile(db, group, own, out / features, new_recipe=new_recipe, now=now)
            remove_temporaries(db, [out / name for name in scratch], reconciled)
            db.execute("CREATE TEMP TABLE wanted (id INTEGER PRIMARY KEY)")
            db.execute("BEGIN")
            db.executemany(
                "INSERT INTO temp.wanted VALUES (?)", [(state.row,) for state in own.values()]
            )
            db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return Opened(db, group, reconciled)


def _reconcile(
    db: sqlite3.Connection,
    group: RecipeSet,
    own: Mapping[str, SlideState],
    folder: Path,
    *,
    new_recipe: bool,
    now: float,
) -> Reconciled:
    """Bring the ledger to what is on disk."""
    reconciled, verdicts = compare(group, folder, own, new_recipe=new_recipe)
    if verdicts or reconciled.missing:
        with transaction(db, durable=True):
            record(db, group, own, reconciled, verdicts, now)
    return reconciled
