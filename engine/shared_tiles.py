"""Memory for tiles that several processes see: slabs of decoded pixels, without a name.

The memory is a file that exists in memory only and has no name in any folder, so nothing is left
behind however the processes end: the kernel frees it with the last descriptor and mapping.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import InputError

Rgb = npt.NDArray[np.uint8]

# Linux' madvise: map pages and make them, all at one go; not in Python's mmap yet.
_MADV_POPULATE_WRITE = 23


class SharedTiles:
    """Slabs of tiles in shared memory.

    Attributes:
        array: uint8 [slabs, tiles, tile_px, tile_px, 3], all zero at first; a page of it takes
            memory once it has been written.
        descriptor: File descriptor for a child process, to be passed to it by inheritance.
    """

    def __init__(self, shape: tuple[int, int, int], descriptor: int | None = None) -> None:
        """Make the memory, or map that of another process.

        Args:
            shape: (slabs, tiles per slab, tile_px), each >= 1.
            descriptor: The other process's descriptor as inherited; None makes new memory.

        Raises:
            InputError: The limit of a file's size is below the memory's.
            OSError: The system refuses.
        """
        slabs, tiles, tile_px = shape
        size = slabs * tiles * tile_px * tile_px * 3
        if descriptor is None:
            descriptor = os.memfd_create("modaltune-tiles", os.MFD_CLOEXEC)
            with _allowed(size):
                os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        self._buffer = mmap.mmap(descriptor, size)
        self.array: Rgb = np.frombuffer(self._buffer, dtype=np.uint8).reshape(
            slabs, tiles, tile_px, tile_px, 3
        )

    def populate(self, slab: int) -> None:
        """Have a slab's memory made and mapped now, and not page by page when it is written.

        Kernels before Linux 5.14 can't, and one without memory does not; nothing is lost then.
        """
        size = self.array[slab].nbytes
        start = slab * size // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):
            self._buffer.madvise(_MADV_POPULATE_WRITE, start, (slab + 1) * size - start)

    def close(self) -> None:
        """Close the descriptor, once; the memory lives as long as an array of it does."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@contextlib.contextmanager
def _allowed(size: int) -> Iterator[None]:
    """Lift the limit of a file's size for a moment: it counts for memory without a file, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY or soft >= size:
        yield
        return
    if hard != resource.RLIM_INFINITY and hard < size:
        raise InputError(
            f"the hard limit of a file's size must allow {size} bytes of shared tiles, got {hard}; "
            "raise it (ulimit -H -f), or use fewer --workers"
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
