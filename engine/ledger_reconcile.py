"""The ledger against the disk: what is there counts, whoever wrote it and whatever was killed.

One pass over the folder of features compares names, sizes and times with what was recorded. Only a
file that this does not explain is opened, and each such file once.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modaltune.engine.atomic import is_temporary, stem_in_temporary, temporary_stem
from modaltune.engine.errors import RecipeChangedError
from modaltune.engine.ledger_manifest import (
    FRESH,
    RecipeSet,
    SlideState,
    describe,
)
from modaltune.engine.recipes import differences, slide_recipe

if TYPE_CHECKING:
    from modaltune.engine.own_features import FileFacts

logger = logging.getLogger(__name__)

SUFFIX = ".h5"
_ENOUGH = 20  # files of another recipe that are opened before a run is refused


@dataclass
class Reconciled:
    """What a comparison with the disk changed, by slide id.

    Attributes:
        adopted: Whole files that the ledger did not know as finished.
        missing: Finished slides whose files are gone.
        damaged: Slides whose files are damaged, with the reason.
        replaced: Slides whose files were made by other settings and will be made again.
        opened: Number of files opened.
        temporary: Temporary files seen, of dead writers or living ones.
        removed: Those of dead writers, which were removed.
    """

    adopted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    opened: int = 0
    temporary: list[Path] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


class _Verdict(NamedTuple):
    """What became of one slide's file; `facts` None where it can't be used."""

    state: SlideState
    stamp: tuple[int, int]
    facts: FileFacts | None


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size in bytes and time of change in ns of a file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def compare(
    group: RecipeSet, folder: Path, known: Mapping[str, SlideState], *, new_recipe: bool
) -> tuple[Reconciled, list[_Verdict]]:
    """Compare what the ledger says with a folder of features; nothing is changed.

    Args:
        group: The recipe that files must be made by.
        folder: The features folder; it need not exist.
        known: The ledger's slides, read before the folder is.
        new_recipe: Whether files made by other settings may be made again.

    Returns:
        What is to change, for people and for `record`.

    Raises:
        RecipeChangedError: Files were made by other settings, and `new_recipe` is False.
    """
    result, verdicts = Reconciled(), []
    found = _stamps(folder, result.temporary)
    different: dict[str, tuple[object, object]] = {}
    for slide_id, state in known.items():
        # Whoever works on a slide settles its file.
        if state.status == "running":
            continue
        stamp = found.get(slide_id + SUFFIX)
        if stamp is None:
            if state.status in ("done", "empty"):
                result.missing.append(slide_id)
            continue
        if (state.file_size, state.file_mtime_ns) == stamp and state.judged == group.sha256:
            continue
        facts = _judge(group, folder / (slide_id + SUFFIX), state, result, different)
        verdicts.append(_Verdict(state, stamp, facts))
        if len(result.replaced) >= _ENOUGH and not new_recipe:
            break
    if result.replaced and not new_recipe:
        few = ", ".join(result.replaced[:5]) + (" ..." if len(result.replaced) > 5 else "")
        count = f"{'at least ' if len(result.replaced) >= _ENOUGH else ''}{len(result.replaced)}"
        raise RecipeChangedError(
            f"feature files in {folder} must be made by this run's settings, got "
            f"{count} by others ({few}): {describe(different)}; choose another --out, ask for the "
            "stored settings, move the files away, or make them again with --new-recipe (each old "
            "file stays until its new one is whole)",
            different,
        )
    return result, verdicts


def record(
    db: sqlite3.Connection,
    group: RecipeSet,
    known: Mapping[str, SlideState],
    result: Reconciled,
    verdicts: Iterable[_Verdict],
    now: float,
) -> None:
    """Write into the ledger what `compare` found; inside a transaction.

    A slide that somebody claimed or finished in between is left alone.
    """
    unmoved = (
        "WHERE id = ? AND status = ? AND attempts = ? AND EXISTS "
        "(SELECT 1 FROM sets WHERE sets.id = set_id AND recipe_sha256 = ?)"
    )

    def guard(state: SlideState) -> tuple[int, str, int, str]:
        return state.row, state.status, state.attempts, group.sha256

    db.executemany(
        f"UPDATE slides SET {FRESH}, file_size = NULL, file_mtime_ns = NULL, updated_at = ? "
        f"{unmoved}",
        [(now, *guard(known[slide_id])) for slide_id in result.missing],
    )
    for state, stamp, facts in verdicts:
        stamped = "file_size = ?, file_mtime_ns = ?, judged = ?, updated_at = ?"
        values = (*stamp, group.sha256, now)
        if facts is None:
            sql = f"UPDATE slides SET {FRESH}, {stamped} {unmoved}"
            if state.status in ("failed", "quarantined"):
                sql = f"UPDATE slides SET {stamped} {unmoved}"
            db.execute(sql, (*values, *guard(state)))
            continue
        db.execute(
            "UPDATE slides SET status = ?, tiles = ?, reason = ?, reader = ?, "
            f"payload_sha256 = ?, {stamped} {unmoved}",
            ("done" if facts.tiles else "empty", *facts, *values, *guard(state)),
        )


def remove_temporaries(db: sqlite3.Connection, scratch: Iterable[Path], result: Reconciled) -> None:
    """Remove what killed writers left: `result.temporary`, and what lies in some more folders.

    Leases are read after the folders: a file of a living writer has had one since before it was.
    """
    for folder in scratch:
        _stamps(folder, result.temporary)
    if not result.temporary:
        return
    in_work = {
        stem_in_temporary(slide_id)
        for (slide_id,) in db.execute("SELECT slide_id FROM slides WHERE status = 'running'")
    }
    for path in result.temporary:
        if temporary_stem(path) not in in_work:
            path.unlink(missing_ok=True)
            result.removed.append(path.name)


def _stamps(folder: Path, temporary: list[Path]) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every feature file in a folder, by name.

    Temporary files are added to a list.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if is_temporary(name):
                    temporary.append(Path(entry.path))
                elif name.endswith(SUFFIX):
                    stat = entry.stat()
                    found[name] = (stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        return {}
    return found


def _judge(
    group: RecipeSet,
    path: Path,
    state: SlideState,
    result: Reconciled,
    different: dict[str, tuple[object, object]],
) -> FileFacts | None:
    """Open a file and return what a row records of it, or None if it is to be made again."""
    from modaltune.engine.own_features import file_facts
    from modaltune.engine.store import is_complete, open_features

    recipe = slide_recipe(group.recipe, state.base_mpp)
    found = is_complete(path, recipe)
    result.opened += 1
    if found in ("done", "empty") and (others := _other_slide(path, Path(state.path))):
        result.replaced.append(state.slide_id)
        different.setdefault(f"slide {state.slide_id}", others)
        return None
    if found in ("done", "empty"):
        if state.status not in ("done", "empty"):
            result.adopted.append(state.slide_id)
        return file_facts(path)
    if found[0] == "damaged":
        logger.warning("%s is damaged (%s); it is made again", path, found[1])
        result.damaged[state.slide_id] = str(found[1])
    elif found[0] == "different":
        result.replaced.append(state.slide_id)
        stored = {} if found[1] == ["format_version"] else open_features(path).recipe
        for name, (asked, had) in differences(recipe, stored, set(found[1])).items():
            different.setdefault(name, (had, asked))
    return None


def _other_slide(features: Path, slide: Path) -> tuple[str, str] | None:
    """Return what a feature file says its slide's size was, and what it is, where they differ."""
    from modaltune.engine.store import open_features

    had = open_features(features).extra.get("slide_bytes")
    try:
        now = slide.stat().st_size
    except OSError:  # whoever reads the slide will say so
        return None
    return None if had is None or had == now else (f"{had} bytes", f"{now} bytes")
