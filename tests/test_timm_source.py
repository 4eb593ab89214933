"""`timm:NAME` and `timm:FOLDER`: a tiny network saved here, loaded back, and everything refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modaltune.engine.encoders import weights
from modaltune.engine.encoders.loading import load_encoder
from modaltune.engine.errors import InputError, WeightsError
from modaltune.kernels.tile_norm.api import normalize_tiles

ARGS = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "reg_tokens": 2}
CFG = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "license": "mit",
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"the network was reached: {args}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


def _network(classes: int = 0, pool: str = "token") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=classes, global_pool=pool, **ARGS
    ).eval()


def _save(folder: Path, network: nn.Module, **change: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {**ARGS, "global_pool": "token"},
        "pretrained_cfg": CFG,
        **change,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def _tiles() -> Any:
    return np.random.default_rng(0).integers(0, 256, (3, 50, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("classes", [0, 7])
def test_folder_with_or_without_a_classifier(tmp_path: Path, classes: int) -> None:
    network = _network(classes)
    encoder = load_encoder(f"timm:{_save(tmp_path / 'm', network)}")
    spec = encoder.spec
    assert (spec.input_px, spec.resize_px, spec.width) == (32, 40, 24)
    assert (spec.mean, spec.std, spec.interpolation) == (
        (0.5, 0.4, 0.3),
        (0.2, 0.3, 0.4),
        "bilinear",
    )
    assert spec.licence == "mit"
    assert "/" not in spec.slug
    x = normalize_tiles(
        torch.from_numpy(_tiles()),
        mean=CFG["mean"],  # type: ignore[arg-type]
        std=CFG["std"],  # type: ignore[arg-type]
        resize_px=40,
        crop_px=32,
        interpolation="bilinear",
    )
    with torch.no_grad():
        want = network.forward_features(x)[:, 0]  # type: ignore[operator]
    torch.testing.assert_close(encoder.encode(_tiles()), want, rtol=1e-4, atol=1e-5)


def test_folder_that_timm_itself_wrote(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    network = timm.create_model("test_efficientnet", num_classes=5).eval()
    save_for_hf(network, tmp_path / "m")
    encoder = load_encoder(f"timm:{tmp_path / 'm'}")
    size = encoder.spec.input_px
    tiles = np.random.default_rng(0).integers(0, 256, (2, 200, 200, 3), dtype=np.uint8)
    x = normalize_tiles(
        torch.from_numpy(tiles),
        mean=network.pretrained_cfg["mean"],
        std=network.pretrained_cfg["std"],
        resize_px=encoder.spec.resize_px,
        crop_px=size,
        interpolation=network.pretrained_cfg["interpolation"],
    )
    with torch.no_grad():
        want = network.forward_features(x).mean(dim=(2, 3))
    torch.testing.assert_close(encoder.encode(tiles), want, rtol=1e-4, atol=1e-5)


def test_name_with_weights_and_buffers_that_no_file_holds(tmp_path: Path) -> None:
    # The rotary table of EVA-02 is a buffer outside the state dict.
    network = timm.create_model("eva02_tiny_patch14_224", num_classes=0).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder("timm:eva02_tiny_patch14_224", weights=tmp_path / "w.safetensors")
    tiles = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    spec = encoder.spec
    x = normalize_tiles(
        torch.from_numpy(tiles),
        mean=spec.mean,
        std=spec.std,
        resize_px=spec.resize_px,
        crop_px=spec.input_px,
    )
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(tiles), network(x), rtol=1e-4, atol=1e-4)


def test_name_without_weights_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "hf_hub_download", lambda *a, **k: pytest.fail("download"))
    with pytest.raises(WeightsError) as caught:
        load_encoder("timm:resnet18.a1_in1k")
    for part in ("timm:resnet18.a1_in1k must have its weights", "--allow-download", "apache-2.0"):
        assert part in str(caught.value)


def test_name_is_fetched_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=1000).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def fetch(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(weights, "hf_hub_download", fetch)
    encoder = load_encoder("timm:test_vit.r160_in1k", allow_download=True)
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert encoder.width == network.num_features


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", _network())
    state = load_file(folder / "model.safetensors")
    state["cls_tokens"] = state.pop("cls_token")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="missing: cls_token; unexpected: cls_tokens; check"):
        load_encoder(f"timm:{folder}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architecture": "no_such_net"}, InputError, "must name a timm architecture, got 'no_su"),
        ({"architecture": "hf-hub:evil/model"}, InputError, "must name a timm architecture"),
        ({"pretrained_cfg": {"mean": [0.5] * 3}}, WeightsError, "got none for std, input_size"),
        ({"pretrained_cfg": None}, WeightsError, "must hold a JSON object, and so must its"),
        ({"model_args": []}, WeightsError, "must hold a JSON object, and so must its"),
        ({"model_args": {"checkpoint_path": "x"}}, WeightsError, "got checkpoint_path; remove"),
        ({"model_args": {"pretrained": True}}, WeightsError, "got pretrained; remove"),
        ({"model_args": {"width": 3}}, InputError, "must be a network that runs here, got:.*width"),
        (
            {"pretrained_cfg": {**CFG, "mean": [120.0, 110.0, 100.0]}},
            InputError,
            "must be a network that runs here, got: mean must be three numbers",
        ),
    ],
)
def test_bad_folders_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = _save(tmp_path / "m", _network(), **change)
    with pytest.raises(error, match=message):
        load_encoder(f"timm:{folder}")


def test_folder_without_config_or_weights(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", _network())
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"must be a folder with model.safetensors or"):
        load_encoder(f"timm:{folder}")
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"must hold a JSON object"):
        load_encoder(f"timm:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"must hold a config.json as timm's save_for_hf writes"):
        load_encoder(f"timm:{folder}")


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="timm:NAME must name a timm architecture, got 'no_such'"):
        load_encoder("timm:no_such")
