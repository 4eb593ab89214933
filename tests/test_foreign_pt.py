"""`.pt` features of CLAM, slide2vec and the published ModalTune, honest and hostile."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from modaltune.engine import foreign_pt, untrusted_pt
from modaltune.engine.errors import FeatureFileError
from modaltune.engine.store import read_features
from modaltune.engine.untrusted_pt import UntrustedPtError, load_pt_tensors

N, D = 6, 5
RNG = np.random.default_rng(7)
FEATURES = RNG.normal(size=(N, D)).astype(np.float32)
# Odd pixels above 2^16: microns, float16 or a lost bit would all show.
COORDS = RNG.integers(70_000, 140_000, (N, 2)).astype(np.int64) | 1


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test the child's import of torch; what the child does stays the same."""

    def load(path: Path) -> dict[str, Any]:
        content = torch.load(path, weights_only=True)
        layout, tensors = untrusted_pt.dense_tensors(content, budget=1 << 20)
        return {"" if layout == "tensor" else k: v.numpy() for k, v in tensors.items()}

    monkeypatch.setattr(foreign_pt, "load_pt_tensors", load)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.open, (str(self.target), "w"))


def write_clam_h5(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
        file["coords"] = COORDS.astype(np.int32)
    return path


@pytest.mark.usefixtures("in_process")
def test_clam_pt(tmp_path: Path) -> None:
    path = tmp_path / "pt_files" / "s.pt"
    path.parent.mkdir()
    torch.save(torch.from_numpy(FEATURES), path)
    with pytest.raises(FeatureFileError, match=r"read_features\(\.\.\., allow_pt=True\)"):
        read_features(path)
    with pytest.raises(FeatureFileError, match="coords_from must name a file"):
        read_features(path, allow_pt=True)
    write_clam_h5(tmp_path / "h5_files" / "s.h5")
    feats = read_features(path, allow_pt=True)
    np.testing.assert_array_equal(feats.features, FEATURES)
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert (feats.producer, feats.slide) == ("clam", "s")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("kind", "width"), [(torch.float16, 1536), (torch.float32, 768)])
def test_modaltune_reference(tmp_path: Path, kind: torch.dtype, width: int) -> None:
    features = torch.randn(N, width).to(kind)
    path = tmp_path / "TCGA-01.uuid_featvec.pt"
    torch.save({"features": features, "coords": torch.from_numpy(COORDS), "note": "x"}, path)
    feats = read_features(path, allow_pt=True, expect_width=width)
    np.testing.assert_array_equal(feats.features, features.numpy())
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert (feats.slide, feats.producer) == ("TCGA-01.uuid", "modaltune_reference")


def test_modaltune_reference_through_the_child(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    base = torch.randn(N, 2 * D).to(torch.bfloat16)
    # A view, two names for one storage, and a type that numpy lacks.
    torch.save({"features": base[:, ::2], "feats": base, "coords": torch.tensor(COORDS)}, path)
    feats = read_features(path, allow_pt=True)
    np.testing.assert_array_equal(feats.features, base[:, ::2].float().numpy())
    np.testing.assert_array_equal(feats.coords, COORDS)


@pytest.mark.usefixtures("in_process")
def test_pt_with_float16_coords(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"features": torch.ones(N, D), "coords": torch.tensor(COORDS / 2).half()}, path)
    with pytest.raises(FeatureFileError, match=r"coords .* got float16"):
        read_features(path, allow_pt=True)


@pytest.mark.parametrize("layout", ["torch", "bare pickle"])
def test_malicious_pt_is_refused_and_runs_nothing(tmp_path: Path, layout: str) -> None:
    target, path = tmp_path / "owned", tmp_path / "evil.pt"
    if layout == "torch":
        torch.save({"features": torch.from_numpy(FEATURES), "coords": Evil(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(target), protocol=2))
    with pytest.raises(FeatureFileError, match=r"evil\.pt must hold tensors and nothing else"):
        read_features(path, allow_pt=True)
    assert not target.exists()
    # The file is truly loaded: without the guard it does run.
    if layout == "bare pickle":
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)
    assert target.exists()


