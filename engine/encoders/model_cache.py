"""Files that are built once a machine: exported graphs and engines, below the user's cache folder.

A file's name holds a digest of everything that it depends on, so a new version of anything is a new
file. It appears by renaming, whole or not at all; of processes that want the same one, the first
builds it and the others wait for its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/modaltune/encoders` (default below `~/.cache`); it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "modaltune" / "encoders"


def digest(facts: Mapping[str, Any]) -> str:
    """Return 16 hex digits that stand for JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cached file; other processes and threads wait.

    Raises:
        OSError: The folder can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def build_once(path: Path, build: Callable[[Path], object]) -> Path:
    """Return `path`, building the file if it is not there.

    Args:
        path: Final name.
        build: Writes the file it is given atomically (`engine.atomic`).

    Raises:
        OSError: The folder can't be written.
    """
    if path.is_file():
        return path
    with locked(path):
        if not path.is_file():
            build(path)
    return path


@contextlib.contextmanager
def writable_cache() -> Iterator[Path]:
    """Yield the cache folder, or a folder that lasts for the block where it can't be written."""
    folder = cache_folder()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(tempfile.TemporaryFile(dir=folder))
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield folder
