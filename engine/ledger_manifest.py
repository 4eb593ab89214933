"""What a run is about, written into the ledger: its recipe and its slides."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from modaltune.engine.errors import LedgerError, RecipeChangedError
from modaltune.engine.recipes import differences, plain_json, recipe_sha256

if TYPE_CHECKING:
    from modaltune.engine.cohort import SlideItem

logger = logging.getLogger(__name__)

FINISHED = "('done', 'empty')"
# What a slide's row says of its attempts before the first one; its file is told apart elsewhere.
FRESH = (
    "status = 'pending', attempts = 0, failures = 0, reason = '', reader = '', tiles = 0, "
    "timings = '{}', payload_sha256 = '', finished_at = NULL"
)
_INSERT = (
    "INSERT INTO slides (set_id, slide_id, case_id, path, base_mpp, features, queue_rank, "
    "updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)


class SlideState(NamedTuple):
    """What the ledger says of one slide, as far as manifest and disk are compared with it."""

    row: int
    slide_id: str
    case_id: str
    path: str
    base_mpp: float | None
    status: str
    attempts: int
    file_size: int | None
    file_mtime_ns: int | None
    judged: str | None
    queue_rank: float


class RecipeSet(NamedTuple):
    """One encoder's folder of features in the ledger.

    Attributes:
        row: Its row.
        folder: Name of the folder, below the output folder.
        recipe: What its features are made by.
        sha256: Hash of the recipe.
    """

    row: int
    folder: str
    recipe: dict[str, Any]
    sha256: str


def states(db: sqlite3.Connection, set_id: int) -> dict[str, SlideState]:
    """Return all slides of a set by id."""
    rows = db.execute(
        "SELECT id, slide_id, case_id, path, base_mpp, status, attempts, file_size, "
        "file_mtime_ns, judged, queue_rank FROM slides WHERE set_id = ?",
        (set_id,),
    )
    return {row[1]: SlideState._make(row) for row in rows}


def settle_recipe(
    db: sqlite3.Connection,
    folder: str,
    recipe: Mapping[str, Any],
    *,
    new_recipe: bool,
    now: float,
) -> RecipeSet:
    """Find or make the set of a features folder; inside a transaction.

    Where nothing is finished under another recipe, nothing is lost and the new one is taken.

    Raises:
        RecipeChangedError: Finished slides were made by another recipe, and `new_recipe` is False.
        LedgerError: Other processes are at work by another recipe.
    """
    asked, sha = plain_json(recipe, "recipe"), recipe_sha256(recipe)
    text = json.dumps(asked, sort_keys=True)
    row = db.execute(
        "SELECT id, recipe, recipe_sha256 FROM sets WHERE folder = ?", (folder,)
    ).fetchone()
    if row is None:
        cursor = db.execute(
            "INSERT INTO sets (folder, recipe, recipe_sha256) VALUES (?, ?, ?)", (folder, text, sha)
        )
        return RecipeSet(int(cursor.lastrowid or 0), folder, asked, sha)
    set_id, stored = int(row[0]), json.loads(row[1])
    changed = differences(asked, stored, asked.keys() | stored.keys()) if row[2] != sha else {}
    if changed:
        _replace_recipe(db, set_id, folder, changed, (text, sha), new_recipe=new_recipe, now=now)
        return RecipeSet(set_id, folder, asked, sha)
    # Recipes that differ in nothing but the noise of arithmetic are the stored one.
    return RecipeSet(set_id, folder, stored, row[2])


def _replace_recipe(
    db: sqlite3.Connection,
    set_id: int,
    folder: str,
    changed: dict[str, tuple[Any, Any]],
    new: tuple[str, str],
    *,
    new_recipe: bool,
    now: float,
) -> None:
    """Put a new recipe in place of the old one and let all slides wait for it."""
    (finished,) = db.execute(
        f"SELECT COUNT(*) FROM slides WHERE set_id = ? AND status IN {FINISHED}", (set_id,)
    ).fetchone()
    (running,) = db.execute(
        "SELECT COUNT(*) FROM slides WHERE set_id = ? AND status = 'running'", (set_id,)
    ).fetchone()
    said = describe({key: (stored, asked) for key, (asked, stored) in changed.items()})
    if finished and not new_recipe:
        raise RecipeChangedError(
            f"the recipe of {folder} must be the one its {finished} finished slides were made by, "
            f"got {said}; choose another --out, ask for the stored settings, or make them again "
            "with --new-recipe (each old file stays until its new one is whole)",
            {key: (stored, asked) for key, (asked, stored) in changed.items()},
        )
    if running:
        raise LedgerError(
            f"the recipe of {folder} must stay as it is while other processes work by it, got "
            f"{running} slides in work and {said}; end those processes first, or choose another "
            "--out"
        )
    logger.warning("%s is made by another recipe from now on: %s", folder, said)
    db.execute("UPDATE sets SET recipe = ?, recipe_sha256 = ? WHERE id = ?", (*new, set_id))
    # Files of finished slides are known to be of the old recipe; any other is looked at again.
    db.execute(
        f"UPDATE slides SET judged = CASE WHEN status IN {FINISHED} THEN ? END, {FRESH}, "
        "updated_at = ? WHERE set_id = ?",
        (new[1], now, set_id),
    )


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Say in which settings two recipes differ, given setting to (stored, asked)."""
    return "; ".join(
        f"{key}: stored {stored}, asked {asked}" for key, (stored, asked) in changed.items()
    )


