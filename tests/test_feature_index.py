"""Feature folders: every producer's files are listed from their headers, others say why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from modaltune.engine import foreign_pt, untrusted_pt
from modaltune.engine.cohort import SlideItem
from modaltune.engine.errors import FeatureFileError
from modaltune.engine.feature_index import PT, import_pt, index_features
from modaltune.engine.store import read_features
from modaltune.testing_features import small_features

N, D = 4, 6
FEATURES = np.arange(N * D, dtype=np.float32).reshape(N, D)
COORDS = np.arange(2 * N, dtype=np.int64).reshape(N, 2) * 256


def write_h5(path: Path, content: dict[str, Any], **attrs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = value
        file.attrs.update(attrs)
    return path


def write_trident(path: Path) -> None:
    write_h5(path, {"features": FEATURES, "coords": COORDS})
    with h5py.File(path, "r+") as file:
        file["features"].attrs["encoder"] = "uni_v2"


def write_clam(path: Path) -> None:
    write_h5(path, {"features": FEATURES, "coords": COORDS.astype(np.int32)})


def write_stamp(path: Path) -> None:
    content = {"feats": FEATURES.astype(np.float16), "coords": COORDS.astype(np.float32)}
    write_h5(path, content, unit="um", extractor="uni", feat_type="tile")


def write_atlaspatch(path: Path) -> None:
    write_h5(path, {"features/uni": FEATURES, "coords": COORDS})


def write_ours(path: Path) -> None:
    small_features(path, SlideItem(path, path.stem, path.stem), tiles=N, width=D)


@pytest.mark.parametrize(
    ("write", "producer", "encoder"),
    [
        (write_ours, "modaltune", "small"),
        (write_trident, "trident", "uni_v2"),
        (write_clam, "clam", None),
        (write_stamp, "stamp", "uni"),
        (write_atlaspatch, "atlaspatch", "uni"),
    ],
)
def test_every_producer_is_known_as_the_reader_knows_it(
    tmp_path: Path, write: Callable[[Path], None], producer: str, encoder: str | None
) -> None:
    write(tmp_path / "sub" / "b.h5")
    write(tmp_path / "a.h5")
    index = index_features(tmp_path)
    assert [file.slide for file in index.files] == ["a", "b"]
    assert index.skipped == ()
    (first, _) = index.files
    assert (first.producer, first.encoder, first.tiles, first.width) == (producer, encoder, N, D)
    read = read_features(first.path, base_mpp=0.5)
    assert (read.producer, read.encoder, len(read), read.width) == (producer, encoder, N, D)


def test_what_holds_no_tile_features_is_skipped_with_a_reason(tmp_path: Path) -> None:
    write_trident(tmp_path / "good.h5")
    write_h5(tmp_path / "patches" / "good_patches.h5", {"coords": COORDS})
    write_h5(tmp_path / "slide.h5", {"features": FEATURES[0], "coords": COORDS})
    write_h5(tmp_path / "other.h5", {"weights": FEATURES})
    write_h5(tmp_path / "two.h5", {"features/a": FEATURES, "features/b": FEATURES,
                                   "coords": COORDS})  # fmt: skip
    (tmp_path / "damaged.h5").write_bytes(b"\x89HDF\r\n\x1a\n broken")
    (tmp_path / ".x.0123456789abcdef.modaltune-tmp.h5").write_bytes(b"")
    (tmp_path / "thumbnail.png").write_bytes(b"")
    index = index_features(tmp_path)
    assert [file.slide for file in index.files] == ["good"]
    reasons = {path.name: reason for path, reason in index.skipped}
    assert reasons["good_patches.h5"] == "coordinates only"
    assert reasons["slide.h5"] == "a slide embedding, not tile features"
    assert reasons["other.h5"] == "no tile features: the datasets ['weights']"
    assert "encoder must be one of" in reasons["two.h5"]
    assert "damaged" in reasons["damaged.h5"]
    assert "killed writer" in reasons[".x.0123456789abcdef.modaltune-tmp.h5"]
    assert len(reasons) == 6
    assert index_features(tmp_path, encoder="b").files[1].slide == "two"


def test_two_files_of_a_slide_are_refused_but_hdf5_wins_over_pt(tmp_path: Path) -> None:
    write_clam(tmp_path / "h5_files" / "s.h5")
    torch.save(torch.from_numpy(FEATURES), tmp_path / "s.pt")
    torch.save(torch.from_numpy(FEATURES), tmp_path / "only.pt")
    index = index_features(tmp_path)
    assert [(f.slide, f.producer) for f in index.files] == [("only", PT), ("s", "clam")]
    assert [(path.name, why) for path, why in index.skipped] == [
        ("s.pt", "the same slide is there as HDF5, which is preferred")
    ]
    write_clam(tmp_path / "h5_files_new" / "s.h5")
    with pytest.raises(FeatureFileError, match=r"one feature file per slide, got .*s\.h5 and"):
        index_features(tmp_path)
    with pytest.raises(FeatureFileError, match="features must be a folder, got nothing"):
        index_features(tmp_path / "absent")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test the child's import of torch; what the child does stays the same."""

    def load(path: Path) -> dict[str, Any]:
        content = torch.load(path, weights_only=True)
        layout, tensors = untrusted_pt.dense_tensors(content, budget=1 << 20)
        return {"" if layout == "tensor" else k: v.numpy() for k, v in tensors.items()}

    monkeypatch.setattr(foreign_pt, "load_pt_tensors", load)


@pytest.mark.usefixtures("in_process")
def test_imported_pt_files_are_hdf5_with_the_same_content(tmp_path: Path) -> None:
    source = tmp_path / "s_featvec.pt"
    content = {"features": torch.from_numpy(FEATURES).half(), "coords": torch.from_numpy(COORDS)}
    torch.save(content, source)
    assert index_features(tmp_path).files[0].slide == "s"
    import_pt(source, tmp_path / "h5" / "s.h5")
    read = read_features(tmp_path / "h5" / "s.h5")
    np.testing.assert_array_equal(read.features, FEATURES.astype(np.float16))
    np.testing.assert_array_equal(read.coords, COORDS)
    assert read.features.dtype == np.float16
    (found,) = index_features(tmp_path / "h5").files
    assert (found.slide, found.tiles, found.width) == ("s", N, D)
