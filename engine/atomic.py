"""Atomic file replacement: under its final name a file is either absent, old, or complete.

The recipe is that of REQUIREMENTS 19: write under a temporary name in the same folder, fsync the
file, rename it over the final name, fsync the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK = ".modaltune-tmp"
# Some network and FUSE file systems cannot fsync a folder at all; there the rename is the best
# that can be had, and failing after it would report a file as unwritten that is in place.
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})
_MAX_STEM_CHARS = 40
_MAX_SUFFIX_CHARS = 16


def is_temporary(path: str | Path) -> bool:
    """Tell whether a path is a temporary name of `atomic_path`, such as a killed writer leaves."""
    name = Path(path).name
    return name.startswith(".") and _MARK in name


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, and put it in place of `path` when the block ends well.

    The temporary file lies in the folder of `path` (created if need be), has a hidden name that
    `is_temporary` knows, and keeps the suffix, since many writers choose their format by it. It is
    not created here: the block has to write it. When the block raises, the temporary file is
    removed and `path` is left as it was.

    Args:
        path: Final name of the file; an existing file is replaced.

    Yields:
        The temporary path, unused so far.

    Raises:
        FileNotFoundError: The block ended without writing the temporary file.
        OSError: The file or its folder could not be written.

    Example:
        >>> with atomic_path("report.html") as temp:
        ...     temp.write_text("<html></html>")
    """
    final = Path(path)
    _make_folder(final.parent)
    temp = final.with_name(_temporary_name(final))
    try:
        yield temp
        if not temp.exists():
            raise FileNotFoundError(
                f"the block of atomic_path must write the path it was given, got no file at {temp}"
            )
        _fsync(temp)
        os.replace(temp, final)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    _fsync_folder(final.parent)


def write_json_atomic(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write an object as strict JSON (UTF-8, sorted keys), atomically.

    Args:
        path: Final name of the file.
        obj: What `json.dumps` takes. NaN and infinities are refused, since they are not JSON.
        indent: Spaces per level; None for one line.

    Raises:
        TypeError: `obj` holds something that JSON has no form for.
        ValueError: `obj` holds NaN or an infinity.
    """
    text = json.dumps(obj, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temp:
        temp.write_text(text + "\n", encoding="utf-8")


def _temporary_name(final: Path) -> str:
    """Make a hidden, unguessable name of bounded length that ends in the final suffix."""
    suffix = final.suffix if len(final.suffix) <= _MAX_SUFFIX_CHARS else ""
    return f".{final.stem[:_MAX_STEM_CHARS]}.{secrets.token_hex(8)}{_MARK}{suffix}"


def _make_folder(folder: Path) -> None:
    """Create a folder with its parents, and make the new folders' names durable."""
    new = [level for level in (folder, *folder.parents) if not level.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for level in new:
        _fsync_folder(level.parent)


def _fsync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
