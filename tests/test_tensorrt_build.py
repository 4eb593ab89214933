"""Graphs of real encoders through TensorRT-RTX, for GPUs that are not here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from modaltune.engine.encoders.export import export_encoder
from modaltune.engine.encoders.loading import load_encoder
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.tensorrt_builder import BuildError, build_plan
from modaltune.engine.encoders.tensorrt_library import is_rtx, library_version
from modaltune.engine.encoders.torch_runtime import TorchEncoder

pytestmark = pytest.mark.tensorrt

GPUS = ("SM80", "SM86", "SM89", "SM120")
WIDTHS = {"vit_small_patch16_224": 384, "vit_large_patch16_224": 1024}


def _random_vit(architecture: str) -> TorchEncoder:
    torch.manual_seed(0)
    spec = replace(
        get_spec("phikon-v2"), name=architecture, backend="timm", model_args={},
        width=WIDTHS[architecture],
    )  # fmt: skip
    network = timm.create_model(architecture, pretrained=False, num_classes=0)
    return TorchEncoder(spec, TimmFeatures(network, "cls"))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("efficientnet-lite0", "fp16"),
        ("efficientnet-lite0", "bf16"),
        ("efficientnet-lite0", "fp32"),
        ("vit_small_patch16_224", "fp16"),
        ("vit_small_patch16_224", "bf16"),
        ("vit_large_patch16_224", "fp16"),
    ],
)
def test_engines_for_four_gpus(tmp_path: Path, name: str, precision: str) -> None:
    encoder = load_encoder(name) if name == "efficientnet-lite0" else _random_vit(name)
    assert isinstance(encoder, TorchEncoder)
    graph = tmp_path / "encoder.onnx"
    # A large random network is checked elsewhere, at a fraction of its size.
    export_encoder(
        encoder, graph, precision=precision, preprocessing="outside", check="large" not in name
    )
    weights = sum(p.numel() for p in encoder.features.parameters())
    size = weights * (4 if precision == "fp32" else 2)
    took = {}
    for gpu in GPUS:
        started = time.perf_counter()
        plan = build_plan(graph, (1, 8, 32), timing_cache=tmp_path / gpu, capability=gpu)
        took[gpu] = round(time.perf_counter() - started, 2)
        assert 0.9 * size < len(plan) < 2 * size
        assert (tmp_path / gpu).is_file()
    print(f"{library_version()}: {name} {precision}, seconds: {took}")


def test_a_graph_with_preprocessing_inside(tmp_path: Path) -> None:
    encoder = load_encoder()
    assert isinstance(encoder, TorchEncoder)
    export_encoder(encoder, tmp_path / "tiles.onnx", precision="fp16", tile_px=300, check=False)
    assert build_plan(tmp_path / "tiles.onnx", (4,), capability="SM89")


def test_no_graph_at_all(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert is_rtx()
    with pytest.raises(BuildError, match=r"bad\.onnx must be a graph that tensorrt_rtx"):
        build_plan(tmp_path / "bad.onnx", (1,), capability="SM89")
