"""What is saved beside the weights: comes back as it was, refuses what it was not fitted to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from modaltune.clinical_encoder import ClinicalEncoder
from modaltune.engine.store import TileFeatures
from modaltune.errors import CohortError, FeatureFileError
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import SurvivalBins
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe

TRAIN = pd.DataFrame(
    {"C": [1.0, 2.0, 6.0], "A": [0.0, 4.0, 8.0], "X": [5.0, 5.0, 5.0]}, index=["P1", "P2", "P3"]
)
ROWS = pd.DataFrame(
    {"age": [40.0, 60.0, np.nan], "sex": ["female", "male", None], "site": ["lung", "lung", None]},
    index=["P1", "P2", "P3"],
)


def features(**changes: Any) -> TileFeatures:
    slide = TileFeatures(
        "S1",
        np.zeros((2, 3), np.float32),
        np.zeros((2, 2), np.int64),
        tile_px=256,
        target_mpp=0.5,
        encoder="lite",
        encoder_sha256="ab" * 32,
    )
    return replace(slide, **changes)


def fitted() -> Preprocessing:
    index = PathwayIndex.build(PathwayTable(("p", "q"), (("C", "A"), ("A",))), TRAIN.columns)
    return Preprocessing(
        TileRecipe.of(features()),
        index,
        GeneScaler.fit(TRAIN[list(index.genes)], clip_quantiles=None),
        ClinicalEncoder.fit(ROWS),
        SurvivalBins.fit([1.0, 5.0, 9.0, 20.0]),
    )


def test_it_comes_back_through_json_as_it_was() -> None:
    before = fitted()
    after = Preprocessing.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
    assert after.to_dict() == before.to_dict()
    assert after.tiles == before.tiles
    assert torch.equal(after.gene_values(TRAIN), before.gene_values(TRAIN))
    assert torch.equal(after.clinical_values(ROWS)[0], before.clinical_values(ROWS)[0])
    nothing = Preprocessing()
    assert Preprocessing.from_dict(json.loads(json.dumps(nothing.to_dict()))) == nothing


def test_genes_are_scaled_and_in_the_order_of_the_index() -> None:
    values = fitted().gene_values(TRAIN)
    assert values.dtype == torch.float32
    want = [(TRAIN[g] - TRAIN[g].mean()) / TRAIN[g].std(ddof=0) for g in ("A", "C")]
    np.testing.assert_allclose(values.numpy(), np.stack(want, axis=1), rtol=1e-6)


def test_without_a_scaler_values_pass_as_they_are() -> None:
    values = replace(fitted(), genes=None).gene_values(TRAIN)
    assert values.tolist() == [[0.0, 1.0], [4.0, 2.0], [8.0, 6.0]]


@pytest.mark.parametrize("scaled", [True, False])
def test_missing_genes_and_gaps_are_refused(scaled: bool) -> None:
    ready = fitted() if scaled else replace(fitted(), genes=None)
    with pytest.raises(CohortError, match=r"1 missing.*C"):
        ready.gene_values(TRAIN.drop(columns="C"))
    gap = TRAIN.copy()
    gap.loc["P2", "A"] = np.nan
    with pytest.raises(CohortError, match=r"genes must be finite.*P2"):
        ready.gene_values(gap)
    gap.loc["P2", "A"] = np.inf
    with pytest.raises(CohortError, match=r"genes must be finite.*P2"):
        ready.gene_values(gap)


def test_a_case_of_which_nothing_is_known_counts_as_without_record() -> None:
    values, known = fitted().clinical_values(ROWS)
    assert known.tolist() == [True, True, False]
    assert bool(torch.isfinite(values).all())


def test_a_model_without_a_modality_says_so() -> None:
    with pytest.raises(CohortError, match="genes must be left out: the model was tuned without"):
        Preprocessing().gene_values(TRAIN)
    with pytest.raises(CohortError, match="clinical values must be left out"):
        Preprocessing().clinical_values(ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((2, 4), np.float32)}, "must have width 3.*got 4"),
        ({"encoder_sha256": "cd" * 32}, f"must have encoder_sha256 {'ab' * 32}.*got {'cd' * 32}"),
        ({"target_mpp": 1.0}, r"must have target_mpp 0\.5.*got 1\.0.*at 0\.5 mpp"),
        ({"tile_px": 512}, "must have tile_px 256.*got 512"),
    ],
)
def test_features_made_in_another_way_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureFileError, match=f"slide S1 {message}"):
        TileRecipe.of(features()).check(features(**changes))


def test_what_is_unknown_is_not_compared() -> None:
    TileRecipe.of(features()).check(features(encoder_sha256=None, target_mpp=None, tile_px=None))
    TileRecipe(width=3).check(features(encoder="other", target_mpp=2.0))
