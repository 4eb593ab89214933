"""A grid of square tiles at a wanted resolution, and the tiles' pixels.

Geometry, all of it in level-0 pixels (x, y) with the origin at the slide's top left corner:

* Column k starts at round(k * (tile_px - overlap_px) * mpp / base_mpp), from float64 and not by
  adding up a rounded step: no drift, whatever the resolution. Where the pitch is fractional,
  neighbours therefore lie up to one pixel closer or further than the mean pitch. Whoever needs the
  tile's column or row takes `TileGrid.cells`; dividing coords by a rounded tile size and flooring
  is wrong by one for many of them.
* A tile's footprint is `tile_px_level0` = round(tile_px * mpp / base_mpp) pixels square.
* Only tiles whose footprint lies inside the slide exist: the strip at the right and bottom that is
  narrower than a tile is left out.
* Order: rows from top to bottom, in a row from left to right.

Pixels come from the coarsest level that is at most 1 % coarser than wanted. A level within 1 % of
the wanted mpp is read as it is; others are shrunk by averaging over areas. Nothing is enlarged
silently: a slide up to 5 % too coarse is enlarged with a warning, beyond that it is an error.

Source: METHOD 4.11 (256 px at 0.5 mpp, foreground >= 0.95); REQUIREMENTS 1, 2, 11.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import InputError, SlideError
from modaltune.engine.mask_shares import box_shares
from modaltune.engine.resample import resample_tile

if TYPE_CHECKING:
    from modaltune.engine.readers import SlideReader
    from modaltune.engine.tissue import TissueMask

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

logger = logging.getLogger(__name__)

SAME_MPP_TOLERANCE = 0.01
MAX_ENLARGEMENT = 0.05
SMALL_TISSUE_SHARE = 0.01
MAX_GRID_POSITIONS = 20_000_000
_SHARE_ROUNDING = 1e-9  # a share that is 0.95 on paper must not fail on its last bit


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one slide: where they are and how to read them.

    Attributes:
        coords: int64 [N, 2], level-0 px, top left corner (x, y) of each kept tile, row by row.
        tile_px: Side of a tile as delivered, in px.
        mpp: Microns per pixel of a delivered tile.
        base_mpp: Microns per level-0 pixel.
        level: Level that is read.
        read_px: Side of the square read at that level; resampled to `tile_px` where different.
        tile_px_level0: Side of a tile's footprint in level-0 px, rounded.
        foreground: float32 [N], share 0..1 of each kept tile's footprint that is tissue.
        dimensions: (width, height) of the slide in level-0 px.
        overlap_px: Overlap of neighbours in px of a delivered tile.
        shape: (rows, columns) of the whole grid, kept and dropped tiles.
        min_foreground: Least share of tissue of a kept tile, 0..1.
        reason: Why there are no tiles; empty where there are some.
    """

    coords: Int64
    tile_px: int
    mpp: float
    base_mpp: float
    level: int
    read_px: int
    tile_px_level0: int
    foreground: npt.NDArray[np.float32]
    dimensions: tuple[int, int]
    overlap_px: int = 0
    shape: tuple[int, int] = (0, 0)
    min_foreground: float = 0.0
    reason: str = ""

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def status(self) -> Literal["ok", "empty"]:
        """ "empty" where no tile was kept; `reason` says why."""
        return "ok" if len(self.coords) else "empty"

    @property
    def pitch_level0(self) -> float:
        """Exact distance of neighbouring tiles in level-0 px; coords are its rounded multiples."""
        return (self.tile_px - self.overlap_px) * self.mpp / self.base_mpp

    @property
    def cells(self) -> Int64:
        """int64 [N, 2], (column, row) of each kept tile in the grid."""
        return np.rint(self.coords / self.pitch_level0).astype(np.int64)

    def candidates(self) -> Int64:
        """int64 [rows * columns, 2], coords of the whole grid, kept and dropped, row by row."""
        rows, columns = self.shape
        x = _positions(columns, self.tile_px - self.overlap_px, self.mpp, self.base_mpp)
        y = _positions(rows, self.tile_px - self.overlap_px, self.mpp, self.base_mpp)
        return _pairs(x, y)


class ReadPlan(NamedTuple):
    """Which level to read, and the side in px of the square to read there."""

    level: int
    read_px: int


