"""Run folders: a model with everything it needs to embed a new case, written whole or not at all.

A run folder holds `model.safetensors` (weights, the frozen text projector under `projector.`) and
`run.json` (configuration, preprocessing, provenance, checksum of the weights). No pickle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig, PositionConvention
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.engine.device import check_device
from modaltune.errors import CheckpointError
from modaltune.modal_stream import TASK
from modaltune.modalities import Modality
from modaltune.model import ModalTune
from modaltune.preprocessing import Preprocessing
from modaltune.targets import TextProjector
from modaltune.trained_run import TrainedRun

FORMAT_VERSION = 1
LEARNER = "learner"  # the key that a baseline's description has in place of `config`
WEIGHTS, DESCRIPTION = "model.safetensors", "run.json"
_PROJECTOR = "projector."
_BUILT_IN = (TASK, "genes", "clinical")
_KEYS = ("preprocessing", "config", "projector", "extra_modalities", "weights_sha256", "info")


@dataclass
class Run(TrainedRun):
    """A loaded run: the model and what belongs to it.

    Attributes:
        model: In evaluation mode.
        preprocessing: What turns a case's records into inputs.
        projector: The frozen text projector of training, or None (imported checkpoints).
        info: Provenance, JSON values.
    """

    model: ModalTune
    preprocessing: Preprocessing
    projector: TextProjector | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the task prompts."""
        return self.model.config.tasks

    @property
    def out_features(self) -> int:
        """Width of an embedding."""
        return self.model.config.out_features

    @property
    def random_backbone(self) -> bool:
        """Whether the slide encoder is random, not pretrained; every output says so."""
        return self.model.config.random_backbone

    @property
    def position_convention(self) -> PositionConvention:
        """How the positions of tiles are counted."""
        return self.model.config.position_convention

    @property
    def tile_width(self) -> int:
        """Width of the tile features."""
        return self.model.slide_encoder.in_features

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.modal_positions.device

    def embed_batch(self, batch: CaseBatch, tasks: Sequence[int] | None) -> Tensor:
        """Return raw embeddings `[B, T, out_features]` of packed cases on the model's device."""
        return self.model(batch, tasks)

    def described(self) -> dict[str, Any]:
        """Return JSON values of which, with the weights, the model is built again."""
        projector = self.projector
        return {
            "config": self.model.config.model_dump(mode="json"),
            "projector": None if projector is None else [projector.text_dim, projector.out_dim],
            # In token order: their learned positions follow it.
            "extra_modalities": [m for m in self.model.spans if m not in _BUILT_IN],
        }

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the weights file, the projector's among them."""
        state = super().saved_tensors()
        if self.projector is not None:
            extra = self.projector.state_dict()
            state |= {f"{_PROJECTOR}{name}": t.contiguous() for name, t in extra.items()}
        return state


def save_run(folder: str | Path, run: TrainedRun) -> Path:
    """Write a run folder; the description comes last, so that a torn folder never counts as one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = run.saved_tensors()
    (folder / DESCRIPTION).unlink(missing_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({name: t.clone() for name, t in state.items()}, temporary)
    write_json_atomic(
        folder / DESCRIPTION,
        {
            "format": "modaltune-run",
            "format_version": FORMAT_VERSION,
            **run.described(),
            "software_version": importlib.metadata.version("modaltune"),
            "preprocessing": run.preprocessing.to_dict(),
            "weights_sha256": file_sha256(folder / WEIGHTS),
            "info": run.info,
        },
    )
    return folder


def load_run(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    extra_modalities: Mapping[str, Modality] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Load a run folder, verified, in evaluation mode.

    Args:
        folder: What `save_run`, training or `modaltune import-checkpoint` wrote.
        device: Where the model goes.
        extra_modalities: Fresh modules of the further modalities it was tuned with.
        settings: Fields to change that leave the weights as they are, such as `recompute`
            (`modaltune.config.SETTINGS`).

    Raises:
        InputError: A setting does not exist or shapes the weights, or the device is not there.
        CheckpointError: The folder is no complete run, is damaged, or needs other modules.
    """
    folder, device = Path(folder), check_device(device)
    described = read_description(folder)
    if LEARNER in described:
        raise CheckpointError(
            f"run {folder} must be a tuned ModalTune, got the baseline "
            f"{described[LEARNER]['kind']}; open it with modaltune.open_run"
        )
    given, further = dict(extra_modalities or {}), described["extra_modalities"]
    if set(given) != set(further):
        raise CheckpointError(
            f"extra_modalities of run {folder} must be {further}, got {sorted(given)}; pass a "
            "fresh module for each"
        )
    try:
        preprocessing = Preprocessing.from_dict(described["preprocessing"])
        pathways = preprocessing.pathways
        state = load_file(folder / WEIGHTS)
        model = ModalTune(
            ModalTuneConfig.model_validate(described["config"]),
            gene_index=None if pathways is None else pathways.indices,
            gene_offsets=None if pathways is None else pathways.offsets,
            extra_modalities={name: given[name] for name in further},
        )
        model.load_state_dict({k: t for k, t in state.items() if not k.startswith(_PROJECTOR)})
    except (SafetensorError, ValidationError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"run {folder} must hold weights of the model it describes, got: {error}"
        ) from error
    projector = None
    if described["projector"] is not None:
        projector = TextProjector(*described["projector"], seed=0)
        kept = {k.removeprefix(_PROJECTOR): t for k, t in state.items() if k.startswith(_PROJECTOR)}
        projector.load_state_dict(kept)
    model.adjust(**(settings or {}))
    return Run(model.to(device).eval(), preprocessing, projector, described["info"])


def read_description(folder: Path) -> dict[str, Any]:
    """Return `run.json`, checked, with the weights verified by their checksum.

    Raises:
        CheckpointError: The folder is no complete run, is damaged, or of a newer format.
    """
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"run {folder} must hold {DESCRIPTION} and {WEIGHTS}, got "
            f"{'a folder without them' if folder.is_dir() else 'no such folder'}; train a model, "
            "or import one with: modaltune import-checkpoint"
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON, got: {error}; copy the run again") from error
    described: dict[str, Any] = read if isinstance(read, dict) else {}
    kind, version = described.get("format"), described.get("format_version")
    if kind != "modaltune-run" or not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} must describe a modaltune run of format {FORMAT_VERSION} or older, got "
            f"{kind!r} {version}; update modaltune"
        )
    keys = (LEARNER, *_KEYS[:1], *_KEYS[-2:]) if LEARNER in described else _KEYS
    missing = [key for key in keys if key not in described]
    if missing:
        raise CheckpointError(
            f"{path} must hold {', '.join(keys)}, got no {', '.join(missing)}; copy the run again"
        )
    if file_sha256(folder / WEIGHTS) != described["weights_sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} must have the checksum that {DESCRIPTION} states, got another; "
            "the file is damaged or was replaced: copy the run again"
        )
    return described


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
