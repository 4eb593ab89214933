"""Which slides to run: a list of files or a manifest, checked whole before the first is opened."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modaltune.engine.errors import InputError
from modaltune.engine.readers import MAX_MPP, MIN_MPP

COLUMNS = ("slide", "case_id", "mpp")


@dataclass(frozen=True)
class SlideItem:
    """One slide to embed.

    Attributes:
        path: The slide file.
        slide_id: Name of its outputs, the file's stem; unique within a run.
        case_id: The patient; the slide's own id unless a manifest says otherwise.
        base_mpp: Microns per level-0 px from the manifest or an option; None to read metadata.
    """

    path: Path
    slide_id: str
    case_id: str
    base_mpp: float | None = None


def items_from_paths(paths: Sequence[Path], base_mpp: float | None = None) -> list[SlideItem]:
    """Return one item per slide file; each slide is a case of its own.

    Raises:
        InputError: No file is given, one is missing, two share a name, a name is no text, or the
            mpp is absurd.
    """
    _check_mpp("--base-mpp", base_mpp)
    if not paths:
        raise InputError("slides must be given, got none; name slide files, or use --manifest")
    odd = [repr(str(path)) for path in paths if not _is_text(str(path))]
    if odd:
        raise InputError(
            _many(
                "slides of the command line must have names in UTF-8; rename those of others", odd
            )
        )
    items = [SlideItem(path, path.stem, path.stem, base_mpp) for path in paths]
    _refuse_repeats(items, "the command line")
    _refuse_missing(items, "the command line")
    return items


def read_manifest(
    path: str | Path, *, root: str | Path | None = None, base_mpp: float | None = None
) -> list[SlideItem]:
    """Read a manifest: CSV with columns `slide` and, if wanted, `case_id` and `mpp`.

    Args:
        path: The manifest.
        root: Folder that every slide must lie in, links followed; relative paths start there. The
            manifest's own folder unless given.
        base_mpp: mpp of slides whose `mpp` cell is empty.

    Returns:
        The slides in the manifest's order.

    Raises:
        InputError: The manifest is unreadable, or a row breaks a rule; all such rows are named.

    Source: REQUIREMENTS 1 and 27.
    """
    _check_mpp("--base-mpp", base_mpp)
    path = Path(path)
    folder = Path(root) if root is not None else path.parent
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"manifest {path} must be a readable CSV file, got: {error}") from error
    if "slide" not in header:
        raise InputError(
            f"manifest {path} must have a column 'slide' (and may have case_id, mpp), got columns "
            f"{', '.join(header) or 'none'}"
        )
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise InputError(
            f"manifest {path} must have no columns but {', '.join(COLUMNS)}, got "
            f"{', '.join(unknown)}; remove or rename them"
        )
    items, problems = [], []
    for line, row in rows:
        try:
            items.append(_item(row, folder, base_mpp))
        except InputError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise InputError(_many(f"manifest {path} must hold valid rows", problems))
    if not items:
        raise InputError(f"manifest {path} must list at least one slide, got none")
    _refuse_repeats(items, f"manifest {path}")
    _refuse_missing(items, f"manifest {path}")
    return items


def _item(row: dict[str | None, Any], folder: Path, base_mpp: float | None) -> SlideItem:
    if None in row:  # where a DictReader puts what has no column
        raise InputError(
            f"row must have no more cells than columns, got {', '.join(row[None])} beyond; quote "
            "names with commas"
        )
    name = (row.get("slide") or "").strip()
    if not name or "\0" in name:
        raise InputError(f"slide must be a file name, got {name!r}")
    slide = Path(name)
    full = slide if slide.is_absolute() else folder / slide
    # Resolved against links and `..`: the file itself must lie below the root.
    if ".." in slide.parts or not full.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"slide must lie below {folder}, got {name}; move it there, or name its folder with "
            "--root"
        )
    case = (row.get("case_id") or "").strip() or full.stem
    text = (row.get("mpp") or "").strip()
    if not text:
        return SlideItem(full, full.stem, case, base_mpp)
    try:
        mpp = float(text)
    except ValueError as error:
        raise InputError(f"mpp of {name} must be a number, got {text!r}") from error
    _check_mpp(f"mpp of {name}", mpp)
    return SlideItem(full, full.stem, case, mpp)


def _is_text(name: str) -> bool:
    """Whether a name can be written down; bytes that are not UTF-8 can't."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_mpp(what: str, mpp: float | None) -> None:
    """Refuse a base resolution that no slide has; None is not given."""
    if mpp is not None and not MIN_MPP <= mpp <= MAX_MPP:
        raise InputError(
            f"{what} must lie in {MIN_MPP}..{MAX_MPP:g} microns per level-0 pixel, got {mpp}; a "
            "40x scan has about 0.25, a 20x scan 0.5"
        )


def _refuse_repeats(items: Iterable[SlideItem], where: str) -> None:
    seen: dict[str, Path] = {}
    problems = []
    for item in items:
        if item.slide_id in seen:
            problems.append(f"{item.slide_id} ({seen[item.slide_id]} and {item.path})")
        seen.setdefault(item.slide_id, item.path)
    if problems:
        raise InputError(
            _many(f"slides of {where} must have distinct names, since outputs carry them", problems)
        )


def _refuse_missing(items: Iterable[SlideItem], where: str) -> None:
    missing = [str(item.path) for item in items if not item.path.is_file()]
    if missing:
        raise InputError(_many(f"slides of {where} must be existing files; missing", missing))


def _many(rule: str, problems: Sequence[str], most: int = 10) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return f"{rule}, got {len(problems)}: " + "; ".join(problems[:most]) + more
