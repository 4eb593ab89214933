"""Memory for tiles that several processes see: slabs of decoded pixels, without a name.

The memory is a file that exists in memory only and has no name in any folder, so nothing is left
behind however the processes end: the kernel frees it with the last descriptor and mapping.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

Rgb = npt.NDArray[np.uint8]


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
            OSError: The system refuses.
        """
        slabs, tiles, tile_px = shape
        size = slabs * tiles * tile_px * tile_px * 3
        if descriptor is None:
            descriptor = os.memfd_create("modaltune-tiles", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        buffer = mmap.mmap(descriptor, size)
        self.array: Rgb = np.frombuffer(buffer, dtype=np.uint8).reshape(
            slabs, tiles, tile_px, tile_px, 3
        )

    def close(self) -> None:
        """Close the descriptor, once; the memory lives as long as an array of it does."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
