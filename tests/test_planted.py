"""The planted cohort: what is hidden, where it shows, how good one can get, what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modaltune.cases import pack_cases, prepare_cases
from modaltune.cases_folder import CasesFolder
from modaltune.clinical import COLUMNS
from modaltune.errors import InputError
from modaltune.evaluate import balanced_accuracy
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import SurvivalBins, label_cohort
from modaltune.pathways import PathwayIndex
from modaltune.planted import CLASS_PATHWAY, RISK_PATHWAY, PlantedCohort, PlantedConfig, plant
from modaltune.planted_truth import (
    LATENTS,
    Effect,
    Outcomes,
    Truth,
    bayes_scores,
    draw_latents,
    draw_outcomes,
)
from modaltune.preprocessing import Preprocessing, TileRecipe

SMALL = PlantedConfig(num_train=14, num_val=4, num_test=6, min_tiles=40, max_tiles=60)


@pytest.fixture(scope="module")
def planted() -> PlantedCohort:
    return plant()


def drawn(truth: Truth, count: int = 20_000) -> tuple[pd.DataFrame, Outcomes]:
    rng = np.random.default_rng(5)
    latents = draw_latents(truth, count, rng)
    return latents, draw_outcomes(truth, latents, rng)


def test_neither_modality_suffices() -> None:
    """20,000 cases: a balanced accuracy is known to 0.007 (two standard errors)."""
    truth = Truth()
    latents, outcomes = drawn(truth)
    few = Outcomes(*(values[:4000] for values in outcomes))
    for seen, score in bayes_scores(truth, latents, outcomes).items():
        low, high = (0.94, 0.97) if seen == "both" else (0.69, 0.73)
        assert low < score.balanced_accuracy < high, seen
    for seen, score in bayes_scores(truth, latents[:4000], few).items():
        low, high = (0.89, 0.94) if seen == "both" else (0.69, 0.74)
        assert low < score.c_index < high, seen
    assert 0.4 < outcomes.events.mean() < 0.6
    assert 0.4 < outcomes.classes.mean() < 0.6


def test_best_scores_are_those_of_a_closed_form() -> None:
    """Class 1 where g + a > 0: g alone is right with 1/2 + asin(correlation of g and sum) / pi."""
    truth = Truth(class_effect=Effect(interaction=0, scale=1e4))
    alone = 0.5 + math.asin(math.sqrt((1 + truth.correlation) / 2)) / math.pi
    latents, outcomes = drawn(truth)
    scores = bayes_scores(truth, latents, outcomes)
    assert scores["both"].balanced_accuracy == pytest.approx(1, abs=0.001)
    for seen in ("image", "genes"):
        assert scores[seen].balanced_accuracy == pytest.approx(alone, abs=0.01)


def test_no_rule_over_one_modality_beats_the_best_score() -> None:
    """Of all thresholds, in either direction, over a grade: the best is the Bayes rule."""
    truth = Truth()
    latents, outcomes = drawn(truth)
    grade = latents["class_grade"].to_numpy()
    rules = [
        balanced_accuracy(outcomes.classes, (sign * grade > cut).astype(int))
        for cut in np.linspace(-2, 2, 81)
        for sign in (1, -1)
    ]
    best = bayes_scores(truth, latents, outcomes)["image"].balanced_accuracy
    assert best == pytest.approx(max(rules), abs=0.01)


def test_hidden_values_are_standard_normal_and_correlated_in_pairs() -> None:
    latents, _ = drawn(Truth())
    np.testing.assert_allclose(latents.mean(), 0, atol=0.03)
    np.testing.assert_allclose(latents.std(), 1, atol=0.02)
    pair = np.array([[1, -0.3], [-0.3, 1]])
    want = np.kron(np.eye(2), pair)
    np.testing.assert_allclose(latents.corr().to_numpy(), want, atol=0.03)


def test_outcomes_follow_the_stated_rule() -> None:
    truth = Truth(censored_by_months=1e9)
    zero = pd.DataFrame(np.zeros((20_000, 4)), columns=list(LATENTS))
    outcomes = draw_outcomes(truth, zero, np.random.default_rng(0))
    assert outcomes.classes.mean() == pytest.approx(0.5, abs=0.015)
    assert np.median(outcomes.months) == pytest.approx(truth.median_months, rel=0.03)
    assert outcomes.events.all()
    higher = zero.assign(risk_grade=0.5, risk_activity=0.4, class_grade=0.2, class_activity=-0.1)
    outcomes = draw_outcomes(truth, higher, np.random.default_rng(0))
    logit = 9 * (0.2 - 0.1 - 0.5 * 0.2 * 0.1)
    assert outcomes.classes.mean() == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.015)
    risk = 2.5 * (0.5 + 0.4 + 0.5 * 0.5 * 0.4)
    want = truth.median_months * math.exp(-risk / truth.shape)
    assert np.median(outcomes.months) == pytest.approx(want, rel=0.03)


def test_sizes_are_those_of_the_study(planted: PlantedCohort) -> None:
    split = planted.split
    assert (len(split.train), len(split.val), len(split.test)) == (200, 0, 400)
    assert planted.cohort.case_ids == (*split.train, *split.test)
    counts = [len(kinds) for kinds in planted.pattern.values()]
    assert 300 <= min(counts) < 350
    assert 1450 < max(counts) <= 1500
    expression = planted.cohort.expression
    assert expression is not None
    assert expression.shape == (600, 300)
    assert len(planted.pathways.names) == 30
    assert {len(genes) for genes in planted.pathways.genes} == {12}
    for case, kinds in list(planted.pattern.items())[:20]:
        (slide,) = planted.cohort.read_slides(case)
        assert slide.features.shape == (len(kinds), 32)
        assert slide.features.dtype == np.float32
        assert len(np.unique(slide.coords, axis=0)) == len(kinds)
        for number in (0, 1):
            assert (kinds == number).mean() == pytest.approx(0.05, abs=0.003)


def test_a_grade_shows_in_the_tiles_of_its_pattern_alone(planted: PlantedCohort) -> None:
    """Least squares on 300 cases, correlation on the others: from its pattern's tiles only."""

    def means(kind: int) -> np.ndarray:
        rows = []
        for case, kinds in planted.pattern.items():
            (slide,) = planted.cohort.read_slides(case)
            rows.append(slide.features[kinds == kind].mean(0))
        return np.column_stack([np.stack(rows), np.ones(len(rows))])

    for number, latent in enumerate(("class_grade", "risk_grade")):
        grade = planted.latents[latent].to_numpy()
        for kind in (-1, 0, 1):
            x = means(kind)
            weights = np.linalg.lstsq(x[:300], grade[:300], rcond=None)[0]
            found = np.corrcoef(x[300:] @ weights, grade[300:])[0, 1]
            # 300 cases: four standard errors of a chance correlation are 0.23.
            assert (found > 0.95) if kind == number else (abs(found) < 0.23), (latent, kind)


