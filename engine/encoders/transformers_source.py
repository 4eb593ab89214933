"""Encoders that transformers builds: registered, `transformers:NAME`, `transformers:FOLDER`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel
from transformers.utils import logging as hf_logging

from modaltune.engine.encoders.models import TransformersFeatures
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.encoders.weights import (
    cached_file,
    download_file,
    find_weights,
    hub_id,
    way_out,
)
from modaltune.engine.errors import InputError, WeightsError

logger = logging.getLogger(__name__)

PREFIX = "transformers:"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_REVISION = re.compile(r"[0-9a-f]{40}")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # codes of PIL
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
# Parts of a checkpoint that features never use.
_UNUSED_IN_MODEL = ("pooler.",)
_UNUSED_IN_FILE = ("classifier.", "decoder.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path.parent} must hold a readable {path.name}, got {type(error).__name__}; save the "
            "model and its image processor there with save_pretrained"
        ) from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _folder_revision(folder: Path) -> str | None:
    """Return the commit that a hub folder was fetched at: a cache snapshot or a `--local-dir`."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":
        return resolved.name
    record = resolved / ".cache" / "huggingface" / "download" / f"{_CONFIG}.metadata"
    try:
        return record.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def check_remote_code(name: str, folder: Path, config: Mapping[str, Any], flag: str | None) -> bool:
    """Return whether code from `folder` may run: only if it is needed, pinned and matching.

    Args:
        name: The encoder, for messages.
        folder: Where the code lies.
        config: Its config.json.
        flag: The revision given with `--trust-remote-code`, or None.

    Raises:
        WeightsError: The model needs its own code and the flag is absent, is not a 40-hex commit,
            or is not the commit of the folder; or the code lies in another repository.
    """
    if "auto_map" not in config:
        return False
    if flag is None:
        raise WeightsError(
            f"{name} must bring no code of its own, got auto_map in {folder / _CONFIG}; read the "
            "code, then allow exactly that commit with --trust-remote-code REVISION (40 hex digits)"
        )
    check_revision(flag)
    if "--" in json.dumps(config["auto_map"]):
        raise WeightsError(
            f"{name} must keep its code beside its weights, got auto_map into another repository "
            f"in {folder / _CONFIG}; it can't be pinned"
        )
    found = _folder_revision(folder)
    if found != flag:
        raise WeightsError(
            f"--trust-remote-code must be the commit that {folder} was fetched at, got {flag} "
            f"and {found or 'no record of a commit'}; fetch it with `hf download --revision {flag}`"
        )
    logger.warning("%s: running code from %s at %s", name, folder, flag)
    return True


def check_revision(flag: str) -> None:
    """Raise WeightsError unless `flag` is a full commit id."""
    if _REVISION.fullmatch(flag) is None:
        raise WeightsError(
            f"--trust-remote-code must be a commit of 40 lower-case hex digits, got {flag!r}; a "
            "branch or tag can change after you read the code"
        )


def _hub_folder(spec: EncoderSpec, allow_download: bool, revision: str | None) -> Path:
    """Return the local folder of a hub model, fetching what is missing only where allowed."""
    repository = hub_id(spec)
    if repository is None:
        raise WeightsError(
            f"--tile-encoder {PREFIX} must be followed by an existing folder or a hub id such as "
            f"facebook/dinov2-base, got {spec.source!r}"
        )
    if revision is not None:
        try:
            return Path(
                snapshot_download(
                    repository, revision=revision, local_files_only=not allow_download
                )
            )
        except (OSError, EntryNotFoundError) as error:
            raise WeightsError(
                f"{spec.name} must lie on this machine at {revision}, got {type(error).__name__}; "
                f"{way_out(spec)}"
            ) from error
    config = cached_file(repository, _CONFIG)
    if allow_download:
        for name in (_CONFIG, _PROCESSOR):
            try:
                download_file(spec, repository, name)
            except EntryNotFoundError:
                logger.debug("%s: no %s", repository, name)
        config = cached_file(repository, _CONFIG)
    path = find_weights(spec, None, allow_download)
    if config is None or config.parent != path.parent:
        raise WeightsError(f"{spec.name} must have its config.json in the cache; {way_out(spec)}")
    return path.parent


def find_folder(
    spec: EncoderSpec, weights: Path | None, allow_download: bool, revision: str | None = None
) -> Path:
    """Return the folder with config.json and weights of a transformers encoder.

    Raises:
        WeightsError: Config or weights are missing; names what was expected and the way out.
    """
    if weights is None:
        return _hub_folder(spec, allow_download, revision)
    folder = weights if weights.is_dir() else weights.parent
    path = find_weights(spec, weights, allow_download=False)
    if not (folder / _CONFIG).is_file() or path.name not in WEIGHTS_FILES:
        raise WeightsError(
            f"--tile-encoder-weights must be a folder with {_CONFIG} and "
            f"{' or '.join(WEIGHTS_FILES)} for {spec.name}, got {weights}; {way_out(spec)}"
        )
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bar and key report off the screen: faults are raised here."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _faults(info: Mapping[str, Any], pooling: str) -> list[str]:
    skip = _UNUSED_IN_MODEL if pooling != "pooled" else ()
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(skip))
    unexpected = sorted(k for k in info["unexpected_keys"] if not k.startswith(_UNUSED_IN_FILE))
    misshapen = sorted(str(k[0]) for k in info.get("mismatched_keys", ()))
    named = (("missing", missing), ("unexpected", unexpected), ("shapes", misshapen))
    return [f"{what}: {', '.join(keys[:4])}" for what, keys in named if keys]


