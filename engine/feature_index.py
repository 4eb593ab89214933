"""Which slides a folder holds tile features of, whoever wrote them: headers are read, not tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from modaltune.engine.atomic import atomic_path, is_temporary
from modaltune.engine.errors import FeatureFileError
from modaltune.engine.foreign_zarr import read_spatialdata
from modaltune.engine.hdf5_files import get_dataset, open_hdf5, plain_attributes
from modaltune.engine.own_features import FORMAT
from modaltune.engine.store import TileFeatures, read_features
from modaltune.engine.tile_features import choose_encoder, slide_name

_HDF5_SUFFIXES = (".h5", ".hdf5")
_PT_SUFFIXES = (".pt", ".pth")
#: `FeatureFile.producer` of a file that has to be imported first.
PT = "pt"


@dataclass(frozen=True)
class FeatureFile:
    """The tile features of one slide on disk.

    Attributes:
        slide: Slide id, from the file's name.
        path: The file, or the folder of a SpatialData zarr.
        producer: Whose layout it has; `PT` for a `.pt` file, which is not looked into.
        encoder: Name of the tile encoder, where the file says it.
        tiles: Number of tiles; -1 for `.pt`.
        width: Width of the features; -1 for `.pt`.
    """

    slide: str
    path: Path
    producer: str
    encoder: str | None
    tiles: int
    width: int


@dataclass(frozen=True)
class FeatureIndex:
    """What a folder holds.

    Attributes:
        files: One per slide, sorted by slide.
        skipped: Files that look like features and are not used, with the reason.
    """

    files: tuple[FeatureFile, ...]
    skipped: tuple[tuple[Path, str], ...]


def index_features(folder: str | Path, *, encoder: str | None = None) -> FeatureIndex:
    """List the feature files below a folder, one per slide.

    HDF5 files, SpatialData zarrs and `.pt` files are looked at; of a slide with both, the `.pt` is
    left out. Files with coordinates only, slide embeddings, damaged files and what killed writers
    left behind are skipped with a reason; other kinds of files are no features.

    Args:
        folder: Searched with its sub-folders.
        encoder: Which features, where files hold those of several encoders.

    Raises:
        FeatureFileError: No such folder, or two files of one slide.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FeatureFileError(
            f"features must be a folder, got nothing at {root}; give the folder with the files"
        )
    files: dict[str, FeatureFile] = {}
    skipped: list[tuple[Path, str]] = []
    for path in _candidates(root):
        try:
            found = _peek(path, encoder)
        except FeatureFileError as error:
            skipped.append((path, str(error)))
            continue
        known = files.get(found.slide)
        if known is None:
            files[found.slide] = found
        elif PT in (known.producer, found.producer):
            kept, left = (known, found) if found.producer == PT else (found, known)
            files[found.slide] = kept
            skipped.append((left.path, "the same slide is there as HDF5, which is preferred"))
        else:
            raise FeatureFileError(
                f"{root} must hold one feature file per slide, got {known.path} and {path}; name "
                "the folder of one tile encoder"
            )
    return FeatureIndex(tuple(files[slide] for slide in sorted(files)), tuple(skipped))


def _candidates(root: Path) -> Iterator[Path]:
    """Give every file that may hold features, in a fixed order."""
    for folder, folders, names in os.walk(root):
        zarrs = sorted(name for name in folders if name.endswith(".zarr"))
        folders[:] = sorted(set(folders) - set(zarrs))
        for name in sorted([*names, *zarrs]):
            kinds = (*_HDF5_SUFFIXES, *_PT_SUFFIXES, ".zarr")
            if (name.lower().endswith(kinds) and not name.startswith(".")) or is_temporary(name):
                yield Path(folder, name)


def _peek(path: Path, encoder: str | None) -> FeatureFile:
    """Find out what a file holds from its header."""
    if is_temporary(path):
        raise FeatureFileError("left behind by a killed writer; delete it")
    if path.suffix.lower() in _PT_SUFFIXES:
        return FeatureFile(slide_name(path), path, PT, None, -1, -1)
    if path.is_dir():
        feats = read_spatialdata(path, encoder=encoder)
        return FeatureFile(feats.slide, path, feats.producer, feats.encoder, len(feats),
                           feats.width)  # fmt: skip
    with open_hdf5(path) as file:
        return _peek_hdf5(path, file, encoder)


def _peek_hdf5(path: Path, file: h5py.File, encoder: str | None) -> FeatureFile:
    """Tell the layouts apart by what is in them, as `modaltune.engine.foreign_features` does."""
    name: str | None
    if "feats" in file and "coords" in file:
        data, producer = get_dataset(file, "feats", path), "stamp"
        name = plain_attributes(file).get("extractor")
    elif isinstance(file.get("features"), h5py.Group):
        name = choose_encoder(encoder, sorted(file["features"]), path)
        data, producer = get_dataset(file["features"], name, path), "atlaspatch"
    elif "features" in file and "coords" in file:
        data = get_dataset(file, "features", path)
        is_own = file.attrs.get("format") == FORMAT
        name = plain_attributes(file if is_own else data).get("encoder")
        producer = "modaltune" if is_own else "trident" if name else "clam"
    elif "features" in file or "coords" in file:
        what = "features" if "features" in file else "coordinates"
        raise FeatureFileError(f"{what} only")
    else:
        raise FeatureFileError(f"no tile features: the datasets {sorted(file)[:10]}")
    if data.ndim != 2:
        raise FeatureFileError("a slide embedding, not tile features")
    return FeatureFile(slide_name(path), path, producer, name, data.shape[0], data.shape[1])


def import_pt(source: Path, target: Path) -> TileFeatures:
    """Turn a `.pt` feature file, read in a child process, into HDF5 with all that it says.

    Args:
        source: The file; untrusted.
        target: HDF5 file to write, atomically, in the layout of CLAM with TRIDENT's attributes
            where the source knows them.

    Raises:
        FeatureFileError: The file was refused, or has no coordinates.
    """
    feats = read_features(source, allow_pt=True)
    known = {
        "patch_size": feats.tile_px,
        "patch_size_level0": feats.level0_tile_px,
        "encoder": feats.encoder,
    }
    with atomic_path(target) as temp, h5py.File(temp, "w") as file:
        file.create_dataset("features", data=np.asarray(feats.features))
        coords = file.create_dataset("coords", data=np.asarray(feats.coords))
        for name, value in known.items():
            if value is not None:
                (file["features"] if name == "encoder" else coords).attrs[name] = value
    return feats
