"""User tables as text: opened through .gz or .zip, sniffed, and with errors that name the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from modaltune.errors import CohortError, InputError

#: Told by readers what they left out or changed: the reason, and the cases or genes concerned.
OnDrop = Callable[[str, Sequence[str]], None]

# What a damaged, truncated or foreign file makes the parsers raise.
_DAMAGE = (
    EOFError,
    OSError,
    UnicodeError,
    csv.Error,
    json.JSONDecodeError,
    pd.errors.EmptyDataError,
    pd.errors.ParserError,
    zipfile.BadZipFile,
    zlib.error,
)
# Bare NaN and None come from JSON and pandas, the words from spreadsheets, '-- from GDC.
_MISSING_WORDS = frozenset({"", "nan", "na", "n/a", "none", "<na>", "null", "'--", "--"})
_SHOWN = 5


def is_missing(value: object) -> bool:
    """Tell whether a cell says that nothing is known: None, NaN, empty, `NA`, `'--`."""
    if value is None or value is pd.NA or value is pd.NaT:
        return True
    if isinstance(value, str):
        return value.strip().lower() in _MISSING_WORDS
    return isinstance(value, (float, np.floating)) and math.isnan(value)


def name_few(names: Collection[object], shown: int = _SHOWN) -> str:
    """List the first names of a collection for a message, and say how many more there are."""
    first = ", ".join(str(name) for name in list(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


@contextmanager
def naming_damage(path: Path, kind: str) -> Iterator[None]:
    """Turn what parsers raise on damaged files into an error that names the file.

    Args:
        path: The file being read.
        kind: What the file must be, for the message: "a readable CSV table".

    Raises:
        CohortError: The file is missing, truncated, damaged or of another kind.
    """
    try:
        yield
    except FileNotFoundError:
        raise CohortError(
            f"{path} must be {kind}, got no such file; check the path, and that the file is there"
        ) from None
    except _DAMAGE as error:
        # The wording of the parser, shortened: pandas quotes whole lines.
        detail = re.sub(r"\s+", " ", str(error))[:200] or type(error).__name__
        raise CohortError(
            f"{path} must be {kind}, got an unreadable file ({detail}); "
            "check that it was downloaded whole and is of this format"
        ) from error


@contextmanager
def open_text(path: Path, kind: str) -> Iterator[TextIO]:
    """Open a text file for reading, looking inside .gz and single-member .zip files.

    Args:
        path: The file; UTF-8 with or without a byte order mark.
        kind: What the file must be, for messages: "a readable CSV table".

    Yields:
        The text handle at its beginning. Errors raised while it is read name the file, too.

    Raises:
        CohortError: The file is missing, empty, truncated, damaged, or a .zip of several files.
    """
    with naming_damage(path, kind):
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as text:
                yield text
        elif path.suffix.lower() == ".zip":
            with (
                zipfile.ZipFile(path) as archive,
                archive.open(_only_member(archive, path)) as raw,
                io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text,
            ):
                yield text
        else:
            with path.open("r", encoding="utf-8-sig", newline="") as text:
                yield text


def _only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """Return the single file of an archive."""
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        found = name_few([member.filename for member in members]) or "none"
        raise CohortError(
            f"{path} must hold exactly one file, got {len(members)} ({found}); "
            "unpack it and give the table itself"
        )
    return members[0]


def read_header(text: TextIO, path: Path) -> tuple[list[str], str]:
    """Read the first line of a table and find out what separates its columns.

    Args:
        text: A handle at its beginning; afterwards it stands at the second line.
        path: The file, for messages.

    Returns:
        The column names, stripped, and the delimiter: a tab or a comma, whichever is more frequent.

    Raises:
        CohortError: The file is empty.
    """
    line = text.readline()
    if not line.strip():
        raise CohortError(
            f"{path} must begin with a line of column names, got "
            f"{'an empty line' if line else 'an empty file'}; write the header first"
        )
    delimiter = "\t" if line.count("\t") > line.count(",") else ","
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))], delimiter


def repeated(names: Collection[str]) -> list[str]:
    """Return the names that occur more than once, in order of their second occurrence."""
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for name in names:
        if name in seen:
            twice[name] = None
        seen.add(name)
    return list(twice)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an unknown option.

    Raises:
        InputError: `value` is none of `allowed`; the message names the option.
    """
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; pick one")
