"""Read one group of tiles as planned, straight into memory that the caller gives.

The pixels of a sound file are those of `engine.tiling.read_tiles`, bit for bit, whatever the plan:
a part cut out of a larger read is that part read by itself, and an average over whole blocks of
pixels does not depend on where the image around them was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from modaltune.engine.decode_plan import BoxPlan, plan_boxes, plan_file_tiles
from modaltune.engine.errors import SlideError
from modaltune.engine.resample import resample_tile

if TYPE_CHECKING:
    from modaltune.engine.readers import SlideReader

Rgb = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
# Reads a box at (x, y) of a size, px of the level; into the memory given if it can and likes.
ReadBox = Callable[[int, int, tuple[int, int], Rgb | None], Rgb]

_WHITE = 255


class TileSource(Protocol):
    """Decodes file tiles of a level one by one (`engine.file_tiles`)."""

    @property
    def tile_px(self) -> tuple[int, int]:
        """(width, height) of a tile."""
        ...

    @property
    def can_halve(self) -> bool:
        """Whether it decodes at half scale, too."""
        ...

    def read(self, x: int, y: int, out: Rgb | None) -> Rgb:
        """Decode the tile at a corner: uint8 [h, w, 3], `out` itself where its shape fits."""
        ...

    def read_half(self, x: int, y: int, out: Rgb | None) -> Rgb:
        """Decode it at half scale: uint8 [h / 2, w / 2, 3]."""
        ...


@dataclass(frozen=True)
class ReadShape:
    """What is read for each tile: a square of `read_px` of a level, delivered at `tile_px`."""

    level: int
    read_px: int
    tile_px: int

    @property
    def factor(self) -> int:
        """Level pixels per tile pixel where that is a whole number, else 0."""
        return self.read_px // self.tile_px if self.read_px % self.tile_px == 0 else 0


def read_group(
    slide: SlideReader,
    coords: Int64,
    shape: ReadShape,
    out: Rgb,
    file_tiles: TileSource | None = None,
    *,
    is_half_scale: bool = False,
) -> Bool:
    """Read a group of tiles.

    Args:
        slide: The open slide.
        coords: int64 [n, 2], top-left corners in level-0 px.
        shape: Level and sizes.
        out: uint8 [n, tile_px, tile_px, 3], C-contiguous; overwritten.
        file_tiles: Of the level, where the slide's own reader need not decode it.
        is_half_scale: Let `file_tiles` decode at half scale where every edge falls on even pixels
            of the level and `read_px` is twice `tile_px`; the pixels then differ slightly.

    Returns:
        bool [n], True for a tile that can't be read: it is white.
    """
    corners = slide.level_corners(coords, shape.level)
    level = slide.levels[shape.level]
    size = level.width, level.height
    if file_tiles is None:
        plan = plan_boxes(corners, shape.read_px, size, slide.file_tile_px(shape.level))
        read, sink = _box_reader(slide, shape.level), _sink_for(plan, corners, shape, out)
        return _read_alone(slide, _read_boxes(plan, corners, read, sink, out), corners, shape, out)
    plan = plan_file_tiles(corners, shape.read_px, size, file_tiles.tile_px)
    is_half = is_half_scale and file_tiles.can_halve and shape.factor == 2
    if is_half and _is_on(plan.pieces[:, 2:], 2):
        read, sink = _tile_reader(file_tiles.read_half), _Copies(out, scale=2)
    else:
        read, sink = _tile_reader(file_tiles.read), _sink_for(plan, corners, shape, out)
    is_bad = np.zeros(len(out), dtype=np.bool_)
    is_bad[list(_read_boxes(plan, corners, read, sink, out))] = True
    out[is_bad] = _WHITE
    return is_bad


def _box_reader(slide: SlideReader, level: int) -> ReadBox:
    return lambda x, y, size, out: slide.read_at(x, y, size, level)


def _tile_reader(read: Callable[[int, int, Rgb | None], Rgb]) -> ReadBox:
    return lambda x, y, size, out: read(x, y, out)


def _is_on(values: Int64, factor: int) -> bool:
    """Whether all values are multiples of a factor."""
    return not (values % factor).any()


def _sink_for(plan: BoxPlan, corners: Int64, shape: ReadShape, out: Rgb) -> _Sink:
    """Choose how pieces become tiles."""
    if shape.read_px == shape.tile_px:
        return _Copies(out)
    inside = plan.pieces[:, 2:] - np.tile(corners[plan.pieces[:, 1]], 2)
    if shape.factor > 1 and _is_on(inside, shape.factor):
        return _Averages(out, shape.factor)
    return _Squares(out, shape, plan)


def _read_boxes(plan: BoxPlan, corners: Int64, read: ReadBox, sink: _Sink, out: Rgb) -> set[int]:
    """Read every box and hand its pieces on; return the tiles of boxes that can't be read."""
    out[~plan.is_whole] = _WHITE
    suspects: set[int] = set()
    boxes = plan.boxes.tolist()
    starts = np.searchsorted(plan.pieces[:, 0], np.arange(len(boxes) + 1)).tolist()
    tiles = plan.pieces[:, 1]
    parts = plan.pieces[:, 2:]
    source = (parts - np.tile(plan.boxes[plan.pieces[:, 0], :2], 2)).tolist()
    target = (parts - np.tile(corners[tiles], 2)).tolist()
    owners = tiles.tolist()
    for box, start, stop in zip(boxes, starts[:-1], starts[1:], strict=True):
        left, top, right, bottom = box
        slot = sink.slot(owners[start], target[start]) if stop - start == 1 else None
        try:
            region = read(left, top, (right - left, bottom - top), slot)
        except SlideError:
            suspects.update(owners[start:stop])
            continue
        if region is slot:
            continue
        for index in range(start, stop):
            sink.add(owners[index], region, source[index], target[index])
        # Its memory is free before the next box asks for some: the same, still in the cache.
        del region
    return suspects


