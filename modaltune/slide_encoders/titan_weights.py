"""TITAN's published weights: read from a safetensors file, and held against the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modaltune.errors import WeightsError

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_PREFIX = "vision_encoder."


def read_vision_encoder(path: Path) -> dict[str, Tensor]:
    """Return the tensors under `vision_encoder.` of a safetensors file, prefix stripped.

    Args:
        path: The file, or the folder it lies in.

    Raises:
        WeightsError: There is no such file, it is damaged, or holds no such tensor.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(
            f"TITAN weights must be a safetensors file or a folder with {WEIGHTS_FILE}, got {path};"
            " request access at huggingface.co/MahmoodLab/TITAN and pass the downloaded path"
        )
    try:
        with safe_open(str(file), framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(WEIGHTS_PREFIX)]  # noqa: SIM118
            # Copied out of the mapped file: own memory is aligned, and outlives the file.
            state = {n.removeprefix(WEIGHTS_PREFIX): weights.get_tensor(n).clone() for n in names}
    except SafetensorError as error:
        raise WeightsError(
            f"{file} must be a whole safetensors file, got {error}; download it again"
        ) from error
    if not state:
        raise WeightsError(
            f"{file} must hold keys {WEIGHTS_PREFIX}*, got none; pass TITAN's {WEIGHTS_FILE}"
        )
    return state


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise WeightsError naming every kind of difference between weights and architecture."""
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    listed = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for kind, names in faults.items()
        if names
    ]
    if listed:
        raise WeightsError(
            f"TITAN weights must have the keys and shapes of its vision encoder, got "
            f"{'; '.join(listed)}; pass TITAN's {WEIGHTS_FILE}, or the TitanConfig it was made with"
        )
