"""What is judged after an epoch: loss and probes of the embedding, or a baseline's own heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.baseline_run import BaselineRun
from modaltune.checkpoint import Run
from modaltune.config import GENERAL
from modaltune.learner import Learner, ModalTuneLearner, embed_all
from modaltune.targets import Targets
from modaltune.train import Training
from modaltune.train_cases import StreamedCases
from modaltune.train_prepare import Prepared
from modaltune.train_watcher import Validation
from modaltune.validation import validate, validate_heads


def validation_of(prepared: Prepared) -> Validation:
    """Return the validation of a run, with the same limit of tiles as training.

    It gives the figures of `validate`, and `loss`, the mean over validation cases of the loss that
    is trained on, in evaluation mode; ModalTune's of the one prompt that is validated (METHOD 4.7),
    with `train_loss`, the same of the training cases.
    """
    run = prepared.run
    if isinstance(run, BaselineRun):
        own = run

        def judge(training: Training) -> dict[str, Any]:
            return _judge_baseline(prepared, own, training)
    else:

        def judge(training: Training) -> dict[str, Any]:
            return _judge_modaltune(prepared, training)

    return judge


def _judge_modaltune(prepared: Prepared, training: Training) -> dict[str, Any]:
    """Return the figures of METHOD 4.4."""
    run, train, val = prepared.run, prepared.train, prepared.val
    if not (isinstance(run, Run) and len(val)):
        return {}
    # The general prompt, as published; the first one of a model without it.
    prompt = run.tasks.index(GENERAL) if GENERAL in run.tasks else 0
    learner = ModalTuneLearner(run.model, prepared.config.training, embed_tasks=(prompt,))
    own, other = (_embedded(prepared, learner, cases, training) for cases in (train, val))
    return {
        "loss": _text_loss(learner, other, val.all_targets, prompt),
        "train_loss": _text_loss(learner, own, train.all_targets, prompt),
        **_probed(prepared, own, other),
    }


def _judge_baseline(prepared: Prepared, run: BaselineRun, training: Training) -> dict[str, Any]:
    """Return the figures of the heads; of the published probes for the linear probe."""
    train, val, learner = prepared.train, prepared.val, run.learner
    targets = val.all_targets
    if not len(val) or targets is None:
        return {}
    other = _embedded(prepared, learner, val, training)
    found = {"loss": _finite(learner.loss_embedded(other, targets))}
    if run.is_probed:
        own = _embedded(prepared, learner, train, training)
        return {**found, **_probed(prepared, own, other)}
    said = run.predict_embedded(val.case_ids, other.numpy())
    sites = [prepared.pooled.site[case] for case in val.case_ids]
    return {**found, **validate_heads(said.probabilities, said.risk, targets, sites)}


def _embedded(
    prepared: Prepared, learner: Learner, cases: StreamedCases, training: Training
) -> Tensor:
    """Return embeddings `[n, T, d]` of all cases of a part."""
    at_once = prepared.config.training.cases_per_batch
    return embed_all(learner, cases, range(len(cases)), at_once, training.accelerator)


def _probed(prepared: Prepared, own: Tensor, other: Tensor) -> dict[str, Any]:
    """Return the figures of probes on the first embedding of training and validation cases."""
    train, val, site = prepared.train, prepared.val, prepared.pooled.site
    if train.all_targets is None or val.all_targets is None:
        return {}
    return validate(
        own[:, 0].double().numpy(),
        other[:, 0].double().numpy(),
        train.all_targets,
        val.all_targets,
        [site[case] for case in train.case_ids],
        [site[case] for case in val.case_ids],
    )


def _text_loss(
    learner: ModalTuneLearner, embedded: Tensor, targets: Targets | None, prompt: int
) -> float | None:
    """Return the mean loss of one prompt over the cases whose labels were embedded, if any."""
    if targets is None or targets.text is None:
        return None
    text = targets.text[:, [prompt]]
    known = ~text.isnan().any(dim=2).squeeze(1)
    if not bool(known.any()):
        return None
    return _finite(learner.loss(embedded[known], text[known]))


def _finite(loss: Tensor) -> float | None:
    """Return a loss, None where it is no number: metrics hold strict JSON."""
    return float(loss) if bool(torch.isfinite(loss)) else None