def load_folder(spec: EncoderSpec, folder: Path, trust_code: bool) -> TransformersFeatures:
    """Build the model of `folder` with its weights, strictly and from local files alone.

    Raises:
        WeightsError: The weights are damaged or do not fit the architecture; keys are named.
    """
    path = find_weights(spec, folder, allow_download=False)
    try:
        with _quiet():
            # Misshapen tensors are asked for as a list, to be named like every other fault.
            network, info = AutoModel.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=trust_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(
            f"{folder} must hold a model that transformers can load for {spec.name}, got "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    faults = _faults(info, spec.pooling)
    if faults:
        raise WeightsError(
            f"{folder} must hold exactly the weights of {spec.name}, got {'; '.join(faults)}; "
            "check that the folder belongs to this --tile-encoder"
        )
    return TransformersFeatures(network, spec.pooling, path)


def load_registered(
    spec: EncoderSpec, weights: Path | None, allow_download: bool
) -> TransformersFeatures:
    """Load a registered transformers encoder, whose config must be the published one.

    Raises:
        WeightsError: Folder missing or incomplete, another model's config, or weights that differ.
    """
    folder = find_folder(spec, weights, allow_download)
    config = _read_json(folder / _CONFIG)
    wanted = {"model_type": spec.architecture, **spec.model_args}
    other = {key: config.get(key) for key, value in wanted.items() if config.get(key) != value}
    if other:
        raise WeightsError(
            f"{folder / _CONFIG} must be that of {spec.name} with "
            f"{', '.join(f'{k}={wanted[k]}' for k in other)}, got {other}; give its own folder"
        )
    return load_folder(spec, folder, check_remote_code(spec.name, folder, config, None))


def _edge(value: Any, *names: str) -> int | None:
    if isinstance(value, Mapping):
        value = next((value[name] for name in names if name in value), None)
    return int(value) if value else None


def _spec_from_files(
    name: str, source: str, config: Mapping[str, Any], processor: Mapping[str, Any]
) -> EncoderSpec:
    resize = _edge(processor.get("size"), "shortest_edge", "height")
    resize = resize if processor.get("do_resize", True) else None
    crops = processor.get("do_center_crop", "crop_size" in processor)
    crop = _edge(processor.get("crop_size"), "height") if crops else None
    input_px = crop or resize or _edge(config.get("image_size"))
    width = config.get("hidden_size") or (config.get("hidden_sizes") or [0])[-1]
    scale = float(processor.get("rescale_factor", 1 / 255))
    if abs(scale * 255 - 1) > 1e-3:
        raise ValueError(f"rescale_factor must be 1/255, got {scale}")
    return EncoderSpec(
        name=name,
        backend="transformers",
        architecture=str(config.get("model_type") or "unknown"),
        input_px=input_px or 0,
        resize_px=resize,
        tile_px=256,
        mpp=0.5,
        mean=tuple(float(v) for v in processor.get("image_mean", ())),  # type: ignore[arg-type]
        std=tuple(float(v) for v in processor.get("image_std", ())),  # type: ignore[arg-type]
        interpolation=_RESAMPLE.get(processor.get("resample", 3), str(processor.get("resample"))),
        width=int(width),
        precision="fp32",
        pooling="cls",
        source=source,
        weights_files=WEIGHTS_FILES,
        licence="unknown: see where the weights come from",
        is_gated=False,
        access=source if Path(source).is_dir() else f"https://huggingface.co/{source}",
        citation=f"transformers {config.get('model_type', 'model')}",
        notes="tile_px, mpp and precision are this program's defaults, not the model's",
    )


def _placeholder(name: str, source: str) -> EncoderSpec:
    """Return a spec good for finding files only: the real one needs the files that it finds."""
    found = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "size": 224}
    return _spec_from_files(name, source, {"hidden_size": 1}, found)


def load_transformers(
    name: str, weights: Path | None, allow_download: bool, trust_remote_code: str | None
) -> tuple[EncoderSpec, TransformersFeatures]:
    """Load `transformers:NAME` or `transformers:FOLDER` with its weights.

    Features are the class token, or the model's pooled output where it has no class token.

    Args:
        name: The reference, prefix included.
        weights: Folder that takes the place of the reference's own files.
        allow_download: Whether the hub may be asked.
        trust_remote_code: Commit whose code may run, or None.

    Raises:
        InputError: The image processor asks for something that is not done here.
        WeightsError: Files are missing, damaged, of another model, or bring code that is not
            allowed.
    """
    if trust_remote_code is not None:
        check_revision(trust_remote_code)
    source = name.removeprefix(PREFIX)
    given = weights or (Path(source) if Path(source).is_dir() else None)
    folder = find_folder(_placeholder(name, source), given, allow_download, trust_remote_code)
    config = _read_json(folder / _CONFIG)
    trusted = check_remote_code(name, folder, config, trust_remote_code)
    try:
        spec = _spec_from_files(name, source, config, _read_json(folder / _PROCESSOR))
    except WeightsError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{folder / _PROCESSOR} must be one that runs here, got: {error}"
        ) from error
    features = load_folder(spec, folder, trusted)
    embeddings = getattr(features.network, "embeddings", None)
    if getattr(embeddings, "cls_token", None) is None:
        spec = replace(spec, pooling="pooled")
        features.pooling = "pooled"
    return spec, features
