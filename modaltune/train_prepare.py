"""What a training run needs before its first step: cases, what is fitted, model, targets."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modaltune.cases_folder import CasesFolder
from modaltune.checkpoint import Run
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError, WeightsError
from modaltune.labels import ROWS, label_cohort
from modaltune.model import ModalTune
from modaltune.model_start import start_at_unit_gain
from modaltune.preprocessing import Preprocessing
from modaltune.run_config import RunConfig
from modaltune.slide_encoders.longnet import LongNet
from modaltune.slide_encoders.titan import TitanEncoder
from modaltune.targets import Targets, TextProjector
from modaltune.text_embeddings import PrecomputedText
from modaltune.text_encoders import embed_labels, load_text_encoder
from modaltune.tile_limit import TileLimit
from modaltune.train_cases import (
    PooledCases,
    StreamedCases,
    fit_inputs,
    label_targets,
    pool_cases,
)
from modaltune.train_checkpoint import frozen_sha256

logger = logging.getLogger(__name__)

START_TILES = 20_000  # of training cases, behind the standardised features of a random encoder
_ROWS_WITH_STAGE = {ROWS.index(name) for name in ("general", "stage", "survival")}


@dataclass(frozen=True)
class Prepared:
    """A run before its first step.

    Attributes:
        config: Of the run.
        pooled: All cases.
        run: The untrained model with what was fitted and its projector.
        train: Training cases with targets.
        val: Validation cases with labels.
        facts: What a run that goes on must agree with.
    """

    config: RunConfig
    pooled: PooledCases
    run: Run
    train: StreamedCases
    val: StreamedCases
    facts: dict[str, Any]


def prepare(config: RunConfig) -> Prepared:
    """Open the cases, fit what stands beside the weights, build the model and its targets."""
    random.seed(config.training.seed)
    np.random.seed(config.training.seed)  # of libraries; nothing of ours draws from it
    torch.manual_seed(config.training.seed)
    section = config.cases
    opened = [CasesFolder.open(folder, features=section.features) for folder in section.folders]
    pooled = pool_cases(opened, section.fold)
    split = pooled.split
    if not split.train:
        raise InputError("the split must hold training cases, got none; choose another cases.fold")
    rows = config.text_rows
    has_stage = bool(_ROWS_WITH_STAGE & set(rows)) and bool(pooled.clinical["stage"].notna().any())
    preprocessing = fit_inputs(pooled, config.inputs, stage_in_targets=has_stage)
    text, provenance = _text(config, pooled, split.train, preprocessing)
    torch.manual_seed(config.training.seed)  # whatever loading the text encoder drew
    model = build_model(config, preprocessing)
    seed, inputs = config.text.projector_seed, config.inputs
    projector = TextProjector(text.width, config.model.out_features, seed=seed)
    unit = projector.project(text.lookup(split.train))[:, rows]

    def served(cases: Sequence[str], targets: Targets) -> StreamedCases:
        width, convention = model.slide_encoder.in_features, model.config.position_convention
        return StreamedCases(pooled, cases, preprocessing, targets, convention, width, inputs.limit)

    train = served(split.train, label_targets(pooled.clinical.loc[list(split.train)], unit))
    val = served(split.val, label_targets(pooled.clinical.loc[list(split.val)], None))
    if config.model.start == "unit_gain":
        start_at_unit_gain(model, _some_tiles(train), config.model.feature_gain)
    facts = {"cases": list(pooled.sources), "frozen_weights": frozen_sha256(model)}
    info = {
        **_provenance(config, train, val),
        "cases": list(pooled.sources),
        "random_backbone": model.config.random_backbone,
        "text": provenance,
        "stage_leak": inputs.clinical == "published" and has_stage,
    }
    return Prepared(config, pooled, Run(model, preprocessing, projector, info), train, val, facts)


def _provenance(config: RunConfig, train: StreamedCases, val: StreamedCases) -> dict[str, Any]:
    """Return what a run says of its configuration and of what it used of the cases."""
    left_out = {"train": train.without_inputs, "val": val.without_inputs}
    for part, cases in left_out.items():
        if cases:
            logger.warning("%d %s cases hold nothing the model reads: left out", len(cases), part)
    return {
        "run_config": config.model_dump(mode="json"),
        "tile_limit": {
            **vars(config.inputs.limit),
            "limited": {**train.tile_counts(), **val.tile_counts()},
        },
        "trained_on": list(train.case_ids),
        "left_out": {part: list(cases) for part, cases in left_out.items()},
        "fit_on": config.inputs.fit_on,
    }


def build_model(config: RunConfig, preprocessing: Preprocessing) -> ModalTune:
    """Build the model, with the slide encoder's weights where it has any.

    Raises:
        WeightsError: There are no weights and no random backbone was asked for.
    """
    section = config.model
    clinical, tiles, pathways = preprocessing.clinical, preprocessing.tiles, preprocessing.pathways
    shape = section.model_shape(
        clinical_features=0 if clinical is None else len(clinical.feature_names),
        has_genes=pathways is not None,
    )
    if section.weights is None and tiles is not None and not section.random_backbone:
        raise WeightsError(
            "model.weights must be the path of the slide encoder's weights, got none; give it, or "
            "set model.random_backbone = true, which every output then says"
        )
    if section.weights is None:
        shape = _random_backbone(shape, preprocessing)
    if tiles is not None and tiles.width != shape.slide_encoder.in_features:
        raise InputError(
            f"model.slide_encoder.in_features must be the features' width {tiles.width}, got "
            f"{shape.slide_encoder.in_features}; embed the slides with the tile encoder that this "
            "slide encoder was made for"
        )
    model = ModalTune(
        shape,
        gene_index=None if pathways is None else pathways.indices,
        gene_offsets=None if pathways is None else pathways.offsets,
    )
    if section.weights is not None:
        _load_weights(model, section.weights)
    return model


def _random_backbone(shape: ModalTuneConfig, preprocessing: Preprocessing) -> ModalTuneConfig:
    """Say that the slide encoder is random, and let it take the width of the features."""
    changes: dict[str, Any] = {"random_backbone": True}
    if preprocessing.tiles is not None:
        width = {"in_features": preprocessing.tiles.width}
        changes["slide_encoder"] = shape.slide_encoder.model_copy(update=width)
    return shape.model_copy(update=changes)


def _load_weights(model: ModalTune, path: Path) -> None:
    encoder = model.slide_encoder
    if isinstance(encoder, LongNet):
        encoder.load_published(path)
    elif isinstance(encoder, TitanEncoder):
        loaded = TitanEncoder.from_safetensors(path, encoder.config)
        encoder.load_state_dict(loaded.state_dict())
    encoder.requires_grad_(False)


def _text(
    config: RunConfig, pooled: PooledCases, cases: Sequence[str], preprocessing: Preprocessing
) -> tuple[PrecomputedText, dict[str, str]]:
    """Embed the label sentences of the training cases, or look them up."""
    section = config.text
    if section.embeddings is not None:
        text = PrecomputedText.load(section.embeddings)
        return text, {"embeddings": str(section.embeddings), **text.provenance}
    encoder = load_text_encoder(
        section.encoder,
        section.pooling,
        allow_download=section.allow_download,
        normalize=section.normalize,
        revision=section.revision,
    )
    sentences = label_cohort(pooled.clinical.loc[list(cases)], preprocessing.survival)
    text = embed_labels(sentences, encoder)
    return text, dict(text.provenance)


def _some_tiles(train: StreamedCases) -> torch.Tensor | None:
    """Return tile features of all training cases, a few of each where there are many."""
    counts = train.tiles_per_case
    with_tiles = sum(count > 0 for count in counts.values())
    if not with_tiles:
        return None
    some = TileLimit("random", max(1, START_TILES // with_tiles), seed=0)
    return torch.cat([train.some_tiles(i, some) for i in range(len(train))])
