"""Read tile features from `.pt` files: untrusted, so only through a child process."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.hdf5_files import positive_number
from modaltune.engine.tile_coords import TileCoords, read_coords
from modaltune.engine.tile_features import (
    FloatArray,
    Int64Array,
    TileFeatures,
    check_coords,
    check_features,
    slide_name,
)
from modaltune.engine.untrusted_pt import UntrustedPtError, load_pt_tensors

# Coordinates are small; more than this in one archive is not a tiling.
_MAX_NPZ_BYTES = 1 << 30


def read_pt(path: Path, other: TileCoords | None, *, allow_pt: bool) -> TileFeatures:
    """Read published ModalTune features (a dict), or a bare tensor by CLAM or slide2vec.

    Args:
        path: The `.pt` file.
        other: Coordinates from elsewhere, used instead of the file's or its neighbours'.
        allow_pt: The caller is an importer and means it.

    Raises:
        FeatureFileError: Not allowed, refused, or without coordinates.
    """
    if not path.is_file():
        raise FeatureFileError(f"the feature file must exist, got nothing at {path}")
    if not allow_pt:
        raise FeatureFileError(
            f"{path} must be HDF5, got a .pt file, which may carry code; import it from a trusted "
            "place with read_features(..., allow_pt=True), which reads it in a child process"
        )
    try:
        tensors = load_pt_tensors(path)
    except UntrustedPtError as error:
        raise FeatureFileError(
            f"{path} must hold tensors and nothing else, got a file that was refused: {error}"
        ) from error
    if "" in tensors:
        return _read_bare_tensor(path, check_features(tensors[""], path), other)
    features = tensors.get("features", tensors.get("feats"))
    if features is None or (other is None and "coords" not in tensors):
        raise FeatureFileError(
            f"{path} must hold the tensors 'features' and 'coords', got {sorted(tensors)}; "
            "coordinates can come from another file (coords_from=...)"
        )
    coords = other.coords if other is not None else check_coords(tensors["coords"], path)
    return TileFeatures(
        slide=slide_name(path),
        features=check_features(features, path),
        coords=coords,
        producer="modaltune_reference",
    )


def _read_bare_tensor(path: Path, features: FloatArray, other: TileCoords | None) -> TileFeatures:
    """A bare tensor has its coordinates in another file, where its producer puts them."""
    name = path.stem
    description = path.with_name(f"{name}.meta.json")
    if description.is_file():
        attributes = _read_json(description)
        tiles = path.parent.parent / "tiles" / f"{name}.coordinates.npz"
        coords = other.coords if other is not None else _slide2vec_coords(tiles)
        footprint = positive_number(attributes, description, "tile_size_lv0")
        return TileFeatures(
            slide=name,
            features=features,
            coords=coords,
            level0_tile_px=None if footprint is None else round(footprint),
            encoder=attributes.get("encoder_name"),
            extra=attributes,
            producer="slide2vec",
        )
    if other is None:
        beside = path.parent.parent / "h5_files" / f"{name}.h5"
        if not beside.is_file():
            raise FeatureFileError(
                f"{path} holds features without coordinates: coords_from must name a file that "
                f"has them (CLAM: h5_files/{name}.h5 or patches/{name}.h5), got None"
            )
        other = read_coords(beside)
    return TileFeatures(
        slide=slide_name(path), features=features, coords=other.coords, producer="clam"
    )


def _slide2vec_coords(path: Path) -> Int64Array:
    """Read x, y and the feature row each tile belongs to."""
    if not path.is_file():
        raise FeatureFileError(
            f"coordinates of slide2vec features must lie at {path}, got no file; copy the tiles "
            "folder too, or give coords_from"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        if declared > _MAX_NPZ_BYTES:
            raise ValueError(f"it declares {declared} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            x, y, row = (np.asarray(arrays[key]) for key in ("x", "y", "tile_index"))
        corners = check_coords(np.stack([x, y], axis=1), path)
    except FeatureFileError:
        raise
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FeatureFileError(f"{path} must hold x, y and tile_index, got {error}") from error
    if not np.array_equal(np.sort(row), np.arange(len(corners))):
        raise FeatureFileError(
            f"tile_index of {path} must number the {len(corners)} tiles from 0 without gaps, got "
            "gaps or repeats"
        )
    coords = np.empty_like(corners)
    coords[row] = corners
    return coords


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FeatureFileError(f"{path} must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise FeatureFileError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value
