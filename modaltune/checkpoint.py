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

import pandas as pd
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modaltune.cases import Case, pack_cases
from modaltune.config import ModalTuneConfig
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.engine.store import read_features
from modaltune.errors import CheckpointError
from modaltune.modal_stream import TASK
from modaltune.modalities import Modality
from modaltune.model import ModalTune
from modaltune.preprocessing import Preprocessing
from modaltune.targets import TextProjector

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "run.json"
_PROJECTOR = "projector."
_BUILT_IN = (TASK, "genes", "clinical")
_KEYS = ("config", "preprocessing", "projector", "extra_modalities", "weights_sha256", "info")


@dataclass
class Run:
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

    def case(
        self,
        case_id: str,
        slides: Sequence[str | Path] = (),
        genes: Mapping[str, float] | pd.Series | None = None,
        clinical: Mapping[str, Any] | None = None,
    ) -> Case:
        """Put one case together from files and values; leave out what is missing.

        Args:
            case_id: The patient.
            slides: Feature files, of any producer that `read_features` knows.
            genes: Expression by gene symbol, on the scale of the training table.
            clinical: Fields of a clinical row, such as age, sex, site.

        Raises:
            InputError: A file or value breaks a rule; the message names it.
        """
        values: dict[str, Tensor] = {}
        if genes is not None:
            row = pd.DataFrame([dict(genes)], index=pd.Index([case_id]))
            values["genes"] = self.preprocessing.gene_values(row)[0]
        if clinical is not None:
            row = pd.DataFrame([dict(clinical)], index=pd.Index([case_id]))
            features, known = self.preprocessing.clinical_values(row)
            if bool(known[0]):
                values["clinical"] = features[0]
        read = tuple(read_features(path) for path in slides)
        for features_of_slide in read:
            if self.preprocessing.tiles is not None:
                self.preprocessing.tiles.check(features_of_slide)
        return Case(case_id, read, values)

    @torch.inference_mode()
    def embed(self, cases: Sequence[Case], tasks: Sequence[int] | None = None) -> Tensor:
        """Return raw embeddings `[B, T, out_features]` float32 on the CPU, one case at a time."""
        self.model.eval()
        device = self.model.modal_positions.device
        convention = self.model.config.position_convention
        width = self.model.slide_encoder.in_features
        outputs = [
            self.model(pack_cases([case], convention, width).to(device), tasks).float().cpu()
            for case in cases
        ]
        count = len(self.model.config.tasks if tasks is None else tasks)
        empty = torch.zeros(0, count, self.model.config.out_features)
        return torch.cat(outputs) if outputs else empty


def save_run(folder: str | Path, run: Run) -> Path:
    """Write a run folder; the description comes last, so that a torn folder never counts as one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().contiguous() for name, t in run.model.state_dict().items()}
    if run.projector is not None:
        extra = run.projector.state_dict()
        state.update({f"{_PROJECTOR}{name}": t.contiguous() for name, t in extra.items()})
    (folder / DESCRIPTION).unlink(missing_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({name: t.clone() for name, t in state.items()}, temporary)
    projector = run.projector
    write_json_atomic(
        folder / DESCRIPTION,
        {
            "format": "modaltune-run",
            "format_version": FORMAT_VERSION,
            "software_version": importlib.metadata.version("modaltune"),
            "config": run.model.config.model_dump(mode="json"),
            "preprocessing": run.preprocessing.to_dict(),
            "projector": None if projector is None else [projector.text_dim, projector.out_dim],
            # In token order: their learned positions follow it.
            "extra_modalities": [m for m in run.model.spans if m not in _BUILT_IN],
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
        InputError: A setting does not exist or shapes the weights.
        CheckpointError: The folder is no complete run, is damaged, or needs other modules.
    """
    folder = Path(folder)
    described = _read_description(folder)
    given, further = dict(extra_modalities or {}), described["extra_modalities"]
    if set(given) != set(further):
        raise CheckpointError(
            f"extra_modalities of run {folder} must be {further}, got {sorted(given)}; pass a "
            "fresh module for each"
        )
    if file_sha256(folder / WEIGHTS) != described["weights_sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} must have the checksum that {DESCRIPTION} states, got another; "
            "the file is damaged or was replaced: copy the run again"
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


def _read_description(folder: Path) -> dict[str, Any]:
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
    missing = [key for key in _KEYS if key not in described]
    if missing:
        raise CheckpointError(
            f"{path} must hold {', '.join(_KEYS)}, got no {', '.join(missing)}; copy the run again"
        )
    return described


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
