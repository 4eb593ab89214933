"""Freed memory on the CPU: kept for the next call instead of being given back and faulted in again.

Operators that work in blocks free and allocate megabytes many times a second. glibc gives memory
back to the system as soon as a little more than a block is free, and every page of the next block
then costs a fault: 1.4 us for 4 KiB, which was a fifth of a feed-forward branch of 1,000 rows.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from functools import cache

from modaltune.kernels import _checks  # noqa: F401  (the import guard)

logger = logging.getLogger(__name__)

VARIABLE = "MODALTUNE_KEEP_FREED_MIB"
DEFAULT_MIB = 256
# mallopt's names in malloc.h, and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 32 * 2**20
# Whoever sets these has chosen already.
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> int:
    """Let this process keep some freed memory; return the MiB, 0 where nothing was changed.

    Runs once, at the first product of the CPU paths. `MODALTUNE_KEEP_FREED_MIB` (256) says how
    much, 0 leaves the allocator alone; so do glibc's own variables, and other C libraries.

    Raises:
        ValueError: `MODALTUNE_KEEP_FREED_MIB` is no whole number.
    """
    text = os.environ.get(VARIABLE, str(DEFAULT_MIB))
    if not text.isdecimal():
        raise ValueError(f"{VARIABLE} must be a whole number of MiB (0 for none), got {text!r}")
    kept = int(text)
    is_chosen = any(name in os.environ for name in _CHOSEN)
    if kept == 0 or is_chosen or platform.libc_ver()[0] != "glibc":
        return 0
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_MMAP_THRESHOLD, _LARGEST) and libc.mallopt(
        _TRIM_THRESHOLD, min(kept * 2**20, 2**31 - 1)
    )
    if not done:
        return 0
    logger.debug("up to %d MiB of freed memory are kept for the next call", kept)
    return kept
