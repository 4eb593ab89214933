"""A baseline under `modaltune train`: how it begins, and what is fitted once it is trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np

from modaltune.baseline_run import BaselineRun, reads_slide_vectors
from modaltune.baselines import SupervisedLearner, make_baseline
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.learner import embed_all
from modaltune.learner_config import AnyBaseline
from modaltune.model import ModalTune
from modaltune.preprocessing import Preprocessing
from modaltune.probes import ProbeError
from modaltune.run_config import RunConfig
from modaltune.tables import name_few
from modaltune.train_cases import StreamedCases

__all__ = ["begin_baseline", "finish_baseline", "reads_slide_vectors"]

logger = logging.getLogger(__name__)


def begin_baseline(
    config: RunConfig,
    section: AnyBaseline,
    preprocessing: Preprocessing,
    train: StreamedCases,
    model: ModalTune | None,
    sites: Sequence[str] = (),
) -> BaselineRun:
    """Return a baseline with new weights and heads that fit the labels of the training cases.

    Args:
        config: Of the run.
        section: Its section `learner`.
        preprocessing: Fitted.
        train: Training cases.
        model: Whose slide encoder a linear probe reads.
        sites: Cancer sites of the training cases.

    Raises:
        InputError: The labels can't carry the heads asked for.
    """
    if section.classes and len(config.cases.folders) > 1:
        raise InputError(
            "learner.classes must be false for several cases folders, whose class numbers mean "
            "different diagnoses, got true; train survival alone, or a baseline per folder"
        )
    if section.classes and len(sites) > 1:
        logger.warning(
            "one class head is trained for the sites %s: a class number must mean the same in all",
            name_few(sites),
        )
    targets = train.all_targets
    assert targets is not None  # training cases have labels; narrows the type
    tiles = preprocessing.tiles
    encoder = None if model is None else model.slide_encoder
    baseline = make_baseline(
        section.kind,
        tile_width=None if tiles is None else tiles.width,
        pathways=preprocessing.pathways,
        slide_encoder=encoder,
        settings=section.settings,
    )
    recipe = config.training
    together = recipe.cases_per_step // (recipe.accumulation * int(os.environ.get("WORLD_SIZE", 1)))
    learner = SupervisedLearner.for_training(
        baseline,
        targets,
        classes=section.classes,
        survival=None if section.survival == "none" else section.survival,
        bins=section.bins,
        cases_per_batch=together,
        balanced=section.balanced,
        survival_weight=section.survival_weight,
    )
    if section.classes and learner.supervised.class_head is None:
        logger.warning("training cases are of one class or none: no class head")
    if config.inputs.clinical != "none":
        logger.warning("%s reads no clinical values: inputs.clinical is not used", section.kind)
    convention = config.model.position_convention
    shape = ModalTuneConfig(position_convention=convention) if model is None else model.config
    return BaselineRun(learner, section, preprocessing, shape, {"sites": list(sites)})


def finish_baseline(run: BaselineRun, train: StreamedCases, cases_per_batch: int) -> None:
    """Fit what stands beside the heads of a trained baseline: Cox's baseline, the median risk.

    Args:
        run: With its final weights.
        train: Training cases.
        cases_per_batch: Cases embedded at once.
    """
    targets, learner = train.all_targets, run.learner
    if targets is None or learner.supervised.survival_head is None:
        return
    embedded = embed_all(learner, train, range(len(train)), cases_per_batch)
    risk = learner.predict_embedded(embedded).risk
    assert risk is not None  # there is a survival head; narrows the type
    risk = risk.cpu()
    known = ~(targets.durations.isnan() | targets.events.isnan())
    run.info["risk_cut"] = float(np.median(risk[known].double().numpy()))
    try:
        learner.fit_baseline(risk, targets)
    except ProbeError as error:
        logger.warning("no survival curves: %s", error)
