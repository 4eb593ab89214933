"""Scores of predictions on the planted cohort, over seeds, and paired differences of two models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import InputError
from modaltune.evaluate import balanced_accuracy, bootstrap_interval, harrell_c_index
from modaltune.targets import Targets

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Predictions:
    """Of one trained model on the test cases, in order.

    Attributes:
        probability: `[n]` of class 1.
        risk: `[n]`, higher for cases that should die sooner.
    """

    probability: Floats
    risk: Floats

    def state(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Return the predictions as JSON values, with what they belong to."""
        return {
            "key": dict(key),
            "probability": self.probability.tolist(),
            "risk": self.risk.tolist(),
        }

    @classmethod
    def read(cls, path: Path, key: Mapping[str, Any]) -> Predictions:
        """Read what was written of `state`.

        Raises:
            InputError: It belongs to another cohort.
        """
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["key"] != dict(key):
            raise InputError(
                f"{path} must hold predictions of {dict(key)}, got {state['key']}; give another "
                "--out for another cohort"
            )
        return cls(np.array(state["probability"]), np.array(state["risk"]))


def _balanced_accuracy(targets: npt.NDArray[Any], predicted: Floats) -> float:
    """Mean over seeds of the balanced accuracy; columns of `predicted` are seeds."""
    classes = targets[:, 0]
    return float(np.mean([balanced_accuracy(classes, p > 0.5) for p in predicted.T]))


def _c_index(targets: npt.NDArray[Any], predicted: Floats) -> float:
    """Mean over seeds of Harrell's c-index."""
    return float(np.mean([harrell_c_index(targets[:, 1], targets[:, 2], p) for p in predicted.T]))


#: Metric -> the field of `Predictions` that it judges, and how.
METRICS: dict[str, tuple[str, Callable[[npt.NDArray[Any], Floats], float]]] = {
    "balanced_accuracy": ("probability", _balanced_accuracy),
    "c_index": ("risk", _c_index),
}


def _labels(targets: Targets) -> Floats:
    parts = (targets.classes, targets.durations, targets.events)
    return np.stack([part.double().numpy() for part in parts], axis=1)


def _columns(field: str, predictions: Sequence[Predictions]) -> Floats:
    return np.stack([getattr(p, field) for p in predictions], axis=1)


def interval(metric: str, targets: Targets, predictions: Sequence[Predictions]) -> dict[str, float]:
    """Return a metric, mean over seeds, under "", and the ends of its 95 % interval over patients.

    Args:
        metric: One of `METRICS`.
        targets: Of the test cases.
        predictions: One per seed.
    """
    field, score = METRICS[metric]
    labels, columns = _labels(targets), _columns(field, predictions)
    found = bootstrap_interval(score, labels, columns, resamples=RESAMPLES)
    return {"": score(labels, columns), "_low": found.low, "_high": found.high}


def scores(found: Mapping[tuple[str, int], Predictions], targets: Targets) -> list[dict[str, Any]]:
    """Return a row per metric and model: the mean over its seeds and its 95 % ends over patients.

    Args:
        found: Predictions by model and seed.
        targets: Of the test cases.
    """
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        own = [predictions for (model, _), predictions in found.items() if model == name]
        for metric in METRICS:
            ends = interval(metric, targets, own)
            values = {f"value{end}": round(value, 4) for end, value in ends.items()}
            rows.append({"metric": metric, "model": name, "seeds": len(own), **values})
    return rows


def differences(
    found: Mapping[tuple[str, int], Predictions], targets: Targets, against: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row per metric and pair of models: the first minus the second, paired by patient.

    Args:
        found: Predictions by model and seed; a pair is compared over the seeds that both have.
        targets: Of the test cases.
        against: Models that stand first in a pair; each is compared with all that come after it.

    Returns:
        Rows of `metric`, `model`, `rival`, `seeds`, their means, `difference` and its 95 % ends.
    """
    names = list(dict.fromkeys(name for name, _ in found))
    labels, rows = _labels(targets), []
    for model in (name for name in names if name in against):
        for rival in names[names.index(model) + 1 :]:
            seeds = [s for name, s in found if name == model and (rival, s) in found]
            if not seeds:
                continue
            for metric, (field, score) in METRICS.items():
                ours, theirs = (
                    _columns(field, [found[n, s] for s in seeds]) for n in (model, rival)
                )

                def gain(labels: Floats, a: Floats, b: Floats, score: Any = score) -> float:
                    return score(labels, a) - score(labels, b)

                ends = bootstrap_interval(gain, labels, ours, theirs, resamples=RESAMPLES)
                rows.append(
                    {
                        "metric": metric,
                        "model": model,
                        "rival": rival,
                        "seeds": len(seeds),
                        "value": round(score(labels, ours), 4),
                        "rival_value": round(score(labels, theirs), 4),
                        "difference": round(gain(labels, ours, theirs), 4),
                        "low": round(ends.low, 4),
                        "high": round(ends.high, 4),
                    }
                )
    return rows
