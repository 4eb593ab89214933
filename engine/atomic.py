"""Atomic file replacement: under its final name a file is either absent, old, or complete.

The recipe is that of REQUIREMENTS 19: write under a temporary name in the same folder, fsync the
file, rename it over the final name, fsync the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modaltune.engine.errors import DiskFullError

_MARK = ".modaltune-tmp"
# Stem, writing process, and what nobody can guess.
_TEMPORARY = re.compile(rf"\.(.*)\.([0-9a-f]{{8}})[0-9a-f]{{8}}{re.escape(_MARK)}")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Some network and FUSE file systems cannot fsync a folder at all; there the rename is the best
# that can be had, and failing after it would report a file as unwritten that is in place.
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})
_MAX_STEM_CHARS = 40
_MAX_SUFFIX_CHARS = 16


def is_temporary(path: str | Path) -> bool:
    """Tell whether a path is a temporary name of `atomic_path`, such as a killed writer leaves."""
    name = os.path.basename(path)  # not Path: this runs over folders of 100,000 files
    return name.startswith(".") and _MARK in name


def temporary_stem(path: str | Path) -> str | None:
    """Return the stem, cut to 40 characters, that a temporary name was made from, or None.

    `stem_in_temporary` gives what to compare it with.
    """
    found = _TEMPORARY.match(Path(path).name)
    return None if found is None else found[1]


def stem_in_temporary(stem: str) -> str:
    """Return what `temporary_stem` says of a file with this stem while it is written."""
    return stem[:_MAX_STEM_CHARS]


def remove_temporaries(path: str | Path, pid: int) -> None:
    """Remove what a process of this machine, which has ended, left beside a file it was writing."""
    final = Path(path)
    wanted = (stem_in_temporary(final.stem), f"{pid:08x}")
    with contextlib.suppress(FileNotFoundError), os.scandir(final.parent) as entries:
        for entry in entries:
            found = _TEMPORARY.match(entry.name)
            if found is not None and (found[1], found[2]) == wanted:
                Path(entry.path).unlink(missing_ok=True)


@contextlib.contextmanager
def names_full_disk(path: str | Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one error that says what to do.

    Args:
        path: The file that the block writes.

    Raises:
        DiskFullError: The block failed for want of room.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError) as error:
        number = _error_number(error)
        if number not in _FULL:
            raise
        raise DiskFullError(
            f"{path} must fit on its disk, got {os.strerror(number).lower()!r}; free space, or "
            "raise the quota or the limit of a file's size (ulimit -f), then run the same command: "
            "finished work is kept"
        ) from error


def _error_number(error: BaseException) -> int | None:
    """Find the system's error number; HDF5 has it in its text only."""
    number = getattr(error, "errno", None)
    if number is None and (said := re.search(r"\berrno = (\d+)", str(error))):
        number = int(said[1])
    return number


def reserve(path: Path, size: int) -> None:
    """Find out that a disk is full before a library is half through with a file.

    Creates `path` with room for `size` bytes. File systems that can't tell are believed.

    Raises:
        OSError: There is no room.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in _FULL:
            raise
    finally:
        os.close(handle)


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
        DiskFullError: There is no room for the file.
        OSError: The file or its folder could not be written.

    Example:
        >>> with atomic_path("report.html") as temp:
        ...     temp.write_text("<html></html>")
    """
    final = Path(path)
    with names_full_disk(final):
        _make_folder(final.parent)
        temp = final.with_name(_temporary_name(final))
        try:
            yield temp
            if not temp.exists():
                raise FileNotFoundError(
                    f"the block of atomic_path must write the path it was given, got no file at "
                    f"{temp}"
                )
            _fsync(temp)
            os.replace(temp, final)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        fsync_folder(final.parent)


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


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder to fill, and put it in place of `path` when all is well.

    The temporary folder lies beside `path`. When the block raises, it is removed and `path` is left
    as it was. An old folder is moved aside before the new one takes its name: a killed process may
    leave it under its temporary name, but never a mixture of both.

    Args:
        path: Final name of the folder.
        replace: Whether an existing folder may be replaced.

    Yields:
        The temporary folder.

    Raises:
        FileExistsError: `path` exists, and `replace` is off or it is no folder.
        DiskFullError: There is no room for the files.
    """
    final = Path(path)
    if final.exists() and not (replace and final.is_dir()):
        raise FileExistsError(str(final))
    with names_full_disk(final):
        _make_folder(final.absolute().parent)
        temp = final.with_name(_temporary_name(final))
        temp.mkdir()
        try:
            yield temp
            for folder, _, files in os.walk(temp):
                for name in files:
                    _fsync(Path(folder, name))
                fsync_folder(Path(folder))
            _exchange(temp, final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        fsync_folder(final.absolute().parent)


def _exchange(temp: Path, final: Path) -> None:
    """Give a filled folder its final name; what had it is moved aside, then removed."""
    if not final.exists():
        os.rename(temp, final)
        return
    old = final.with_name(_temporary_name(final))
    os.rename(final, old)
    try:
        os.rename(temp, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old)


def _temporary_name(final: Path) -> str:
    """Make a hidden, unguessable name of bounded length that ends in the final suffix."""
    suffix = final.suffix if len(final.suffix) <= _MAX_SUFFIX_CHARS else ""
    token = f"{os.getpid():08x}{secrets.token_hex(4)}"
    return f".{final.stem[:_MAX_STEM_CHARS]}.{token}{_MARK}{suffix}"


def _make_folder(folder: Path) -> None:
    """Create a folder with its parents, and make the new folders' names durable."""
    new = [level for level in (folder, *folder.parents) if not level.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for level in new:
        fsync_folder(level.parent)


def _fsync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
