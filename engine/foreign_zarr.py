"""Read LazySlide / wsidata tile features: an AnnData table and tile polygons in a SpatialData zarr.

Zarr arrays may name any registered codec, and one of numcodecs' unpickles. So before anything is
decoded, the metadata below the table is searched and only codecs known to be harmless pass. Recent
zarr and numcodecs refuse that codec themselves; nothing here depends on their version.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.hdf5_files import plain_value
from modaltune.engine.tile_features import (
    TileFeatures,
    check_coords,
    check_features,
    choose_encoder,
)

_HARMLESS_CODECS = frozenset(
    {"adler32", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "endian", "fixedscaleoffset"}
    | {"gzip", "lz4", "lzma", "sharding_indexed", "shuffle", "transpose", "vlen-array"}
    | {"vlen-bytes", "vlen-utf8", "zlib", "zstd"}
)
_METADATA_FILES = (".zarray", ".zmetadata", "zarr.json")
_CODEC_LISTS = ("codecs", "index_codecs", "filters")
_POLYGON = 3


def read_spatialdata(path: Path, *, encoder: str | None = None) -> TileFeatures:
    """Read one feature table of a SpatialData zarr with the tiles it belongs to.

    Args:
        path: The zarr folder.
        encoder: Which model's table, `<model>` or `<model>_<tiles>`; needed where several are.

    Returns:
        Features in the table's order; each tile's corner joined by tile id.

    Raises:
        FeatureFileError: Not such a store, a codec that may run code, or ids that don't join.
        ModuleNotFoundError: zarr or anndata is not installed.
    """
    try:
        import zarr
        from anndata.io import read_elem
    except ImportError as error:
        raise ModuleNotFoundError(
            "reading LazySlide features needs zarr and anndata; install them with "
            "`pip install 'modaltune[zarr]'`"
        ) from error
    table_name, model, tiles = _choose_table(path, encoder)
    folder = path / "tables" / table_name
    _refuse_unsafe_codecs(folder)
    try:
        root, table = zarr.open_group(path, mode="r"), zarr.open_group(folder, mode="r")
        matrix = read_elem(table["X"])
        obs = read_elem(table["obs"])
        attributes = {str(k): v for k, v in dict(table.attrs).items()}
        spec = _tile_spec(dict(root.attrs), tiles)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FeatureFileError(f"{folder} must be an AnnData table, got {error}") from error
    instance_key = str(attributes.get("instance_key", "tile_id"))
    ids = obs[instance_key].tolist() if instance_key in obs else obs.index.tolist()
    boxes = _tile_boxes(path / "shapes" / tiles / "shapes.parquet")
    corners, footprint = _join(ids, boxes, folder)
    dense = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)
    return TileFeatures(
        slide=path.stem,
        features=check_features(dense, folder),
        coords=check_coords(corners, folder),
        level0_tile_px=footprint,
        encoder=model,
        extra={"tiles": tiles, "tile_spec": spec},
        producer="lazyslide",
        **_geometry(spec),
    )


def _choose_table(path: Path, encoder: str | None) -> tuple[str, str, str]:
    """Find (table, model, tiles): a table is named <model>_<tiles> after the tiles it is of."""
    shapes = sorted(p.parent.name for p in path.glob("shapes/*/shapes.parquet"))
    found: dict[str, tuple[str, str, str]] = {}
    for table in sorted(p.name for p in path.glob("tables/*") if p.is_dir()):
        # The longest name wins, should one name of tiles end in another.
        fitting = [tiles for tiles in shapes if table.endswith(f"_{tiles}")]
        if fitting:
            tiles = max(fitting, key=len)
            found[table] = (table, table.removesuffix(f"_{tiles}"), tiles)
    if not found:
        raise FeatureFileError(
            f"{path} must be a SpatialData zarr with tables/<model>_<tiles> and shapes/<tiles>, "
            f"got shapes {shapes} and no table of theirs"
        )
    by_model = [table for table, (_, model, _) in found.items() if model == encoder]
    wanted = by_model[0] if len(by_model) == 1 else encoder
    return found[choose_encoder(wanted, sorted(found), path)]


def _refuse_unsafe_codecs(folder: Path) -> None:
    """Search all metadata below a folder for codecs that are not known to be harmless."""
    for path in sorted(p for p in folder.rglob("*") if p.name in _METADATA_FILES):
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FeatureFileError(f"{path} must be JSON, got {error}") from error
        unsafe = sorted(set(_codecs(metadata)) - _HARMLESS_CODECS)
        if unsafe:
            raise FeatureFileError(
                f"{path} must use plain codecs only, got {', '.join(unsafe)}, which may run code "
                "when the data is read; write the store again without it"
            )


def _codecs(node: Any) -> Iterator[str]:
    """Name every codec in zarr metadata of version 2 (id) or 3 (name), consolidated or not."""
    if isinstance(node, list):
        for item in node:
            yield from _codecs(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "compressor" and isinstance(value, dict):
                yield _codec_name(value)
            if key in _CODEC_LISTS and isinstance(value, list):
                yield from (_codec_name(item) for item in value)
            yield from _codecs(value)


def _codec_name(codec: Any) -> str:
    """Name one codec; version 3 lists numcodecs' own under a prefix."""
    name = codec.get("id", codec.get("name")) if isinstance(codec, dict) else codec
    return str(name).removeprefix("numcodecs.")


