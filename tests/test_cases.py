"""Positions of tiles, slides of one case, packing, and cohorts joined by id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modaltune.cases import (
    Case,
    Cohort,
    PreparedCases,
    pack_cases,
    place_slides,
    prepare_cases,
    scale_positions,
)
from modaltune.engine.store import TileFeatures, feature_recipe, write_features
from modaltune.errors import CohortError, FeatureFileError, InputError
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe

WIDTH = 3
CELLS = np.array([[0, 0], [1, 0], [2, 5], [77, 31], [198, 399], [311, 112]])


def rounded_grid(base_mpp: float, cells: Any = CELLS, **changes: Any) -> TileFeatures:
    """Tiles of 256 px at 0.5 mpp as a tiler writes them: corners rounded to whole level-0 px."""
    coords = np.rint(np.asarray(cells) * 256 * 0.5 / base_mpp).astype(np.int64)
    features = np.random.default_rng(0).normal(size=(len(coords), WIDTH)).astype(np.float32)
    slide = TileFeatures(
        "S1",
        features,
        coords,
        tile_px=256,
        level0_tile_px=round(256 * 0.5 / base_mpp),
        target_mpp=0.5,
        base_mpp=base_mpp,
        encoder="lite",
        encoder_sha256="ab" * 32,
    )
    return replace(slide, **changes)


@pytest.mark.parametrize("base_mpp", [0.25, 0.5, 0.2527, 0.499, 0.2325, 0.1213, 1.0])
def test_every_scan_of_a_tissue_has_the_same_positions(base_mpp: float) -> None:
    got = scale_positions(rounded_grid(base_mpp), "scaled")
    assert got.dtype == torch.float64
    assert got.tolist() == (CELLS * 256.0).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.06, 4.9),
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=1, max_size=9),
)
def test_no_resolution_moves_a_tile_to_another_cell(
    base_mpp: float, cells: list[tuple[int, int]]
) -> None:
    got = torch.floor(scale_positions(rounded_grid(base_mpp, cells), "scaled") / 256)
    assert got.tolist() == [list(map(float, cell)) for cell in cells]


def test_overlapping_tiles_keep_their_step() -> None:
    coords = np.rint(CELLS * 192 * 0.5 / 0.2527).astype(np.int64)
    slide = rounded_grid(0.2527, coords=coords, overlap_px=64)
    assert scale_positions(slide, "scaled").tolist() == (CELLS * 192.0).tolist()


def test_a_grid_with_a_rounded_step_is_put_back_too() -> None:
    # TRIDENT: corners are whole multiples of round(256 * 0.5 / 0.2527) = 507 px, which drift away
    # from the exact step by a cell in a thousand; with 506 px two tiles would meet in cell 0.
    for step in (506, 507):
        slide = rounded_grid(0.2527, coords=CELLS * step, level0_tile_px=step)
        assert scale_positions(slide, "scaled").tolist() == (CELLS * 256.0).tolist()


def test_corners_off_the_grid_are_scaled() -> None:
    coords = np.array([[10, 999], [1000, 4]])
    got = scale_positions(rounded_grid(0.25, coords=coords, cells=CELLS[:2]), "scaled")
    assert torch.floor(got).tolist() == [[5, 499], [500, 2]]


def test_the_tile_size_at_level_0_serves_where_mpp_is_unknown() -> None:
    slide = replace(rounded_grid(0.25), base_mpp=None, target_mpp=None)
    assert scale_positions(slide, "scaled").tolist() == (CELLS * 256.0).tolist()


def test_nothing_is_guessed() -> None:
    slide = replace(rounded_grid(0.25), base_mpp=None, level0_tile_px=None)
    with pytest.raises(FeatureFileError, match=r"slide S1 must say their mpp.*got neither"):
        scale_positions(slide, "scaled")
    assert scale_positions(slide, "reference").tolist() == slide.coords.tolist()


def test_the_reference_convention_is_level_0_px() -> None:
    slide = rounded_grid(0.2527)
    assert scale_positions(slide, "reference").tolist() == slide.coords.tolist()


def at(*rows: tuple[int, int], name: str = "S", base_mpp: float = 0.5) -> TileFeatures:
    return rounded_grid(base_mpp, cells=rows, slide=name)


def test_slides_lie_below_all_before_them() -> None:
    slides = [at((0, 10)), at((1, 0), (1, 2)), at((2, 1))]
    _, where = place_slides(slides, "scaled")
    first = 10 * 256 + 1500
    second = first + 2 * 256 + 1500
    assert where.tolist() == [
        [0, 2560],
        [256, first],
        [256, first + 512],
        [512, second + 256],
    ]


def test_published_offsets_are_not_cumulative() -> None:
    slides = [at((0, 10)), at((1, 0), (1, 2)), at((2, 1))]
    _, where = place_slides(slides, "reference")
    # METHOD 4.8: offset_0 = 0, offset_{i+1} = max(raw y of slide i) + 1500.
    assert where.tolist() == [[0, 2560], [256, 4060], [256, 4572], [512, 2012 + 256]]


def test_scaled_offsets_do_not_depend_on_the_scanner() -> None:
    cells = [((0, 10), (3, 3)), ((1, 0), (1, 2))]
    scans = [[at(*c, base_mpp=mpp) for c in cells] for mpp in (0.25, 0.499)]
    assert torch.equal(place_slides(scans[0], "scaled")[1], place_slides(scans[1], "scaled")[1])


def test_slides_without_tiles_take_no_room() -> None:
    empty = rounded_grid(0.5, cells=np.zeros((0, 2)), empty_reason="no tissue")
    features, where = place_slides([empty, at((0, 1)), empty, at((0, 0))], "scaled")
    assert where.tolist() == [[0, 256], [0, 1756]]
    assert features.shape == (2, WIDTH)
    assert place_slides([empty], "scaled")[0].shape[0] == 0


def test_slides_of_different_encoders_do_not_mix() -> None:
    wide = replace(at((0, 0), name="S2"), features=np.zeros((1, 5), np.float32))
    with pytest.raises(FeatureFileError, match=r"features of one width, got \[3, 5\] for S, S2"):
        place_slides([at((0, 0)), wide], "scaled")


def test_cases_are_packed_with_their_gaps() -> None:
    cases = [
        Case("A", (at((0, 0), (1, 1)),), {"genes": torch.ones(4)}),
        Case("B", (), {"clinical": torch.ones(2)}),
        Case("C", (at((3, 3)),)),
    ]
    batch = pack_cases(cases, "scaled", WIDTH)
    assert batch.offsets.tolist() == [0, 2, 2, 3]
    assert batch.positions_px.tolist() == [[0, 0], [256, 256], [768, 768]]
    assert batch.case_ids == ("A", "B", "C")
    assert {n: p.tolist() for n, p in batch.present.items()} == {
        "genes": [True, False, False],
        "clinical": [False, True, False],
    }
    assert batch.modalities["genes"].shape == (3, 4)


def test_what_cannot_be_packed_names_the_case() -> None:
    with pytest.raises(InputError, match="case B must have tiles, genes or another modality"):
        pack_cases([Case("A", (at((0, 0)),)), Case("B")], "scaled", WIDTH)
    empty = rounded_grid(0.5, cells=np.zeros((0, 2)))
    with pytest.raises(InputError, match="case A must have tiles"):
        pack_cases([Case("A", (empty,))], "scaled", WIDTH)
    with pytest.raises(FeatureFileError, match="of case A must have width 7 for this model, got 3"):
        pack_cases([Case("A", (at((0, 0)),))], "scaled", 7)
    uneven = [Case(i, (), {"genes": torch.ones(n)}) for i, n in (("A", 4), ("B", 5))]
    with pytest.raises(InputError, match=r"genes of case B must have shape \[4\].*got \[5\]"):
        pack_cases(uneven, "scaled", WIDTH)


def cohort(tmp_path: Path) -> Cohort:
    files = {}
    for case, cells in (("P1", [(0, 0), (1, 1)]), ("P2", [(2, 2)])):
        recipe = feature_recipe(
            encoder="lite", encoder_sha256="ab" * 32, target_mpp=0.5, tile_px=256, overlap_px=0
        )
        slide = replace(at(*cells, name=case), level0_size=(9000, 9000), recipe=recipe)
        files[case] = (write_features(tmp_path / f"{case}.h5", replace(slide, reader="image")),)
    genes = pd.DataFrame({"B": [1.0, 2.0], "A": [3.0, 4.0], "C": [0.0, 0.0]}, index=["P3", "P1"])
    return Cohort(files, genes, pd.DataFrame({"age": [50.0]}, index=["P4"]))


def preprocessing() -> Preprocessing:
    table = PathwayTable(("p", "q"), (("B",), ("A", "B")))
    return Preprocessing(TileRecipe(WIDTH), PathwayIndex.build(table, "ABC"))


def test_a_cohort_is_joined_by_id(tmp_path: Path) -> None:
    study = cohort(tmp_path)
    assert study.case_ids == ("P1", "P2", "P3", "P4")
    cases = prepare_cases(study, ["P3", "P2", "P1"], preprocessing())
    assert [case.case_id for case in cases] == ["P3", "P2", "P1"]
    assert [[len(s) for s in case.slides] for case in cases] == [[], [1], [2]]
    assert cases[0].values["genes"].tolist() == [3.0, 1.0]  # genes A, B of P3
    assert dict(cases[1].values) == {}
    assert cases[2].values["genes"].tolist() == [4.0, 2.0]


def test_what_the_model_does_not_know_is_left_out(tmp_path: Path) -> None:
    (case,) = prepare_cases(cohort(tmp_path), ["P1"], Preprocessing())
    assert case == Case("P1", (), {})


def test_unknown_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CohortError, match="cases must be in the cohort, got 2 unknown, such as X, Y"
    ):
        prepare_cases(cohort(tmp_path), ["P1", "X", "Y"], preprocessing())


def test_ids_that_pandas_reads_as_numbers_are_ids(tmp_path: Path) -> None:
    genes = pd.DataFrame({"A": [1.0, 2.0], "B": [3.0, 4.0]}, index=[17, 4])
    (case,) = prepare_cases(Cohort({}, genes), ["4"], preprocessing())
    assert case.values["genes"].tolist() == [2.0, 4.0]


def test_two_rows_of_one_case_are_refused() -> None:
    genes = pd.DataFrame({"A": [1.0, 2.0], "B": [3.0, 4.0]}, index=["P1", "P1"])
    with pytest.raises(CohortError, match=r"one row per case, got several for 1 case\(s\).*P1"):
        prepare_cases(Cohort({}, genes), ["P1"], preprocessing())


def test_prepared_cases_serve_batches_and_targets() -> None:
    cases = [Case(i, (at((n, n)),)) for n, i in enumerate("ABC")]
    targets = torch.arange(3.0)[:, None, None].expand(3, 2, 4)
    ready = PreparedCases(cases, targets, "scaled", WIDTH)
    assert len(ready) == 3
    assert ready.batch([2, 0]).case_ids == ("C", "A")
    text = ready.targets([2, 0]).text
    assert text is not None
    assert text[:, 0, 0].tolist() == [2, 0]
    with pytest.raises(CohortError, match="cases must carry targets"):
        PreparedCases(cases, None, "scaled", WIDTH).targets([0])
    with pytest.raises(CohortError, match=r"one row per case \(3\), got 2"):
        PreparedCases(cases, targets[:2], "scaled", WIDTH)
