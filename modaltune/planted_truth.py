"""The rule behind the planted cohort: how class and survival follow from what is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import expit

from modaltune.evaluate import balanced_accuracy, harrell_c_index

Floats = npt.NDArray[np.float64]

#: Hidden values of a case, standard normal; grade and activity of a pair are correlated. A grade
#: shows in the tiles of one pattern, an activity in the genes of one pathway.
LATENTS = ("class_grade", "class_activity", "risk_grade", "risk_activity")
# Nodes of Gauss-Hermite quadrature over the modality that a score does not see.
_NODES = 64


class Effect(BaseModel):
    """`scale * (image * g + genes * a + interaction * g * a)` of a grade g and an activity a."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: float = Field(1.0, description="weight of the grade")
    genes: float = Field(1.0, description="weight of the activity")
    interaction: float = Field(0.5, description="weight of their product")
    scale: float = Field(gt=0, description="size of the whole against the noise of its outcome")

    def value(self, grade: npt.ArrayLike, activity: npt.ArrayLike) -> Floats:
        """Return the effect, elementwise."""
        g, a = np.asarray(grade, np.float64), np.asarray(activity, np.float64)
        return self.scale * (self.image * g + self.genes * a + self.interaction * g * a)


class Truth(BaseModel):
    """How outcomes are drawn.

        class 1 with probability sigmoid(class effect)
        log hazard = risk effect;  time = median * (E * exp(-risk effect) / log 2)^(1 / shape)

    E is standard exponential, so times are Weibull with the hazards in proportion. Censoring is
    uniform on 0 to `censored_by_months`, whatever the case. A grade tends to come with a low
    activity, so that each alone says less than half of what both say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    correlation: float = Field(-0.3, gt=-1, lt=1, description="of grade and activity")
    class_effect: Effect = Effect(scale=9.0)
    risk_effect: Effect = Effect(scale=2.5)
    median_months: float = Field(40.0, gt=0, description="median survival of a case of risk 0")
    shape: float = Field(2.0, gt=0, description="Weibull shape; c-indices do not depend on it")
    censored_by_months: float = Field(110.0, gt=0, description="end of uniform censoring")


class Outcomes(NamedTuple):
    """Labels of n cases.

    Attributes:
        classes: `[n]` int64, 0 or 1.
        months: `[n]` to death or censoring.
        events: `[n]` 1 died, 0 censored.
    """

    classes: npt.NDArray[np.int64]
    months: Floats
    events: Floats


class BayesScores(NamedTuple):
    """Scores of the best predictors on drawn cases: balanced accuracy, Harrell's c-index."""

    balanced_accuracy: float
    c_index: float


def draw_latents(truth: Truth, count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw the hidden values `[count, 4]` of cases; columns `LATENTS`."""
    drawn = rng.standard_normal((count, len(LATENTS)))
    own = np.sqrt(1 - truth.correlation**2)
    drawn[:, 1::2] = truth.correlation * drawn[:, ::2] + own * drawn[:, 1::2]
    return pd.DataFrame(drawn, columns=list(LATENTS))


def draw_outcomes(truth: Truth, latents: pd.DataFrame, rng: np.random.Generator) -> Outcomes:
    """Draw class, time and event of cases from their hidden values."""
    count = len(latents)
    logit = truth.class_effect.value(latents["class_grade"], latents["class_activity"])
    classes = (rng.random(count) < expit(logit)).astype(np.int64)
    risk = truth.risk_effect.value(latents["risk_grade"], latents["risk_activity"])
    unit = rng.standard_exponential(count) * np.exp(-risk) / np.log(2)
    died = truth.median_months * unit ** (1 / truth.shape)
    left = rng.uniform(0, truth.censored_by_months, count)
    return Outcomes(classes, np.minimum(died, left), (died <= left).astype(np.float64))


def bayes_scores(truth: Truth, latents: pd.DataFrame, outcomes: Outcomes) -> dict[str, BayesScores]:
    """Score the best possible predictors on drawn cases: of the image, of the genes, of both.

    Each knows its hidden values exactly. A class is predicted where its probability, averaged over
    what is not seen, exceeds the prevalence: that maximises the expected balanced accuracy. The
    risk is the log hazard, averaged likewise.

    Args:
        truth: The rule.
        latents: Hidden values `[n, 4]`.
        outcomes: Labels of the same cases.

    Returns:
        `image`, `genes` and `both` to scores.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / weights.sum()
    spread = np.sqrt(1 - truth.correlation**2)

    def average(effect: Effect, name: str, seen: str, link: Callable[[Floats], Floats]) -> Floats:
        """Return the mean of a link of the effect over what is not seen, `[n]`."""
        grade = latents[f"{name}_grade"].to_numpy()[:, None]
        activity = latents[f"{name}_activity"].to_numpy()[:, None]
        if seen == "both":
            return link(effect.value(grade, activity))[:, 0]
        known = grade if seen == "image" else activity
        hidden = truth.correlation * known + spread * nodes[None, :]
        pair = (known, hidden) if seen == "image" else (hidden, known)
        return link(effect.value(*pair)) @ weights

    activities = truth.correlation * nodes[:, None] + spread * nodes[None, :]
    grid = truth.class_effect.value(nodes[:, None], activities)
    prevalence = float(weights @ expit(grid) @ weights)
    scores = {}
    for seen in ("image", "genes", "both"):
        predicted = average(truth.class_effect, "class", seen, expit) > prevalence
        risk = average(truth.risk_effect, "risk", seen, np.asarray)
        scores[seen] = BayesScores(
            balanced_accuracy(outcomes.classes, predicted.astype(np.int64)),
            harrell_c_index(outcomes.months, outcomes.events, risk),
        )
    return scores