def _tile_boxes(path: Path) -> dict[Any, tuple[float, float, float, float]]:
    """Read tile id -> (min x, min y, max x, max y) in level-0 px from a GeoParquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
        geometry = columns["geometry"]
        keys = [k for k in ("tile_id", "__index_level_0__") if k in columns]
        ids = columns[keys[0]] if keys else list(range(len(geometry)))
        boxes = {key: _bounds(blob) for key, blob in zip(ids, geometry, strict=True)}
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        struct.error,
        pyarrow.ArrowException,
    ) as error:
        raise FeatureFileError(f"{path} must hold tile polygons as WKB, got {error}") from error
    if len(boxes) != len(geometry):
        raise FeatureFileError(
            f"tile ids of {path} must be unique, got {len(geometry) - len(boxes)} repeats"
        )
    return boxes


def _bounds(blob: bytes) -> tuple[float, float, float, float]:
    """Bound the outer ring of a polygon in well-known binary (OGC 06-103r4, 8.2)."""
    order = "<" if blob[0] == 1 else ">"
    kind, rings, points = struct.unpack_from(f"{order}III", blob, 1)
    if kind != _POLYGON or rings < 1:
        raise ValueError(f"geometry of type {kind} instead of a polygon")
    ring = np.frombuffer(blob, f"{order}f8", count=2 * points, offset=13).reshape(-1, 2)
    (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def _join(
    ids: list[Any], boxes: dict[Any, tuple[float, float, float, float]], source: Path
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], int | None]:
    """Give each feature row its tile's corner, by id; and the footprint if all tiles share one."""
    if not set(ids) <= boxes.keys():
        # Ids stored as text beside numbers: the AnnData index is always text.
        boxes = {str(key): box for key, box in boxes.items()}
        ids = [str(key) for key in ids]
    lost = [key for key in ids if key not in boxes]
    if lost or len(set(ids)) != len(ids):
        raise FeatureFileError(
            f"tile ids of {source} must each name one tile, got {len(lost)} without a polygon "
            f"(such as {lost[:3]}) and {len(ids) - len(set(ids))} repeats"
        )
    table = np.array([boxes[key] for key in ids], dtype=np.float64).reshape(-1, 4)
    sides = set(np.rint(table[:, 2:] - table[:, :2]).ravel().tolist())
    return table[:, :2], int(sides.pop()) if len(sides) == 1 else None


def _tile_spec(attributes: dict[str, Any], tiles: str) -> dict[str, Any]:
    """Find wsidata's description of the tiling among the store's attributes."""
    nested = attributes.get("spatialdata_attrs")
    for place in (attributes, nested if isinstance(nested, dict) else {}):
        specs = place.get("tile_spec")
        if isinstance(specs, str):
            specs = plain_value(specs)
        if isinstance(specs, dict) and isinstance(specs.get(tiles), dict):
            return dict(specs[tiles])
    return {}


def _geometry(spec: dict[str, Any]) -> dict[str, Any]:
    """Take tile size and resolutions from wsidata's description, as far as they make sense."""

    def number(name: str) -> float | None:
        value = spec.get(name)
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            return float(value)
        return None

    side, mpp, downsample = number("width"), number("mpp"), number("base_downsample")
    square = side is not None and side == number("height")
    return {
        "tile_px": round(side) if square and side is not None else None,
        "target_mpp": mpp,
        "base_mpp": mpp / downsample if mpp is not None and downsample is not None else None,
    }
