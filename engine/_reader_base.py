"""The one face of every slide reader: geometry, clipping, white outside, budgets, mpp."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from modaltune.engine._slide_tags import PageTags
from modaltune.engine.errors import MissingMppError, SlideError

Rgb = npt.NDArray[np.uint8]
ReaderName = Literal["cucim", "openslide", "image"]
MppSource = Literal["metadata", "option"]
DeviceName = Literal["cpu", "cuda"]

WHITE = 255
# Most pixels that one read, one decoded plain image or one file tile may have: 805 MB of RGB.
PIXEL_BUDGET = 2**28
# Thumbnails are averaged in bands of about this many pixels where a whole level is large.
_BAND_PX = 2**24
# Regions handed to a backend at once: abandoning the iterator costs at most this many reads.
_CHUNK = 512


@dataclass(frozen=True)
class Level:
    """One resolution of the slide: size in pixels, and level-0 pixels per pixel of this level."""

    width: int
    height: int
    downsample: float


class Backend(Protocol):
    """What a library must offer: reads inside the slide, in pixels of the level."""

    name: ReaderName
    vendor: str
    library: str
    level_sizes: tuple[tuple[int, int], ...]
    # Per level, (width, height) of the file tiles; None for strips, and where a part of a large
    # read may differ from a read of that part.
    tile_sizes: tuple[tuple[int, int] | None, ...]
    # Per level, where the file keeps its tiles; none where only the library knows.
    pages: tuple[PageTags, ...]

    def read(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read a region that lies inside the level, uint8 [h, w, 3], memory of its own."""
        ...

    def read_many(
        self, corners: npt.NDArray[np.int64], size: tuple[int, int], level: int, num_workers: int
    ) -> Generator[Rgb, None, None]:
        """Read regions of one size at corners int64 [n, 2] (x, y), in order; closing drains."""
        ...

    def metadata_mpp(self) -> tuple[float, float] | None:
        """Microns per pixel along x and y, where the library knows more than the TIFF tags."""
        ...

    def associated_images(self) -> tuple[str, ...]:
        """Names of label, macro and thumbnail images."""
        ...

    def close(self) -> None:
        """Free the handle."""
        ...


@dataclass(frozen=True)
class Mpp:
    """The base resolution: its value and where it came from, or why there is none."""

    value: float | None
    source: MppSource | None
    problem: str | None = None


@dataclass(frozen=True)
class OpenRequest:
    """The arguments of `open_slide`, kept so that a reader can be opened again elsewhere."""

    path: Path
    base_mpp: float | None
    reader: ReaderName
    pixel_budget: int
    device: DeviceName = "cpu"


