"""Each family of registered encoders, at a fraction of its size: exported, and built."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from torch import nn

from modaltune.engine.encoders.conch import ConchVisionTower
from modaltune.engine.encoders.export import export_encoder
from modaltune.engine.encoders.models import ImageFeatures, TimmFeatures, TransformersFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.tensorrt_builder import build_plan
from modaltune.engine.encoders.torch_runtime import TorchEncoder

SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


class Nameless(TorchEncoder):
    """An encoder without a weights file to hash."""

    @cached_property
    def weights_sha256(self) -> str:
        return "0" * 64


def _dinov2() -> ImageFeatures:
    from transformers import Dinov2Config, Dinov2Model

    # The published table of positions is of 518 px images and is stretched for 224.
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    return TransformersFeatures(Dinov2Model(Dinov2Config(image_size=518, **size)), "cls", Path("-"))


def _vit(architecture: str, pooling: str, **more: Any) -> ImageFeatures:
    network = timm.create_model(architecture, img_size=224, init_values=1e-5, **SMALL, **more)
    return TimmFeatures(network, pooling)


def _family(name: str) -> TorchEncoder:
    torch.manual_seed(0)
    if name == "dinov2-small":
        features, width = _dinov2(), 64
    elif name == "virchow2":
        more = {"reg_tokens": 4, "global_pool": "", **SWIGLU}
        features, width = _vit("vit_huge_patch14_224", "cls+mean", **more), 128
    elif name == "uni2-h":
        more = {"reg_tokens": 8, "no_embed_class": True, "mlp_ratio": 4, **SWIGLU}
        features, width = _vit("vit_giant_patch14_224", "cls", **more), 64
    else:
        tower = ConchVisionTower("vit_large_patch16_224", img_size=448, init_values=1.0, **SMALL)
        features, width = TimmFeatures(tower, "pooled"), 768
    for parameter in features.parameters():
        if parameter.dim() > 1:  # as initialised, blocks add next to nothing
            nn.init.normal_(parameter, std=0.05)
    return Nameless(replace(get_spec(name), width=width), features)


FAMILIES = ("dinov2-small", "virchow2", "uni2-h", "conch-v1.5")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_export(tmp_path: Path, name: str) -> None:
    report = export_encoder(_family(name), tmp_path / "x.onnx", precision="fp16")
    assert report.agreement is not None
    assert report.agreement.cosine >= 0.9999


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", FAMILIES)
def test_families_build(tmp_path: Path, name: str) -> None:
    graph = tmp_path / "x.onnx"
    precision = get_spec(name).precision
    export_encoder(_family(name), graph, precision=precision, preprocessing="outside", check=False)
    assert build_plan(graph, (1, 8), capability="SM89")
