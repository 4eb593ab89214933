"""Read tile features that other programs wrote, from what their files themselves say.

One function per layout of FORMATS. Geometry that a file does not record stays None; it is never
guessed. `.pt` files go through a child process (`modaltune.engine.untrusted_pt`).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.foreign_pt import read_pt
from modaltune.engine.foreign_zarr import read_spatialdata
from modaltune.engine.hdf5_files import (
    get_dataset,
    open_hdf5,
    plain_attributes,
    positive_number,
    read_array,
)
from modaltune.engine.tile_coords import TileCoords, coords_of, read_coords
from modaltune.engine.tile_features import (
    TileFeatures,
    check_base_mpp,
    check_coords,
    check_features,
    check_rows,
    check_same_mpp,
    choose_encoder,
    slide_name,
)

_PT_SUFFIXES = (".pt", ".pth")

_log = logging.getLogger(__name__)


def read_foreign(
    path: Path,
    *,
    base_mpp: float | None = None,
    encoder: str | None = None,
    coords_from: str | Path | None = None,
    allow_pt: bool = False,
) -> TileFeatures:
    """Read a feature file of any known producer but ourselves, by its layout.

    Args:
        path: HDF5 or `.pt` file, or the folder of a SpatialData zarr.
        base_mpp: Microns per level-0 px, where known from elsewhere.
        encoder: Which features to take where the file holds several.
        coords_from: Another HDF5 file of the slide to take the coordinates from.
        allow_pt: Read `.pt` (in a child process).

    Raises:
        FeatureFileError: Unknown layout, damage, or something missing; the message says what.
    """
    check_base_mpp(base_mpp)
    other = None if coords_from is None else read_coords(coords_from)
    if path.is_dir():
        feats = read_spatialdata(path, encoder=encoder)
    elif path.suffix.lower() in _PT_SUFFIXES:
        feats = read_pt(path, other, allow_pt=allow_pt)
    else:
        with open_hdf5(path) as file:
            feats = _read_hdf5(path, file, base_mpp, encoder)
    if other is not None:
        feats = _with_coords(feats, other)
    feats = _with_mpp(feats, base_mpp, path)
    check_rows(feats.features, feats.coords, path)
    _log.info("%s: %d tiles in %s layout", path, len(feats), feats.producer)
    return feats


def _read_hdf5(
    path: Path, file: h5py.File, base_mpp: float | None, encoder: str | None
) -> TileFeatures:
    """Tell HDF5 layouts apart by what is in them."""
    if "feats" in file and "coords" in file:
        return _read_stamp(path, file, base_mpp)
    if isinstance(file.get("features"), h5py.Group):
        return _read_atlaspatch(path, file, encoder)
    if "features" not in file and "coords" in file:
        raise FeatureFileError(
            f"{path} must hold features, got coordinates only (a tiling by TRIDENT or CLAM); give "
            "the feature file, and this one as coords_from if that lacks coordinates"
        )
    if "features" not in file:
        raise FeatureFileError(
            f"{path} must be a tile feature file of a known layout, got the datasets "
            f"{sorted(file)[:10]}"
        )
    if get_dataset(file, "features", path).ndim == 1:
        raise FeatureFileError(
            f"{path} must hold one feature row per tile, got a single vector: it is a slide "
            "embedding"
        )
    return _read_trident_or_clam(path, file)


def _read_trident_or_clam(path: Path, file: h5py.File) -> TileFeatures:
    """`features` beside `coords`: TRIDENT describes its tiling in attributes, CLAM does not."""
    place = coords_of(path, file)
    attributes = plain_attributes(file["features"])
    is_trident = bool(place.extra) or "encoder" in attributes
    return TileFeatures(
        slide=slide_name(path),
        features=check_features(read_array(file, "features", path), path),
        coords=place.coords,
        tile_px=place.tile_px,
        level0_tile_px=place.level0_tile_px,
        encoder=attributes.get("encoder") or _encoder_of_folder(path),
        level0_size=place.level0_size,
        overlap_px=place.overlap_px,
        extra={**place.extra, **attributes},
        producer="trident" if is_trident else "clam",
    )


def _read_atlaspatch(path: Path, file: h5py.File, encoder: str | None) -> TileFeatures:
    """One group of features per file, a dataset per encoder."""
    place = coords_of(path, file)
    name = choose_encoder(encoder, sorted(file["features"]), path)
    features = read_array(file["features"], name, path)
    return TileFeatures(
        slide=slide_name(path),
        features=check_features(features, path),
        coords=place.coords,
        tile_px=place.tile_px,
        level0_tile_px=place.level0_tile_px,
        encoder=name,
        level0_size=place.level0_size,
        overlap_px=place.overlap_px,
        extra=place.extra,
        producer="atlaspatch",
    )


def _read_stamp(path: Path, file: h5py.File, base_mpp: float | None) -> TileFeatures:
    """`feats` with coordinates in microns: level-0 px only exist with the slide's resolution."""
    attributes = plain_attributes(file)
    unit = attributes.get("unit")
    if unit != "um" or attributes.get("feat_type", "tile") != "tile":
        raise FeatureFileError(
            f"{path} must be a STAMP tile feature file with unit 'um', got unit {unit!r} and "
            f"feat_type {attributes.get('feat_type')!r}; extract with a current STAMP"
        )
    if base_mpp is None:
        raise FeatureFileError(
            f"{path} holds coordinates in microns (STAMP): base_mpp must be given to place them "
            "on level 0, got None; pass read_features(..., base_mpp=<microns per level-0 px>)"
        )
    # float64 before the division: a float32 quotient is off by a pixel on large slides.
    microns = np.asarray(read_array(file, "coords", path), dtype=np.float64)
    tile_um = positive_number(attributes, path, "tile_size_um")
    tile_px = positive_number(attributes, path, "tile_size_px")
    return TileFeatures(
        slide=slide_name(path),
        features=check_features(read_array(file, "feats", path), path),
        coords=check_coords(microns / base_mpp, path),
        tile_px=None if tile_px is None else round(tile_px),
        level0_tile_px=None if tile_um is None else round(tile_um / base_mpp),
        target_mpp=None if tile_um is None or tile_px is None else tile_um / tile_px,
        base_mpp=base_mpp,
        encoder=attributes.get("extractor"),
        extra=attributes,
        producer="stamp",
    )


def _with_coords(feats: TileFeatures, place: TileCoords) -> TileFeatures:
    """Take coordinates from another file, and from it the geometry that is not known yet."""
    return replace(
        feats,
        coords=place.coords,
        tile_px=feats.tile_px or place.tile_px,
        level0_tile_px=feats.level0_tile_px or place.level0_tile_px,
        level0_size=feats.level0_size or place.level0_size,
        overlap_px=feats.overlap_px or place.overlap_px,
    )


def _with_mpp(feats: TileFeatures, base_mpp: float | None, path: Path) -> TileFeatures:
    """Set the resolution known from elsewhere, and the tiles' own as far as it follows."""
    check_same_mpp(feats.base_mpp, base_mpp, path)
    base = feats.base_mpp or base_mpp
    target = feats.target_mpp
    if target is None and base is not None and feats.tile_px and feats.level0_tile_px:
        target = base * feats.level0_tile_px / feats.tile_px
    return replace(feats, base_mpp=base, target_mpp=target)


def _encoder_of_folder(path: Path) -> str | None:
    """TRIDENT names the encoder in the folder too: features_<encoder>/<slide>.h5."""
    folder = path.absolute().parent.name
    return folder.removeprefix("features_") if folder.startswith("features_") else None
