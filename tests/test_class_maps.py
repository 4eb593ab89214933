"""Classes: the published maps against the published splits, and tables of the user's."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from modaltune.class_maps import (
    PUBLISHED_CLASSES,
    published_classes,
    published_diagnosis,
    read_labels,
)
from modaltune.clinical import PROJECT_SITES, read_clinical
from modaltune.errors import CohortError, InputError


@pytest.mark.parametrize(
    ("recorded", "project", "written"),
    [
        ("Infiltrating duct carcinoma, NOS", "TCGA-BRCA", "infiltrating duct carcinoma"),
        ("Adenocarcinoma, NOS", "TCGA-LUAD", "Lung adenocarcinoma"),
        ("Lung adenocarcinoma", "TCGA-LUAD", "Lung adenocarcinoma"),
        ("Adenocarcinoma, NOS", "TCGA-READ", "rectal adenocarcinoma"),
        ("rectal adenocarcinoma", "TCGA-READ", "rectal adenocarcinoma"),
        ("colon adenocarcinoma", "TCGA-COAD", "colon adenocarcinoma"),
        (float("nan"), "TCGA-COAD", None),
    ],
)
def test_diagnoses_are_written_as_published(
    recorded: object, project: str, written: str | None
) -> None:
    assert published_diagnosis(recorded, project) == written


@pytest.mark.shared
@pytest.mark.parametrize("cohort", ["brca", "blca", "coadread"])
def test_published_maps_give_the_published_classes(shared_dir: Path, cohort: str) -> None:
    folder = shared_dir / "data" / "tcga" / "splits"
    for part in ("train", "val", "test"):
        table = read_clinical(folder / f"{cohort}_{part}.json.gz")
        classes = published_classes(table)
        assert classes.of_case == table["primary_class"].to_dict()
        assert sum(classes.unmapped.values()) == (table["primary_class"] == -1).sum()
        again = [
            published_diagnosis(d, p)
            for d, p in zip(table["diagnosis"], table["project"], strict=True)
        ]
        assert again == list(table["diagnosis"])


def test_other_maps_and_every_project_has_one() -> None:
    projects = [project for one in PUBLISHED_CLASSES for project in one.projects]
    assert sorted(projects) == sorted(set(PROJECT_SITES) - {"TCGA-STAD"})
    for one in PUBLISHED_CLASSES:
        assert set(one.diagnoses.values()) | ({one.otherwise} - {-1}) == set(range(len(one.names)))
    table = pd.DataFrame(
        [
            ("TCGA-GBM", "Glioblastoma"),
            ("TCGA-LGG", "Astrocytoma, anaplastic"),
            ("TCGA-KICH", "Renal cell carcinoma, chromophobe type"),
            ("TCGA-UCEC", "Carcinosarcoma, NOS"),
            ("TCGA-UCEC", None),
        ],
        columns=["project", "diagnosis"],
        index=list("abcde"),
    )
    classes = published_classes(table)
    assert classes.of_case == {"a": 0, "b": 1, "c": 2, "d": -1, "e": -1}
    assert classes.unmapped == {"(none recorded)": 1, "carcinosarcoma": 1}
    assert classes.names["TCGA-GBM, TCGA-LGG"] == {"0": "glioblastoma", "1": "lower grade glioma"}
    with pytest.raises(CohortError, match="got TCGA-ACC; give the classes"):
        published_classes(pd.DataFrame({"project": ["TCGA-ACC"], "diagnosis": ["x"]}, index=["f"]))


def test_tables_of_labels_or_numbers(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("case_id,label\nc,luminal\na,basal\nb,luminal\nd,\n")
    classes = read_labels(path)
    assert classes.of_case == {"c": 1, "a": 0, "b": 1, "d": -1}
    assert classes.names == {"": {"0": "basal", "1": "luminal"}}
    path.write_text("case_id\tprimary_class\na\t2\nb\t\nc\t-1\n")
    assert read_labels(path).of_case == {"a": 2, "b": -1, "c": -1}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("case_id,subtype\na,x\n", CohortError, "must have the columns case_id and label"),
        ("case_id,label\na,x\na,y\n", CohortError, "got 'x' and 'y' for a"),
        (
            "case_id,label\na,carcinoma, ductal\nb,carcinoma, lobular\n",
            CohortError,
            "line 2 must have 2 cells like the header, got 3; quote text",
        ),
        ("case_id,primary_class\na,IDC\n", InputError, "call the column label if it holds text"),
        ("case_id,primary_class\na,0.5\n", InputError, "must be a whole number"),
    ],
)
def test_tables_that_break_a_rule_are_refused(
    tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(error, match=message):
        read_labels(tmp_path / "labels.csv")
