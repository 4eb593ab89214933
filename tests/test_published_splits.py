"""Published splits: read, written, and read again as the same."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from modaltune.clinical import COLUMNS, read_clinical
from modaltune.errors import CohortError
from modaltune.published_splits import read_published_split, write_published_split
from modaltune.splits import Split, count_by_class

CLASSES = {
    "brca": {"train": (506, 130, 113), "val": (90, 23, 0), "test": (150, 38, 0)},
    "blca": {"train": (215, 46, 2), "val": (38, 8, 0), "test": (63, 13, 0)},
    "coadread": {"train": (296, 111, 90), "val": (30, 8, 0), "test": (50, 14, 0)},
}


def published(folder: Path, cohort: str) -> tuple[Path, Path, Path]:
    files = (
        folder / "data/tcga/splits" / f"{cohort}_{p}.json.gz" for p in ("train", "val", "test")
    )
    train, val, test = files
    return train, val, test


@pytest.mark.shared
@pytest.mark.parametrize("cohort", list(CLASSES))
def test_published_splits_have_their_cases_and_come_back(
    shared_dir: Path, tmp_path: Path, cohort: str
) -> None:
    split, clinical = read_published_split(*published(shared_dir, cohort))
    want = {
        part: {k: n for k, n in zip(("0", "1", "-1"), counts, strict=True) if n}
        for part, counts in CLASSES[cohort].items()
    }
    assert count_by_class(split, clinical) == want
    files = write_published_split(tmp_path, split, clinical, with_genes=split.test)
    text = files[2].read_text()
    assert "NaN" not in text
    assert {r["gene_availability"] for r in json.loads(text)["data"]} == {1}
    again, records = read_published_split(*files)
    assert again == split
    ordered = clinical.loc[records.index]
    pd.testing.assert_frame_equal(records, ordered[list(COLUMNS)])


def test_feature_files_and_gaps_are_written(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("case_id,slide,age,event,survival_months\na,s2,50,1,3\na,s1,50,1,3\nb,,,,\n")
    clinical = read_clinical(path)
    split = Split(("a",), (), ("b",))
    files = write_published_split(
        tmp_path / "new", split, clinical, features={"a": ["s2.h5", "s1.h5"]}
    )
    train = json.loads(files[0].read_text())["data"]
    assert [(r["slide_submitter_id"], r["features_path"]) for r in train] == [
        ("s2", "s2.h5"),
        ("s1", "s1.h5"),
    ]
    assert (train[0]["vital_status"], train[0]["durations"]) == (1, 3.0)
    (other,) = json.loads(files[2].read_text())["data"]
    assert (other["case_submitter_id"], other["age_at_index"], other["primary_class"]) == (
        "b",
        None,
        -1,
    )
    assert read_published_split(*files)[0] == split
    with pytest.raises(CohortError, match="none for 1, such as x"):
        write_published_split(tmp_path, Split(("x",)), clinical)


def test_parts_may_be_absent_and_cases_excluded(tmp_path: Path) -> None:
    record = {"case_submitter_id": "a", "durations": -1.0, "vital_status": 0}
    for name, records in (("train", [record]), ("test", [{"case_submitter_id": "b"}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": records}))
    files = (tmp_path / "train.json", None, tmp_path / "test.json")
    split, _ = read_published_split(*files, exclude=("a",))
    assert split == Split((), (), ("b",))
    with pytest.raises(ValueError, match="survival_months of case a must be a number >= 0"):
        read_published_split(*files)
