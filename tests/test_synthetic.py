"""The cohort on disk: complete, consistent with its truth, the same on every run, or not there."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile

from modaltune.errors import CohortError
from modaltune.synthetic import SyntheticCohort, write_cohort

CASES = 8


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCohort:
    return write_cohort(tmp_path_factory.mktemp("synthetic") / "cohort", cases=CASES, seed=7)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_arguments_give_the_same_bytes_and_progress_is_told(
    cohort: SyntheticCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[int, int]] = []
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.INFO, "modaltune.synthetic"):
        again = write_cohort(
            tmp_path / "empty", cases=CASES, seed=7, on_progress=lambda *step: told.append(step)
        )
    names = sorted(p.relative_to(cohort.root) for p in cohort.root.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again.root) for p in again.root.rglob("*") if p.is_file())
    assert len(names) == 5 + len(cohort.slides)
    for name in names:
        assert (cohort.root / name).read_bytes() == (again.root / name).read_bytes(), name
    assert again.cases == cohort.cases
    assert told == [(i, len(again.slides)) for i in range(len(again.slides) + 1)]
    assert f"synthetic cohort of {CASES} cases and {len(again.slides)} slides" in caplog.text


def test_clinical_has_the_canonical_columns_and_a_row_for_every_case(
    cohort: SyntheticCohort,
) -> None:
    header = cohort.clinical.read_text().splitlines()[0]
    assert header == (
        "case_id,age,sex,site,diagnosis,stage,t,n,m,survival_months,event,primary_class"
    )
    table = rows(cohort.clinical)
    assert [row["case_id"] for row in table] == [case.case_id for case in cohort.cases]
    for row, case in zip(table, cohort.cases, strict=True):
        assert int(row["primary_class"]) == case.primary_class
        assert row["event"] in ("0", "1")
        assert 1 <= float(row["survival_months"]) <= 120
        assert all(bool(row[c]) == case.has_clinical for c in ("age", "sex", "site"))
        assert row["stage"] in ("Stage I", "Stage II", "Stage III", "Stage IV")
    assert len({(row["diagnosis"], row["primary_class"]) for row in table}) == 2


def test_manifest_lists_the_slides_that_exist(cohort: SyntheticCohort) -> None:
    table = rows(cohort.manifest)
    assert list(table[0]) == ["slide", "case_id", "mpp"]
    listed = [cohort.root / row["slide"] for row in table]
    assert listed == list(cohort.slides)
    assert set(listed) == set((cohort.root / "slides").iterdir())
    assert {row["mpp"] for row in table} == {""}
    for row in table:
        assert Path(row["slide"]).name.startswith(row["case_id"] + "-")


def test_slides_are_pyramids_at_half_a_micron(cohort: SyntheticCohort) -> None:
    with tifffile.TiffFile(cohort.slides[0]) as file:
        first, second = file.pages
        assert first.tags["XResolution"].value[0] / first.tags["XResolution"].value[1] == 20_000
        assert first.tile == (256, 256)
        assert [n // 2 for n in first.shape[:2]] == list(second.shape[:2])
        assert first.shape[2] == 3


def test_some_lack_a_modality_and_none_lacks_image_and_genes(cohort: SyntheticCohort) -> None:
    assert sum(not case.slide_ids for case in cohort.cases) == 1
    assert sum(not case.has_expression for case in cohort.cases) == 1
    assert sum(not case.has_clinical for case in cohort.cases) == 1
    assert sum(len(case.slide_ids) == 2 for case in cohort.cases) == 1
    assert all(case.slide_ids or case.has_expression for case in cohort.cases)


def test_expression_and_pathways_agree(cohort: SyntheticCohort) -> None:
    table = rows(cohort.expression)
    assert [r["case_id"] for r in table] == [c.case_id for c in cohort.cases if c.has_expression]
    sets = [line.split("\t") for line in cohort.pathways.read_text().splitlines()]
    assert len(sets) == 14
    assert {gene for line in sets for gene in line[2:]} < set(table[0])
    assert "synthetic" in sets[0][1]
    planted = json.loads(cohort.truth.read_text())["genes"]["planted_pathways"]
    members = [gene for line in sets if line[0] in planted for gene in line[2:]]
    values = np.array([[float(row[gene]) for gene in members] for row in table])
    activity = [case.activity for case in cohort.cases if case.has_expression]
    assert np.corrcoef(values.mean(1), activity)[0, 1] > 0.9


def test_truth_explains_every_label(cohort: SyntheticCohort) -> None:
    truth = json.loads(cohort.truth.read_text())
    assert truth["notice"].startswith("SYNTHETIC")
    assert truth["seed"] == 7
    for record, case in zip(truth["cases"], cohort.cases, strict=True):
        score = record["morphology"] + record["pathway_activity"]
        assert ((score > 0) ^ record["label_changed"]) == bool(record["primary_class"])
        assert tuple(record["slides"]) == case.slide_ids
        for tiles in record["slides"].values():
            drawn = np.mean([tile["discohesive"] for tile in tiles])
            assert drawn == pytest.approx(record["discohesive_share"], abs=2e-3)
            assert len(tiles) <= 16


def test_another_seed_is_another_cohort(cohort: SyntheticCohort, tmp_path: Path) -> None:
    other = write_cohort(tmp_path / "other", cases=CASES, seed=8)
    assert other.expression.read_bytes() != cohort.expression.read_bytes()
    assert other.clinical.read_bytes() != cohort.clinical.read_bytes()
    mine, yours = tifffile.imread(cohort.slides[0]), tifffile.imread(other.slides[0])
    assert mine.shape != yours.shape or (mine != yours).mean() > 0.3


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path / "cohort", cases=8, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": 7}, "cases must be at least 8, got 7"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(CohortError, match=message):
        write_cohort(tmp_path / "cohort", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_or_file_is_refused_and_kept(tmp_path: Path) -> None:
    note = tmp_path / "full" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with pytest.raises(CohortError, match="out must be a new or empty folder"):
        write_cohort(note.parent, cases=8)
    with pytest.raises(CohortError, match="out must be a folder, got the file"):
        write_cohort(note, cases=8)
    assert note.read_text() == "mine"
