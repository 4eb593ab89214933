"""Which parts of a slide's file to read for a set of tiles, and where their pixels go.

Decoding costs per file tile (the TIFF tile, a macro-tile), however little of it is wanted. So tiles
are grouped by place, and a group is read as boxes of whole file tiles: each file tile under the
group once, none that no tile touches. A piece is the part of a box that belongs to one tile; a tile
may come in pieces out of several boxes. Nothing here touches a file: sizes in, indices out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import InputError

if TYPE_CHECKING:
    from modaltune.engine.tiling import TileGrid

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# Boxes of about this side: one call decodes 16 file tiles of 256 px into 3 MB, which a processor's
# cache still holds when the pieces are cut.
BOX_PX = 1024
# Most level pixels under one group, 200 MB of RGB: limits what a worker holds at a time.
GROUP_PX = 2**26


@dataclass(frozen=True)
class BoxPlan:
    """How to read one group of tiles at one level.

    Attributes:
        boxes: int64 [m, 4], (left, top, right, bottom) in px of the level, inside the level.
        pieces: int64 [k, 6], in order of the boxes: box, tile, then (left, top, right, bottom) of
            the part that both share, in px of the level.
        is_whole: bool [n], False for a tile that reaches over the level's edge.
    """

    boxes: Int64
    pieces: Int64
    is_whole: Bool

    @property
    def read_px(self) -> int:
        """Pixels read in all."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return int(np.prod(sides, axis=1).sum())


def group_tiles(grid: TileGrid, most: int) -> list[Int64]:
    """Split the tiles of a grid into groups that lie close together.

    Squares of the grid, row by row; squares with few tiles share a group with the next ones.

    Args:
        grid: The tiles.
        most: Most tiles of a group, >= 1.

    Returns:
        Indices int64 [<= most] into the grid's tiles; every tile in exactly one group.

    Raises:
        InputError: `most` breaks its rule.
    """
    if most < 1:
        raise InputError(f"most must be at least 1 tile, got {most}; try 64")
    if not len(grid):
        return []
    side = max(1, math.isqrt(group_limit(grid.read_px, most)))
    cells = grid.cells
    squares = cells // side
    # Every other row of squares runs backwards, so that groups of several squares stay compact.
    turned = np.where(squares[:, 1] % 2, -squares[:, 0], squares[:, 0])
    order = np.lexsort((cells[:, 0], cells[:, 1], turned, squares[:, 1]))
    ordered = squares[order]
    starts = np.flatnonzero(np.any(ordered[1:] != ordered[:-1], axis=1)) + 1
    bounds = [0, *starts.tolist(), len(order)]
    groups, begin = [], 0
    for start, stop in pairwise(bounds):
        if stop - begin > side * side and start > begin:
            groups.append(order[begin:start])
            begin = start
        while stop - begin > side * side:  # more tiles than cells: a grid with doubled tiles
            groups.append(order[begin : begin + side * side])
            begin += side * side
    groups.append(order[begin:])
    return groups


