"""Giving freed memory back to the system, which the C library keeps otherwise."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
    return found


def return_freed_memory() -> bool:
    """Return to the system what was freed on the CPU; False where the C library can't.

    glibc keeps freed blocks of up to 32 MB that lie below one in use. After a backward pass the
    gradients lie above the activations, and all of those would stay. A call takes milliseconds.
    """
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True
