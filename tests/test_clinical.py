"""Clinical tables: CSV under our names, published splits, merged rows, refused values."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modaltune.clinical import COLUMNS, read_clinical
from modaltune.errors import CohortError, InputError

RECORD = {
    "case_id": "93ed6066-b567-4e1c-ab81-23370f9d3452",
    "case_submitter_id": "TCGA-BH-A0AY",
    "slide_submitter_id": "TCGA-BH-A0AY-01Z-00-DX1",
    "project_id": "TCGA-READ",
    "age_at_index": "62",
    "vital_status": 1,
    "durations": 25.5,
    "ajcc_pathologic_stage": float("nan"),
    "ajcc_pathologic_t": "T2",
    "ajcc_pathologic_n": "N0 (i-)",
    "ajcc_pathologic_m": "M0",
    "primary_diagnosis": "rectal adenocarcinoma",
    "year_of_diagnosis": 2008,
    "primary_class": 1,
    "features_path": "TCGA-BH-A0AY-01Z-00-DX1_featvec.pt",
    "gene_availability": 1,
}


def split(path: Path, *records: dict[str, object]) -> Path:
    text = json.dumps({"data": list(records)})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def csv_table(tmp_path: Path, text: str) -> pd.DataFrame:
    path = tmp_path / "clinical.csv"
    path.write_text(text)
    return read_clinical(path)


@pytest.mark.parametrize("name", ["split.json", "split.json.gz"])
def test_published_record_under_canonical_names(tmp_path: Path, name: str) -> None:
    second = {**RECORD, "slide_submitter_id": "TCGA-BH-A0AY-01Z-00-DX2"}
    other = {**RECORD, "case_submitter_id": "TCGA-BH-0001", "age_at_index": float("nan")}
    path = split(tmp_path / name, RECORD, other, second)
    if name == "split.json":
        assert "NaN" in path.read_text()
    table = read_clinical(path)
    assert table.index.tolist() == ["TCGA-BH-A0AY", "TCGA-BH-0001"]
    assert tuple(table.columns) == COLUMNS
    assert table.loc["TCGA-BH-A0AY"].to_dict() == {
        "case_uuid": "93ed6066-b567-4e1c-ab81-23370f9d3452",
        "project": "TCGA-READ",
        "age": 62.0,
        "sex": None,
        "site": "colorectal",
        "stage": None,
        "t": "T2",
        "n": "N0 (i-)",
        "m": "M0",
        "diagnosis": "rectal adenocarcinoma",
        "year": "2008",
        "survival_months": 25.5,
        "event": 1.0,
        "primary_class": 1,
        "slides": ("TCGA-BH-A0AY-01Z-00-DX1", "TCGA-BH-A0AY-01Z-00-DX2"),
    }
    assert np.isnan(table.loc["TCGA-BH-0001", "age"])


def test_csv_under_our_names_in_any_column_order(tmp_path: Path) -> None:
    table = csv_table(
        tmp_path,
        "event,case_id,age,sex,site,extra,survival_months\n"
        "1,a,60.5,F,breast,x,12\n\n0.0,b,NA,Male,,y,\nTrue,c,,unknown sex,lung,z,0\n",
    )
    assert table["event"].tolist() == [1.0, 0.0, 1.0]
    assert table["sex"].tolist() == ["female", "male", "unknown sex"]
    assert table["site"].tolist() == ["breast", None, "lung"]
    assert table["survival_months"].dtype == np.float64
    assert table["survival_months"].isna().tolist() == [False, True, False]
    assert table["primary_class"].tolist() == [-1, -1, -1]
    assert table["slides"].tolist() == [(), (), ()]
    assert "extra" not in table


def test_cbioportal_columns_are_understood(tmp_path: Path) -> None:
    table = csv_table(
        tmp_path,
        ",case_id,slide_id,age,site,survival_months,censorship,is_female\n"
        "0,TCGA-3C-AALI,s1,50,3C,131.5,1.0,1.0\n1,TCGA-3C-AALI,s2,50,3C,131.5,1.0,1.0\n"
        "2,TCGA-4N-A93T,s3,67,4N,4.5,0,0\n",
    )
    assert table["event"].tolist() == [0.0, 1.0]
    assert table["sex"].tolist() == ["female", "male"]
    assert table["slides"].tolist() == [("s1", "s2"), ("s3",)]
    assert table["site"].tolist() == [None, None]


def test_rows_of_a_case_fill_gaps_but_may_not_contradict(tmp_path: Path) -> None:
    merged = csv_table(tmp_path, "case_id,age,stage\na,,Stage I\na,50,\nb,1,\n")
    assert merged.loc["a", ["age", "stage"]].tolist() == [50.0, "Stage I"]
    with pytest.raises(CohortError, match=r"case a must agree in age, got 50\.0 and 51\.0"):
        csv_table(tmp_path, "case_id,age\na,50\nb,1\na,51\n")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", CohortError, "an empty file"),
        ("case_id,age\n", CohortError, "at least one case, got none"),
        ("case,age\na,1\n", CohortError, "must have a column case_id.* got case, age"),
        ("case_id,age,age\na,1,1\n", CohortError, "no column twice"),
        ("case_id,age\na,1\n,2\n", CohortError, "line 3 must name its case"),
        ("case_id,age\na,1\n\nb,2,3\n", CohortError, "line 4 must have 2 cells.* got 3"),
        ("case_id,survival_months\nz,-3\n", InputError, "survival_months of case z .* got '-3'"),
        ("case_id,event\nz,dead\n", InputError, "event of case z must be 0 .* got 'dead'"),
        ("case_id,censorship\nz,2\n", InputError, r"event of case z \(column censorship\)"),
        ("case_id,age\nz,22000\n", InputError, r"age of case z must be years in 0\.\.130"),
        ("case_id,primary_class\nz,1.5\n", InputError, "primary_class of case z .* got '1.5'"),
        ("case_id,primary_class\nz,inf\n", InputError, "primary_class of case z .* got 'inf'"),
    ],
)
def test_bad_tables_name_the_line_or_the_case(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        csv_table(tmp_path, text)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"data": 3}', '{"data": [1]}', "\x00\x01"])
def test_bad_json_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CohortError, match=r"bad\.json must be"):
        read_clinical(path)
    with pytest.raises(CohortError, match="no such file"):
        read_clinical(tmp_path / "absent.json")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("cancer", "expected"),
    [
        ("brca", {"train": (506, 130, 113), "val": (90, 23, 0), "test": (150, 38, 0)}),
        ("blca", {"train": (215, 46, 2), "val": (38, 8, 0), "test": (63, 13, 0)}),
        ("coadread", {"train": (296, 111, 90), "val": (30, 8, 0), "test": (50, 14, 0)}),
    ],
)
def test_published_splits_have_the_stated_cases(
    shared_dir: Path, cancer: str, expected: dict[str, tuple[int, int, int]]
) -> None:
    seen: set[str] = set()
    for name, counts in expected.items():
        path = shared_dir / "data" / "tcga" / "splits" / f"{cancer}_{name}.json.gz"
        table = read_clinical(path)
        classes = table["primary_class"]
        assert tuple(int((classes == c).sum()) for c in (0, 1, -1)) == counts
        assert len(table) == sum(counts)
        assert not seen & set(table.index)
        seen |= set(table.index)
        records = json.loads(gzip.decompress(path.read_bytes()))["data"]
        assert sum(map(len, table["slides"])) == len(records)
        for record in records:
            row = table.loc[record["case_submitter_id"]]
            assert row["survival_months"] == record["durations"]
            assert row["event"] == record["vital_status"]
            assert row["age"] == float(record["age_at_index"])


@pytest.mark.shared
@pytest.mark.parametrize("cancer", ["brca", "blca", "coadread"])
def test_metadata_tables_agree_with_pandas(shared_dir: Path, cancer: str) -> None:
    path = shared_dir / "data" / "tcga" / f"tcga_{cancer}_metadata.csv"
    table, raw = read_clinical(path), pd.read_csv(path, index_col=0)
    by_case = raw.drop_duplicates("case_id").set_index("case_id").loc[table.index]
    np.testing.assert_array_equal(table["event"], 1 - by_case["censorship"])
    np.testing.assert_allclose(table["survival_months"], by_case["survival_months"])
    assert table["site"].isna().all()
    assert sum(map(len, table["slides"])) == raw["slide_id"].nunique()


def test_reading_is_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        csv_table(tmp_path, "case_id\na\nb\n")
    assert "clinical.csv: 2 cases" in caplog.text