def test_an_activity_shows_in_its_pathway_over_a_common_background(planted: PlantedCohort) -> None:
    expression = planted.cohort.expression
    assert expression is not None
    scaled = (expression - expression.mean()) / expression.std()
    for number, latent in ((CLASS_PATHWAY, "class_activity"), (RISK_PATHWAY, "risk_activity")):
        found = [
            np.corrcoef(scaled[list(genes)].mean(axis=1), planted.latents[latent])[0, 1]
            for genes in planted.pathways.genes
        ]
        assert found[number] > 0.9
        assert np.abs(np.delete(found, number)).max() < 0.35
    first = [genes[0] for genes in planted.pathways.genes]
    between = np.corrcoef(scaled[first].to_numpy().T)[np.triu_indices(30, 1)]
    # 600 independent cases: chance correlations have a standard deviation of 0.04.
    assert between.std() > 0.07


def test_clinical_rows_are_ready_for_label_sentences(planted: PlantedCohort) -> None:
    clinical = planted.clinical
    assert tuple(clinical.columns) == COLUMNS
    bins = SurvivalBins.fit(clinical.loc[list(planted.split.train), "survival_months"])
    sentences = label_cohort(clinical, bins)
    for case, row in clinical.head(20).iterrows():
        kind = "lobular" if row["primary_class"] == 1 else "duct"
        assert kind in sentences[str(case)].diagnosis
        assert ("died" if row["event"] else "was censored") in sentences[str(case)].survival
    for column in ("age", "sex"):
        assert clinical[column].notna().all()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again = plant(SMALL), plant(SMALL)
    other = plant(SMALL.model_copy(update={"seed": 1}))
    pd.testing.assert_frame_equal(first.clinical, again.clinical)
    assert first.cohort.expression is not None
    assert again.cohort.expression is not None
    pd.testing.assert_frame_equal(first.cohort.expression, again.cohort.expression)
    for case in first.cohort.case_ids:
        (one,), (two,) = first.cohort.read_slides(case), again.cohort.read_slides(case)
        np.testing.assert_array_equal(one.features, two.features)
        np.testing.assert_array_equal(one.coords, two.coords)
    assert not first.latents.equals(other.latents)
    assert not first.clinical["survival_months"].equals(other.clinical["survival_months"])


