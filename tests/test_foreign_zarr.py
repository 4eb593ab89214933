"""LazySlide / wsidata stores, written by zarr, anndata and pyarrow directly."""

from __future__ import annotations

import builtins
import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.feature_index import index_features
from modaltune.engine.store import read_features

N, D = 6, 5
RNG = np.random.default_rng(7)
FEATURES = RNG.normal(size=(N, D)).astype(np.float32)
# Odd pixels above 2^16: microns, float16 or a lost bit would all show.
COORDS = RNG.integers(70_000, 140_000, (N, 2)).astype(np.int64) | 1


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.open, (str(self.target), "w"))


def wkb_square(x: float, y: float, side: float) -> bytes:
    ring = [(x, y), (x, y + side), (x + side, y + side), (x + side, y), (x, y)]
    return struct.pack("<BIII", 1, 3, 1, 5) + b"".join(struct.pack("<dd", *p) for p in ring)


def write_lazyslide(path: Path, *, version: int, models: tuple[str, ...] = ("uni2",)) -> Path:
    """Shapes in another order than the table, so that only a join by id is right."""
    import anndata
    import pandas as pd
    import zarr

    spec = {"width": 256, "height": 256, "mpp": 0.5, "base_downsample": 2.0}
    root = zarr.open_group(path, mode="w", zarr_format=version)
    root.attrs["tile_spec"] = {"tiles": spec}
    tables = root.create_group("tables")
    ids = np.arange(10, 10 + N)
    for model in models:
        obs = pd.DataFrame({"tile_id": ids, "library_id": "tiles"}, index=ids.astype(str))
        table = anndata.AnnData(X=FEATURES, obs=obs)
        anndata.io.write_elem(tables, f"{model}_tiles", table)
        tables[f"{model}_tiles"].attrs.update({"region": "tiles", "instance_key": "tile_id"})
    order = RNG.permutation(N)
    squares = [wkb_square(*map(float, COORDS[i]), 512.0) for i in order]
    folder = path / "shapes" / "tiles"
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table({"tile_id": ids[order], "geometry": squares}), folder / "shapes.parquet"
    )
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [2, 3])
def test_lazyslide(tmp_path: Path, version: int) -> None:
    path = write_lazyslide(tmp_path / "s.zarr", version=version)
    feats = read_features(path)
    np.testing.assert_array_equal(feats.features, FEATURES)
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert feats.coords.dtype == np.int64
    assert (feats.slide, feats.producer, feats.encoder) == ("s", "lazyslide", "uni2")
    assert (feats.tile_px, feats.level0_tile_px) == (256, 512)
    assert (feats.target_mpp, feats.base_mpp) == (0.5, 0.25)


@pytest.mark.filterwarnings("ignore")
def test_lazyslide_choice_and_broken_join(tmp_path: Path) -> None:
    path = write_lazyslide(tmp_path / "s.zarr", version=2, models=("conch", "uni2"))
    with pytest.raises(FeatureFileError, match=r"\['conch_tiles', 'uni2_tiles'\], got None"):
        read_features(path)
    assert read_features(path, encoder="uni2").encoder == "uni2"
    assert read_features(path, encoder="conch_tiles").encoder == "conch"
    squares = [wkb_square(0, 0, 512) for _ in range(N - 1)]
    shapes = path / "shapes" / "tiles" / "shapes.parquet"
    pq.write_table(pa.table({"tile_id": np.arange(10, 9 + N), "geometry": squares}), shapes)
    with pytest.raises(FeatureFileError, match="1 without a polygon"):
        read_features(path, encoder="uni2")
    with pytest.raises(FeatureFileError, match="must be a SpatialData zarr"):
        read_features(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_lazyslide_stores_of_a_folder_are_indexed(tmp_path: Path) -> None:
    write_lazyslide(tmp_path / "s.zarr", version=2, models=("conch", "uni2"))
    (path, reason) = index_features(tmp_path).skipped[0]
    assert path.name == "s.zarr"
    assert "encoder" in reason
    (found,) = index_features(tmp_path, encoder="uni2").files
    assert (found.slide, found.encoder, found.tiles, found.width) == ("s", "uni2", N, D)


@pytest.mark.filterwarnings("ignore")
def test_lazyslide_pickle_codec_is_refused(tmp_path: Path) -> None:
    """Zarr 2 lets an array name a codec that unpickles its chunks."""
    path = write_lazyslide(tmp_path / "s.zarr", version=2)
    array = path / "tables" / "uni2_tiles" / "obs" / "tile_id"
    metadata = json.loads((array / ".zarray").read_text())
    metadata |= {"compressor": None, "filters": [{"id": "pickle"}]}
    (array / ".zarray").write_text(json.dumps(metadata))
    (array / "0").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(FeatureFileError, match="plain codecs only, got pickle"):
        read_features(path)
    assert not (tmp_path / "owned").exists()
    # The payload is live: a reader that unpickles the chunk runs it.
    pickle.loads((array / "0").read_bytes()).close()
    assert (tmp_path / "owned").exists()


def test_lazyslide_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'modaltune\[zarr\]'"):
        read_features(tmp_path)
