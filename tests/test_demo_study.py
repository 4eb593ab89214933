"""The demo's study on a tiny cohort: folds, masks, and nothing fitted on held-out cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modaltune.cases import Cohort
from modaltune.demo_study import BOTH, VARIANTS, DemoStudy, StudyData, load_study, usable
from modaltune.engine.store import TileFeatures, feature_recipe, write_features
from modaltune.pathways import PathwayTable
from modaltune.train import TrainConfig

CASES = [f"C{i:02d}" for i in range(24)]
GENES = ["A", "B", "C", "D"]
STUDY = DemoStudy(
    folds=2,
    members=1,
    workers=1,
    width=16,
    out_features=8,
    training=TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, cases_per_step=12),
)


def features(folder: Path, case: str, shift: float) -> Path:
    rng = np.random.default_rng(sum(map(ord, case)))
    recipe = feature_recipe(encoder="e", encoder_sha256="0" * 64, target_mpp=0.5, tile_px=256)
    return write_features(
        folder / f"{case}.h5",
        TileFeatures(
            slide=case,
            features=(rng.normal(size=(3, 12)) + shift).astype(np.float32),
            coords=np.array([[0, 0], [256, 0], [0, 256]]),
            tile_px=256,
            level0_tile_px=256,
            target_mpp=0.5,
            base_mpp=0.5,
            encoder="e",
            encoder_sha256="0" * 64,
            level0_size=(1024, 1024),
            reader="test",
            recipe=recipe,
        ),
    )


@pytest.fixture
def data(tmp_path: Path) -> StudyData:
    """Case 0 has no slide, case 1 no expression, case 2 nothing clinical but its outcome."""
    rng = np.random.default_rng(0)
    classes = np.arange(24) % 2
    clinical = pd.DataFrame(
        {
            "age": rng.integers(40, 80, 24).astype(float),
            "sex": ["female", "male"] * 12,
            "site": "colorectal",
            "diagnosis": [("one", "two")[k] + " carcinoma" for k in classes],
            "survival_months": rng.uniform(2, 60, 24),
            "event": rng.integers(0, 2, 24).astype(float),
            "primary_class": classes,
        },
        index=pd.Index(CASES, name="case_id"),
    )
    clinical.loc["C02", ["age", "sex", "site"]] = [np.nan, None, None]
    expression = pd.DataFrame(rng.normal(size=(24, 4)), CASES, GENES).drop("C01")
    slides = {c: (features(tmp_path, c, k),) for c, k in zip(CASES, classes, strict=True)}
    del slides["C00"]
    cohort = Cohort(slides, expression.astype(np.float32), clinical)
    return load_study(cohort, PathwayTable(("P", "Q"), (("A", "B"), ("C", "D"))), seed=0)


def test_every_case_is_predicted_by_every_variant(data: StudyData) -> None:
    steps: list[tuple[int, int]] = []
    found = STUDY.evaluate(data, lambda done, total: steps.append((done, total)))
    assert list(found.variants) == list(VARIANTS)
    assert steps == [(i, 6) for i in range(7)]
    assert found.case_ids == tuple(CASES)
    for name, lacking in ((BOTH, 0), ("image only", 1), ("genes only", 1)):
        variant = found.variants[name]
        assert variant.unpredictable == lacking
        assert np.isfinite(variant.probability).all()
        assert np.isfinite(variant.risk).all()
        value, low, high = variant.balanced_accuracy
        assert low <= value <= high
    assert found.variants["image only"].probability[0] == 0.5  # the training prior: C00 no slide
    assert found.variants["image only"].risk[0] == 0.0
    assert found.modalities["slide"] == [False] + [True] * 23
    assert found.modalities["genes"] == [True, False] + [True] * 22
    assert found.modalities["clinical"] == [True, True, False] + [True] * 21
    best = max(found.variants[name].balanced_accuracy[0] for name in VARIANTS[1:])
    assert found.margin == pytest.approx(found.variants[BOTH].balanced_accuracy[0] - best)


def test_usable_cases(data: StudyData) -> None:
    assert usable(data, BOTH).all()
    assert np.flatnonzero(~usable(data, "image only")).tolist() == [0]
    assert np.flatnonzero(~usable(data, "genes only")).tolist() == [1]


def test_nothing_is_fitted_on_held_out_cases(data: StudyData) -> None:
    """Changing everything about held-out cases changes nothing that is fitted or tuned."""
    train, held_out = CASES[:16], CASES[16:]
    first = STUDY.tune(data, BOTH, train)
    expression = data.cohort.expression
    assert expression is not None
    changed_genes, changed_rows = expression.copy(), data.clinical.copy()
    changed_genes.loc[held_out] = 1e3
    changed_rows.loc[held_out, "age"] = 99.0
    changed_rows.loc[held_out, "survival_months"] = 500.0
    changed_rows.loc[held_out, "diagnosis"] = "other"
    cohort = Cohort(data.cohort.slides, changed_genes, changed_rows)
    other = StudyData(cohort, changed_rows, data.pathways, data.text, data.seed)
    second = STUDY.tune(other, BOTH, train)
    assert first.preprocessing.to_dict() == second.preprocessing.to_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    # And the test can fail: a changed training case changes what is fitted.
    changed_genes.loc[train[3]] = 1e3
    third = STUDY.tune(other, BOTH, train)
    assert first.preprocessing.to_dict() != third.preprocessing.to_dict()


def test_variants_see_only_their_inputs(data: StudyData) -> None:
    image = STUDY.tune(data, "image only", CASES[1:])
    assert image.preprocessing.pathways is None
    assert image.preprocessing.clinical is None
    assert set(image.model.modalities) == set()
    genes = STUDY.tune(data, "genes only", [CASES[0], *CASES[2:]])
    assert genes.preprocessing.tiles is None
    assert genes.model.config.random_backbone
