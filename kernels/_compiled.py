"""Loops compiled by numba: without Python's lock, cached on disk."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba

_REORDERED = {"contract", "reassoc", "nsz"}
_IN_ORDER = {"contract", "nsz"}


def compiled(
    *, reordered: bool, sources: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles a function at its first call.

    The cache is left out where no place for it can be written: a read-only install of a user
    without a cache folder.

    Args:
        reordered: Whether sums may be taken in another order than written, which sums over the
            innermost loop need to be fast. The order is always the same one either way.
        sources: Other files whose code is compiled into the function: a change of theirs makes the
            cache stale.
    """
    flags = _REORDERED if reordered else _IN_ORDER

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        keyed = _keyed_by(function, sources) if sources else function
        try:
            return numba.njit(cache=True, nogil=True, fastmath=flags)(keyed)
        except RuntimeError:  # no place for the cache
            return numba.njit(nogil=True, fastmath=flags)(keyed)

    return decorate


def _keyed_by(function: Callable[..., Any], sources: Sequence[str]) -> Callable[..., Any]:
    """Return the function with the hash of some files in a closure, which it does not use.

    numba compares its cache with the date of the function's own file, and with its closure.
    """
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise TypeError(f"function must be a plain one without a closure, got {function!r}")
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()
    code = function.__code__.replace(co_freevars=("sources",))
    keyed = types.FunctionType(
        code, function.__globals__, function.__name__, None, (types.CellType(digest),)
    )
    keyed.__doc__, keyed.__module__ = function.__doc__, function.__module__
    keyed.__qualname__ = function.__qualname__
    return keyed
