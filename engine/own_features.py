"""Our own feature files, the reading side; `modaltune.engine.store` says what is in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.hdf5_files import get_dataset, open_hdf5, read_array
from modaltune.engine.recipes import FORMAT_VERSION
from modaltune.engine.tile_features import (
    FloatArray,
    TileFeatures,
    check_coords,
    check_features,
    check_rows,
)

FORMAT = "modaltune.tile_features"


def payload_sha256(features: npt.NDArray[Any], coords: npt.NDArray[Any]) -> str:
    """Hash features [N, D] and coords [N, 2]: bytes, types and shapes (see the module's text)."""
    digest = hashlib.sha256()
    for name, array in (("features", features), ("coords", coords)):
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        rows, columns = little.shape
        digest.update(f"{name} {little.dtype.str} {rows}x{columns}\n".encode("ascii"))
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def own_header(path: Path) -> dict[str, Any] | None:
    """Read the root attributes of one of our files; None for a readable HDF5 file of others.

    Raises:
        FeatureFileError: It is not a readable HDF5 file.
    """
    with open_hdf5(path) as file:
        header = _raw_attributes(file)
    return header if header.get("format") == FORMAT else None


class FileFacts(NamedTuple):
    """What a ledger records of a whole feature file.

    Attributes:
        tiles: Number of tiles.
        reason: Why there are none.
        reader: What decoded the slide.
        payload_sha256: Checksum of features and coordinates.
    """

    tiles: int
    reason: str
    reader: str
    payload_sha256: str


def file_facts(path: Path) -> FileFacts:
    """Read the facts of one of our feature files off its header; the payload is not looked at.

    Raises:
        FeatureFileError: It is not a readable feature file of ours.
    """
    with open_hdf5(path) as file:
        if file.attrs.get("format") != FORMAT:
            raise FeatureFileError(f"{path} must be a ModalTune feature file, got a foreign one")
        said = (str(file.attrs[name]) for name in ("status_reason", "reader", "payload_sha256"))
        return FileFacts(len(get_dataset(file, "features", path)), *said)


def read_own(path: Path, *, verify: bool, mapped: bool = False) -> TileFeatures:
    """Read one of our feature files.

    Args:
        path: The file.
        verify: Compare the payload with its checksum.
        mapped: Map the features from disk instead of reading them; they are then looked at for
            NaN only where `verify` reads them anyway.

    Raises:
        FeatureFileError: Not ours, of a later version, partial or damaged.
    """
    with open_hdf5(path) as file:
        root = _raw_attributes(file)
        if root.get("format") != FORMAT:
            raise FeatureFileError(
                f"{path} must be a ModalTune feature file, got a foreign or partial one (no root "
                f"attribute format = {FORMAT!r}); move it away or read it with read_features"
            )
        if root.get("format_version") != FORMAT_VERSION:
            raise FeatureFileError(
                f"{path} must have format version {FORMAT_VERSION}, got "
                f"{root.get('format_version')}; read it with the ModalTune that wrote it "
                f"({root.get('software_version')}), or extract again"
            )
        coords = check_coords(read_array(file, "coords", path), path)
        tiling = _raw_attributes(file["coords"])
        dataset = get_dataset(file, "features", path)
        features = _map(dataset, path) if mapped else read_array(file, "features", path)
        feats = _assemble(root, tiling, check_features(features, path, finite=False), coords)
    check_rows(feats.features, coords, path)
    _check_status(path, root, feats)
    if verify:
        verify_payload(path, root, feats)
    if verify or not mapped:
        check_features(feats.features, path)
    return feats


def verify_payload(path: Path, root: dict[str, Any], feats: TileFeatures) -> None:
    """Compare the payload with the checksum in the file.

    Raises:
        FeatureFileError: They differ.
    """
    actual = payload_sha256(feats.features, feats.coords)
    if actual != root["payload_sha256"]:
        raise FeatureFileError(
            f"payload of {path} must have the checksum the file records, "
            f"{root['payload_sha256']}, got {actual}: the file is damaged; delete it and extract "
            "or copy it again"
        )


def _raw_attributes(item: h5py.HLObject) -> dict[str, Any]:
    """Read attributes as written: ours are text and numbers, to be taken literally."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in item.attrs.items()}


def _assemble(
    root: dict[str, Any], tiling: dict[str, Any], features: FloatArray, coords: npt.NDArray[Any]
) -> TileFeatures:
    """Build the object from the file's attributes; a missing one is a KeyError (damaged)."""
    return TileFeatures(
        slide=str(root["slide"]),
        features=features,
        coords=coords,
        tile_px=int(tiling["patch_size"]),
        level0_tile_px=int(tiling["patch_size_level0"]),
        target_mpp=float(root["target_mpp"]),
        base_mpp=float(root["source_mpp"]),
        encoder=str(root["encoder"]),
        encoder_sha256=str(root["encoder_sha256"]),
        level0_size=(int(tiling["level0_width"]), int(tiling["level0_height"])),
        reader=str(root["reader"]),
        extra=dict(json.loads(root["extra"])),
        overlap_px=int(tiling["overlap"]),
        recipe=dict(json.loads(root["recipe"])),
        empty_reason=root["status_reason"] or None,
    )


def _check_status(path: Path, root: dict[str, Any], feats: TileFeatures) -> None:
    """Refuse a status that the tiles contradict."""
    expected = "done" if len(feats) else "empty"
    if root.get("status") != expected or "payload_sha256" not in root:
        raise FeatureFileError(
            f"status of {path} must be {expected!r} with {len(feats)} tiles and a checksum, got "
            f"{root.get('status')!r}; the file is damaged: delete it and extract again"
        )


def _map(dataset: h5py.Dataset, path: Path) -> npt.NDArray[Any]:
    """Map a contiguous dataset's bytes from disk, read-only."""
    offset = dataset.id.get_offset()
    if dataset.size == 0 or offset is None:
        return np.asarray(dataset[()])
    return np.memmap(path, dataset.dtype, "r", offset=offset, shape=dataset.shape)
