"""Encoders through transformers: tiny models saved here; strictness, processors, remote code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

from modaltune.engine.encoders import loading
from modaltune.engine.encoders import transformers_source as source
from modaltune.engine.encoders.loading import load_encoder
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.errors import InputError, WeightsError
from modaltune.kernels.tile_norm.api import normalize_tiles

REVISION = "0123456789abcdef0123456789abcdef01234567"
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"the network was reached: {args}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


def _save(folder: Path, model: Any, **processor: Any) -> Path:
    model.save_pretrained(folder)
    settings: dict[str, Any] = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    BitImageProcessor(**{**settings, **processor}).save_pretrained(folder)
    return folder


def _dinov2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Dinov2Model(Dinov2Config(**SIZE)).eval()


def _tiles(side: int = 40) -> Any:
    return np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)


def _input() -> torch.Tensor:
    return normalize_tiles(
        torch.from_numpy(_tiles()),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        resize_px=32,
        crop_px=28,
    )


def test_dinov2_folder(tmp_path: Path) -> None:
    model = _dinov2()
    encoder = load_encoder(f"transformers:{_save(tmp_path / 'm', model)}")
    spec = encoder.spec
    assert (spec.input_px, spec.resize_px, spec.width, spec.pooling) == (28, 32, 32, "cls")
    assert (spec.architecture, spec.interpolation) == ("dinov2", "bicubic")
    with torch.no_grad():
        want = model(_input()).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode(_tiles()), want, rtol=1e-4, atol=1e-5)
    # The processor that was saved agrees with our reading of it.
    images = BitImageProcessor.from_pretrained(tmp_path / "m")(list(_tiles()), return_tensors="pt")
    assert (images["pixel_values"] - _input()).abs().max() < 1.2 / 255 / 0.2


def test_registers_are_skipped_in_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3)
    ).eval()
    encoder = load_encoder(f"transformers:{_save(tmp_path / 'm', model)}")
    features = encoder.features
    features.pooling = "cls+mean"
    with torch.no_grad():
        tokens = model(_input()).last_hidden_state
        got = features(_input())
    assert tokens.shape[1] == 1 + 3 + 4
    torch.testing.assert_close(got, torch.cat([tokens[:, 0], tokens[:, 4:].mean(1)], 1))


def test_model_without_a_class_token_is_pooled_its_own_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    encoder = load_encoder(f"transformers:{_save(tmp_path / 'm', model)}")
    assert (encoder.spec.pooling, encoder.width) == ("pooled", 16)
    with torch.no_grad():
        want = model(_input()).pooler_output.flatten(1)
    torch.testing.assert_close(encoder.encode(_tiles()), want, rtol=1e-4, atol=1e-5)


def test_parts_that_features_never_use_may_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(**{**SIZE, "patch_size": 14}, intermediate_size=64, num_labels=3)
    ).eval()
    encoder = load_encoder(f"transformers:{_save(tmp_path / 'm', model)}")
    with torch.no_grad():
        want = model.vit(_input()).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode(_tiles()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "got missing: .*layernorm.weight; check"),
        ("unexpected", "got unexpected: .*surplus; check"),
        ("shape", "got shapes: .*layernorm.weight; check"),
    ],
)
def test_loading_is_strict(tmp_path: Path, kind: str, message: str) -> None:
    folder = _save(tmp_path / "m", _dinov2())
    state = load_file(folder / "model.safetensors")
    if kind == "missing":
        del state["layernorm.weight"]
    elif kind == "unexpected":
        state["surplus"] = torch.zeros(1)
    else:
        state["layernorm.weight"] = torch.ones(7)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=message):
        load_encoder(f"transformers:{folder}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_mean": [0.5]}, InputError, "preprocessor_config.json must be one that runs here"),
        ({"resample": 0}, InputError, "interpolation must be one of bilinear, bicubic, got '0'"),
        ({"rescale_factor": 1 / 127.5}, InputError, "rescale_factor must be 1/255"),
    ],
)
def test_processors_that_are_not_done_here(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = _save(tmp_path / "m", _dinov2())
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        load_encoder(f"transformers:{folder}")


def test_folders_that_lack_something(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", _dinov2())
    for name, message in (
        ("preprocessor_config.json", "must hold a readable preprocessor_config.json"),
        ("config.json", "must be a folder with config.json and model.safetensors or pytorch_model"),
        ("model.safetensors", "must be a folder with model.safetensors or pytorch_model.bin"),
    ):
        (folder / name).unlink()
        with pytest.raises(WeightsError, match=message):
            load_encoder(f"transformers:{folder}")


@pytest.mark.parametrize("name", ["/no/such/folder", "/no", "nothing", "a b/c"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(WeightsError, match="must be followed by an existing folder or a hub id"):
        load_encoder(f"transformers:{name}")


def test_names_download_nothing_unasked() -> None:
    with pytest.raises(WeightsError) as caught:
        load_encoder("transformers:nobody/nothing")
    for part in (
        "transformers:nobody/nothing must have its weights",
        "--allow-download",
        "licence",
    ):
        assert part in str(caught.value)
    with pytest.raises(WeightsError, match=f"must lie on this machine at {REVISION}"):
        load_encoder("transformers:nobody/nothing", trust_remote_code=REVISION)


def test_registered_encoder_takes_its_own_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _dinov2()
    folder = _save(tmp_path / "m", model)
    args = {k: v for k, v in SIZE.items() if k != "image_size"}
    small = replace(
        get_spec("phikon-v2"), model_args=args, width=32, input_px=28, resize_px=32, tile_px=40
    )
    with pytest.raises(WeightsError, match=r"must be that of phikon-v2 with hidden_size=1024.*got"):
        load_encoder("phikon-v2", weights=folder)
    monkeypatch.setattr(loading, "get_spec", lambda name: small)
    want = load_encoder("phikon-v2", weights=folder)
    by_file = load_encoder("phikon-v2", weights=folder / "model.safetensors")
    assert torch.equal(want.encode(_tiles()), by_file.encode(_tiles()))
    # The hash is over the names in the file, which outlive transformers' own renaming.
    digest = hashlib.sha256()
    for key, value in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{key} torch.float32 {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    assert want.weights_sha256 == by_file.weights_sha256 == digest.hexdigest()
    assert want.spec.mean == (0.485, 0.456, 0.406)  # the published ones, not the folder's


def test_registered_encoder_comes_from_the_cache_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {k: v for k, v in SIZE.items() if k != "image_size"}
    small = replace(
        get_spec("phikon-v2"), model_args=args, width=32, input_px=28, resize_px=32, tile_px=40
    )
    monkeypatch.setattr(loading, "get_spec", lambda name: small)
    root = tmp_path / "empty-cache" / "models--owkin--phikon-v2"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    _save(root / "snapshots" / REVISION, _dinov2())
    assert load_encoder("phikon-v2").encode(_tiles()).shape == (3, 32)


CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
import torch
from transformers import Dinov2Config, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
class OwnModel(PreTrainedModel):
    config_class = Dinov2Config
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = torch.nn.Conv2d(3, config.hidden_size, 14, 14)
        self.embeddings.cls_token = torch.nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.post_init()
    def forward(self, pixel_values):
        tokens = self.embeddings(pixel_values).flatten(2).transpose(1, 2)
        cls = tokens.mean(1, keepdim=True) + self.embeddings.cls_token
        return BaseModelOutput(last_hidden_state=torch.cat([cls, tokens], 1))
"""


