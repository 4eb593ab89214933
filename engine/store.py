"""Feature files: write ours whole or not at all, read anybody's, tell what is already done.

Ours is TRIDENT's layout (a TRIDENT reader needs nothing new) with provenance at the root:

=======================  =====================================================================
`/features`              [N, D] float16 or float32; attributes `name`, `savetodir`, `encoder`
`/coords`                [N, 2] int64, level-0 px; attributes `patch_size`,
                         `patch_size_level0`, `level0_magnification`, `target_magnification`
                         (10 / mpp), `overlap`, `name`, `savetodir`, `level0_width`,
                         `level0_height`
root attributes          `format`, `format_version`, `software_version`, `status` ("done" or
                         "empty"), `status_reason`, `slide`, `source_mpp`, `target_mpp`,
                         `encoder`, `encoder_sha256`, `reader`, `payload_sha256`, `recipe` and
                         `extra` (JSON)
=======================  =====================================================================

The payload checksum is SHA-256 over, for features and then coords: the line
`<name> <dtype> <rows>x<columns>\\n` in ASCII (dtype as numpy's `<f4`) and the row-major bytes.
Both datasets lie contiguous and uncompressed in the file, so that rows can be mapped from it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from modaltune.engine.atomic import atomic_path, reserve
from modaltune.engine.errors import FeatureFileError
from modaltune.engine.foreign_features import read_foreign
from modaltune.engine.own_features import FORMAT, FileFacts, own_header, payload_sha256, read_own
from modaltune.engine.recipes import (
    FORMAT_VERSION,
    differences,
    feature_recipe,
    plain_json,
    recipe_facts,
)
from modaltune.engine.tile_features import (
    TileFeatures,
    check_base_mpp,
    check_coords,
    check_features,
    check_rows,
    check_same_mpp,
    check_width,
)

__all__ = [
    "FORMAT_VERSION",
    "TileFeatures",
    "feature_recipe",
    "is_complete",
    "open_features",
    "payload_sha256",
    "read_features",
    "record_features",
    "write_features",
]

# HDF5 keeps attributes below 64 KiB.
_MAX_ATTRIBUTE_BYTES = 64_000
_REQUIRED = (
    "tile_px",
    "level0_tile_px",
    "target_mpp",
    "base_mpp",
    "encoder",
    "encoder_sha256",
    "level0_size",
    "reader",
)

Completeness = (
    Literal["done", "empty", "missing"]
    | tuple[Literal["different"], list[str]]
    | tuple[Literal["damaged"], str]
)

_log = logging.getLogger(__name__)


def write_features(
    path: str | Path, feats: TileFeatures, *, dtype: Literal["float32", "float16"] = "float32"
) -> Path:
    """Write one slide's features; the file appears under its name complete, or not at all.

    Args:
        path: File to write, `features_<encoder>/<slide>.h5`; an existing one is replaced.
        feats: Features and their full provenance. Zero tiles need `empty_reason`.
        dtype: Type the features are stored as. Coordinates are int64 always.

    Returns:
        The path.

    Raises:
        FeatureFileError: Provenance is missing or contradicts the recipe, or the arrays are not
            finite, do not fit the type, or differ in length.
        DiskFullError: There is no room for the file.
    """
    record_features(path, feats, dtype=dtype)
    return Path(path)


def record_features(
    path: str | Path, feats: TileFeatures, *, dtype: Literal["float32", "float16"] = "float32"
) -> FileFacts:
    """Do what `write_features` does, and return what a ledger records of the file."""
    path = Path(path)
    features, coords = _check_payload(path, feats, dtype)
    root = _root_attributes(path, feats, features, coords)
    base_mpp, target_mpp = float(root["source_mpp"]), float(root["target_mpp"])
    level0_width, level0_height = feats.level0_size or (0, 0)
    # Only the folder's own name: a full path would tell where, and make copies differ.
    naming = {"name": feats.slide, "savetodir": path.absolute().parent.name}
    tiling = {
        "patch_size": int(feats.tile_px or 0),
        "patch_size_level0": int(feats.level0_tile_px or 0),
        "level0_magnification": 10.0 / base_mpp,
        "target_magnification": 10.0 / target_mpp,
        "overlap": int(feats.overlap_px),
        "level0_width": int(level0_width),
        "level0_height": int(level0_height),
    }
    with atomic_path(path) as temp:
        # HDF5 that runs out of room half-way leaves handles behind; a file system is asked first.
        reserve(temp, features.nbytes + coords.nbytes + _MAX_ATTRIBUTE_BYTES)
        with h5py.File(temp, "w") as file:
            file.attrs.update(root)
            file.create_dataset("features", data=features).attrs.update(
                {**naming, "encoder": feats.encoder}
            )
            file.create_dataset("coords", data=coords).attrs.update({**tiling, **naming})
    return FileFacts(
        len(features), root["status_reason"], root["reader"], str(root["payload_sha256"])
    )


def read_features(
    path: str | Path,
    *,
    verify: bool = True,
    expect_width: int | None = None,
    base_mpp: float | None = None,
    encoder: str | None = None,
    coords_from: str | Path | None = None,
    allow_pt: bool = False,
) -> TileFeatures:
    """Read the tile features of one slide, whoever wrote them.

    Known layouts: ours, TRIDENT, CLAM (h5; pt), ModalTune's published `_featvec.pt`, STAMP,
    AtlasPatch, slide2vec, LazySlide / wsidata. What a file does not say stays None.

    Args:
        path: Feature file, or the folder of a SpatialData zarr.
        verify: Check the payload checksum of our files.
        expect_width: Width the features must have.
        base_mpp: Microns per level-0 px, for files that don't record it; STAMP files need it.
        encoder: Which features to take where a file holds several (AtlasPatch, LazySlide).
        coords_from: Another file of the same slide to take the coordinates from.
        allow_pt: Read a `.pt` file, in a child process. Importers only.

    Returns:
        The features, finite, with int64 level-0 coordinates.

    Raises:
        FeatureFileError: The file is partial, foreign, damaged, of another width, or lacks
            something that only an argument can supply; the message names it.
    """
    path = Path(path)
    if path.is_file() and h5py.is_hdf5(path) and own_header(path) is not None:
        feats = read_own(path, verify=verify)
        check_same_mpp(feats.base_mpp, base_mpp, path)
    else:
        feats = read_foreign(
            path, base_mpp=base_mpp, encoder=encoder, coords_from=coords_from, allow_pt=allow_pt
        )
    check_width(feats.features, expect_width, path)
    return feats


def open_features(
    path: str | Path, *, verify: bool = False, expect_width: int | None = None
) -> TileFeatures:
    """Open one of our feature files with its features mapped from disk, not read.

    `.features[rows]` then reads only those rows; sorted rows read fastest. Coordinates are read.

    Args:
        path: A file written by `write_features`.
        verify: Check the payload checksum, which reads the file once.
        expect_width: Width the features must have.

    Returns:
        The features; `.features` is a read-only memory map.

    Raises:
        FeatureFileError: Not our file, or partial, damaged or of another width.
    """
    path = Path(path)
    feats = read_own(path, verify=verify, mapped=True)
    check_width(feats.features, expect_width, path)
    return feats


def is_complete(
    path: str | Path, recipe: Mapping[str, Any], *, verify: bool = True
) -> Completeness:
    """Tell whether a slide's features are there, whole, and made by this very recipe.

    Nothing is changed on disk, and a difference is reported, never overwritten.

    Args:
        path: Where the slide's feature file would be.
        recipe: What the features must have been made by (`feature_recipe`).
        verify: Check the payload checksum too; without it, structure and recipe only.

    Returns:
        "done", "empty" (whole, and says that there are no tiles), "missing",
        ("different", names of the settings that differ), or ("damaged", reason). A partial or
        foreign file is damaged.
    """
    path = Path(path)
    wanted = {"format_version": FORMAT_VERSION, **plain_json(recipe, "recipe")}
    if not path.exists():
        return "missing"
    try:
        header = own_header(path)
        if header is not None and header.get("format_version") != wanted["format_version"]:
            # Another version's other fields can't be relied on: this difference says it all.
            return ("different", ["format_version"])
        feats = read_own(path, verify=False, mapped=True)
        stored = {**feats.recipe, **recipe_facts(feats, feats.features.dtype.name)}
        differing = differences(wanted, stored, wanted.keys() | feats.recipe.keys())
        for key, (want, have) in differing.items():
            _log.warning("%s was made with %s = %s, this run wants %s", path, key, have, want)
        if differing:
            return ("different", list(differing))
        if verify:
            read_own(path, verify=True, mapped=True)
    except FeatureFileError as error:
        return ("damaged", str(error))
    return "done" if len(feats) else "empty"


def _check_payload(
    path: Path, feats: TileFeatures, dtype: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Bring the arrays to the stored types, refusing what would not survive it."""
    if dtype not in ("float32", "float16"):
        raise FeatureFileError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
    features = check_features(np.asarray(feats.features), path)
    coords = check_coords(np.asarray(feats.coords), path)
    check_rows(features, coords, path)
    if dtype == "float16" and features.size:
        largest = max(abs(float(features.max())), abs(float(features.min())))
        if largest > float(np.finfo(np.float16).max):
            raise FeatureFileError(
                f"features of {path} must be within ±65,504 to be stored as float16, got "
                f"{largest:g}; store them as float32"
            )
    return np.ascontiguousarray(features, dtype=f"<{np.dtype(dtype).str[1:]}"), coords