class SlideReader:
    """A slide opened by one of the readers; made by `open_slide`.

    Locations are (x, y) in level-0 pixels, sizes (width, height) in pixels of the level that is
    read; a location is rounded to the nearest pixel of that level. Whatever lies outside the slide
    is white (255). Reads may run in several threads at once. A handle is never shared over fork or
    pickling: the child opens the file again by its path, at its first read. Prefer the "spawn"
    start method all the same, for the libraries keep threads of their own.

    Attributes:
        path: The slide file.
        name: Reader in use: "cucim", "openslide" or "image".
        levels: Level 0 first, each smaller than the last.
        device: Where pixels are decoded: "cpu", or "cuda" where that was asked for.
    """

    def __init__(self, request: OpenRequest, backend: Backend, mpp: Mpp) -> None:
        self.path = request.path
        self.name: ReaderName = backend.name
        self.device: DeviceName = request.device
        self._request = request
        self._mpp = mpp
        self._handle: Backend | None = backend
        self._pid = os.getpid()
        width, height = backend.level_sizes[0]
        self.levels: tuple[Level, ...] = tuple(
            Level(w, h, (width / w + height / h) / 2) for w, h in backend.level_sizes
        )

    @property
    def dimensions(self) -> tuple[int, int]:
        """Level-0 size, (width, height) in pixels."""
        return self.levels[0].width, self.levels[0].height

    @property
    def mpp(self) -> float:
        """Microns per level-0 pixel.

        Raises:
            MissingMppError: Neither the metadata nor the caller gave a usable one.
        """
        if self._mpp.value is None:
            raise MissingMppError(
                f"mpp of slide {self.path} must lie in 0.05..5 microns per pixel, got "
                f"{self._mpp.problem}; give it with --base-mpp or in the manifest's column mpp"
            )
        return self._mpp.value

    @property
    def mpp_source(self) -> MppSource | None:
        """Where `mpp` came from: "metadata", "option", or None where there is none."""
        return self._mpp.source

    @property
    def base_resolution(self) -> Mpp:
        """The base resolution with its source, or with what is wrong about it; never raises."""
        return self._mpp

    @property
    def backend(self) -> Backend:
        """The open handle of this process.

        Raises:
            SlideError: The reader is closed, or the file can't be opened again after a fork.
        """
        if self._handle is None:
            raise SlideError(f"slide must be open to be read, got {self.path} closed; open it anew")
        if self._pid != os.getpid():
            self._handle = _reopen(self._request)._handle
            self._pid = os.getpid()
            return self.backend
        return self._handle

    def read_region(self, location: tuple[int, int], size: tuple[int, int], level: int = 0) -> Rgb:
        """Read one region.

        Args:
            location: Top-left corner (x, y), level-0 pixels; may lie outside the slide.
            size: (width, height) in pixels of `level`, >= 1.
            level: Index into `levels`.

        Returns:
            uint8 [height, width, 3], RGB; white outside the slide.

        Raises:
            SlideError: The region is over the pixel budget, or can't be decoded.
        """
        size = self._check_size(size, level)
        corner = self.level_corners(np.asarray(location, dtype=np.int64)[None], level)[0]
        return self._read_clipped(int(corner[0]), int(corner[1]), size, level)

    def read_at(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read one region at a corner in pixels of the level; else as `read_region`."""
        return self._read_clipped(x, y, self._check_size(size, level), level)

    def file_tile_px(self, level: int) -> tuple[int, int] | None:
        """(width, height) of a level's file tiles, None where reads can't follow them.

        Where there are some, a region cut out of a larger read is the region read by itself.
        """
        return self.backend.tile_sizes[level]

    @property
    def pages(self) -> tuple[PageTags, ...]:
        """The TIFF page of each level, where file tiles may be read past the reader; else none."""
        return self.backend.pages

    def read_regions(
        self,
        locations: npt.NDArray[np.int64] | Sequence[tuple[int, int]],
        size: tuple[int, int],
        level: int = 0,
        *,
        num_workers: int | None = None,
    ) -> Iterator[Rgb]:
        """Read many regions of one size, in order; the iterator may be abandoned at any point.

        Args:
            locations: int64 [n, 2], corners (x, y) in level-0 pixels.
            size: (width, height) in pixels of `level`, >= 1.
            level: Index into `levels`.
            num_workers: Decoding threads, >= 1; None takes the process's cores, 8 at most.

        Yields:
            uint8 [height, width, 3] for each location, each with memory of its own.

        Raises:
            SlideError: As `read_region`, at the first region that can't be read.
        """
        size = self._check_size(size, level)
        corners = self.level_corners(_as_locations(locations), level)
        workers = min(8, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
        if workers < 1:
            raise SlideError(f"num_workers must be >= 1, got {workers}; None takes all cores")
        return self._stream(corners, size, level, workers)

    def level_corners(self, locations: npt.NDArray[np.int64], level: int) -> npt.NDArray[np.int64]:
        """Round level-0 locations int64 [n, 2] to pixels of the level, as every read does."""
        if level == 0:
            return locations
        return np.floor(locations / self.levels[level].downsample + 0.5).astype(np.int64)

    def thumbnail(self, max_side: int) -> tuple[Rgb, float]:
        """Show the whole slide small, averaged by area from the nearest larger level.

        Args:
            max_side: Longest side wanted, pixels, >= 1. A smaller slide keeps its size.

        Returns:
            uint8 [h, w, 3], and level-0 pixels per thumbnail pixel.

        Raises:
            SlideError: `max_side` is over the budget, or a region can't be read.
        """
        if not 1 <= max_side <= math.isqrt(self._request.pixel_budget):
            raise SlideError(
                f"max_side must be 1..{math.isqrt(self._request.pixel_budget)}, got {max_side}; "
                "a thumbnail needs a few thousand pixels at most"
            )
        fitting = [i for i, v in enumerate(self.levels) if max(v.width, v.height) >= max_side]
        level = fitting[-1] if fitting else 0
        width, height = self.levels[level].width, self.levels[level].height
        scale = min(1.0, max_side / max(width, height))
        target = max(1, round(width * scale)), max(1, round(height * scale))
        return self._read_averaged(level, target), max(self.dimensions) / max(target)

    def close(self) -> None:
        """Free the handle; further reads raise."""
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        self._handle = None

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._request,)

    def __repr__(self) -> str:
        return (
            f"SlideReader({str(self.path)!r}, reader={self.name!r}, dimensions={self.dimensions})"
        )

    def _check_size(self, size: tuple[int, int], level: int) -> tuple[int, int]:
        """Check level, size and budget before anything is allocated."""
        if not 0 <= level < len(self.levels):
            raise SlideError(
                f"level of {self.path} must be 0..{len(self.levels) - 1}, got {level}; "
                "see `modaltune slides info`"
            )
        width, height = int(size[0]), int(size[1])
        budget = self._request.pixel_budget
        if width < 1 or height < 1 or width * height > budget:
            raise SlideError(
                f"size of a region of {self.path} must be 1..{budget} pixels, got "
                f"{width} x {height}; read smaller regions or raise pixel_budget"
            )
        return width, height

    def _read_clipped(self, x: int, y: int, size: tuple[int, int], level: int) -> Rgb:
        """Read a region at a corner in pixels of the level; outside is white."""
        width, height = size
        x0, y0 = max(x, 0), max(y, 0)
        x1 = min(x + width, self.levels[level].width)
        y1 = min(y + height, self.levels[level].height)
        if x1 <= x0 or y1 <= y0:
            return np.full((height, width, 3), WHITE, dtype=np.uint8)
        inside = self.backend.read(x0, y0, (x1 - x0, y1 - y0), level)
        if inside.shape[:2] == (height, width):
            return inside
        rgb = np.full((height, width, 3), WHITE, dtype=np.uint8)
        rgb[y0 - y : y1 - y, x0 - x : x1 - x] = inside
        return rgb

    def _stream(
        self, corners: npt.NDArray[np.int64], size: tuple[int, int], level: int, workers: int
    ) -> Iterator[Rgb]:
        """Yield regions in order: whole ones from the backend's batches, clipped ones singly."""
        edge = np.array([self.levels[level].width, self.levels[level].height]) - size
        is_whole = np.asarray(((corners >= 0) & (corners <= edge)).all(axis=1))
        for start in range(0, len(corners), _CHUNK):
            chunk, whole = corners[start : start + _CHUNK], is_whole[start : start + _CHUNK]
            regions = self.backend.read_many(chunk[whole], size, level, workers)
            with contextlib.closing(regions):
                for corner, inside in zip(chunk, whole, strict=True):
                    if inside:
                        yield next(regions)
                    else:
                        yield self._read_clipped(int(corner[0]), int(corner[1]), size, level)

    def _read_averaged(self, level: int, target: tuple[int, int]) -> Rgb:
        """Average a whole level by area to `target` (width, height), in bands if it is large."""
        width, height = self.levels[level].width, self.levels[level].height
        if width * height <= min(self._request.pixel_budget, 4 * _BAND_PX):
            rgb = self._read_clipped(0, 0, (width, height), level)
            return rgb if target == (width, height) else _shrink(rgb, target)
        edges = np.linspace(0, height, target[1] + 1)
        total = np.zeros((target[1], target[0] * 3), dtype=np.float32)
        rows = max(1, _BAND_PX // width)
        for top in range(0, height, rows):
            band = self._read_clipped(0, top, (width, min(rows, height - top)), level)
            narrow = _shrink(band, (target[0], band.shape[0])).reshape(band.shape[0], -1)
            # Share of each row of the band in each thumbnail row that it touches.
            first = int(np.searchsorted(edges, top, side="right")) - 1
            last = int(np.searchsorted(edges, top + band.shape[0], side="left"))
            y = np.arange(top, top + band.shape[0])
            low, high = edges[first:last, None], edges[first + 1 : last + 1, None]
            share = np.clip(np.minimum(high, y + 1) - np.maximum(low, y), 0, None) / (high - low)
            total[first:last] += share.astype(np.float32) @ narrow.astype(np.float32)
        return np.round(total).astype(np.uint8).reshape(target[1], target[0], 3)


def _shrink(rgb: Rgb, size: tuple[int, int]) -> Rgb:
    """Average by area to size (width, height)."""
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _as_locations(locations: Any) -> npt.NDArray[np.int64]:
    """Check corners and return them as int64 [n, 2]."""
    array = np.asarray(locations)
    if array.size == 0:
        return np.empty((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise SlideError(
            f"locations must be integers [n, 2], got {array.dtype} {list(array.shape)}; "
            "give (x, y) in level-0 pixels"
        )
    return array.astype(np.int64)


def _reopen(request: OpenRequest) -> SlideReader:
    """Open a slide again, in another process."""
    from modaltune.engine.readers import open_slide  # here: readers imports this module

    return open_slide(
        request.path,
        base_mpp=request.base_mpp,
        reader=request.reader,
        pixel_budget=request.pixel_budget,
        device=request.device,
    )
