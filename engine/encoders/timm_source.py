"""`timm:NAME` and `timm:FOLDER`: a spec from what timm or the folder says about the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from modaltune.engine.encoders.models import (
    TimmFeatures,
    build_for_loading,
    classifier_size,
    measure_width,
    resize_for_crop,
)
from modaltune.engine.encoders.registry import TIMM_PREFIX
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.encoders.weights import find_weights, load_strict, read_state
from modaltune.engine.errors import InputError, WeightsError

# A folder's config must not make timm open files, fetch weights or return something else.
_FORBIDDEN_ARGS = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "features_only",
        "num_classes",
    }
)
_NEEDED = ("mean", "std", "input_size")
_DEFAULT_TILE_PX = 256


@dataclass(frozen=True)
class _Reference:
    """What a `timm:` reference stands for."""

    architecture: str
    cfg: Mapping[str, Any]
    model_args: Mapping[str, Any]
    folder: Path | None


def _known(architecture: str, where: str) -> str:
    if not isinstance(architecture, str) or not timm.is_model(architecture.split(".")[0]):
        raise InputError(
            f"{where} must name a timm architecture, got {architecture!r}; list them with "
            "timm.list_models()"
        )
    return architecture


def _read_folder(folder: Path) -> _Reference:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder} must hold a config.json as timm's save_for_hf writes it, got "
            f"{type(error).__name__}; save the model again"
        ) from error
    said = config.get("pretrained_cfg", {}) if isinstance(config, dict) else None
    if not isinstance(said, dict) or not isinstance(config.get("model_args", {}), dict):
        raise WeightsError(
            f"{path} must hold a JSON object, and so must its pretrained_cfg and model_args; save "
            "the model again with timm's save_for_hf"
        )
    cfg = {**config, **said}
    missing = [key for key in _NEEDED if key not in cfg]
    if missing or "architecture" not in config:
        raise WeightsError(
            f"{path} must have architecture and, in pretrained_cfg, {', '.join(_NEEDED)}, got none "
            f"for {', '.join(missing) or 'architecture'}; add them"
        )
    architecture = _known(config["architecture"], f"architecture in {path}")
    args = dict(config.get("model_args", {}))
    args.pop("num_classes", None)
    forbidden = sorted(_FORBIDDEN_ARGS & set(args))
    if forbidden:
        raise WeightsError(
            f"model_args in {path} must be arguments of the network, got {', '.join(forbidden)}; "
            "remove them"
        )
    return _Reference(architecture, cfg, args, folder)


def _read_reference(reference: str) -> _Reference:
    if Path(reference).is_dir():
        return _read_folder(Path(reference))
    cfg = timm.get_pretrained_cfg(_known(reference, f"--tile-encoder {TIMM_PREFIX}NAME"))
    return _Reference(reference, cfg.to_dict() if cfg is not None else {}, {}, None)


def _builder(ref: _Reference, classes: int) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(
        ref.architecture, pretrained=False, num_classes=classes, **ref.model_args
    )


def _spec(name: str, ref: _Reference, headless: nn.Module) -> EncoderSpec:
    data = resolve_data_config({}, pretrained_cfg=dict(ref.cfg))
    input_px = int(data["input_size"][-1])
    width = measure_width(TimmFeatures(headless, "pooled"), input_px)
    hub = ref.cfg.get("hf_hub_id")
    source = str(ref.folder) if ref.folder else str(hub or "timm")
    return EncoderSpec(
        name=name,
        backend="timm",
        architecture=ref.architecture,
        model_args=ref.model_args,
        input_px=input_px,
        resize_px=resize_for_crop(input_px, float(data["crop_pct"])),
        tile_px=_DEFAULT_TILE_PX,
        mpp=0.5,
        mean=tuple(float(v) for v in data["mean"]),  # type: ignore[arg-type]
        std=tuple(float(v) for v in data["std"]),  # type: ignore[arg-type]
        interpolation=str(data["interpolation"]),
        width=width,
        precision="fp32",
        pooling="pooled",
        source=source,
        licence=str(ref.cfg.get("license") or "unknown: see where the weights come from"),
        is_gated=False,
        access=f"https://huggingface.co/{hub}" if hub and not ref.folder else source,
        citation=str(ref.cfg.get("paper_name") or f"timm {ref.architecture}"),
        notes="tile_px, mpp and precision are this program's defaults, not the model's",
    )


def load_timm(
    name: str, weights: Path | None, allow_download: bool
) -> tuple[EncoderSpec, TimmFeatures]:
    """Load `timm:NAME` or `timm:FOLDER` with its weights.

    Args:
        name: The reference, prefix included.
        weights: File or folder that takes the place of the reference's own weights.
        allow_download: Whether the hub may be asked.

    Raises:
        InputError: The architecture is unknown, or its settings can't be run here.
        WeightsError: The folder or the weights are missing, damaged or of another network.
    """
    ref = _read_reference(name.removeprefix(TIMM_PREFIX))
    try:
        with torch.device("meta"):
            headless = _builder(ref, 0)()
        spec = _spec(name, ref, headless)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a network that runs here, got: {error}") from error
    path = find_weights(spec, weights or ref.folder, allow_download)
    state = read_state(path)
    classes = classifier_size(headless, state)
    network = build_for_loading(_builder(ref, classes))
    load_strict(network, state, name, str(path))
    if classes:
        network.reset_classifier(0)  # type: ignore[operator]
    return spec, TimmFeatures(network, spec.pooling)