def _root_attributes(
    path: Path, feats: TileFeatures, features: npt.NDArray[Any], coords: npt.NDArray[Any]
) -> dict[str, Any]:
    """Put the provenance together, refusing gaps and contradictions."""
    missing = [name for name in _REQUIRED if not getattr(feats, name)]
    if missing:
        raise FeatureFileError(
            f"{path} must record {', '.join(missing)}, got none; set them with "
            "dataclasses.replace(features, ...)"
        )
    check_base_mpp(feats.base_mpp)
    if (len(features) == 0) != bool(feats.empty_reason):
        raise FeatureFileError(
            f"empty_reason of {path} must be given exactly when there are no tiles, got "
            f"{feats.empty_reason!r} with {len(features)} tiles"
        )
    recipe = plain_json(dict(feats.recipe), "recipe")
    facts = recipe_facts(feats, features.dtype.name)
    wrong = differences(recipe, facts, recipe.keys() & facts.keys())
    if wrong:
        raise FeatureFileError(
            f"recipe of {path} must agree with the features, got "
            + ", ".join(f"{key} = {said!r} for {fact!r}" for key, (said, fact) in wrong.items())
        )
    root = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "software_version": _software_version(),
        "status": "done" if len(features) else "empty",
        "status_reason": feats.empty_reason or "",
        "slide": feats.slide,
        "source_mpp": float(feats.base_mpp or 0),
        "target_mpp": float(feats.target_mpp or 0),
        "encoder": feats.encoder,
        "encoder_sha256": feats.encoder_sha256,
        "reader": feats.reader,
        "payload_sha256": payload_sha256(features, coords),
        "recipe": json.dumps({**recipe, "format_version": FORMAT_VERSION}, sort_keys=True),
        "extra": json.dumps(plain_json(dict(feats.extra), "extra"), sort_keys=True),
    }
    for name, value in root.items():
        if isinstance(value, str):
            _check_text(path, name, value)
    return root


def _check_text(path: Path, name: str, text: str) -> None:
    """Refuse text that an HDF5 attribute cannot hold."""
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if "\0" in text or (not text.isascii() and text != text.encode(errors="replace").decode()):
        raise FeatureFileError(f"{name} of {path} must be text without NUL, got {text!r}")
    if size > _MAX_ATTRIBUTE_BYTES:
        raise FeatureFileError(
            f"{name} of {path} must be below {_MAX_ATTRIBUTE_BYTES} bytes, got {size}"
        )


def _software_version() -> str:
    try:
        return importlib.metadata.version("modaltune")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
