"""Where the tiles of a slide lie, read from the HDF5 tilings of several producers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.hdf5_files import (
    find_attribute,
    open_hdf5,
    plain_attributes,
    positive_number,
    read_array,
)
from modaltune.engine.tile_features import Int64Array, check_coords


@dataclass(eq=False)
class TileCoords:
    """Where the tiles of a slide lie, as a file without features says; None is not recorded.

    Attributes:
        coords: [N, 2] int64, top-left corners in level-0 px.
        tile_px: Side of a tile at the target resolution, px.
        level0_tile_px: Side of a tile's footprint in level-0 px.
        level0_size: (width, height) of the slide in level-0 px.
        overlap_px: Overlap at the target resolution, px.
        extra: All attributes of the file.
    """

    coords: Int64Array
    tile_px: int | None = None
    level0_tile_px: int | None = None
    level0_size: tuple[int, int] | None = None
    overlap_px: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def read_coords(path: str | Path) -> TileCoords:
    """Read tile coordinates from an HDF5 file with `coords` in level-0 px.

    TRIDENT's and CLAM's `patches/<slide>.h5`, TRIDENT's and our feature files, CLAM's h5 files.

    Raises:
        FeatureFileError: Damaged, or without such coordinates.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        if "unit" in file.attrs:
            raise FeatureFileError(
                f"coords of {path} must be in level-0 px, got unit {file.attrs['unit']!r}; read "
                "the file with read_features(..., base_mpp=...)"
            )
        return coords_of(path, file)


def coords_of(path: Path, file: h5py.File) -> TileCoords:
    """Read `coords` of an open file with the geometry that TRIDENT, CLAM and AtlasPatch record.

    Raises:
        FeatureFileError: No such dataset, or coordinates or sizes that cannot be.
    """
    table = read_array(file, "coords", path)
    attributes = {**plain_attributes(file), **plain_attributes(file["coords"])}
    # AtlasPatch: x, y, read width, read height, level.
    corners = table[:, :2] if table.ndim == 2 and table.shape[1] == 5 else table

    def number(*names: str) -> float | None:
        return positive_number(attributes, path, *names)

    tile, footprint = number("patch_size"), number("patch_size_level0")
    source, target = number("level0_magnification"), number("target_magnification")
    downsample = number("downsample")
    if footprint is None and tile is not None:
        if source is not None and target is not None:
            footprint = tile * source / target
        elif downsample is not None:
            footprint = tile * downsample
    width, height = number("level0_width"), number("level0_height")
    return TileCoords(
        coords=check_coords(corners, path),
        tile_px=None if tile is None else round(tile),
        level0_tile_px=None if footprint is None else round(footprint),
        level0_size=None if width is None or height is None else (round(width), round(height)),
        overlap_px=_overlap(path, attributes),
        extra=attributes,
    )


def _overlap(path: Path, attributes: Mapping[str, Any]) -> int:
    """Read the overlap, the one size that may well be zero."""
    value = find_attribute(attributes, "overlap")
    if value in (None, 0):
        return 0
    return round(positive_number({"overlap": value}, path, "overlap") or 0)
