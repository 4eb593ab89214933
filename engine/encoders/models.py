"""Networks of the tile encoders, and the one module around each that returns `[n, width]`."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from modaltune.engine.encoders.conch import ConchVisionTower, stretch_positions
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.encoders.weights import read_state

_CLASSES: dict[str, Any] = {"SwiGLUPacked": SwiGLUPacked, "SiLU": nn.SiLU}
# Blocks in each stage of EfficientNet-Lite0, by which the packaged file numbers them through.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_STEM = "_conv_stem.weight"


class ImageFeatures(nn.Module, ABC):
    """A network and the way its features are taken.

    Args:
        network: Its state dict is what weights files hold and what is hashed.
        pooling: `cls`, `cls+mean` or `pooled`.
    """

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling

    def published_state(self) -> Mapping[str, Tensor]:
        """Return the weights under the names that their publisher gave them, for hashing."""
        return self.network.state_dict()

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens: the class token and the registers."""

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """Return `[n, prefix + patches, width]` after the last norm, class token first."""

    @abstractmethod
    def pooled(self, x: Tensor) -> Tensor:
        """Return `[n, width]` by the network's own pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[n, width]` for normalised images `[n, 3, p, p]`."""
        if self.pooling == "pooled":
            return self.pooled(x)
        tokens = self.tokens(x)
        if self.pooling == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)


class TimmFeatures(ImageFeatures):
    """Features of a timm network (or of one with the same methods)."""

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens."""
        return int(getattr(self.network, "num_prefix_tokens", 0))

    def tokens(self, x: Tensor) -> Tensor:
        """Return all tokens after the last norm."""
        return self.network.forward_features(x)  # type: ignore[operator]

    def pooled(self, x: Tensor) -> Tensor:
        """Return the network's output; its classifier was taken off."""
        return self.network(x)


class TransformersFeatures(ImageFeatures):
    """Features of a transformers vision model.

    Args:
        network: The model.
        pooling: `cls`, `cls+mean` or `pooled`.
        path: Its weights file. transformers renames parameters from version to version, so only
            the file has names that last.
    """

    def __init__(self, network: nn.Module, pooling: str, path: Path) -> None:
        super().__init__(network, pooling)
        self.path = path

    def published_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the weights file."""
        return read_state(self.path)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens."""
        return 1 + int(getattr(self.network.config, "num_register_tokens", 0))

    def tokens(self, x: Tensor) -> Tensor:
        """Return `last_hidden_state`."""
        return self.network(pixel_values=x).last_hidden_state

    def pooled(self, x: Tensor) -> Tensor:
        """Return `pooler_output`, flattened."""
        return self.network(pixel_values=x).pooler_output.flatten(1)


def _arguments(spec: EncoderSpec) -> dict[str, Any]:
    return {
        key: _CLASSES.get(value, value) if isinstance(value, str) else value
        for key, value in spec.model_args.items()
    }


def build_network(spec: EncoderSpec) -> nn.Module:
    """Build the untrained network of a `timm` or `conch` spec on the current default device."""
    if spec.backend == "conch":
        return ConchVisionTower(spec.architecture, **_arguments(spec))
    return timm.create_model(spec.architecture, pretrained=False, **_arguments(spec))


def build_for_loading(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose weights are about to be replaced, without initialising it if possible.

    On the meta device a network of 10⁹ parameters takes 0.2 s instead of half a minute. Networks
    with buffers that no weights file holds are built for real.
    """
    with torch.device("meta"):
        network = build()
    saved = network.state_dict()
    if any(name not in saved for name, _ in network.named_buffers()):
        return build()
    return network


def measure_width(features: ImageFeatures, input_px: int) -> int:
    """Return the number of features per tile of a network that lies on the meta device."""
    with torch.inference_mode():
        out = features.eval()(torch.empty(1, 3, input_px, input_px, device="meta"))
    return int(out.shape[-1])


def drop_classifier(network: nn.Module) -> None:
    """Take the classification head off a timm network that has one."""
    if getattr(network, "num_classes", 0):
        network.reset_classifier(0)  # type: ignore[operator]


def _lite0_name(key: str) -> str:
    """Translate a key of the packaged EfficientNet-Lite0 file into timm's."""
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key)
    if match is None:
        head, _, leaf = key.partition(".")
        return f"{top.get(head, 'classifier')}.{leaf}"
    index, layer, leaf = int(match[1]), match[2], match[3]
    stage = 0
    while index >= _LITE0_STAGES[stage]:
        index -= _LITE0_STAGES[stage]
        stage += 1
    if stage == 0:  # a separable block: nothing is expanded, the projection is its pointwise layer
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw"}
        layers["_bn2"] = "bn2"
    else:
        layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
        layers |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"blocks.{stage}.{index}.{layers.get(layer, layer)}.{leaf}"


def adapt_state(
    spec: EncoderSpec, network: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Bring the published form of a weights file to the names and sizes of the network."""
    if spec.backend == "conch":
        patches = network.trunk.patch_embed.num_patches  # type: ignore[union-attr]
        return stretch_positions(state, 1 + int(patches))  # type: ignore[arg-type]
    if _LITE0_STEM in state:
        return {_lite0_name(key): value for key, value in state.items()}
    return dict(state)


def classifier_size(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes that a timm weights file has a head for; 0 without one."""
    cfg = getattr(network, "pretrained_cfg", {})
    names = cfg.get("classifier") or ()
    first = names if isinstance(names, str) else next(iter(names), "")
    weight = state.get(f"{first}.weight")
    return 0 if weight is None else int(weight.shape[0])


def resize_for_crop(input_px: int, crop_pct: float) -> int:
    """Return the shorter edge before a crop that keeps the share `crop_pct` of it (timm's rule)."""
    return math.floor(input_px / crop_pct)