def tile_slide(
    slide: SlideReader,
    tissue: TissueMask,
    *,
    tile_px: int = 256,
    mpp: float = 0.5,
    min_foreground: float = 0.95,
    overlap_px: int = 0,
) -> TileGrid:
    """Lay a grid over a slide, and keep the tiles with enough tissue.

    Args:
        slide, tissue: An open slide with a known base mpp, and its mask of any resolution.
        tile_px, overlap_px: Side of a tile, >= 1, and overlap of neighbours, < tile_px; tile px.
        mpp: Microns per pixel of a tile, > 0.
        min_foreground: Least share of tissue, 0..1; 0 keeps the whole grid.

    Returns:
        The grid; without tiles, its `reason` says why. Under 1 % of tissue is logged as a warning.

    Raises:
        InputError: An argument breaks its rule.
        MissingMppError, SlideError: No base mpp, or one over 5 % coarser than `mpp`.
    """
    _check_options(tile_px, mpp, min_foreground, overlap_px)
    _check_tissue(slide, tissue)
    level, read_px = plan_read(slide, tile_px=tile_px, mpp=mpp)
    base_mpp, step_px = slide.mpp, tile_px - overlap_px
    footprint = int(np.rint(tile_px * mpp / base_mpp))
    _check_size(slide, step_px * mpp / base_mpp, tile_px)
    x, y = (_axis(side, footprint, step_px, mpp, base_mpp) for side in slide.dimensions)
    shares = _footprint_shares(tissue.mask, x, y, footprint, slide.dimensions)
    keep = shares.ravel() >= min_foreground - _SHARE_ROUNDING
    grid = TileGrid(
        coords=_pairs(x, y)[keep],
        tile_px=int(tile_px),
        mpp=float(mpp),
        base_mpp=base_mpp,
        level=level,
        read_px=read_px,
        tile_px_level0=footprint,
        foreground=shares.ravel()[keep].astype(np.float32),
        dimensions=slide.dimensions,
        overlap_px=int(overlap_px),
        shape=(len(y), len(x)),
        min_foreground=min_foreground,
        reason="" if keep.any() else _why_empty(slide, tissue, footprint, shares, min_foreground),
    )
    _log(slide, tissue, grid)
    return grid


def read_tiles(slide: SlideReader, grid: TileGrid) -> Iterator[npt.NDArray[np.uint8]]:
    """Read the tiles of a grid, in the order of its coords.

    Closing this generator closes the slide's own iterator too.

    Yields:
        uint8 [tile_px, tile_px, 3], RGB 0..255; each a new array.

    Raises:
        InputError: The grid belongs to another slide.
        SlideError: A region can't be read, or fewer came than were asked for.
    """
    if slide.dimensions != grid.dimensions:
        raise InputError(
            f"grid must belong to the slide: {slide.path.name} is {_size(slide.dimensions)}, "
            f"got a grid for {_size(grid.dimensions)}; tile it again"
        )
    if not len(grid):
        return
    regions = slide.read_regions(grid.coords, (grid.read_px, grid.read_px), grid.level)
    count = 0
    try:
        for region in regions:
            count += 1
            yield resample_tile(region, grid.tile_px)
    finally:
        close = getattr(regions, "close", None)
        if close is not None:
            close()
    if count != len(grid):
        raise SlideError(
            f"slide must deliver the {len(grid)} tiles asked for, got {count} from "
            f"{slide.path.name}; check the file, or try another --reader"
        )


def plan_read(slide: SlideReader, *, tile_px: int, mpp: float) -> ReadPlan:
    """Choose the level for tiles of `tile_px` at `mpp`.

    Returns:
        The coarsest level whose mpp is at most 1 % above `mpp`, with the side to read there:
        `tile_px` itself where the level is within 1 % of `mpp`.

    Raises:
        MissingMppError: The slide has no base mpp.
        SlideError: The slide is coarser than `mpp` by more than 5 %.
    """
    base_mpp = slide.mpp
    if base_mpp > mpp * (1 + MAX_ENLARGEMENT):
        raise SlideError(
            f"--mpp must not be finer than the slide, got {mpp:g} for {slide.path.name} with "
            f"{base_mpp:g} microns per pixel; pass --mpp {base_mpp:g} or coarser, or correct the "
            "slide's resolution with --base-mpp"
        )
    fitting = [
        (base_mpp * level.downsample, index)
        for index, level in enumerate(slide.levels)
        if base_mpp * level.downsample <= mpp * (1 + SAME_MPP_TOLERANCE)
    ]
    level_mpp, level = max(fitting, default=(base_mpp, 0))
    if abs(level_mpp / mpp - 1) <= SAME_MPP_TOLERANCE:
        return ReadPlan(level, tile_px)
    if level_mpp > mpp:
        logger.warning(
            "%s: tiles are enlarged by %.1f %%: the slide has %g mpp, %g is wanted",
            slide.path.name, 100 * (level_mpp / mpp - 1), level_mpp, mpp,
        )  # fmt: skip
    return ReadPlan(level, max(1, int(np.rint(tile_px * mpp / level_mpp))))


def _footprint_shares(
    mask: npt.NDArray[np.bool_], x: Int64, y: Int64, footprint: int, dimensions: tuple[int, int]
) -> Float64:
    """Tissue share of every grid position: float64 [rows, columns]."""
    if not len(x) or not len(y) or not mask.size:
        return np.zeros((len(y), len(x)))
    # The mask spans the slide exactly; its sides are rounded, so each axis has its own scale.
    scale_x = mask.shape[1] / dimensions[0]
    scale_y = mask.shape[0] / dimensions[1]
    return box_shares(
        mask, x * scale_x, (x + footprint) * scale_x, y * scale_y, (y + footprint) * scale_y
    )


