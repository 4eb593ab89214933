"""HDF5 files of the producers in FORMATS' table, written here by hand, read by the one reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.store import is_complete, read_features
from modaltune.engine.tile_coords import read_coords

N, D = 6, 5
RNG = np.random.default_rng(7)
FEATURES = RNG.normal(size=(N, D)).astype(np.float32)
# Odd pixels above 2^16: microns, float16 or a lost bit would all show.
COORDS = RNG.integers(70_000, 140_000, (N, 2)).astype(np.int64) | 1


def write_trident(
    path: Path, *, coords: Any = COORDS, features: Any = FEATURES, **attrs: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if features is not None:
            file["features"] = features
            file["features"].attrs.update(
                {"name": "slide", "savetodir": "/out", "encoder": "uni_v2"}
            )
        file["coords"] = coords
        known = {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 0,
            "name": "slide",
            "savetodir": "/out",
            "level0_width": 150_000,
            "level0_height": 141_000,
        }
        file["coords"].attrs.update({**known, **attrs})
    return path


def test_trident(tmp_path: Path) -> None:
    feats = read_features(write_trident(tmp_path / "features_uni_v2" / "slide.h5"))
    np.testing.assert_array_equal(feats.features, FEATURES)
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert feats.coords.dtype == np.int64
    assert (feats.slide, feats.producer, feats.encoder) == ("slide", "trident", "uni_v2")
    assert (feats.tile_px, feats.level0_tile_px) == (256, 512)
    assert feats.level0_size == (150_000, 141_000)
    # The true mpp is not in the file and is not invented from a nominal magnification.
    assert (feats.base_mpp, feats.target_mpp) == (None, None)
    known = read_features(tmp_path / "features_uni_v2" / "slide.h5", base_mpp=0.2525)
    assert (known.base_mpp, known.target_mpp) == (0.2525, 0.505)
    status = is_complete(tmp_path / "features_uni_v2" / "slide.h5", {})
    assert status[0] == "damaged"


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.float32, np.float64])
def test_trident_variants(tmp_path: Path, kind: Any) -> None:
    path = write_trident(
        tmp_path / "features_conch" / "s.h5",
        coords=COORDS.astype(kind),
        level0_width="None",
        overlap="None",
        segmentation=json.dumps({"model": "hest", "holes": [1, 2]}),
    )
    with h5py.File(path, "r+") as file:
        file["features"].attrs["encoder"] = "None"
    feats = read_features(path)
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert feats.level0_size is None
    assert feats.overlap_px == 0
    assert feats.encoder == "conch"
    assert feats.extra["segmentation"] == {"model": "hest", "holes": [1, 2]}


def test_trident_geometry_in_a_json_attribute_and_by_magnification(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES, COORDS
        file["coords"].attrs["attributes"] = json.dumps(
            {"patch_size": 256, "level0_magnification": 40, "target_magnification": 10}
        )
    feats = read_features(path)
    assert (feats.tile_px, feats.level0_tile_px) == (256, 1024)


def test_trident_zero_tiles(tmp_path: Path) -> None:
    path = write_trident(
        tmp_path / "s.h5", features=np.zeros((0, D), "f4"), coords=np.zeros((0, 2), "i8")
    )
    feats = read_features(path, expect_width=D)
    assert (feats.features.shape, feats.coords.shape) == ((0, D), (0, 2))


def test_coords_only_file(tmp_path: Path) -> None:
    path = write_trident(tmp_path / "slide_patches.h5", features=None)
    with pytest.raises(FeatureFileError, match="must hold features, got coordinates only"):
        read_features(path)
    place = read_coords(path)
    np.testing.assert_array_equal(place.coords, COORDS)
    assert (place.tile_px, place.level0_tile_px) == (256, 512)


def write_clam_h5(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
        file["coords"] = COORDS.astype(np.int32)
    return path


def write_clam_patches(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = COORDS.astype(np.int32)
        file["coords"].attrs.update(
            {
                "patch_size": 256,
                "patch_level": 1,
                "downsample": np.array([4.0, 4.0]),
                "downsampled_level_dim": np.array([10, 20]),
                "level_dim": np.array([40, 80]),
                "name": "s",
                "save_path": "/out",
            }
        )
    return path


def test_clam_h5_and_patches(tmp_path: Path) -> None:
    features = write_clam_h5(tmp_path / "h5_files" / "s.h5")
    patches = write_clam_patches(tmp_path / "patches" / "s.h5")
    feats = read_features(features)
    assert (feats.producer, feats.tile_px, feats.level0_tile_px) == ("clam", None, None)
    np.testing.assert_array_equal(feats.coords, COORDS)
    feats = read_features(features, coords_from=patches, base_mpp=0.25)
    assert (feats.tile_px, feats.level0_tile_px, feats.target_mpp) == (256, 1024, 1.0)
    with pytest.raises(FeatureFileError, match="coordinates only"):
        read_features(patches)


def write_stamp(path: Path, *, mpp: float, **attrs: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["coords"] = (COORDS * mpp).astype(np.float32)
        file["feats"] = FEATURES.astype(np.float16)
        known = {
            "stamp_version": "2.3.0",
            "extractor": "uni2",
            "unit": "um",
            "tile_size_um": 256.0,
            "tile_size_px": 224,
            "code_hash": "abc",
            "feat_type": "tile",
        }
        file.attrs.update({**known, **attrs})
    return path


@pytest.mark.parametrize("mpp", [0.25, 0.2525, 0.499])
def test_stamp_microns_become_level0_pixels(tmp_path: Path, mpp: float) -> None:
    path = write_stamp(tmp_path / "s.h5", mpp=mpp)
    feats = read_features(path, base_mpp=mpp)
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert feats.features.dtype == np.float16
    assert (feats.producer, feats.encoder, feats.tile_px) == ("stamp", "uni2", 224)
    assert feats.level0_tile_px == round(256 / mpp)
    assert feats.target_mpp == pytest.approx(256 / 224)


def test_stamp_needs_resolution_and_unit(tmp_path: Path) -> None:
    path = write_stamp(tmp_path / "s.h5", mpp=0.25)
    with pytest.raises(FeatureFileError, match=r"base_mpp must be given .* got None"):
        read_features(path)
    with pytest.raises(FeatureFileError, match="must be in level-0 px, got unit 'um'"):
        read_coords(path)
    with pytest.raises(FeatureFileError, match=r"0\.05\.\.5 microns per px, got 250"):
        read_features(path, base_mpp=250)
    for attrs in ({"unit": "px"}, {"feat_type": "slide"}):
        with pytest.raises(FeatureFileError, match="must be a STAMP tile feature file"):
            read_features(write_stamp(path, mpp=0.25, **attrs), base_mpp=0.25)


def test_atlaspatch(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        reads = np.tile(np.array([512, 512, 0]), (N, 1))
        file["coords"] = np.concatenate([COORDS, reads], axis=1).astype(np.int32)
        file["features/uni_v2"] = FEATURES
        file["features/conch"] = FEATURES[:, :3]
        file.attrs.update({"patch_size": 256, "patch_size_level0": 512})
        file.attrs.update({"level0_magnification": 40, "target_magnification": 20})
    with pytest.raises(FeatureFileError, match=r"one of those in .* \['conch', 'uni_v2'\]"):
        read_features(path)
    feats = read_features(path, encoder="conch")
    np.testing.assert_array_equal(feats.features, FEATURES[:, :3])
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert (feats.producer, feats.encoder) == ("atlaspatch", "conch")
    assert (feats.tile_px, feats.level0_tile_px) == (256, 512)
    with h5py.File(path, "r+") as file:
        del file["features/conch"]
    assert read_features(path).encoder == "uni_v2"


def test_damage_names_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    bad = FEATURES.copy()
    bad[2] = np.nan
    cases: list[tuple[dict[str, Any], str]] = [
        ({"features": bad}, "5 NaN or infinite values in 1 of 6 tiles"),
        ({"features": FEATURES[:4]}, "4 rows of features and 6 of coords"),
        ({"coords": (COORDS % 999).astype(np.float16)}, "coords .* got float16"),
        ({"coords": np.where(COORDS > 0, np.inf, 0.0)}, "12 values that are NaN, infinite"),
        ({"coords": COORDS[:, :1]}, r"numbers \[tiles, 2\], got int64 \[6, 1\]"),
        ({"features": FEATURES[0]}, "slide embedding"),
        ({"features": FEATURES[None]}, "float matrix"),
        ({"patch_size": "big"}, "attribute patch_size .* positive number, got 'big'"),
        ({"patch_size_level0": -1}, "patch_size_level0 .* positive number, got -1"),
    ]
    for changes, message in cases:
        with pytest.raises(FeatureFileError, match=message):
            read_features(write_trident(path, **changes))
    with pytest.raises(FeatureFileError, match=r"s\.h5 must have width 1536, got 5"):
        read_features(write_trident(path), expect_width=1536)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FeatureFileError, match="must be a complete HDF5 feature file"):
        read_features(path)
    with h5py.File(path, "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(FeatureFileError, match=r"known layout, got the datasets \['weights'\]"):
        read_features(path)
    with pytest.raises(FeatureFileError, match="must exist"):
        read_features(tmp_path / "none.h5")
