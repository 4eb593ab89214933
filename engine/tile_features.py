"""One slide's tile features in memory, and the checks every producer's arrays go through."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import FeatureFileError

FloatArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

# Beyond 2^53 a float64 coordinate no longer names one pixel; no slide comes near.
_MAX_COORD_PX = float(2**53)


@dataclass(eq=False)
class TileFeatures:
    """Features of the tiles of one slide, where the tiles lie, and where all of it came from.

    What a foreign file does not say is None: nothing is guessed. Fill it with
    `dataclasses.replace` where it is known from elsewhere.

    Attributes:
        slide: Slide id, the stem of the slide's file name.
        features: [N, D] float16 or float32; may be a read-only memory map (`open_features`).
        coords: [N, 2] int64, (x, y) of each tile's top-left corner in level-0 px.
        tile_px: Side of a tile as the encoder saw it, in px at `target_mpp`.
        level0_tile_px: Side of a tile's footprint in level-0 px.
        target_mpp: Microns per pixel of the tiles.
        base_mpp: Microns per pixel of level 0.
        encoder: Name of the tile encoder.
        encoder_sha256: Hash of the encoder's weights.
        level0_size: (width, height) of the slide in level-0 px.
        reader: What decoded the slide.
        extra: Further provenance, JSON values.
        overlap_px: Overlap of neighbouring tiles, px at `target_mpp`.
        recipe: Settings the features depend on (see `modaltune.engine.store.feature_recipe`).
        empty_reason: Why there are no tiles; given exactly when N is 0.
        producer: Which program's layout the features were read from.
    """

    slide: str
    features: FloatArray
    coords: Int64Array
    tile_px: int | None = None
    level0_tile_px: int | None = None
    target_mpp: float | None = None
    base_mpp: float | None = None
    encoder: str | None = None
    encoder_sha256: str | None = None
    level0_size: tuple[int, int] | None = None
    reader: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    overlap_px: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    empty_reason: str | None = None
    producer: str = "modaltune"

    @property
    def width(self) -> int:
        """Width D of the features."""
        return int(self.features.shape[1])

    def __len__(self) -> int:
        return int(self.features.shape[0])


def check_features(
    array: npt.NDArray[Any], source: str | Path, *, finite: bool = True
) -> FloatArray:
    """Check a feature matrix and bring it to float16 or float32.

    Args:
        array: [N, D] of any float type; float16 and float32 keep their type, wider ones narrow.
        source: The file, for messages.
        finite: Look at every value for NaN and infinities.

    Returns:
        [N, D] float16 or float32, little-endian.

    Raises:
        FeatureFileError: Not a float matrix, no columns, or NaN or infinite values in it.
    """
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] < 1:
        raise FeatureFileError(
            f"features of {source} must be a float matrix [tiles, width], got {array.dtype} "
            f"{list(array.shape)}; a slide embedding or a label table is not a tile feature file"
        )
    if array.dtype.itemsize > 4:
        array = array.astype(np.float32)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if finite:
        _check_finite(array, source)
    return array


def _check_finite(array: npt.NDArray[Any], source: str | Path) -> None:
    """Refuse NaN and infinities, counting them; blocks of rows keep the boolean mask small."""
    bad_values = bad_rows = 0
    for start in range(0, len(array), 4096):
        bad = ~np.isfinite(array[start : start + 4096])
        if bad.any():
            bad_values += int(bad.sum())
            bad_rows += int(bad.any(axis=1).sum())
    if bad_values:
        raise FeatureFileError(
            f"features of {source} must be finite, got {bad_values} NaN or infinite values in "
            f"{bad_rows} of {len(array)} tiles; extract the slide's features again"
        )


def check_coords(array: npt.NDArray[Any], source: str | Path) -> Int64Array:
    """Check tile coordinates and bring them to int64.

    Args:
        array: [N, 2] of integers, or of floats of at least 32 bits (rounded), in level-0 px.
        source: The file, for messages.

    Returns:
        [N, 2] int64.

    Raises:
        FeatureFileError: Wrong shape or type; float16, which cannot hold level-0 px; not finite.
    """
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise FeatureFileError(
            f"coords of {source} must be numbers [tiles, 2], got {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind in "iu":
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise FeatureFileError(f"coords of {source} must fit int64, got {array.max()}")
        return array.astype(np.int64)
    if array.dtype.itemsize < 4:
        raise FeatureFileError(
            f"coords of {source} must be integers or float32 / float64, got {array.dtype}, which "
            "is exact only up to 2,048 px; take the coordinates from the tiling instead "
            "(coords_from=...)"
        )
    with np.errstate(invalid="ignore"):
        good = np.isfinite(array) & (np.abs(array) < _MAX_COORD_PX)
    if not good.all():
        raise FeatureFileError(
            f"coords of {source} must be finite level-0 pixels, got {int((~good).sum())} values "
            "that are NaN, infinite or beyond 2^53"
        )
    return np.rint(array).astype(np.int64)


def check_rows(features: npt.NDArray[Any], coords: npt.NDArray[Any], source: str | Path) -> None:
    """Refuse features and coordinates of different length.

    Raises:
        FeatureFileError: The row counts differ.
    """
    if len(features) != len(coords):
        raise FeatureFileError(
            f"features and coords of {source} must have one row per tile each, got "
            f"{len(features)} rows of features and {len(coords)} of coords"
        )


def check_width(features: npt.NDArray[Any], expected: int | None, source: str | Path) -> None:
    """Refuse features of another width than the encoder or model expects.

    Raises:
        FeatureFileError: The width is not `expected` (None accepts any).
    """
    if expected is not None and features.shape[1] != expected:
        raise FeatureFileError(
            f"features of {source} must have width {expected}, got {features.shape[1]}; they come "
            "from another tile encoder: choose the matching model, or extract the features again"
        )


def check_base_mpp(base_mpp: float | None) -> None:
    """Refuse a base resolution that no slide has (REQUIREMENTS 1); None is not given.

    Raises:
        FeatureFileError: Outside 0.05..5 microns per pixel.
    """
    if base_mpp is not None and not 0.05 <= base_mpp <= 5:
        raise FeatureFileError(f"base_mpp must be within 0.05..5 microns per px, got {base_mpp}")


def check_same_mpp(recorded: float | None, given: float | None, source: str | Path) -> None:
    """Refuse a base resolution that contradicts the one in the file by more than 1 %.

    Raises:
        FeatureFileError: Both are known and differ.
    """
    if recorded is None or given is None or abs(recorded - given) <= 0.01 * recorded:
        return
    raise FeatureFileError(
        f"base_mpp must be that of {source}, {recorded:g}, got {given:g}; leave it out, or extract "
        "the slide's features again"
    )


def choose_encoder(wanted: str | None, names: list[str], source: str | Path) -> str:
    """Choose one of several feature sets; without a wish there must be just one.

    Raises:
        FeatureFileError: The wish is not there, or there is no wish and not exactly one set.
    """
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        raise FeatureFileError(
            f"encoder must be one of those in {source}, {names}, got {wanted!r}; pass "
            "read_features(..., encoder=...)"
        )
    return wanted


def slide_name(path: Path) -> str:
    """Name the slide by its feature file, without what producers append to it."""
    for ending in ("_featvec", "_patches"):
        if path.stem.endswith(ending):
            return path.stem.removesuffix(ending)
    return path.stem