def test_pt_that_declares_more_than_it_carries(tmp_path: Path) -> None:
    path = tmp_path / "expanded.pt"
    torch.save(torch.zeros(1, 1).expand(1 << 20, 1 << 20), path)
    with pytest.raises(ValueError, match=r"declare .* more than the file carries"):
        untrusted_pt.dense_tensors(torch.load(path, weights_only=True), budget=1 << 20)
    packed = io.BytesIO()
    torch.save(torch.zeros(1 << 21), packed)
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="the archive declares"):
        untrusted_pt.check_archive(str(path), path.stat().st_size)


def test_pt_without_plain_tensors() -> None:
    cases: list[tuple[Any, str]] = [
        ({"names": "x", "size": 3}, r"holds no tensors, only \['names', 'size'\]"),
        ([torch.ones(2)], "holds a list"),
        ({"features": torch.eye(3).to_sparse()}, "not a plain dense tensor"),
    ]
    for content, message in cases:
        with pytest.raises(TypeError, match=message):
            untrusted_pt.dense_tensors(content, budget=1 << 20)


def test_pt_damage_and_time_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.from_numpy(FEATURES), path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(FeatureFileError, match="refused"):
        read_features(path, allow_pt=True)
    with pytest.raises(UntrustedPtError, match=r"did not finish in 0\.05 s"):
        load_pt_tensors(path, timeout_s=0.05)
    with pytest.raises(FeatureFileError, match="must exist"):
        read_features(tmp_path / "none.pt", allow_pt=True)


def test_child_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Seen(Exception):
        pass

    def run(*arguments: Any, **options: Any) -> None:
        seen.update(options, command=arguments[0])
        raise Seen

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(untrusted_pt.subprocess, "run", run)
    with pytest.raises(Seen):
        load_pt_tensors(tmp_path / "a.pt")
    assert "HF_TOKEN" not in seen["env"]
    assert seen["command"][1] == "-I"


@pytest.mark.usefixtures("in_process")
def test_slide2vec(tmp_path: Path) -> None:
    (tmp_path / "tile_embeddings").mkdir()
    (tmp_path / "tiles").mkdir()
    path = tmp_path / "tile_embeddings" / "s.pt"
    torch.save(torch.from_numpy(FEATURES).half(), path)
    meta = {"encoder_name": "virchow2", "tile_size_lv0": 448, "num_tiles": N, "feature_dim": D}
    path.with_name("s.meta.json").write_text(json.dumps(meta))
    with pytest.raises(FeatureFileError, match="coordinates of slide2vec features must lie"):
        read_features(path, allow_pt=True)
    tiles = tmp_path / "tiles" / "s.coordinates.npz"
    order = RNG.permutation(N)
    np.savez(tiles, x=COORDS[order, 0], y=COORDS[order, 1], tile_index=order)
    feats = read_features(path, allow_pt=True)
    np.testing.assert_array_equal(feats.coords, COORDS)
    assert (feats.producer, feats.encoder, feats.level0_tile_px) == ("slide2vec", "virchow2", 448)
    np.savez(tiles, x=COORDS[:, 0], y=COORDS[:, 1], tile_index=np.zeros(N, int))
    with pytest.raises(FeatureFileError, match=r"tile_index .* without gaps"):
        read_features(path, allow_pt=True)
    evil = np.array([Evil(tmp_path / "owned")], dtype=object)
    np.savez(tiles, x=evil, y=COORDS[:, 1], tile_index=np.arange(N))
    with pytest.raises(FeatureFileError, match="must hold x, y and tile_index"):
        read_features(path, allow_pt=True)
    assert not (tmp_path / "owned").exists()
