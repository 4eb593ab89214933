"""Loops compiled by numba: without Python's lock, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_REORDERED = {"contract", "reassoc", "nsz"}
_IN_ORDER = {"contract", "nsz"}


def compiled(*, reordered: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles a function at its first call.

    The cache is left out where no place for it can be written: a read-only install of a user
    without a cache folder.

    Args:
        reordered: Whether sums may be taken in another order than written, which sums over the
            innermost loop need to be fast. The order is always the same one either way.
    """
    flags = _REORDERED if reordered else _IN_ORDER

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(cache=True, nogil=True, fastmath=flags)(function)
        except RuntimeError:  # no place for the cache
            return numba.njit(nogil=True, fastmath=flags)(function)

    return decorate