def test_shuffled_labels_are_dealt_out_within_each_part(planted: PlantedCohort) -> None:
    shuffled = plant(PlantedConfig(shuffle_labels=True, max_tiles=310))
    columns = ["diagnosis", "survival_months", "event", "primary_class"]
    for part in (planted.split.train, planted.split.test):
        before = planted.clinical.loc[list(part), columns].sort_values("survival_months")
        after = shuffled.clinical.loc[list(part), columns].sort_values("survival_months")
        np.testing.assert_array_equal(before.to_numpy(), after.to_numpy())
    pd.testing.assert_frame_equal(shuffled.latents, planted.latents)
    best, chance = planted.facts()["best_test_scores"], shuffled.facts()["best_test_scores"]
    # Four standard errors of a balanced accuracy of 400 cases.
    assert best["both"]["balanced_accuracy"] > 0.9
    assert chance["both"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.1)
    assert chance["both"]["c_index"] == pytest.approx(0.5, abs=0.1)


def test_a_written_cohort_comes_back(tmp_path: Path) -> None:
    planted = plant(SMALL)
    folder = planted.write(tmp_path / "study")
    opened = CasesFolder.open(tmp_path / "study" / "cases")
    assert opened.sha256 == folder.sha256
    assert opened.split() == planted.split
    assert len(opened.split().val) == 4
    pathways = opened.pathways
    assert pathways is not None
    genes = planted.cohort.expression
    assert genes is not None
    training = list(planted.split.train)
    index = PathwayIndex.build(planted.pathways, genes.columns)
    fitted = Preprocessing(
        tiles=TileRecipe(32), pathways=index, genes=GeneScaler.fit(genes.loc[training])
    )
    ours, read = (
        pack_cases(prepare_cases(cohort, planted.split.test, fitted), "scaled", 32)
        for cohort in (planted.cohort, opened.cohort)
    )
    assert torch.equal(ours.tiles, read.tiles)
    assert torch.equal(ours.positions_px, read.positions_px)
    assert torch.equal(ours.modalities["genes"], read.modalities["genes"])
    facts = json.loads((tmp_path / "study" / "planted.json").read_text(encoding="utf-8"))
    assert facts["config"]["truth"]["class_effect"]["interaction"] == 0.5
    assert facts["config"]["tile_noise"] == 0.7
    assert PlantedConfig.model_validate(facts["config"]) == SMALL
    assert facts == opened.description["planted"]


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_val must be below num_train \(14\), got 14"):
        plant(SMALL.model_copy(update={"num_val": 14}))
    with pytest.raises(InputError, match="max_tiles must be at least min_tiles"):
        plant(SMALL.model_copy(update={"max_tiles": 10}))
    with pytest.raises(InputError, match="shared_genes must be at most the genes of the other"):
        plant(SMALL.model_copy(update={"shared_genes": 10_000}))
    with pytest.raises(InputError, match="min_tiles must be at least 2, a tile of each pattern"):
        plant(SMALL.model_copy(update={"min_tiles": 1}))
    with pytest.raises(InputError, match="tile_width must be at least 14"):
        plant(SMALL.model_copy(update={"tissues": 10, "tile_width": 13}))
