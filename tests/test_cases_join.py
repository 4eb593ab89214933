"""Joining slides to cases: by table, by what is listed, by barcode, by name; never by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from modaltune.cases_join import (
    assign_slides,
    drop_unknown_codes,
    empty_clinical,
    merge_clinical,
    read_slide_table,
    slide_key,
)
from modaltune.clinical import COLUMNS
from modaltune.engine.feature_index import FeatureFile
from modaltune.errors import CohortError, FeatureFileError

ROOT = Path("/features")
UUID = "195576CF-B739-4BD9-B15B-4A70AE287D3E"


class Told(dict[str, list[str]]):
    def hear(self, reason: str, items: Sequence[str]) -> None:
        self[reason] = list(items)


def files(*slides: str) -> list[tuple[Path, FeatureFile]]:
    return [(ROOT, FeatureFile(s, ROOT / f"{s}.h5", "clam", None, 1, 2)) for s in slides]


def clinic(**slides: tuple[str, ...]) -> pd.DataFrame:
    table = empty_clinical(name.replace("_", "-") for name in slides)
    table["slides"] = [slides[case.replace("-", "_")] for case in table.index]
    return table


def test_slide_names_lose_suffix_and_uuid_only() -> None:
    assert slide_key("TCGA-2F-A9KO-01Z-00-DX1") == "TCGA-2F-A9KO-01Z-00-DX1"
    assert slide_key(f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}.svs") == "TCGA-2F-A9KO-01Z-00-DX1"
    assert slide_key(f"TCGA-2F-A9KO-01Z-00-DX1.{UUID.lower()}") == "TCGA-2F-A9KO-01Z-00-DX1"
    assert slide_key("S2024.17.ndpi") == "S2024.17"


def test_slides_find_their_case_in_any_of_four_ways(tmp_path: Path) -> None:
    path = tmp_path / "slides.csv"
    path.write_text("slide,case_id,mpp\nraw/scan 7.svs,P7,0.25\n/data/other.ndpi,P8,\n")
    clinical = clinic(P7=(), P8=(), P9=("S2024.17", "S2024.18"), TCGA_2F_A9KO=(), P10=())
    told = Told()
    table = assign_slides(
        files("S2024.18", "scan 7", f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}", "P10", "S2024.17",
              "S2024.19", "TCGA-XX-0000-01Z-00-DX1", "TCGA-2F-A9KO-11A-01-TS1"),
        clinical, read_slide_table(path), told.hear, base_mpp=0.5,
    )  # fmt: skip
    assert dict(zip(table["slide"], table["case_id"], strict=True)) == {
        "S2024.18": "P9",
        "S2024.17": "P9",
        "scan 7": "P7",
        f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}": "TCGA-2F-A9KO",
        "P10": "P10",
    }
    mpp = dict(zip(table["slide"], table["base_mpp"], strict=True))
    assert (mpp["scan 7"], mpp["P10"]) == (0.25, 0.5)
    assert told == {
        "slide of no known case": ["S2024.19", "TCGA-XX-0000-01Z-00-DX1"],
        "slide of normal tissue": ["TCGA-2F-A9KO-11A-01-TS1"],
    }


def test_slides_of_a_case_that_lists_others_are_left_out() -> None:
    clinical = clinic(TCGA_2F_A9KO=("TCGA-2F-A9KO-01Z-00-DX1", f"TCGA-2F-A9KO-01Z-00-DX2.{UUID}"))
    told = Told()
    table = assign_slides(
        files(f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}", "TCGA-2F-A9KO-01A-01-BS1"),
        clinical,
        None,
        told.hear,
    )
    assert table["slide"].tolist() == [f"TCGA-2F-A9KO-01Z-00-DX1.{UUID}"]
    assert told == {
        "slide is not among those listed for its case": ["TCGA-2F-A9KO-01A-01-BS1"],
        "listed slide without a feature file": ["TCGA-2F-A9KO-01Z-00-DX2"],
    }
    assert math.isnan(table["base_mpp"][0])


def test_slides_in_microns_need_a_resolution() -> None:
    stamp = [(ROOT, FeatureFile("P1", ROOT / "P1.h5", "stamp", "uni", 1, 2))]
    with pytest.raises(FeatureFileError, match=r"P1\.h5 holds coordinates in microns.*--base-mpp"):
        assign_slides(stamp, None, None, Told().hear)
    table = assign_slides(stamp, None, None, Told().hear, base_mpp=0.25, target_mpp=1.0)
    assert (table["base_mpp"][0], table["target_mpp"][0]) == (0.25, 1.0)


def test_two_feature_files_of_a_slide_are_refused() -> None:
    other = Path("/elsewhere")
    twice = [*files("a"), (other, FeatureFile("a", other / "a.h5", "clam", None, 1, 2))]
    with pytest.raises(FeatureFileError, match=r"one feature file, got .*a\.h5 and .*a\.h5"):
        assign_slides(twice, None, None, Told().hear)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("slide,patient\na,P\n", CohortError, "must have the columns slide and case_id"),
        ("slide,case_id\na.svs,P\nb/a.svs,Q\n", CohortError, "line 3 must give a slide its one"),
        ("slide,case_id\na,\n", CohortError, "line 2 must give a slide its one case"),
        ("slide,case_id,mpp\na,P,40x\n", CohortError, "line 2: mpp must be a number, got '40x'"),
        ("slide,case_id,mpp\na,P,40\n", FeatureFileError, "within 0.05..5 microns"),
    ],
)
def test_slide_tables_that_break_a_rule_are_refused(
    tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "slides.csv").write_text(content)
    with pytest.raises(error, match=message):
        read_slide_table(tmp_path / "slides.csv")


def test_codes_without_a_wording_are_emptied_and_named() -> None:
    clinical = clinic(a=(), b=(), c=())
    clinical["stage"] = ["Stage IIA", "Stage 0", None]
    clinical["n"] = ["N1mi", "N0 (i-)", "N9"]
    told = Told()
    cleaned = drop_unknown_codes(clinical, told.hear)
    assert cleaned["stage"].tolist() == ["Stage IIA", None, None]
    assert cleaned["n"].tolist() == ["N1mi", "N0 (i-)", None]
    assert told == {
        "stage code without a wording: taken as missing": ["b (Stage 0)"],
        "n code without a wording: taken as missing": ["c (N9)"],
    }
    assert clinical["stage"].tolist() == ["Stage IIA", "Stage 0", None]


def test_merged_tables_have_every_case_once_and_all_slides() -> None:
    first, second = clinic(a=("s1",), b=()), clinic(b=("s3",), a=("s2", "s1"), c=())
    second["age"] = [40.0, 50.0, 60.0]
    second["primary_class"] = [1, 2, 3]
    merged = merge_clinical([("first", first), ("second", second)], Told().hear)
    assert list(merged.index) == ["a", "b", "c"]
    assert list(merged.columns) == list(COLUMNS)
    assert merged["slides"].tolist() == [("s1", "s2"), ("s3",), ()]
    assert merged["age"].tolist() == [40.0, 50.0, 60.0]
    assert merged["primary_class"].tolist() == [1, 2, 3]
    assert merged["stage"].isna().all()
