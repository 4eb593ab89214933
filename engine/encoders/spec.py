"""What must be known about a tile encoder before it may run; checked where a spec is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

BACKENDS = ("timm", "transformers", "conch")
POOLINGS = ("cls", "cls+mean", "pooled")
PRECISIONS = ("fp32", "fp16", "bf16")
INTERPOLATIONS = ("bilinear", "bicubic")


def _require(ok: bool, name: str, rule: str, got: Any) -> None:
    if not ok:
        raise ValueError(f"{name} must {rule}, got {got!r}; correct the EncoderSpec")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides what an encoder's features mean, and where its weights come from.

    Attributes:
        name: What users type after `--tile-encoder`.
        backend: `timm`, `transformers` or `conch` (built here).
        architecture: The backend's name of the network: a timm name, or a transformers model type.
        model_args: timm: arguments of `create_model`; transformers: values that the folder's
            config must have.
        input_px: Side of the square that the network sees, after resize and crop, in px.
        resize_px: Shorter edge before the crop in px; None leaves the tile's size.
        tile_px: Recommended side of the tiles to cut, in px at `mpp`.
        mpp: Recommended resolution in microns per pixel.
        mean: Channel means, scale 0..1.
        std: Channel standard deviations, scale 0..1.
        interpolation: `bilinear` or `bicubic`.
        width: Features per tile.
        precision: Arithmetic on a GPU, `fp32`, `fp16` or `bf16`; the CPU always runs fp32.
        pooling: How features are taken: `cls` (class token after the last norm), `cls+mean` (class
            token, then the mean of the patch tokens without registers) or `pooled` (the network's
            own pooling).
        source: Hub id, Python package or local folder.
        weights_files: File names looked for in a folder or on the hub, in this order.
        licence: Licence of the weights.
        is_gated: Whether the weights need accepted terms.
        access: Where to get the weights, in words or as an address.
        citation: The work to cite.
        notes: What else a user should know, such as what could not be checked.
        package: Python package that ships the weights, or empty.

    Raises:
        ValueError: A field is missing, of the wrong kind, or contradicts another.
    """

    name: str
    backend: str
    architecture: str
    input_px: int
    tile_px: int
    mpp: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    width: int
    precision: str
    pooling: str
    source: str
    licence: str
    is_gated: bool
    access: str
    citation: str
    resize_px: int | None = None
    weights_files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    model_args: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_geometry()
        self._check_statistics()
        # A frozen spec with an open dictionary inside would not be frozen.
        object.__setattr__(self, "model_args", MappingProxyType(dict(self.model_args)))

    def _check_names(self) -> None:
        # A local folder may be part of a name, so any script is fine; control characters are not.
        good = _is_text(self.name) and self.name.isprintable()
        _require(good, "name", "be printable text", self.name)
        for name in ("architecture", "source", "licence", "access", "citation"):
            _require(
                _is_text(getattr(self, name)), name, "be a non-empty text", getattr(self, name)
            )
        for name, allowed in (
            ("backend", BACKENDS),
            ("pooling", POOLINGS),
            ("precision", PRECISIONS),
            ("interpolation", INTERPOLATIONS),
        ):
            value = getattr(self, name)
            _require(value in allowed, name, f"be one of {', '.join(allowed)}", value)
        _require(isinstance(self.is_gated, bool), "is_gated", "be True or False", self.is_gated)
        files = self.weights_files
        _require(
            isinstance(files, tuple) and len(files) > 0 and all(_is_text(f) for f in files),
            "weights_files",
            "be a non-empty tuple of file names",
            files,
        )

    def _check_geometry(self) -> None:
        for name in ("input_px", "tile_px", "width"):
            value = getattr(self, name)
            _require(_is_count(value), name, "be a positive whole number", value)
        resize = self.resize_px
        _require(
            resize is None or (_is_count(resize) and resize >= self.input_px),
            "resize_px",
            f"be None or at least input_px {self.input_px}",
            resize,
        )
        _require(
            resize is not None or self.tile_px >= self.input_px,
            "tile_px",
            f"be at least input_px {self.input_px} where resize_px is None",
            self.tile_px,
        )
        # The range of resolutions that the readers accept (REQUIREMENTS 1).
        _require(
            isinstance(self.mpp, float) and 0.05 <= self.mpp <= 5, "mpp", "be 0.05 to 5", self.mpp
        )

    def _check_statistics(self) -> None:
        for name, low in (("mean", 0.0), ("std", 1e-3)):
            value = getattr(self, name)
            good = (
                isinstance(value, tuple)
                and len(value) == 3
                and all(isinstance(v, float) and math.isfinite(v) and low <= v <= 1 for v in value)
            )
            _require(good, name, f"be three numbers from {low} to 1 on the scale 0..1", value)

    @property
    def slug(self) -> str:
        """The name made safe for a folder name, such as `features_<slug>`."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")