def _positions(count: int, step_px: int, mpp: float, base_mpp: float) -> Int64:
    """The first `count` tile positions along one axis, int64 [count], level-0 px."""
    return np.rint(np.arange(count, dtype=np.float64) * step_px * mpp / base_mpp).astype(np.int64)


def _axis(side: int, footprint: int, step_px: int, mpp: float, base_mpp: float) -> Int64:
    """Positions along one axis of the tiles that lie inside 0..side."""
    pitch = step_px * mpp / base_mpp
    upper = max(0, math.floor((side - footprint) / pitch) + 2)
    positions = _positions(upper, step_px, mpp, base_mpp)
    return positions[positions + footprint <= side]


def _pairs(x: Int64, y: Int64) -> Int64:
    """All (x, y), row by row: int64 [len(y) * len(x), 2]."""
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)


def _why_empty(
    slide: SlideReader, tissue: TissueMask, footprint: int, shares: Float64, least: float
) -> str:
    """Say why a grid has no tiles."""
    if not shares.size:
        tile = _size((footprint, footprint))
        return f"the slide ({_size(slide.dimensions)}) is smaller than one tile ({tile} at level 0)"
    if not tissue.mask.any():
        mask_size = _size((tissue.mask.shape[1], tissue.mask.shape[0]))
        return f"no tissue found (method {tissue.method}, mask of {mask_size})"
    return (
        f"no tile has >= {100 * least:g} % tissue (the best of {shares.size} has "
        f"{100 * math.floor(1000 * shares.max()) / 1000:g} %)"
    )


def _log(slide: SlideReader, tissue: TissueMask, grid: TileGrid) -> None:
    """Report the grid; an empty one and a small share of tissue are warnings."""
    name = slide.path.name
    if grid.status == "empty":
        logger.warning("%s: no tiles: %s", name, grid.reason)
    elif tissue.share < SMALL_TISSUE_SHARE:
        logger.warning("%s: only %.2f %% of the slide is tissue", name, 100 * tissue.share)
    logger.info(
        "%s: %d of %d tiles of %d px at %g mpp (level %d, read at %d px)",
        name, len(grid), grid.shape[0] * grid.shape[1], grid.tile_px, grid.mpp, grid.level,
        grid.read_px,
    )  # fmt: skip


def _check_options(tile_px: int, mpp: float, min_foreground: float, overlap_px: int) -> None:
    """Refuse options outside their range."""
    for name, value in (("tile_px", tile_px), ("overlap_px", overlap_px)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise InputError(f"{name} must be a whole number of px, got {value!r}; pass an int")
    if tile_px < 1:
        raise InputError(f"tile_px must be at least 1, got {tile_px}; the default is 256")
    if not 0 <= overlap_px < tile_px:
        raise InputError(
            f"overlap_px must be at least 0 and less than tile_px ({tile_px}), got {overlap_px}; "
            "the default is 0"
        )
    if not (math.isfinite(mpp) and mpp > 0):
        raise InputError(f"mpp must be a finite number > 0, got {mpp!r}; the default is 0.5")
    if not 0.0 <= min_foreground <= 1.0:  # false for NaN too
        raise InputError(
            f"min_foreground must be in 0..1, got {min_foreground!r}; the default is 0.95"
        )


def _check_tissue(slide: SlideReader, tissue: TissueMask) -> None:
    """Refuse a mask that does not span the slide."""
    sides = (tissue.mask.shape[1] * tissue.downsample, tissue.mask.shape[0] * tissue.downsample)
    slack = tissue.downsample + 1  # a side of the mask is rounded to whole mask pixels
    if any(abs(m - s) > slack for m, s in zip(sides, slide.dimensions, strict=True)):
        raise InputError(
            f"tissue must span {slide.path.name} ({_size(slide.dimensions)}), got a mask of "
            f"{sides[0]:.0f} x {sides[1]:.0f} px; find the tissue of this slide"
        )


def _check_size(slide: SlideReader, pitch: float, tile_px: int) -> None:
    """Refuse a grid too fine to hold, before anything is allocated."""
    count = math.prod(side / pitch for side in slide.dimensions)
    if count > MAX_GRID_POSITIONS:
        raise InputError(
            f"tile_px must give at most {MAX_GRID_POSITIONS:,} grid positions, got {tile_px} and "
            f"about {count:,.0f} on {slide.path.name}; use larger tiles or less overlap"
        )


def _size(dimensions: tuple[int, int]) -> str:
    """Write a (width, height) for a message."""
    return f"{dimensions[0]} x {dimensions[1]} px"
