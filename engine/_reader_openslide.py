"""Slides through OpenSlide: every vendor layout that cuCIM does not read."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide

from modaltune.engine._quiet import quiet_libraries
from modaltune.engine._reader_base import WHITE, ReaderName, Rgb
from modaltune.engine._slide_tags import PageTags
from modaltune.engine.errors import SlideError


def detect_vendor(path: Path) -> str | None:
    """Name the slide's layout as OpenSlide does ("aperio", "generic-tiff"), None if it can't."""
    vendor = None
    with quiet_libraries(path.name), contextlib.suppress(openslide.OpenSlideError):
        vendor = openslide.OpenSlide.detect_format(path)
    return None if vendor is None else str(vendor)


class OpenSlideBackend:
    """A slide held open by OpenSlide.

    Where a level's downsample is not a whole number (odd sides), OpenSlide shifts by a fraction of
    a pixel and interpolates; other readers return the stored pixels.
    """

    name: ReaderName = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._slide = self._open()
        self.library = f"OpenSlide {openslide.__library_version__}"
        self.vendor = str(self._slide.properties.get("openslide.vendor", "unknown"))
        self.level_sizes: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        self._downsamples = tuple(float(v) for v in self._slide.level_downsamples)
        self.pages: tuple[PageTags, ...] = ()
        self.tile_sizes = tuple(map(self._tile_size, range(len(self.level_sizes))))

    def _open(self) -> Any:
        """Open the file."""
        try:
            with quiet_libraries(self._path.name):
                return openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            raise SlideError(f"OpenSlide can't open {self._path}: {error}") from error

    def _tile_size(self, level: int) -> tuple[int, int] | None:
        """(width, height) of a level's file tiles where OpenSlide names them and does not shift."""
        properties = self._slide.properties
        try:
            width = int(properties[f"openslide.level[{level}].tile-width"])
            height = int(properties[f"openslide.level[{level}].tile-height"])
        except (KeyError, ValueError):
            return None
        return (width, height) if self._downsamples[level].is_integer() else None

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read a region that lies inside the level, uint8 [h, w, 3]; holes are white."""
        slide, scale = self._slide, self._downsamples[level]
        try:
            image = slide.read_region((round(x * scale), round(y * scale)), level, size)
        except openslide.OpenSlideError as error:
            self._renew(slide)
            raise SlideError(
                f"region of {self._path} must be readable, got level {level} ({x}, {y}) "
                f"{size[0]} x {size[1]} px: {error}; copy the slide again or leave the region out"
            ) from error
        return over_white(np.asarray(image))

    def _renew(self, broken: Any) -> None:
        """Open the file again: after one error OpenSlide's handle refuses every read."""
        with self._lock:
            # Other threads may still be reading from the broken handle; it is freed with its last
            # reference.
            if self._slide is broken:
                self._slide = self._open()

    def read_many(
        self, corners: npt.NDArray[np.int64], size: tuple[int, int], level: int, num_workers: int
    ) -> Generator[Rgb, None, None]:
        """Read regions at corners [n, 2] in order, `num_workers` at a time."""
        with ThreadPoolExecutor(num_workers) as pool:
            pending: deque[Future[Rgb]] = deque()
            try:
                for x, y in corners:
                    pending.append(pool.submit(self.read, int(x), int(y), size, level))
                    if len(pending) > 2 * num_workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def metadata_mpp(self) -> tuple[float, float] | None:
        """Microns per pixel from a vendor's metadata; generic TIFF is left to its tags."""
        if self.vendor == "generic-tiff":
            return None
        with contextlib.suppress(KeyError, ValueError):
            properties = self._slide.properties
            return float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"])
        return None

    def associated_images(self) -> tuple[str, ...]:
        """Names of label, macro and thumbnail images."""
        return tuple(sorted(self._slide.associated_images))

    def close(self) -> None:
        """Free the handle."""
        self._slide.close()


def over_white(rgba: npt.NDArray[np.uint8]) -> Rgb:
    """Lay pixels with straight alpha, uint8 [h, w, 4], on white: uint8 [h, w, 3]."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    share = alpha.astype(np.float32) / 255
    return np.round(rgba[..., :3] * share + WHITE * (1 - share)).astype(np.uint8)
