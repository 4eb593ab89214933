"""Run folders of baselines, and opening a run folder whatever was trained.

A baseline's folder has the files of ModalTune's: `run.json` describes baseline and heads under
`learner`, `model.safetensors` holds their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modaltune.baselines import SupervisedLearner, SupervisedModel, make_baseline
from modaltune.baselines.heads import CoxHead, HazardHead
from modaltune.batch import CaseBatch
from modaltune.checkpoint import LEARNER, WEIGHTS, load_run, read_description
from modaltune.config import ModalTuneConfig, PositionConvention
from modaltune.engine.device import check_device
from modaltune.errors import CheckpointError
from modaltune.evaluation import DIRECT, EMBEDDING
from modaltune.learner_config import AnyBaseline, LinearProbeSection
from modaltune.model import build_slide_encoder
from modaltune.predictions import Predictions
from modaltune.preprocessing import Preprocessing
from modaltune.trained_run import TrainedRun

PROBED = "linear_probe"  # has no word of its own: the published probes are its heads


@dataclass
class BaselineRun(TrainedRun):
    """A trained baseline and what belongs to it.

    Attributes:
        learner: The baseline with its heads, in evaluation mode.
        section: Its kind, settings and heads.
        preprocessing: What turns a case's records into inputs.
        encoder: Of the linear probe: configuration of the slide encoder, with what its positions
            mean and whether it is random.
        info: Provenance, JSON values; `risk_cut` is the median risk of the training cases.
    """

    learner: SupervisedLearner
    section: AnyBaseline
    preprocessing: Preprocessing
    encoder: ModalTuneConfig
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> SupervisedModel:  # type: ignore[override]
        """The baseline with its heads."""
        return self.learner.supervised

    @property
    def is_probed(self) -> bool:
        """Whether published probes speak for it, as for ModalTune, not heads of its own."""
        return self.section.kind == PROBED

    @property
    def tasks(self) -> tuple[str, ...]:
        """Name of its one embedding: `direct` where the probes on it are all that it says."""
        return (DIRECT,) if self.is_probed else (EMBEDDING,)

    @property
    def out_features(self) -> int:
        """Width of an embedding."""
        return self.model.baseline.width

    @property
    def random_backbone(self) -> bool:
        """Whether it reads a random slide encoder."""
        return self.encoder.random_backbone

    @property
    def position_convention(self) -> PositionConvention:
        """How the positions of tiles are counted."""
        return self.encoder.position_convention

    @property
    def tile_width(self) -> int:
        """Width of the tile features; 1 for a baseline without images."""
        return self.model.baseline.tile_width or 1

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def embed_batch(self, batch: CaseBatch, tasks: Sequence[int] | None) -> Tensor:
        """Return embeddings `[B, 1, d]` of packed cases on the model's device."""
        every = self.learner.embed(batch)
        return every if tasks is None else every[:, list(tasks)]

    def predict_embedded(self, case_ids: Sequence[str], embeddings: ArrayLike) -> Predictions:
        """Return what the heads say of embedded cases.

        Args:
            case_ids: n patients.
            embeddings: `[n, 1, d]` of this run.
        """
        values = torch.from_numpy(np.asarray(embeddings, np.float32))
        said = self.learner.predict_embedded(values)
        parts: dict[str, Any] = {}
        if said.probabilities is not None:
            parts["probabilities"] = said.probabilities.double().cpu().numpy()
            parts["labels"] = np.arange(said.probabilities.shape[1])
        if said.risk is not None:
            parts["risk"] = said.risk.double().cpu().numpy()
        if said.survival is not None and said.times is not None:
            parts["survival"] = said.survival.double().cpu().numpy()
            parts["months"] = said.times.double().cpu().numpy()
        return Predictions(tuple(map(str, case_ids)), **parts)

    def described(self) -> dict[str, Any]:
        """Return JSON values of which, with the weights, the model is built again."""
        model, head = self.model, self.model.survival_head
        return {
            LEARNER: {
                **self.section.model_dump(mode="json"),
                "tile_width": model.baseline.tile_width,
                "num_classes": 0 if model.class_head is None else model.class_head.out_features,
                "times": None if head is None else len(head.times),
                "encoder": self.encoder.model_dump(mode="json"),
            },
        }


def reads_slide_vectors(section: AnyBaseline) -> bool:
    """Whether a baseline needs the slide encoder: the linear probe, unless of mean tiles alone."""
    return isinstance(section, LinearProbeSection) and section.settings.features != "mean"


def open_run(folder: str | Path, *, device: str | torch.device = "cpu") -> TrainedRun:
    """Load a run folder, verified, in evaluation mode: ModalTune's (`load_run`) or a baseline's.

    Args:
        folder: What training wrote.
        device: Where the model goes.

    Raises:
        InputError: The device is not there.
        CheckpointError: The folder is no complete run, or is damaged.
    """
    folder, device = Path(folder), check_device(device)
    described = read_description(folder)
    if LEARNER not in described:
        return load_run(folder, device=device)
    own = dict(described[LEARNER])
    try:
        shape = {name: own.pop(name) for name in ("tile_width", "num_classes", "times", "encoder")}
        section: AnyBaseline = TypeAdapter(AnyBaseline).validate_python(own)
        preprocessing = Preprocessing.from_dict(described["preprocessing"])
        encoder = ModalTuneConfig.model_validate(shape["encoder"])
        has_encoder = reads_slide_vectors(section)
        baseline = make_baseline(
            section.kind,
            tile_width=shape["tile_width"],
            pathways=preprocessing.pathways,
            slide_encoder=build_slide_encoder(encoder) if has_encoder else None,
            settings=section.settings,
        )
        head: HazardHead | CoxHead | None = None
        if shape["times"] is not None:
            times = torch.zeros(shape["times"])
            kind = CoxHead if section.survival == "cox" else HazardHead
            head = kind(baseline.width, times)
        learner = SupervisedLearner(baseline, num_classes=shape["num_classes"], survival=head)
        learner.model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, ValidationError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"run {folder} must hold weights of the baseline it describes, got: {error}"
        ) from error
    learner.model.to(device).eval()
    return BaselineRun(learner, section, preprocessing, encoder, described["info"])
