"""Slides through cuCIM: the fastest reader, kept to the files that it reads right.

Facts behind the guards (cuCIM 26.10, tried): Deflate with a predictor crashes the process; a
damaged Deflate or JPEG 2000 tile aborts the process when it is met by a batch worker, and raises
when it is read singly; a damaged JPEG or LZW tile comes back as black or stale pixels without an
error; strips are returned as RGBA or, for JPEG 2000, as garbage; YCbCr without JPEG is not
converted; tiles without bytes and pages in SubIFDs are not seen.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modaltune.engine._quiet import quiet_libraries
from modaltune.engine._reader_base import DeviceName, ReaderName, Rgb
from modaltune.engine._slide_tags import PageTags, TiffTags
from modaltune.engine.errors import InputError, SlideError

_NONE, _LZW, _JPEG, _DEFLATE = 1, 5, 7, 8
_APERIO_JP2000 = (33003, 33005)
_CODECS = (_NONE, _LZW, _JPEG, _DEFLATE, *_APERIO_JP2000)
# A damaged tile in a batch worker aborts the process for the other two codecs.
_BATCH_CODECS = (_NONE, _LZW, _JPEG)
_RGB, _YCBCR = 2, 6
# OpenSlide's names of the layouts whose pixels were compared with OpenSlide's; None: it knows none.
_VENDORS = ("aperio", "generic-tiff", None)
# What an intact tile begins with.
_MAGIC = {
    _JPEG: (b"\xff\xd8",),
    _LZW: (b"\x80",),
    33003: (b"\xff\x4f", b"\0\0\0\x0c"),
    33005: (b"\xff\x4f", b"\0\0\0\x0c"),
}
_TAIL_BYTES = 16
_BATCH = 16
_BATCH_PX = 2**24
# A region this large (a thumbnail's; boxes of tiles are smaller) is decoded by two threads.
_LARGE_PX, _LARGE_THREADS = 2**21, 2

logger = logging.getLogger(__name__)


def refusal(tags: TiffTags | None, vendor: str | None) -> str | None:
    """Say why a file must not be given to cuCIM, None where it may.

    Args:
        tags: The file's TIFF tags, None where it is no TIFF.
        vendor: OpenSlide's name of the layout.
    """
    if tags is None:
        return "not a TIFF file"
    if vendor not in _VENDORS:
        return f"layout {vendor} is left to OpenSlide"
    if tags.has_subifds:
        return "levels in SubIFDs are not seen"
    for page in tags.levels:
        if reason := _page_refusal(page):
            return f"level page {page.index}: {reason}"
    return None


def _page_refusal(page: PageTags) -> str | None:
    """Say why cuCIM would read a page wrongly."""
    if not page.is_tiled:
        return "strips are read as RGBA or wrongly"
    if page.compression not in _CODECS:
        return f"compression {page.compression} fails at read"
    if page.bits != 8 or page.samples != 3 or page.is_planar:
        return "not 8-bit RGB with interleaved samples"
    is_converted = page.compression == _JPEG or page.compression in _APERIO_JP2000
    if page.photometric != _RGB and not (page.photometric == _YCBCR and is_converted):
        return f"colour space {page.photometric} is not converted"
    if page.compression == _DEFLATE and page.predictor != 1:
        return "Deflate with a predictor crashes"
    if not page.is_gapless or (page.byte_counts == 0).any():
        return "some tiles have no bytes"
    return None


def require_cuda() -> None:
    """Check that cuCIM can decode on a GPU.

    Raises:
        InputError: There is none, or the driver or CuPy is missing.
    """
    try:
        with quiet_libraries("cupy"):
            cupy: Any = importlib.import_module("cupy")
            cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own classes can't be named where it is not installed
        raise InputError(
            f"device must be cpu on a machine without a GPU that CuPy can use, got cuda ({error}); "
            "leave it out, or install the driver and `pip install cupy-cuda13x`"
        ) from error


def load_library() -> Any:
    """Import cuCIM, which takes 10 ms or more the first time.

    Raises:
        ImportError: It is not installed.
    """
    with quiet_libraries("cucim"):
        # Its first import prints driver noise where there is no GPU, and cuFile, where torch
        # brought it, leaves a cufile.log in the working folder.
        os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)
        return importlib.import_module("cucim")


class CucimBackend:
    """A slide held open by cuCIM, decoding on the CPU unless told otherwise."""

    name: ReaderName = "cucim"

    def __init__(
        self, path: Path, tags: TiffTags, vendor: str | None, device: DeviceName = "cpu"
    ) -> None:
        cucim = load_library()
        with quiet_libraries(path.name):
            try:
                self._image: Any = cucim.CuImage(str(path))
            except (RuntimeError, ValueError) as error:
                raise SlideError(f"cuCIM can't open {path}: {error}") from error
        self._path = path
        self.library = f"cuCIM {cucim.__version__}"
        self.vendor = vendor or "tiff"
        resolutions = self._image.resolutions
        self.level_sizes: tuple[tuple[int, int], ...] = tuple(
            (int(w), int(h)) for w, h in resolutions["level_dimensions"]
        )
        self._downsamples = [float(v) for v in resolutions["level_downsamples"]]
        expected = tuple((page.width, page.height) for page in tags.levels)
        if self.level_sizes != expected:
            raise SlideError(
                f"cuCIM sees other levels in {path} than its tags say: {self.level_sizes}, "
                f"tags {expected}"
            )
        self.tile_sizes: tuple[tuple[int, int] | None, ...] = tuple(
            page.segment_px for page in tags.levels
        )
        self.pages = tags.levels
        self._device = device
        self._guard = _TileGuard(path, tags.levels)
        is_safe = all(page.compression in _BATCH_CODECS for page in tags.levels)
        self._is_batched = is_safe and device == "cpu"

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read a region that lies inside the level, uint8 [h, w, 3]."""
        self._guard.check(x, y, size, level)
        try:
            region = self._decode(self._level0(x, y, level), size, level)
        except (RuntimeError, ValueError) as error:
            raise _unreadable(self._path, x, y, size, level, str(error)) from error
        if region.shape != (size[1], size[0], 3) or region.dtype != np.uint8:
            raise _unreadable(
                self._path, x, y, size, level, f"decoded as {region.dtype} {region.shape}"
            )
        return region

    def _decode(self, location: tuple[int, int], size: tuple[int, int], level: int) -> Rgb:
        """Read a region into host memory; the array keeps cuCIM's buffer alive, without a copy."""
        if self._device == "cpu":
            is_large = self._is_batched and size[0] * size[1] >= _LARGE_PX
            threads = {"num_workers": _LARGE_THREADS} if is_large else {}
            return np.asarray(self._image.read_region(location, size, level, **threads))
        region = self._image.read_region(location, size, level, device="cuda")
        cupy: Any = importlib.import_module("cupy")
        return np.asarray(cupy.asnumpy(cupy.asarray(region)), dtype=np.uint8)

    def read_many(
        self, corners: npt.NDArray[np.int64], size: tuple[int, int], level: int, num_workers: int
    ) -> Generator[Rgb, None, None]:
        """Read regions at corners [n, 2] in order, through cuCIM's batches where those are safe."""
        points = [(int(x), int(y)) for x, y in corners]
        if not self._is_batched or len(points) < 2:
            for x, y in points:
                yield self.read(x, y, size, level)
            return
        intact = self._intact(points, size, level)
        done = 0
        if intact > 1:
            for tile in self._batches(points[:intact], size, level, num_workers):
                done += 1
                yield tile
        for x, y in points[done:]:
            yield self.read(x, y, size, level)

    def _batches(
        self, points: list[tuple[int, int]], size: tuple[int, int], level: int, num_workers: int
    ) -> Generator[Rgb, None, None]:
        """Read intact regions through worker threads; stops short where a batch fails."""
        batches = self._image.read_region(
            [self._level0(x, y, level) for x, y in points],
            size,
            level,
            num_workers=num_workers,
            batch_size=max(1, min(_BATCH, _BATCH_PX // (size[0] * size[1]))),
        )
        try:
            for batch in batches:
                # The buffer is used again for a later batch: copy all of it before any yield.
                yield from [t.copy() for t in np.asarray(batch).reshape(-1, *size[::-1], 3)]
        except GeneratorExit:
            # An iterator left half-way leaves its workers behind.
            for _ in batches:
                pass
            raise
        except (RuntimeError, ValueError) as error:
            # The caller goes on one by one, so that the error names the region.
            logger.debug("%s: batch read failed: %s", self._path.name, error)

    def _intact(self, points: list[tuple[int, int]], size: tuple[int, int], level: int) -> int:
        """Count the regions before the first one with a damaged tile."""
        for index, (x, y) in enumerate(points):
            try:
                self._guard.check(x, y, size, level)
            except SlideError:
                return index
        return len(points)

    def _level0(self, x: int, y: int, level: int) -> tuple[int, int]:
        """Return the level-0 location that cuCIM truncates to this pixel of the level.

        Of the whole numbers that do, the middle one, which float32 rounding can't push out.
        """
        scale = self._downsamples[level]
        if scale == 1.0:
            return x, y
        low_x, high_x = int(np.ceil(x * scale)), int(np.ceil((x + 1) * scale)) - 1
        low_y, high_y = int(np.ceil(y * scale)), int(np.ceil((y + 1) * scale)) - 1
        return (low_x + high_x) // 2, (low_y + high_y) // 2

    def metadata_mpp(self) -> tuple[float, float] | None:
        """Nothing beyond the TIFF tags."""
        return None

    def associated_images(self) -> tuple[str, ...]:
        """Names of label, macro and thumbnail images."""
        return tuple(sorted(self._image.associated_images))

    def close(self) -> None:
        """Free the handle."""
        self._guard.close()
        self._image.close()


class _TileGuard:
    """Checks each file tile once, before cuCIM decodes it: does it begin and end like one?

    Catches holes (zeroed blocks of an interrupted download) and foreign bytes, which cuCIM decodes
    to black; damage in the middle of a tile is beyond it.
    """

    def __init__(self, path: Path, levels: tuple[PageTags, ...]) -> None:
        self._path = path
        self._levels = levels
        self._descriptor = os.open(path, os.O_RDONLY)
        self._columns = [-(-page.width // page.segment_px[0]) for page in levels]
        self._is_seen = [np.zeros(page.offsets.size, dtype=bool) for page in levels]
        self._lock = threading.Lock()

    def check(self, x: int, y: int, size: tuple[int, int], level: int) -> None:
        """Raise SlideError if a file tile under the region is damaged."""
        page, seen = self._levels[level], self._is_seen[level]
        if page.compression not in _MAGIC:
            return
        width, height = page.segment_px
        for row in range(y // height, (y + size[1] - 1) // height + 1):
            for column in range(x // width, (x + size[0] - 1) // width + 1):
                tile = row * self._columns[level] + column
                if not seen[tile]:
                    if not self._is_intact(page, tile):
                        raise _unreadable(
                            self._path, x, y, size, level, f"file tile {tile} is damaged"
                        )
                    seen[tile] = True

    def _is_intact(self, page: PageTags, tile: int) -> bool:
        """Look at the first bytes and the last."""
        offset, count = int(page.offsets[tile]), int(page.byte_counts[tile])
        head = os.pread(self._descriptor, 4, offset)
        tail_bytes = min(_TAIL_BYTES, count)
        tail = os.pread(self._descriptor, tail_bytes, offset + count - tail_bytes)
        return head.startswith(_MAGIC[page.compression]) and any(tail)

    def close(self) -> None:
        """Free the descriptor, once."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def _unreadable(
    path: Path, x: int, y: int, size: tuple[int, int], level: int, reason: str
) -> SlideError:
    """Build the error for a region that can't be decoded."""
    return SlideError(
        f"region of {path} must be readable, got level {level} ({x}, {y}) "
        f"{size[0]} x {size[1]} px: {reason}; copy the slide again or leave the region out"
    )