def group_limit(read_px: int, most: int) -> int:
    """Return how many tiles of `read_px` level pixels a side a group may have, 1..`most`."""
    return max(1, min(most, GROUP_PX // read_px**2))


def plan_boxes(
    corners: Int64, side: int, level_size: tuple[int, int], file_tile: tuple[int, int] | None
) -> BoxPlan:
    """Plan the reads of one group of tiles.

    Args:
        corners: int64 [n, 2], top-left corners (x, y) of the tiles in px of the level.
        side: Side of each tile's square in px of the level, >= 1.
        level_size: (width, height) of the level.
        file_tile: (width, height) of the level's file tiles; None reads each square by itself.

    Returns:
        The boxes and pieces. The pieces of a tile cover its square inside the level exactly once.
    """
    limit = np.array(level_size, dtype=np.int64)
    low = np.clip(corners, 0, limit)
    high = np.clip(corners + side, 0, limit)
    squares = np.concatenate([low, high], axis=1)  # [n, 4]
    is_inside = np.all(high > low, axis=1)
    is_whole = np.all((corners >= 0) & (corners + side <= limit), axis=1)
    tiles = np.flatnonzero(is_inside)
    if file_tile is None:
        boxes = squares[tiles]
        pieces = np.column_stack([np.arange(len(tiles)), tiles, boxes])
        return BoxPlan(boxes, pieces.astype(np.int64), is_whole)
    boxes = _boxes(squares[tiles], np.array(file_tile, dtype=np.int64), limit)
    return BoxPlan(boxes, _pieces(boxes, squares, tiles), is_whole)


def plan_file_tiles(
    corners: Int64, side: int, level_size: tuple[int, int], file_tile: tuple[int, int]
) -> BoxPlan:
    """Plan the reads of one group of tiles with every file tile as a box; else as `plan_boxes`."""
    limit = np.array(level_size, dtype=np.int64)
    sides = np.array(file_tile, dtype=np.int64)
    low = np.clip(corners, 0, limit)
    high = np.clip(corners + side, 0, limit)
    is_whole = np.all((corners >= 0) & (corners + side <= limit), axis=1)
    first, stop = low // sides, -(-high // sides)
    stop[~np.all(high > low, axis=1)] = 0  # outside of the level
    most = np.maximum((stop - first).max(axis=0, initial=0), 0)
    x, y = np.meshgrid(np.arange(most[0]), np.arange(most[1]))
    steps = np.stack([x.ravel(), y.ravel()], axis=1)
    places = first[:, None] + steps[None]  # [n, s, 2], in file tiles
    tile, step = np.nonzero(np.all(places < stop[:, None], axis=2))
    place = places[tile, step]
    columns = -(-level_size[0] // file_tile[0])
    keys, box = np.unique(place[:, 1] * columns + place[:, 0], return_inverse=True)
    origin = np.stack([keys % columns, keys // columns], axis=1) * sides
    boxes = np.concatenate([origin, np.minimum(origin + sides, limit)], axis=1)
    order = np.argsort(box, kind="stable")
    box, tile = box[order], tile[order]
    parts = boxes[box]
    np.maximum(parts[:, :2], low[tile], out=parts[:, :2])
    np.minimum(parts[:, 2:], high[tile], out=parts[:, 2:])
    return BoxPlan(boxes, np.column_stack([box, tile, parts]), is_whole)


def _boxes(squares: Int64, file_tile: Int64, limit: Int64) -> Int64:
    """Cover the file tiles under some squares, each once, with boxes: int64 [m, 4]."""
    if not len(squares):
        return np.empty((0, 4), dtype=np.int64)
    first = squares[:, :2] // file_tile
    last = (squares[:, 2:] - 1) // file_tile  # inclusive
    per_box = np.maximum(1, BOX_PX // file_tile)
    origin = first.min(axis=0) // per_box * per_box
    columns, rows = ((last.max(axis=0) - origin) // per_box + 1) * per_box
    is_touched = np.zeros((rows, columns), dtype=np.bool_)
    for (x0, y0), (x1, y1) in zip((first - origin).tolist(), (last - origin).tolist(), strict=True):
        is_touched[y0 : y1 + 1, x0 : x1 + 1] = True
    wide, tall = per_box.tolist()
    cells = is_touched.reshape(rows // tall, tall, columns // wide, wide).swapaxes(1, 2)
    found = []
    for row, column in np.argwhere(cells.any(axis=(2, 3))).tolist():
        left, top = column * wide, row * tall
        for a, b, c, d in rectangles(cells[row, column]):
            found.append((left + a, top + b, left + c, top + d))
    offsets = np.tile(origin, 2) + np.array(found, dtype=np.int64)
    return np.minimum(offsets * np.tile(file_tile, 2), np.tile(limit, 2))


def rectangles(mask: Bool) -> list[tuple[int, int, int, int]]:
    """Cut the True cells of a small mask [h, w] into rectangles that do not overlap.

    Returns:
        (left, top, right, bottom) of each, right and bottom exclusive: runs along rows, joined with
        the rows below while those have the same run.
    """
    if mask.all():
        return [(0, 0, mask.shape[1], mask.shape[0])]
    done: list[tuple[int, int, int, int]] = []
    open_runs: dict[tuple[int, int], int] = {}
    for row in range(mask.shape[0] + 1):
        runs = _runs(mask[row]) if row < mask.shape[0] else []
        for run, top in list(open_runs.items()):
            if run not in runs:
                done.append((run[0], top, run[1], row))
                del open_runs[run]
        for run in runs:
            open_runs.setdefault(run, row)
    return sorted(done, key=lambda box: (box[1], box[0]))


def _runs(row: Bool) -> list[tuple[int, int]]:
    """Return (start, stop) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _pieces(boxes: Int64, squares: Int64, tiles: Int64) -> Int64:
    """Intersect boxes [m, 4] with the squares of some tiles: int64 [k, 6], box by box."""
    mine = squares[tiles]
    low = np.maximum(boxes[:, None, :2], mine[None, :, :2])  # [m, t, 2]
    high = np.minimum(boxes[:, None, 2:], mine[None, :, 2:])
    box, tile = np.nonzero(np.all(high > low, axis=2))
    return np.column_stack([box, tiles[tile], low[box, tile], high[box, tile]])
