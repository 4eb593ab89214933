"""Validation during training: probes on the embeddings of one task prompt, or a model's heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support

from modaltune.evaluate import accuracy, balanced_accuracy, harrell_c_index
from modaltune.probes import ProbeError, fit_cox, fit_logistic
from modaltune.targets import Targets

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
COX_PENALTY = 0.1
_FIGURES = ("balanced_accuracy", "accuracy", "c_index")


def validate(
    train: Floats,
    val: Floats,
    train_targets: Targets,
    val_targets: Targets,
    train_sites: Sequence[int],
    val_sites: Sequence[int],
) -> dict[str, Any]:
    """Fit a logistic and a Cox probe on training embeddings and judge them on validation.

    With several sites, each has probes of its own, figures are their means over sites, and a
    further logistic probe tells the sites apart.

    Args:
        train: `[n, d]` raw embeddings of the training cases.
        val: `[m, d]` of the validation cases.
        train_targets: Classes and survival of the training cases.
        val_targets: Of the validation cases.
        train_sites: Site number of each training case.
        val_sites: Of each validation case.

    Returns:
        `balanced_accuracy`, `accuracy`, `c_index` (None where a probe can't be fitted or judged),
        per-class `recall`, `precision`, `f1`, and with several sites `sites` and
        `site_balanced_accuracy`.

    Source: METHOD 4.4, 4.7.
    """
    own, other = np.asarray(train_sites), np.asarray(val_sites)
    by_site: dict[str, dict[str, Any]] = {}
    for site in sorted(set(own.tolist())):
        here, there = np.flatnonzero(own == site), np.flatnonzero(other == site)
        by_site[str(site)] = _one_site(
            train[here], val[there], train_targets.rows(here.tolist()),
            val_targets.rows(there.tolist()),
        )  # fmt: skip
    if len(by_site) == 1:
        return next(iter(by_site.values()))
    return {
        **{name: _mean(by_site, name) for name in _FIGURES},
        "sites": by_site,
        "site_balanced_accuracy": _site_accuracy(train, val, own, other),
    }


def _one_site(
    train: Floats, val: Floats, train_targets: Targets, val_targets: Targets
) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(_FIGURES)
    classes = val_targets.classes.numpy()
    known = classes >= 0
    try:
        probe = fit_logistic(train, train_targets.classes.numpy())
        if known.any():
            found |= _class_figures(classes[known], probe.predict(val[known]), probe.labels)
    except ProbeError as error:
        logger.warning("validation: %s", error)
    try:
        durations, events = train_targets.durations.numpy(), train_targets.events.numpy()
        cox = fit_cox(train, durations, events, COX_PENALTY)
        if len(val):
            index = cox.c_index(val, val_targets.durations.numpy(), val_targets.events.numpy())
            found["c_index"] = index if np.isfinite(index) else None
    except ProbeError as error:
        logger.warning("validation: %s", error)
    return found


def _class_figures(true: Ints, predicted: Ints, labels: Ints) -> dict[str, Any]:
    precision, recall, f1, _ = precision_recall_fscore_support(
        true, predicted, labels=labels, zero_division=0.0
    )
    return {
        "balanced_accuracy": balanced_accuracy(true, predicted),
        "accuracy": accuracy(true, predicted),
        "recall": recall.tolist(),
        "precision": precision.tolist(),
        "f1": f1.tolist(),
    }


def validate_heads(
    probabilities: Floats | None, risk: Floats | None, targets: Targets, sites: Sequence[int]
) -> dict[str, Any]:
    """Judge what a model's own heads say of validation cases, in the figures of `validate`.

    With several sites figures are their means over sites, and `sites` has each.

    Args:
        probabilities: `[m, C]` of the classes 0..C - 1; None without a class head.
        risk: `[m]`, higher dies sooner; None without a survival head.
        targets: Classes and survival of the m cases.
        sites: Site number of each case.
    """
    numbers = np.asarray(sites)
    by_site: dict[str, dict[str, Any]] = {}
    for site in sorted(set(numbers.tolist())):
        here = np.flatnonzero(numbers == site)
        by_site[str(site)] = _one_site_of_heads(
            None if probabilities is None else probabilities[here],
            None if risk is None else risk[here],
            targets.rows(here.tolist()),
        )
    if len(by_site) == 1:
        return next(iter(by_site.values()))
    return {**{name: _mean(by_site, name) for name in _FIGURES}, "sites": by_site}


def _one_site_of_heads(
    probabilities: Floats | None, risk: Floats | None, targets: Targets
) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(_FIGURES)
    classes = targets.classes.numpy()
    known = classes >= 0
    if probabilities is not None and known.any():
        labels = np.arange(probabilities.shape[1])
        found |= _class_figures(classes[known], probabilities[known].argmax(1), labels)
    time, died = targets.durations.double().numpy(), targets.events.double().numpy()
    followed = ~(np.isnan(time) | np.isnan(died))
    if risk is not None and followed.any():
        index = harrell_c_index(time[followed], died[followed], risk[followed])
        found["c_index"] = index if np.isfinite(index) else None
    return found


def _mean(by_site: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    values = [site[name] for site in by_site.values() if site[name] is not None]
    return float(np.mean(values)) if values else None


def _site_accuracy(
    train: Floats, val: Floats, own: npt.NDArray[Any], other: npt.NDArray[Any]
) -> float | None:
    if len(val) == 0:
        return None
    return balanced_accuracy(other, fit_logistic(train, own).predict(val))
