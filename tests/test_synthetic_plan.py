"""The planted signal as population quantities, measured here by rules that know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
from lifelines.utils import concordance_index
from scipy.stats import chi2_contingency

from modaltune.errors import CohortError
from modaltune.synthetic_plan import (
    ALONE_BALANCED_ACCURACY,
    NOISE_GENES,
    PATHWAYS,
    PLANTED_PATHWAYS,
    TOGETHER_BALANCED_ACCURACY,
    Latents,
    sample_clinical,
    sample_expression,
    sample_latents,
    sample_outcomes,
)

POPULATION = 100_000


@pytest.fixture(scope="module")
def population() -> Latents:
    return sample_latents(POPULATION, np.random.default_rng(11))


def best_rule(classes: np.ndarray, *inputs: np.ndarray) -> float:
    """Balanced accuracy of the best rule on binned inputs, fitted on half of the cases."""
    cells = np.zeros(len(classes), np.int64)
    for values in inputs:
        cells = cells * 64 + np.digitize(values, np.linspace(-2, 2, 63))
    fit = np.arange(len(classes)) % 2 == 0
    ones = np.bincount(cells[fit], classes[fit], minlength=cells.max() + 1)
    seen = np.bincount(cells[fit], minlength=cells.max() + 1)
    guess = (ones > seen / 2)[cells[~fit]]
    truth = classes[~fit]
    return float(np.mean([(guess[truth == label] == label).mean() for label in (0, 1)]))


def test_subtype_needs_both(population: Latents) -> None:
    image = best_rule(population.subtype, population.morphology)
    genes = best_rule(population.subtype, population.activity)
    both = best_rule(population.subtype, population.morphology, population.activity)
    assert image == pytest.approx(0.70, abs=0.03)
    assert genes == pytest.approx(0.70, abs=0.03)
    assert both == pytest.approx(0.95, abs=0.03)
    assert (image, genes) == pytest.approx((ALONE_BALANCED_ACCURACY,) * 2, abs=0.02)
    assert both == pytest.approx(TOGETHER_BALANCED_ACCURACY, abs=0.02)


def test_latents_are_balanced_and_in_range(population: Latents) -> None:
    assert population.subtype.mean() == pytest.approx(0.5, abs=0.01)
    assert population.is_changed.mean() == pytest.approx(0.05, abs=1e-3)
    assert population.discohesive.min() >= 0
    assert population.discohesive.max() <= 1
    assert population.discohesive.std() > 0.2


@pytest.mark.parametrize("seed", range(6))
def test_small_cohorts_are_like_the_population(seed: int) -> None:
    latents = sample_latents(64, np.random.default_rng(seed))
    assert latents.subtype.sum() in range(29, 36)

    def right(values: np.ndarray) -> float:
        return float(((values > 0) == latents.subtype).mean())

    assert right(latents.morphology + latents.activity) > 0.92
    assert 0.6 < right(latents.morphology) < 0.8
    assert 0.6 < right(latents.activity) < 0.8


def test_risk_needs_both() -> None:
    rng = np.random.default_rng(5)
    latents = sample_latents(3000, rng)
    outcomes = sample_outcomes(latents, rng)

    def concordance(risk: np.ndarray) -> float:
        return float(concordance_index(outcomes.survival_months, -risk, outcomes.event))

    both = concordance(latents.morphology + latents.activity)
    assert both > 0.80
    assert both > concordance(latents.morphology) + 0.07
    assert both > concordance(latents.activity) + 0.07
    assert 0.5 < concordance(outcomes.age) < 0.56
    assert both < concordance(outcomes.log_hazard) < 0.9


@pytest.mark.parametrize("cases", [8, 64, 1000])
def test_survival_is_censored_and_in_range(cases: int) -> None:
    rng = np.random.default_rng(cases)
    outcomes = sample_outcomes(sample_latents(cases, rng), rng)
    assert 0.35 <= 1 - outcomes.event.mean() <= 0.50
    assert outcomes.survival_months.min() >= 1
    assert outcomes.survival_months.max() <= 120
    assert set(np.unique(outcomes.event)) == {0, 1}


def test_expression_follows_the_activity_in_the_planted_pathways_alone() -> None:
    rng = np.random.default_rng(6)
    activity = sample_latents(4000, rng).activity
    genes, values = sample_expression(activity, rng)
    assert values.shape == (4000, len(genes))
    assert values.min() >= 0
    assert len(set(genes)) == len(genes)
    scaled = (values - values.mean(0)) / values.std(0)
    for name, members in PATHWAYS.items():
        mean = scaled[:, [genes.index(gene) for gene in members]].mean(1)
        correlation = np.corrcoef(mean, activity)[0, 1]
        assert correlation > 0.93 if name in PLANTED_PATHWAYS else abs(correlation) < 0.06
    noise = scaled[:, [genes.index(gene) for gene in NOISE_GENES]]
    assert np.abs(noise.T @ (activity / activity.std()) / 4000).max() < 0.08


def test_pathways_have_the_promised_sizes_and_share_no_planted_gene() -> None:
    assert len(PATHWAYS) == 14
    assert all(5 <= len(set(members)) == len(members) <= 15 for members in PATHWAYS.values())
    others = {
        g for name, members in PATHWAYS.items() if name not in PLANTED_PATHWAYS for g in members
    }
    planted = {gene for name in PLANTED_PATHWAYS for gene in PATHWAYS[name]}
    assert not others & planted
    assert not set(NOISE_GENES) & (others | planted)


def test_clinical_rows_tell_nothing_of_the_subtype() -> None:
    rng = np.random.default_rng(7)
    classes = sample_latents(4000, rng).subtype
    rows = sample_clinical(4000, rng)
    values = np.array([row["sex"] for row in rows])
    counts = [[((values == v) & (classes == k)).sum() for v in np.unique(values)] for k in (0, 1)]
    assert chi2_contingency(counts).pvalue > 0.01
    for column in ("site", "stage", "t", "n", "m"):
        assert len({row[column] for row in rows}) == 1


def test_too_few_cases_is_an_error() -> None:
    with pytest.raises(CohortError, match="cases must be at least 2, got 1"):
        sample_latents(1, np.random.default_rng(0))
