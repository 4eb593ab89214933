"""Cases folders: what is written is read back, rows in any order give the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modaltune.cases import SlideReading
from modaltune.cases_folder import CasesContent, CasesFolder, write_cases_folder
from modaltune.clinical import COLUMNS
from modaltune.errors import CohortError
from modaltune.pathways import PathwayTable
from modaltune.splits import Split

IDS = ("c1", "c2", "c3", "c4")


def content() -> CasesContent:
    clinical = pd.DataFrame(
        index=pd.Index(IDS, name="case_id"), columns=list(COLUMNS), dtype=object
    )
    clinical = clinical.where(clinical.notna(), None)
    clinical["age"] = [50.0, np.nan, 61.5, 70.0]
    clinical["survival_months"] = [1.5, 2.0, np.nan, 0.0]
    clinical["event"] = [1.0, 0.0, np.nan, 0.0]
    clinical["primary_class"] = [0, 1, -1, 0]
    clinical["sex"] = ["male", None, "female", "female"]
    clinical["slides"] = [("s1", "s0"), (), ("s3",), ()]
    genes = pd.DataFrame(
        np.arange(6, dtype=np.float32).reshape(3, 2),
        index=pd.Index(["c1", "c2", "c4"], name="case_id"),
        columns=["TP53", "EGFR"],
    )
    slides = pd.DataFrame(
        {
            "case_id": ["c3", "c1", "c1"],
            "slide": ["s3", "s1", "s0"],
            "root": ["/far/away", "/far/away", ""],
            "features": ["s3.h5", "sub/s1.h5", "features/s0.h5"],
            "producer": ["modaltune", "stamp", "clam"],
            "encoder": ["e", "e", None],
            "tiles": [3, 4, 0],
            "width": [8, 8, 8],
            "base_mpp": [0.5, 0.25, np.nan],
            "target_mpp": [0.5, np.nan, np.nan],
        }
    )
    return CasesContent(
        clinical=clinical,
        expression=genes,
        pathways=PathwayTable(("B", "A"), (("TP53", "EGFR"), ("KRAS",))),
        slides=slides,
        splits=(Split(("c1", "c2"), ("c3",), ("c4",)), Split(("c4", "c2"), (), ("c1",))),
        facts={"options": {"seed": 0}},
        report={"cases": 4},
        report_md="# Cases\n",
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    folder = write_cases_folder(tmp_path / "cases", content())
    again = CasesFolder.open(tmp_path / "cases")
    assert again.sha256 == folder.sha256
    assert again.description["options"] == {"seed": 0}
    assert again.report == {"cases": 4}
    want = content().clinical
    want["slides"] = [("s0", "s1"), (), ("s3",), ()]
    pd.testing.assert_frame_equal(again.clinical, want, check_dtype=False)
    assert again.clinical["sex"].tolist() == ["male", None, "female", "female"]
    assert again.clinical["primary_class"].dtype == np.int64
    genes = content().expression
    assert genes is not None
    pd.testing.assert_frame_equal(again.expression, genes[["EGFR", "TP53"]])
    assert again.pathways == PathwayTable(("A", "B"), (("KRAS",), ("EGFR", "TP53")))
    assert again.case_ids == IDS
    assert again.num_folds == 2
    assert again.split() == content().splits[0]
    assert again.split(1).train == ("c2", "c4")
    with pytest.raises(CohortError, match=r"fold must be in 0\.\.1.*got 2"):
        again.split(2)


def test_the_cohort_knows_where_features_lie_and_how_to_read_them(tmp_path: Path) -> None:
    write_cases_folder(tmp_path / "cases", content())
    here, there = CasesFolder.open(tmp_path / "cases"), tmp_path / "moved"
    inside, away = tmp_path / "cases/features/s0.h5", Path("/far/away/sub/s1.h5")
    assert here.cohort.slides == {"c1": (inside, away), "c3": (Path("/far/away/s3.h5"),)}
    assert here.cohort.reading == {
        inside: SlideReading(),
        away: SlideReading(base_mpp=0.25, target_mpp=None, encoder="e"),
    }
    assert here.cohort.case_ids == IDS
    moved = CasesFolder.open(tmp_path / "cases", features=there)
    assert moved.cohort.slides["c1"] == (inside, there / "sub/s1.h5")


def test_features_outside_their_folder_are_refused(tmp_path: Path) -> None:
    for name in ("../secret.h5", "/etc/secret.h5"):
        slides = content().slides
        assert slides is not None
        slides.loc[0, "features"] = name
        write_cases_folder(
            tmp_path / "cases", dataclasses.replace(content(), slides=slides), replace=True
        )
        with pytest.raises(CohortError, match="must name features below their folder"):
            _ = CasesFolder.open(tmp_path / "cases").cohort


def test_only_clinical_rows_are_needed(tmp_path: Path) -> None:
    bare = dataclasses.replace(content(), expression=None, pathways=None, slides=None)
    folder = write_cases_folder(tmp_path / "cases", bare)
    assert folder.expression is None
    assert folder.pathways is None
    assert folder.slides.empty
    assert folder.cohort.slides == {}
    assert folder.cohort.case_ids == IDS


def test_rows_and_columns_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    one = content()
    assert one.expression is not None
    assert one.slides is not None
    assert one.pathways is not None
    other = dataclasses.replace(
        one,
        clinical=one.clinical.iloc[::-1],
        expression=one.expression.iloc[::-1, ::-1],
        slides=one.slides.sample(frac=1, random_state=1),
        pathways=PathwayTable(("A", "B"), (("KRAS",), ("EGFR", "TP53"))),
    )
    first = write_cases_folder(tmp_path / "a", one)
    second = write_cases_folder(tmp_path / "b", other)
    assert first.sha256 == second.sha256
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": (Split(("c1", "x")),)}, "split 0 must name every case once.*unknown x"),
        ({"expression": pd.DataFrame({"G": [1.0]}, index=["y"])}, "expression must.*unknown y"),
        ({"slides": pd.DataFrame({"case_id": ["z"]})}, "slides must.*unknown z"),
        ({"clinical": pd.concat([content().clinical] * 2)}, "clinical must.*repeated c1, c2"),
        ({"splits": ()}, "at least one case and one split, got 4 and 0"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(CohortError, match=message):
        write_cases_folder(tmp_path / "cases", dataclasses.replace(content(), **change))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_changed_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cases"
    write_cases_folder(path, content())
    splits = json.loads((path / "splits.json").read_text())
    splits["folds"][0]["train"] = ["c1"]
    (path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(CohortError, match=r"splits.json must be as it was built, got .* changed"):
        CasesFolder.open(path)
    assert CasesFolder.open(path, verify=False).split().train == ("c1",)
    (path / "splits.json").unlink()
    with pytest.raises(CohortError, match="got a file that is missing"):
        CasesFolder.open(path)
    (path / "cases.json").write_text('{"format": "else"}')
    with pytest.raises(CohortError, match="must be a cases folder of version 1, got 'else'"):
        CasesFolder.open(path)
    with pytest.raises(CohortError, match="got no such file"):
        CasesFolder.open(tmp_path / "absent")


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "cases"
    write_cases_folder(path, content())
    with pytest.raises(CohortError, match=r"got a cases folder; .*--replace"):
        write_cases_folder(path, content())
    bare = dataclasses.replace(content(), expression=None)
    assert write_cases_folder(path, bare, replace=True).expression is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CohortError, match="got something else"):
        write_cases_folder(tmp_path / "mine", content(), replace=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