def _read_alone(
    slide: SlideReader, suspects: set[int], corners: Int64, shape: ReadShape, out: Rgb
) -> Bool:
    """Read tiles one by one, so that a damaged file tile costs only the tiles that need it."""
    is_bad = np.zeros(len(out), dtype=np.bool_)
    for tile in sorted(suspects):
        x, y = corners[tile].tolist()
        try:
            region = slide.read_at(x, y, (shape.read_px, shape.read_px), shape.level)
        except SlideError:
            out[tile] = _WHITE
            is_bad[tile] = True
        else:
            resample_tile(region, shape.tile_px, out[tile])
    return is_bad


class _Sink(Protocol):
    """Takes pieces; `source` and `target` are (left, top, right, bottom) in region and square."""

    def slot(self, tile: int, target: list[int]) -> Rgb | None:
        """Return a tile's own memory where a piece is all of it, and is taken as it is."""
        ...

    def add(self, tile: int, region: Rgb, source: list[int], target: list[int]) -> None: ...


class _Copies:
    """Tiles of the level's own resolution, or of a region already scaled down by `scale`."""

    def __init__(self, out: Rgb, scale: int = 1) -> None:
        # Rows of bytes: one long copy per row.
        self._out = out.reshape(*out.shape[:2], -1)
        self._tiles = out
        self._scale = scale
        side = out.shape[1] * scale
        self._whole = [0, 0, side, side]

    def slot(self, tile: int, target: list[int]) -> Rgb | None:
        return self._tiles[tile] if target == self._whole else None

    def add(self, tile: int, region: Rgb, source: list[int], target: list[int]) -> None:
        rows = region.reshape(len(region), -1)
        if self._scale > 1:
            source = [value // self._scale for value in source]
            target = [value // self._scale for value in target]
        x0, y0, x1, y1 = source
        a0, b0, a1, b1 = target
        self._out[tile, b0:b1, 3 * a0 : 3 * a1] = rows[y0:y1, 3 * x0 : 3 * x1]


class _Averages:
    """Tiles averaged by a whole factor, piece by piece: each average lies inside one piece."""

    def __init__(self, out: Rgb, factor: int) -> None:
        self._out, self._factor = out, factor

    def slot(self, tile: int, target: list[int]) -> Rgb | None:
        return None

    def add(self, tile: int, region: Rgb, source: list[int], target: list[int]) -> None:
        x0, y0, x1, y1 = source
        a0, b0, a1, b1 = (value // self._factor for value in target)
        part = self._out[tile, b0:b1, a0:a1]
        cv2.resize(region[y0:y1, x0:x1], (a1 - a0, b1 - b0), dst=part, interpolation=cv2.INTER_AREA)


class _Squares:
    """Tiles of any other size: squares are put together first, and resampled when complete."""

    def __init__(self, out: Rgb, shape: ReadShape, plan: BoxPlan) -> None:
        self._out, self._shape = out, shape
        self._is_whole = plan.is_whole
        self._missing = np.bincount(plan.pieces[:, 1], minlength=len(out)).tolist()
        self._squares: dict[int, Rgb] = {}
        self._spare: list[Rgb] = []

    def slot(self, tile: int, target: list[int]) -> Rgb | None:
        return None

    def add(self, tile: int, region: Rgb, source: list[int], target: list[int]) -> None:
        x0, y0, x1, y1 = source
        a0, b0, a1, b1 = target
        part, side = region[y0:y1, x0:x1], self._shape.read_px
        self._missing[tile] -= 1
        if part.shape[0] == part.shape[1] == side:
            resample_tile(part, self._shape.tile_px, self._out[tile])
            return
        square = self._squares.get(tile)
        if square is None:
            square = self._spare.pop() if self._spare else np.empty((side, side, 3), np.uint8)
            if not self._is_whole[tile]:
                square[:] = _WHITE
            self._squares[tile] = square
        square[b0:b1, a0:a1] = part
        if not self._missing[tile]:
            resample_tile(square, self._shape.tile_px, self._out[tile])
            self._spare.append(self._squares.pop(tile))
