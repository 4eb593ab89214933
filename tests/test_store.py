"""Our feature files: read back with h5py alone, damaged, killed, resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modaltune.engine import store
from modaltune.engine.errors import DiskFullError, FeatureFileError
from modaltune.engine.own_features import file_facts
from modaltune.engine.store import (
    TileFeatures,
    feature_recipe,
    is_complete,
    open_features,
    payload_sha256,
    read_features,
    record_features,
    write_features,
)

SHA = "ab" * 32


def make(n: int = 5, width: int = 7, seed: int = 0, **changes: Any) -> TileFeatures:
    rng = np.random.default_rng(seed)
    # Beyond float16's and float32's exact integers, so that any cast of coordinates shows.
    coords = rng.integers(0, 90_000, (n, 2)).astype(np.int64) + np.array([0, (1 << 24) + 1])
    feats = TileFeatures(
        slide="TCGA-01",
        features=rng.normal(size=(n, width)).astype(np.float32),
        coords=coords,
        tile_px=256,
        level0_tile_px=512,
        target_mpp=0.5,
        base_mpp=0.25,
        encoder="lite",
        encoder_sha256=SHA,
        level0_size=(100_000, 80_000),
        reader="cucim",
        extra={"lost_tiles": 2},
        recipe=recipe(),
        empty_reason=None if n else "no tissue",
    )
    return replace(feats, **changes)


def recipe(**changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "encoder": "lite",
        "encoder_sha256": SHA,
        "target_mpp": 0.5,
        "tile_px": 256,
        "min_foreground": 0.95,
        "tissue_method": "lab",
    }
    return feature_recipe(**{**known, **changes})


def checksum_by_hand(features: np.ndarray, coords: np.ndarray) -> str:
    n, d = features.shape
    kind = {2: b"<f2", 4: b"<f4"}[features.dtype.itemsize]
    text = b"features %s %dx%d\n" % (kind, n, d) + features.tobytes()
    text += b"coords <i8 %dx2\n" % n + coords.tobytes()
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_file_read_by_h5py_alone(tmp_path: Path, dtype: Any) -> None:
    feats = make(recipe=recipe(dtype=dtype))
    path = write_features(tmp_path / "features_lite" / "TCGA-01.h5", feats, dtype=dtype)
    with h5py.File(path) as file:
        assert sorted(file) == ["coords", "features"]
        features, coords = file["features"][()], file["coords"][()]
        assert features.dtype == np.dtype(dtype)
        assert coords.dtype == np.dtype("<i8")
        np.testing.assert_array_equal(features, feats.features.astype(dtype))
        np.testing.assert_array_equal(coords, feats.coords)
        assert dict(file["features"].attrs) == {
            "name": "TCGA-01",
            "savetodir": "features_lite",
            "encoder": "lite",
        }
        assert dict(file["coords"].attrs) == {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40.0,
            "target_magnification": 20.0,
            "overlap": 0,
            "name": "TCGA-01",
            "savetodir": "features_lite",
            "level0_width": 100_000,
            "level0_height": 80_000,
        }
        root = dict(file.attrs)
        assert json.loads(root.pop("recipe")) == recipe(dtype=dtype)
        assert json.loads(root.pop("extra")) == {"lost_tiles": 2}
        assert root == {
            "format": "modaltune.tile_features",
            "format_version": 1,
            "software_version": importlib.metadata.version("modaltune"),
            "status": "done",
            "status_reason": "",
            "slide": "TCGA-01",
            "source_mpp": 0.25,
            "target_mpp": 0.5,
            "encoder": "lite",
            "encoder_sha256": SHA,
            "reader": "cucim",
            "payload_sha256": checksum_by_hand(features, coords),
        }


def test_empty_slide_is_a_status_with_its_reason(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.h5", make(0))
    with h5py.File(path) as file:
        assert file["features"].shape == (0, 7)
        assert file["coords"].shape == (0, 2)
        assert file["coords"].dtype == np.int64
        assert (file.attrs["status"], file.attrs["status_reason"]) == ("empty", "no tissue")
    assert read_features(path).empty_reason == "no tissue"
    assert open_features(path, verify=True).features.shape == (0, 7)
    assert is_complete(path, recipe()) == "empty"
    for wrong in (make(0, empty_reason=None), make(3, empty_reason="none")):
        with pytest.raises(FeatureFileError, match=r"empty_reason of .* exactly when"):
            write_features(tmp_path / "b.h5", wrong)
    assert os.listdir(tmp_path) == ["a.h5"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(0, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(["float32", "float16"]),
    slide=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8),
    extra=st.dictionaries(st.text(max_size=4), st.none() | st.booleans() | st.integers(-9, 9)),
)
def test_round_trip(
    tmp_path: Path, n: int, width: int, seed: int, dtype: Any, slide: str, extra: dict[str, Any]
) -> None:
    feats = make(n, width, seed, slide=slide, extra=extra, recipe=recipe(dtype=dtype))
    path = write_features(tmp_path / "a.h5", feats, dtype=dtype)
    for back in (read_features(path, expect_width=width), open_features(path, verify=True)):
        np.testing.assert_array_equal(back.features, feats.features.astype(dtype))
        np.testing.assert_array_equal(back.coords, feats.coords)
        assert (back.features.dtype, back.coords.dtype) == (np.dtype(dtype), np.int64)
        for name in vars(feats).keys() - {"features", "coords"}:
            assert getattr(back, name) == getattr(feats, name), name


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for run in ("one", "two"):
        write_features(tmp_path / run / "features_x" / "a.h5", make())
    one, two = ((tmp_path / r / "features_x" / "a.h5").read_bytes() for r in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("dataset", ["features", "coords"])
def test_one_flipped_bit_is_found(tmp_path: Path, dataset: str) -> None:
    path = write_features(tmp_path / "a.h5", make())
    with h5py.File(path) as file:
        # The lowest mantissa or coordinate bit of row 2: every value stays plausible.
        offset = file[dataset].id.get_offset() + 2 * file[dataset].dtype.itemsize
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FeatureFileError, match=r"a\.h5 must have the checksum"):
        read_features(path)
    with pytest.raises(FeatureFileError, match="checksum"):
        open_features(path, verify=True)
    status = is_complete(path, recipe())
    assert status[0] == "damaged"
    assert "checksum" in status[1]
    assert len(read_features(path, verify=False)) == 5


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_damaged(tmp_path: Path, share: float) -> None:
    path = write_features(tmp_path / "a.h5", make(200, 64))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    for read in (read_features, open_features):
        with pytest.raises(FeatureFileError, match=r"a\.h5"):
            read(path)
    assert is_complete(path, recipe())[0] == "damaged"


def test_foreign_and_stripped_files_are_never_done(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["features"], file["coords"] = np.ones((2, 7), "f4"), np.zeros((2, 2), "i8")
    assert is_complete(foreign, recipe())[0] == "damaged"
    assert "foreign" in is_complete(foreign, recipe())[1]
    with pytest.raises(FeatureFileError, match="must be a ModalTune feature file"):
        open_features(foreign)
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    with pytest.raises(FeatureFileError, match="must be an HDF5 feature file, got something else"):
        read_features(text)
    for attribute in ("payload_sha256", "status", "slide", "recipe"):
        path = write_features(tmp_path / "a.h5", make())
        with h5py.File(path, "r+") as file:
            del file.attrs[attribute]
        assert is_complete(path, recipe())[0] == "damaged", attribute
        with pytest.raises(FeatureFileError):
            read_features(path)
    path = write_features(tmp_path / "a.h5", make())
    with h5py.File(path, "r+") as file:
        file.attrs["status"] = "empty"
    assert is_complete(path, recipe())[0] == "damaged"
    (tmp_path / "folder.h5").mkdir()
    assert is_complete(tmp_path / "folder.h5", recipe())[0] == "damaged"


def test_completeness_compares_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    assert is_complete(path, recipe()) == "missing"
    write_features(path, make())
    before = path.read_bytes()
    assert is_complete(path, recipe()) == "done"
    assert is_complete(path, recipe(target_mpp=np.float64(0.5), tile_px=np.int64(256))) == "done"
    assert is_complete(path, recipe(base_mpp=0.25)) == "done"
    for changes in (
        {"encoder": "other"},
        {"encoder_sha256": "cd" * 32},
        {"target_mpp": 0.25},
        {"tile_px": 224},
        {"min_foreground": 0.5},
        {"tissue_method": "otsu"},
        {"overlap_px": 16},
        {"dtype": "float16"},
        {"base_mpp": 0.2525},
        {"new_setting": None},
    ):
        assert is_complete(path, recipe(**changes)) == ("different", list(changes)), changes
    partial = {k: v for k, v in recipe().items() if k != "tissue_method"}
    assert is_complete(path, partial) == ("different", ["tissue_method"])
    two = is_complete(path, recipe(tile_px=224, min_foreground=0.1))
    assert two == ("different", ["min_foreground", "tile_px"])
    assert path.read_bytes() == before


def test_another_format_version_is_reported(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.h5", make())
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    assert is_complete(path, recipe()) == ("different", ["format_version"])
    with pytest.raises(FeatureFileError, match="must have format version 1, got 99"):
        read_features(path)


def test_wrong_width_names_file_got_and_expected(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.h5", make(width=7))
    for read in (read_features, open_features):
        with pytest.raises(FeatureFileError, match=r"a\.h5 must have width 1536, got 7"):
            read(path, expect_width=1536)


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    nan = make()
    nan.features[1, 2] = np.nan
    nan.features[1, 3] = np.inf
    nan.features[4, 0] = np.nan
    huge = make(recipe=recipe(dtype="float16"))
    huge.features[0, 0] = 70_000
    cases: list[tuple[TileFeatures, str, str]] = [
        (nan, "float32", r"3 NaN or infinite values in 2 of 5 tiles"),
        (huge, "float16", r"±65,504 .* got 70000"),
        (make(coords=np.zeros((4, 2), np.int64)), "float32", "5 rows of features and 4 of coords"),
        (make(coords=np.zeros((5, 2), np.float16)), "float32", "coords .* got float16"),
        (make(coords=np.zeros((5, 3), np.int64)), "float32", r"numbers \[tiles, 2\]"),
        (make(features=np.zeros((5, 3), np.int64)), "float32", "float matrix"),
        (make(base_mpp=None, reader=None), "float32", "must record base_mpp, reader"),
        (make(base_mpp=9.0), "float32", "base_mpp must be within"),
        (make(target_mpp=0.25), "float32", "recipe .* target_mpp = 0.5 for 0.25"),
        (make(), "float16", "recipe .* dtype = 'float32' for 'float16'"),
        (make(), "bfloat16", "dtype must be"),
        (make(slide="a\0b"), "float32", "slide .* without NUL"),
        (make(extra={"x": object()}), "float32", "extra must hold JSON values only"),
        (make(extra={"x": "y" * 70_000}), "float32", "extra .* must be below"),
    ]
    for feats, dtype, message in cases:
        with pytest.raises(FeatureFileError, match=message):
            write_features(tmp_path / "a.h5", feats, dtype=dtype)  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == [], message


@pytest.mark.parametrize("rows", [0, 5])
def test_the_facts_of_a_file_are_those_it_was_written_with(tmp_path: Path, rows: int) -> None:
    feats = make(rows)
    facts = record_features(tmp_path / "a.h5", feats)
    assert facts == file_facts(tmp_path / "a.h5")
    assert facts == (rows, feats.empty_reason or "", feats.reader, facts.payload_sha256)
    assert facts.payload_sha256 == payload_sha256(feats.features, feats.coords)


def test_failed_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_features(tmp_path / "a.h5", make())
    before = path.read_bytes()

    def full_disk(self: h5py.Group, name: str, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full_disk)
    with pytest.raises(DiskFullError, match=r"a.h5 must fit on its disk, got .no space left"):
        write_features(path, make(seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.h5"]


def test_killed_before_rename_leaves_no_final_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "import numpy as np\n"
        "from modaltune.engine import atomic\n"
        "from modaltune.engine.store import TileFeatures, write_features\n"
        "atomic.os.replace = lambda *_: os._exit(9)\n"
        "write_features(sys.argv[1], TileFeatures('s', np.ones((3, 2), 'f4'),\n"
        "    np.zeros((3, 2), 'i8'), 256, 512, 0.5, 0.25, 'e', 'ab', (9, 9), 'cucim'))\n"
    )
    path = tmp_path / "a.h5"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 9
    assert is_complete(path, recipe()) == "missing"
    (left,) = tmp_path.iterdir()
    # The payload is whole, yet nothing vouches for it: only the rename does.
    with h5py.File(left) as file:
        assert file["features"].shape == (3, 2)
    with pytest.raises(FeatureFileError, match="killed writer"):
        read_features(left)


def test_open_features_maps_rows_without_reading_the_rest(tmp_path: Path) -> None:
    feats = make(1000, 33)
    path = write_features(tmp_path / "a.h5", feats)
    opened = open_features(path)
    assert isinstance(opened.features, np.memmap)
    rows = np.sort(np.random.default_rng(1).choice(1000, 50, replace=False))
    np.testing.assert_array_equal(opened.features[rows], feats.features[rows])
    with pytest.raises(ValueError, match="read-only"):
        opened.features[0, 0] = 1
    np.testing.assert_array_equal(opened.coords, feats.coords)


def test_base_mpp_must_not_contradict_the_file(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.h5", make())
    assert read_features(path, base_mpp=0.2501).base_mpp == 0.25
    with pytest.raises(FeatureFileError, match=r"base_mpp must be that of .* 0\.25, got 0\.5"):
        read_features(path, base_mpp=0.5)


def test_external_and_oversized_datasets_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64))
    linked, huge = tmp_path / "linked.h5", tmp_path / "huge.h5"
    with h5py.File(linked, "w") as file:
        file.create_dataset("features", (4, 4), "f4", external=[(str(secret), 0, 64)])
        file["coords"] = np.zeros((4, 2), "i8")
    with pytest.raises(FeatureFileError, match="must lie in the file"):
        read_features(linked)
    with h5py.File(huge, "w") as file:
        file.create_dataset("features", (10**9, 1536), "f4", chunks=(1, 1536))
        file["coords"] = np.zeros((4, 2), "i8")
    with pytest.raises(FeatureFileError, match="must fit the file"):
        read_features(huge)
    with h5py.File(linked, "w") as file:
        file["features"] = h5py.ExternalLink(str(huge), "features")
        file["coords"] = np.zeros((4, 2), "i8")
    with pytest.raises(FeatureFileError):
        read_features(linked)


def test_public_names() -> None:
    assert all(hasattr(store, name) for name in store.__all__)
