"""What a training run needs before its first step: cases, what is fitted, model, targets."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modaltune.cases_folder import CasesFolder
from modaltune.checkpoint import Run
from modaltune.config import ModalTuneConfig, PositionConvention
from modaltune.errors import InputError, WeightsError
from modaltune.fitted_probes import site_names
from modaltune.labels import ROWS, label_cohort
from modaltune.learner import Learner, ModalTuneLearner
from modaltune.learner_config import AnyBaseline, ModalTuneSection
from modaltune.model import ModalTune
from modaltune.model_start import start_at_unit_gain
from modaltune.preprocessing import Preprocessing
from modaltune.run_config import RunConfig
from modaltune.slide_encoders.longnet import LongNet
from modaltune.slide_encoders.titan import TitanEncoder
from modaltune.targets import TextProjector
from modaltune.text_embeddings import PrecomputedText
from modaltune.text_encoders import embed_labels, load_text_encoder
from modaltune.tile_limit import TileLimit
from modaltune.train_baseline import begin_baseline, reads_slide_vectors
from modaltune.train_cases import (
    PooledCases,
    StreamedCases,
    fit_inputs,
    label_targets,
    pool_cases,
)
from modaltune.train_checkpoint import frozen_sha256
from modaltune.trained_run import TrainedRun

logger = logging.getLogger(__name__)

START_TILES = 20_000  # of training cases, behind the standardised features of a random encoder
_ROWS_WITH_STAGE = {ROWS.index(name) for name in ("general", "stage", "survival")}


@dataclass(frozen=True)
class Prepared:
    """A run before its first step.

    Attributes:
        config: Of the run.
        pooled: All cases.
        run: The untrained model with what was fitted.
        learner: The same model, as the loop tunes it.
        train: Training cases with targets.
        val: Validation cases with labels, and with text where there is some.
        facts: What a run that goes on must agree with.
    """

    config: RunConfig
    pooled: PooledCases
    run: TrainedRun
    learner: Learner
    train: StreamedCases
    val: StreamedCases
    facts: dict[str, Any]


def prepare(config: RunConfig) -> Prepared:
    """Open the cases, fit what stands beside the weights, build the model and its targets."""
    random.seed(config.training.seed)
    np.random.seed(config.training.seed)  # of libraries; nothing of ours draws from it
    torch.manual_seed(config.training.seed)
    recipe, section = config.training, config.cases
    if recipe.epochs <= recipe.warmup_epochs:
        logger.warning(
            "training.warmup_epochs = %d is not shorter than training.epochs = %d: the learning "
            "rate never reaches training.lr", recipe.warmup_epochs, recipe.epochs,
        )  # fmt: skip
    opened = [CasesFolder.open(folder, features=section.features) for folder in section.folders]
    pooled = pool_cases(opened, section.fold)
    if not pooled.split.train:
        raise InputError("the split must hold training cases, got none; choose another cases.fold")
    has_stage = bool(_ROWS_WITH_STAGE & set(config.text_rows)) and bool(
        pooled.clinical["stage"].notna().any()
    )
    preprocessing = fit_inputs(
        pooled, config.read_inputs, stage_in_targets=has_stage, learner=config.learner.kind
    )
    if isinstance(config.learner, ModalTuneSection):
        run, learner, train, val = _modaltune(config, pooled, preprocessing)
        run.info["stage_leak"] = config.inputs.clinical == "published" and has_stage
    else:
        run, learner, train, val = _baseline(config, config.learner, pooled, preprocessing)
    run.info |= {
        **_provenance(config, train, val),
        "cases": list(pooled.sources),
        "random_backbone": run.random_backbone,
    }
    facts = {"cases": list(pooled.sources), "frozen_weights": frozen_sha256(run.model)}
    return Prepared(config, pooled, run, learner, train, val, facts)


Begun = tuple[TrainedRun, Learner, StreamedCases, StreamedCases]


def _modaltune(config: RunConfig, pooled: PooledCases, preprocessing: Preprocessing) -> Begun:
    """Return ModalTune with its cases, which carry text targets."""
    text, text_of_val, provenance = _text(config, pooled, preprocessing)
    torch.manual_seed(config.training.seed)  # whatever loading the text encoder drew
    model = build_model(config, preprocessing)
    projector = TextProjector(
        text.width, config.model.out_features, seed=config.text.projector_seed
    )
    run = Run(model, preprocessing, projector, {"text": provenance})
    rows = config.text_rows
    unit = projector.project(text.lookup(pooled.split.train))[:, rows]
    unit_of_val = _rows_or_nan(projector, text_of_val, pooled.split.val)[:, rows]
    if config.training.choose_by == "loss" and bool(unit_of_val.isnan().all()):
        raise InputError(
            "training.choose_by must be a figure that validation has, got 'loss' without a text "
            "embedding of any validation case; add them to text.embeddings, or choose by "
            "balanced_accuracy"
        )
    shape = (model.config.position_convention, model.slide_encoder.in_features)
    train = _served(config, pooled, preprocessing, "train", unit, shape)
    val = _served(config, pooled, preprocessing, "val", unit_of_val, shape)
    if config.model.start == "unit_gain":
        start_at_unit_gain(model, _some_tiles(train), config.model.feature_gain)
    return run, ModalTuneLearner(model, config.training), train, val


def _baseline(
    config: RunConfig, section: AnyBaseline, pooled: PooledCases, preprocessing: Preprocessing
) -> Begun:
    """Return a baseline with its cases, which carry classes and survival."""
    tiles = preprocessing.tiles
    shape = (config.model.position_convention, 1 if tiles is None else tiles.width)
    train = _served(config, pooled, preprocessing, "train", None, shape)
    val = _served(config, pooled, preprocessing, "val", None, shape)
    model = None
    if reads_slide_vectors(section):
        model = build_model(config, preprocessing)
        if config.model.start == "unit_gain":
            start_at_unit_gain(model, _some_tiles(train), config.model.feature_gain)
    torch.manual_seed(config.training.seed)
    sites = sorted(set(site_names(pooled.clinical.loc[list(train.case_ids)])) - {""})
    run = begin_baseline(config, section, preprocessing, train, model, sites)
    return run, run.learner, train, val


def _served(
    config: RunConfig,
    pooled: PooledCases,
    preprocessing: Preprocessing,
    part: Literal["train", "val"],
    text: Tensor | None,
    shape: tuple[PositionConvention, int],
) -> StreamedCases:
    """Return the cases of a part of the split: how positions count and feature width are given."""
    cases = pooled.split.parts[part]
    targets = label_targets(pooled.clinical.loc[list(cases)], text)
    return StreamedCases(pooled, cases, preprocessing, targets, *shape, config.inputs.limit)


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
            "limited": {**train.for_epoch(0).tile_counts(), **val.tile_counts()},
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
    config: RunConfig, pooled: PooledCases, preprocessing: Preprocessing
) -> tuple[PrecomputedText, Mapping[str, Tensor], dict[str, str]]:
    """Embed the label sentences of training and validation cases, or look them up."""
    section = config.text
    if section.embeddings is not None:
        text = PrecomputedText.load(section.embeddings)
        known = {"embeddings": str(section.embeddings), **text.provenance}
        return text, text.embeddings, known
    encoder = load_text_encoder(
        section.encoder,
        section.pooling,
        allow_download=section.allow_download,
        normalize=section.normalize,
        revision=section.revision,
    )

    def embedded(cases: Sequence[str]) -> PrecomputedText:
        # Apart, so that no batch of the encoder holds sentences of both.
        rows = pooled.clinical.loc[list(cases)]
        return embed_labels(label_cohort(rows, preprocessing.survival), encoder)

    text, val = embedded(pooled.split.train), pooled.split.val
    return text, embedded(val).embeddings if val else {}, dict(text.provenance)


def _rows_or_nan(
    projector: TextProjector, text: Mapping[str, Tensor], cases: Sequence[str]
) -> Tensor:
    """Return unit target rows `[n, rows, out]`; NaN for a case whose labels were not embedded."""
    absent = torch.full((len(ROWS), projector.text_dim), math.nan)
    rows = [text.get(case, absent) for case in cases]
    return projector.project(torch.stack(rows)) if rows else projector.project(absent[None])[:0]


def _some_tiles(train: StreamedCases) -> Tensor | None:
    """Return tile features of all training cases, a few of each where there are many."""
    counts = train.tiles_per_case
    with_tiles = sum(count > 0 for count in counts.values())
    if not with_tiles:
        return None
    some = TileLimit("random", max(1, START_TILES // with_tiles), seed=0)
    return torch.cat([train.some_tiles(i, some) for i in range(len(train))])