def register(
    db: sqlite3.Connection,
    group: RecipeSet,
    items: Sequence[SlideItem],
    known: Mapping[str, SlideState],
    weigh: Callable[[SlideItem], float],
    *,
    new_recipe: bool,
    now: float,
) -> bool:
    """Write a run's slides into the ledger; inside a transaction.

    Args:
        db: The ledger.
        group: Their set.
        items: The slides.
        known: What the ledger says of the set's slides.
        weigh: How heavy a slide is; asked of those that are new or lie elsewhere now.
        new_recipe: Whether a finished slide whose base mpp or file changed may be made again.
        now: The time, seconds.

    Returns:
        Whether anything was written.

    Raises:
        RecipeChangedError: The base mpp of finished slides changed, or they are other files of the
            same name, and `new_recipe` is False.
    """
    new = [item for item in items if item.slide_id not in known]
    db.executemany(
        _INSERT,
        (
            (group.row, item.slide_id, item.case_id, str(item.path), item.base_mpp,
             f"{group.folder}/{item.slide_id}.h5", -weigh(item), now)
            for item in new
        ),
    )  # fmt: skip
    moved, scaled, replaced = [], [], []
    for item in items:
        state = known.get(item.slide_id)
        if state is None:
            continue
        if item.base_mpp != state.base_mpp:
            scaled.append((item, state))
        path = str(item.path)
        # A slide that only moved is as heavy as before.
        if path != state.path and (rank := -weigh(item)) != state.queue_rank:
            replaced.append((item, state, rank))
        if (item.case_id, path) != (state.case_id, state.path):
            moved.append((item.case_id, path, state.row))
    _replace(db, group, replaced, new_recipe=new_recipe, now=now)
    db.executemany("UPDATE slides SET case_id = ?, path = ? WHERE id = ?", moved)
    _rescale(db, group, scaled, new_recipe=new_recipe, now=now)
    return bool(new or moved or scaled)


def _replace(
    db: sqlite3.Connection,
    group: RecipeSet,
    replaced: Sequence[tuple[SlideItem, SlideState, float]],
    *,
    new_recipe: bool,
    now: float,
) -> None:
    """Take another file for a slide's name; features of the old one are never taken for its own."""
    changed = {
        f"file of {item.slide_id}": (state.path, str(item.path))
        for item, state, _ in replaced
        if state.status == "running" or (state.status in ("done", "empty") and not new_recipe)
    }
    if changed:
        raise RecipeChangedError(
            f"slides of {group.folder} must be the files their features are made from, got files "
            f"of another size: {_few(changed)}; choose another --out, give them distinct names, or "
            "make them again with --new-recipe when no process is at work on them",
            changed,
        )
    # The old feature file stays known as judged, so that it is not adopted.
    db.executemany(
        f"UPDATE slides SET queue_rank = ?, {FRESH}, updated_at = ? WHERE id = ?",
        [(rank, now, state.row) for _, state, rank in replaced],
    )


def _few(changed: Mapping[str, tuple[Any, Any]], most: int = 5) -> str:
    more = f"; and {len(changed) - most} more" if len(changed) > most else ""
    return describe(dict(list(changed.items())[:most])) + more


def _rescale(
    db: sqlite3.Connection,
    group: RecipeSet,
    scaled: Sequence[tuple[SlideItem, SlideState]],
    *,
    new_recipe: bool,
    now: float,
) -> None:
    """Take a changed base mpp; a slide that failed for want of it gets its attempts back."""
    changed = {
        f"base_mpp_given of {item.slide_id}": (
            "(not set)" if state.base_mpp is None else state.base_mpp,
            "(not set)" if item.base_mpp is None else item.base_mpp,
        )
        for item, state in scaled
        if state.status in ("done", "empty")
    }
    if changed and not new_recipe:
        raise RecipeChangedError(
            f"slides of {group.folder} must keep the base mpp their finished features were made "
            f"by, got {_few(changed)}; take back --base-mpp or the manifest's mpp, or make "
            "them again with --new-recipe",
            changed,
        )
    db.executemany(
        f"UPDATE slides SET base_mpp = ?, judged = NULL, {FRESH}, updated_at = ? "
        "WHERE id = ? AND status != 'running'",
        [(item.base_mpp, now, state.row) for item, state in scaled],
    )
