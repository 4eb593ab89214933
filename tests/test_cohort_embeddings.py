"""A cohort as one Parquet table: joined by id, gaps left out, provenance, likeness."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from modaltune import cohort_embeddings
from modaltune.adapter import AdapterConfig
from modaltune.cases import Case, Cohort
from modaltune.checkpoint import Run
from modaltune.cohort_embeddings import alike_share, embed_cohort, write_embeddings
from modaltune.config import ModalTuneConfig
from modaltune.engine.store import TileFeatures, feature_recipe, read_features, write_features
from modaltune.errors import CohortError
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.slide_encoders.longnet import LongNetConfig


@pytest.fixture
def run() -> Run:
    index = PathwayIndex.build(PathwayTable(("p", "q"), (("B",), ("A", "B"))), "AB")
    config = ModalTuneConfig(
        slide_encoder=LongNetConfig(in_features=4, width=8, depth=1, heads=2, ffn_width=8),
        adapter=AdapterConfig(heads=2, interactions=((0, 0),)),
        genes=GeneConfig(width=4, depth=1, tokens=2),
        tasks=("general", "survival"),
        out_features=6,
        random_backbone=True,
    )
    torch.manual_seed(0)
    model = ModalTune(config, gene_index=index.indices, gene_offsets=index.offsets)
    ready = Preprocessing(TileRecipe(4), index)
    return Run(model.eval(), ready, info={"trained": "here", "random_backbone": "a lie"})


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """P1 has two slides and genes, P2 a slide, P3 genes, P4 an empty slide, P5 a clinic row."""
    rng = np.random.default_rng(0)
    recipe = feature_recipe(encoder="lite", encoder_sha256="ab" * 32, target_mpp=0.5, tile_px=256)

    def write(name: str, tiles: int) -> Path:
        slide = TileFeatures(
            name,
            rng.normal(size=(tiles, 4)).astype(np.float32),
            np.stack([np.arange(tiles) * 256] * 2, axis=1).astype(np.int64),
            tile_px=256,
            level0_tile_px=256,
            target_mpp=0.5,
            base_mpp=0.5,
            encoder="lite",
            encoder_sha256="ab" * 32,
            level0_size=(9000, 9000),
            reader="image",
            recipe=recipe,
            empty_reason=None if tiles else "no tissue",
        )
        return write_features(tmp_path / f"{name}.h5", slide)

    slides = {
        "P2": (write("S2", 3),),
        "P1": (write("S1a", 4), write("S1b", 2)),
        "P4": (write("S4", 0),),
    }
    genes = pd.DataFrame({"B": [0.5, -1.0], "A": [1.0, 2.0]}, index=["P3", "P1"])
    return Cohort(slides, genes, pd.DataFrame({"age": [50.0]}, index=["P5"]))


@pytest.mark.parametrize("in_memory", [1, 2, 16])
def test_every_case_with_anything_is_embedded(
    run: Run, cohort: Cohort, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(cohort_embeddings, "CASES_IN_MEMORY", in_memory)
    steps: list[tuple[int, int]] = []
    found = embed_cohort(run, cohort, on_case=lambda done, of: steps.append((done, of)))
    assert [case.case_id for case in found.cases] == ["P1", "P2", "P3"]
    assert steps == [(i, 5) for i in range(1, 6)]
    slides = [tuple(map(read_features, cohort.slides[p])) for p in ("P1", "P2")]
    by_hand = [
        Case("P1", slides[0], {"genes": torch.tensor([2.0, -1.0])}),
        Case("P2", slides[1]),
        Case("P3", (), {"genes": torch.tensor([1.0, 0.5])}),
    ]
    assert torch.equal(found.values, run.embed(by_hand))


def test_features_do_not_pile_up(run: Run, cohort: Cohort) -> None:
    found = embed_cohort(run, cohort)
    assert [len(s) for s in found.cases[0].slides] == [4, 2]
    assert sum(s.features.nbytes for case in found.cases for s in case.slides) == 0


def test_cases_asked_for_come_in_that_order_or_not_at_all(run: Run, cohort: Cohort) -> None:
    found = embed_cohort(run, cohort, ["P3", "P1"])
    assert [case.case_id for case in found.cases] == ["P3", "P1"]
    with pytest.raises(CohortError, match="1 unknown, such as P9"):
        embed_cohort(run, cohort, ["P1", "P9"])
    with pytest.raises(ValueError, match="case P4 must have tiles, genes or another modality"):
        embed_cohort(run, cohort, ["P4"])


def test_the_table_has_a_row_per_case_and_task(run: Run, cohort: Cohort, tmp_path: Path) -> None:
    found = embed_cohort(run, cohort)
    path = write_embeddings(tmp_path / "embeddings.parquet", run, found)
    table = pq.read_table(path)
    rows = table.to_pylist()
    assert [(r["case_id"], r["task"]) for r in rows] == [
        (case, task) for case in ("P1", "P2", "P3") for task in ("general", "survival")
    ]
    assert [r["modalities"] for r in rows[::2]] == [["slide", "genes"], ["slide"], ["genes"]]
    assert [r["slides"] for r in rows[::2]] == [["S1a", "S1b"], ["S2"], []]
    assert [r["tiles"] for r in rows[::2]] == [6, 3, 0]
    assert all(r["random_backbone"] is True for r in rows)
    got = torch.tensor([r["embedding"] for r in rows]).reshape(3, 2, 6)
    assert torch.equal(got, found.values)
    told = json.loads(table.schema.metadata[b"modaltune"])
    assert told["random_backbone"] is True  # the model says so, whatever its provenance says
    assert told["position_convention"] == "scaled"
    assert told["trained"] == "here"
    assert [p.name for p in tmp_path.iterdir() if "parquet" in p.name] == ["embeddings.parquet"]


def test_an_empty_cohort_is_an_empty_table(run: Run, tmp_path: Path) -> None:
    found = embed_cohort(run, Cohort({}))
    assert found.values.shape == (0, 2, 6)
    assert found.alike_share is None
    path = write_embeddings(tmp_path / "none.parquet", run, found)
    assert pq.read_table(path).num_rows == 0


def test_alike_share_counts_pairs() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert alike_share(a[None]) is None
    assert alike_share(torch.stack([a, b])) == 0
    assert alike_share(torch.stack([a, 5 * a])) == 1
    assert alike_share(torch.stack([a, 3 * a, b])) == pytest.approx(1 / 3)
    near = torch.tensor([[0.981, 0.194], [0.979, 0.204]])  # cosines 0.981 and 0.979 with a
    assert alike_share(torch.stack([a, near[0]])) == 1
    assert alike_share(torch.stack([a, near[1]])) == 0
    many = torch.eye(2).repeat_interleave(1030, dim=0)  # more than one block of rows
    assert alike_share(many) == pytest.approx(1029 / 2059)


def test_a_missing_modality_is_left_out_of_that_case_only(run: Run, cohort: Cohort) -> None:
    whole = embed_cohort(run, cohort)
    image = embed_cohort(run, replace(cohort, expression=None))
    assert [case.case_id for case in image.cases] == ["P1", "P2"]
    assert torch.equal(whole.values[1], image.values[1])
    assert not torch.equal(whole.values[0], image.values[0])