def _with_code(folder: Path, marker: Path, target: str = "own.OwnModel") -> Path:
    _save(folder, _dinov2())
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    weight = torch.arange(32 * 3 * 14 * 14).view(32, 3, 14, 14) / 1e5
    state = {"weight": weight, "bias": torch.zeros(32), "cls_token": torch.ones(1, 1, 32)}
    state = {f"embeddings.{key}": value for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoModel": target}}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that does run is copied into a folder of this test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))


def test_remote_code_needs_a_flag_a_commit_and_the_same_folder(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = _with_code(tmp_path / "m", marker)
    name = f"transformers:{folder}"
    for flag, message in (
        (None, "must bring no code of its own, got auto_map.*--trust-remote-code REVISION"),
        ("main", "--trust-remote-code must be a commit of 40 lower-case hex digits, got 'main'"),
        (REVISION[:12], "must be a commit of 40 lower-case hex digits"),
        (REVISION, "must be the commit that .* was fetched at, got .* and no record of a commit"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_encoder(name, trust_remote_code=flag)
    record = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    record.parent.mkdir(parents=True)
    record.write_text("f" * 40 + "\netag\n0.0\n")
    with pytest.raises(WeightsError, match=f"got {REVISION} and {'f' * 40}; fetch it with"):
        load_encoder(name, trust_remote_code=REVISION)
    snapshot = _with_code(tmp_path / "snapshots" / REVISION, marker, "other/repo--own.OwnModel")
    with pytest.raises(WeightsError, match="got auto_map into another repository"):
        load_encoder(f"transformers:{snapshot}", trust_remote_code=REVISION)
    assert not marker.exists()


@pytest.mark.usefixtures("modules")
def test_remote_code_runs_at_its_commit(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = _with_code(tmp_path / "snapshots" / REVISION, marker)
    encoder = load_encoder(f"transformers:{folder}", trust_remote_code=REVISION)
    assert marker.exists()
    assert type(encoder.features.network).__name__ == "OwnModel"
    weight = torch.arange(32 * 3 * 14 * 14).view(32, 3, 14, 14) / 1e5
    want = F.conv2d(_input(), weight, stride=14).mean(dim=(2, 3)) + 1
    torch.testing.assert_close(encoder.encode(_tiles()), want, rtol=1e-4, atol=1e-4)


def test_registered_encoders_never_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = _with_code(tmp_path / "m", marker)
    spec = replace(get_spec("phikon-v2"), model_args={"hidden_size": 32})
    with pytest.raises(WeightsError, match="phikon-v2 must bring no code of its own"):
        source.load_registered(spec, folder, allow_download=False)
    assert not marker.exists()


def test_a_hub_model_is_fetched_whole_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = _save(tmp_path / "origin", _dinov2())
    root = tmp_path / "empty-cache" / "models--some--body"
    asked: list[str] = []

    def fetch(repository: str, filename: str) -> str:
        asked.append(filename)
        if not (origin / filename).is_file():
            raise EntryNotFoundError("404")
        folder = root / "snapshots" / REVISION
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(REVISION)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / filename).write_bytes((origin / filename).read_bytes())
        return str(folder / filename)

    monkeypatch.setattr("modaltune.engine.encoders.weights.hf_hub_download", fetch)
    encoder = load_encoder("transformers:some/body", allow_download=True)
    assert asked == ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert encoder.encode(_tiles()).shape == (3, 32)
    (origin / "config.json").unlink()
    (root / "snapshots" / REVISION / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"must have its config.json in the cache"):
        load_encoder("transformers:some/body", allow_download=True)
