"""Open HDF5 files that may be damaged or hostile: plain errors, plain attributes, no detours."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from modaltune.engine.atomic import is_temporary
from modaltune.engine.errors import FeatureFileError

# A dataset may declare any size at no cost in bytes. Real features hardly compress, so a matrix
# this many times larger than its file is a mistake or an attack (REQUIREMENTS 26).
_MAX_EXPANSION = 64
_FREE_BYTES = 1 << 26


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file to read; whatever the HDF5 library stumbles over becomes one clear error.

    Raises:
        FeatureFileError: The file is absent, unfinished, not HDF5, truncated or damaged.
    """
    if not path.is_file():
        raise FeatureFileError(f"the feature file must exist, got nothing at {path}")
    if is_temporary(path):
        raise FeatureFileError(
            f"{path} is what a killed writer left behind, not a feature file; delete it"
        )
    if not h5py.is_hdf5(path):
        kind = "an empty file" if path.stat().st_size == 0 else "something else"
        raise FeatureFileError(
            f"{path} must be an HDF5 feature file, got {kind}; delete it and extract again"
        )
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FeatureFileError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise FeatureFileError(
            f"{path} must be a complete HDF5 feature file, got a damaged one ({error}); delete it "
            "and extract or copy it again"
        ) from error


def get_dataset(group: h5py.Group, name: str, path: Path) -> h5py.Dataset:
    """Get a dataset whose data lies in this very file and is not absurdly larger than it.

    Raises:
        FeatureFileError: Absent, a group, linked from elsewhere, or of an impossible size.
    """
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise FeatureFileError(
            f"{path} must hold a dataset {name!r} of its own, got {sorted(group)}; it is a foreign "
            "or partial file"
        )
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise FeatureFileError(f"{name!r} of {path} must be a dataset, got a group")
    if dataset.external or dataset.is_virtual:
        raise FeatureFileError(
            f"{name!r} of {path} must lie in the file, got a link to other files"
        )
    if dataset.dtype.kind not in "iuf" or dataset.dtype.subdtype is not None:
        raise FeatureFileError(f"{name!r} of {path} must hold numbers, got {dataset.dtype}")
    if dataset.nbytes > _MAX_EXPANSION * os.path.getsize(path) + _FREE_BYTES:
        raise FeatureFileError(
            f"{name!r} of {path} must fit the file, got a declared shape {list(dataset.shape)} in "
            f"{os.path.getsize(path)} bytes"
        )
    return dataset


def read_array(group: h5py.Group, name: str, path: Path) -> npt.NDArray[Any]:
    """Read a numeric dataset of the file whole.

    Raises:
        FeatureFileError: See `get_dataset`.
    """
    return np.asarray(get_dataset(group, name, path)[()])


def plain_attributes(item: h5py.HLObject) -> dict[str, Any]:
    """Read all attributes as plain Python values.

    Producers differ: JSON-encoded dicts and lists are decoded, and the string "None" is None.
    """
    return {name: plain_value(value) for name, value in item.attrs.items()}


def plain_value(value: Any) -> Any:
    """Turn one attribute value into a plain Python value."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray):
        return [plain_value(v) for v in value.tolist()] if value.ndim else plain_value(value[()])
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if isinstance(value, str):
        text = value.strip()
        if text == "None":
            return None
        if text[:1] in ("{", "["):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(text)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def find_attribute(attributes: Mapping[str, Any], *names: str) -> Any:
    """Find the first of several names that has a value, also one level down in a dict attribute."""
    nested = [value for value in attributes.values() if isinstance(value, Mapping)]
    for name in names:
        for place in (attributes, *nested):
            if place.get(name) is not None:
                return place[name]
    return None


def positive_number(attributes: Mapping[str, Any], path: Path, *names: str) -> float | None:
    """Find a positive number under one of several names; None where no name has a value.

    Raises:
        FeatureFileError: There is a value, but not a positive number.
    """
    value = find_attribute(attributes, *names)
    if value is None:
        return None
    if isinstance(value, list) and value:
        value = value[0]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise FeatureFileError(
            f"attribute {names[0]} of {path} must be a positive number, got {value!r}"
        )
    return number
