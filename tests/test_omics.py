"""Expression tables of every kind, written by the tests and read back; real tables by pandas."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modaltune.errors import CohortError, InputError
from modaltune.omics import read_expression

VALUES = pd.DataFrame(
    {"TP53": [1.5, -2.0, 0.25], "?|123": [0.0, 1.0, 2.0], "A.1": [7.0, 8.0, 9.5]},
    index=pd.Index(["TCGA-AA-0001", "TCGA-AA-0002", "TCGA-BB-0003"], name="case_id"),
).astype(np.float32)


class Told:
    """What a reader says it left out."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = {}

    def hear(self, reason: str, names: Sequence[str]) -> None:
        self.reasons[reason] = list(names)


def check(table: pd.DataFrame, expected: pd.DataFrame = VALUES) -> None:
    pd.testing.assert_frame_equal(table, expected)
    assert table.index.name == "case_id"


def test_case_by_gene_text_parquet_and_h5ad_agree(tmp_path: Path) -> None:
    unnamed = VALUES.rename_axis(None)
    VALUES.to_csv(tmp_path / "a.csv")
    unnamed.to_csv(tmp_path / "b.csv.gz")
    VALUES.to_csv(tmp_path / "c.tsv", sep="\t")
    VALUES.reset_index()[["TP53", "case_id", "?|123", "A.1"]].to_csv(
        tmp_path / "d.csv", index=False
    )
    VALUES.to_parquet(tmp_path / "e.parquet")
    unnamed.to_parquet(tmp_path / "f.parquet")
    VALUES.reset_index().to_parquet(tmp_path / "g.parquet")
    VALUES.reset_index(names="barcode").to_parquet(tmp_path / "h.pq")
    for name in ("a.csv", "b.csv.gz", "c.tsv", "d.csv", *("e.parquet", "f.parquet", "g.parquet")):
        check(read_expression(tmp_path / name))
    check(read_expression(tmp_path / "h.pq"))
    anndata = pytest.importorskip("anndata")
    anndata.AnnData(unnamed).write_h5ad(tmp_path / "i.h5ad")
    check(read_expression(tmp_path / "i.h5ad"))


def test_cbioportal_table_takes_rnaseq_columns_and_merges_slides(tmp_path: Path) -> None:
    table = VALUES.add_suffix("_rnaseq").reset_index()
    table.insert(1, "survival_months", 3.5)
    table["TP53_mut"] = 1
    table = pd.concat([table, table.iloc[[1]]]).sample(frac=1, random_state=0)
    path = tmp_path / "all_clean.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/all_clean.csv.zip", table.to_csv())
    check(read_expression(path).loc[VALUES.index])


XENA = (
    "sample\tTCGA-AA-0001-11\tTCGA-AA-0001-06\tTCGA-AA-0001-01\tTCGA-BB-0002-06\t"
    "TCGA-CC-0003-11\tTCGA-DD-0004-02\n"
    "TP53|7157\t90\t91\t1\t2\t92\t4\n"
    "?|123\t90\t91\t5\t6\t92\t8\n"
    "FLAT\t90\t91\t3\t3\t92\t3\n"
    "TP53\t0\t0\t10\t20\t0\t40\n"
)


def test_xena_prefers_primary_then_metastasis_and_never_normal_tissue(tmp_path: Path) -> None:
    expected = pd.DataFrame(
        {"TP53": [1.0, 2.0, 4.0], "?|123": [5.0, 6.0, 8.0]},
        index=pd.Index(["TCGA-AA-0001", "TCGA-BB-0002", "TCGA-DD-0004"], name="case_id"),
    ).astype(np.float32)
    path = tmp_path / "xena.tsv"
    path.write_text(XENA)
    check(read_expression(path), expected)
    flat = read_expression(path, drop_constant_genes=False)
    assert list(flat.columns) == ["TP53", "?|123", "FLAT"]
    # Told by the barcodes, too, whatever the first column is called.
    path.write_text(XENA.replace("sample", "Gene").replace("\t", ","))
    check(read_expression(path), expected)
    path.write_text("sample\tTCGA-AA-0001-11\nTP53\t1\n")
    with pytest.raises(CohortError, match="must have a column per tumour sample"):
        read_expression(path)


def test_rows_named_by_barcodes_follow_the_same_preference(tmp_path: Path) -> None:
    barcodes = [
        ("TCGA-AA-0001-11A-01", 90),
        ("TCGA-AA-0001-06A", 91),
        ("TCGA-AA-0001-01A-11R", 1),
        ("TCGA-BB-0002-06A", 2),
        ("TCGA-CC-0003-11A", 92),
        ("TCGA-DD-0004-02A", 4),
        ("TCGA-EE-0005", 5),
        ("site-a-b-01", 6),
    ]
    expected = {"TCGA-AA-0001": 1, "TCGA-BB-0002": 2, "TCGA-DD-0004": 4, "TCGA-EE-0005": 5}
    expected["site-a-b-01"] = 6  # a hospital's own ids are left alone
    table = pd.DataFrame(barcodes, columns=["case_id", "G"]).astype({"G": np.float32})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "b.parquet")
    for name in ("a.csv", "b.parquet"):
        told = Told()
        read = read_expression(tmp_path / name, on_drop=told.hear)
        assert read["G"].to_dict() == expected
        assert told.reasons == {
            "sample of normal tissue: dropped": ["TCGA-AA-0001-11A-01", "TCGA-CC-0003-11A"],
            "further tumour sample of a case: dropped": ["TCGA-AA-0001-06A"],
        }
    pd.DataFrame({"case_id": ["TCGA-CC-0003-11A"], "G": [1.0]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    with pytest.raises(CohortError, match="must hold tumour samples, got only normal tissue"):
        read_expression(tmp_path / "a.csv")


def test_two_vials_of_a_case_follow_the_policy_for_differing_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("case_id,G\nTCGA-AA-0001-01A,1\nTCGA-AA-0001-01B,3\nTCGA-AA-0001-06A,9\n")
    with pytest.raises(CohortError, match="differing rows for 1 cases: TCGA-AA-0001"):
        read_expression(path)
    assert read_expression(path, duplicate_cases="mean")["G"].to_dict() == {"TCGA-AA-0001": 2.0}


def test_what_xena_leaves_out_is_told(tmp_path: Path) -> None:
    path = tmp_path / "xena.tsv"
    path.write_text(XENA)
    told = Told()
    read_expression(path, on_drop=told.hear)
    assert told.reasons == {
        "sample of normal tissue: dropped": ["TCGA-AA-0001-11", "TCGA-CC-0003-11"],
        "further tumour sample of a case: dropped": ["TCGA-AA-0001-06"],
        "gene listed again: first row taken": ["TP53"],
        "gene the same in all cases: dropped": ["FLAT"],
    }


def test_one_xena_case_keeps_all_genes(tmp_path: Path) -> None:
    path = tmp_path / "one.tsv"
    path.write_text("sample\tTCGA-AA-0001-01A\nTP53\t1\nEGFR\t2\n")
    assert read_expression(path).to_dict("index") == {"TCGA-AA-0001": {"TP53": 1.0, "EGFR": 2.0}}


def test_cases_that_differ_follow_the_policy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("case_id,G,H\na,1,5\nb,2,6\na,3,5\nc,4,7\nc,4,7\n")
    message = r"differing rows for 1 cases: a; choose duplicate_cases='first' or 'mean'"
    with pytest.raises(CohortError, match=message):
        read_expression(path)
    with caplog.at_level(logging.WARNING):
        first = read_expression(path, duplicate_cases="first")
    assert "1 cases with differing rows" in caplog.text
    assert first["G"].to_dict() == {"a": 1.0, "b": 2.0, "c": 4.0}
    mean = read_expression(path, duplicate_cases="mean")
    assert mean["G"].to_dict() == {"a": 2.0, "b": 2.0, "c": 4.0}
    assert mean.dtypes.unique().tolist() == [np.float32]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty file"),
        ("case_id,G\n", "got 0 cases and 1 genes"),
        ("case_id,G,G\na,1,2\n", "name every gene once, got repeated G"),
        ("case_id,G,\na,1,2\n", "1 without a name"),
        ("case_id,G\n,1\n", "got 1 rows without"),
        ("case_id,G,cancer\na,1,IDC\n", r"column 'cancer' must hold numbers, got 'IDC' in row a"),
        ("G,H\na,1,2\nb,3,4\n", r"line 2 must have 2 cells like the header, got 3.*in R"),
        ("case_id,G,H\na,1,2\nb,3,4\nc,5,6,7\n", r"Expected 3 fields in line 4, saw 4"),
        ("case_id,n,G_rnaseq\na,1,2\nb,3,4\nc,5,x,6\n", r"Expected 3 fields in line 4, saw 4"),
        (
            "case_id,G,H,I\na,1,,3\nb,1,2,3\nc,NA,2,inf\n",
            r"NaN or infinity in 3 genes \(G, H, I\) of 2 cases \(a, c\); .*nan_policy='keep'",
        ),
    ],
)
def test_errors_name_file_cases_and_genes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(CohortError, match=message) as caught:
        read_expression(path)
    assert "bad.csv" in str(caught.value)


def test_gaps_can_be_kept_but_infinities_not(tmp_path: Path) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("case_id,G,H\na,1,\nb,2,3\n")
    kept = read_expression(path, nan_policy="keep")
    assert np.isnan(kept.loc["a", "H"])
    path.write_text("case_id,G,H\na,1,inf\nb,2,3\n")
    with pytest.raises(CohortError, match=r"1 genes \(H\) of 1 cases \(a\)"):
        read_expression(path, nan_policy="keep")


def test_damaged_binary_tables_and_unknown_options_are_refused(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.h5ad", "a.csv.gz", "a.zip"):
        path = tmp_path / name
        path.write_bytes(b"not what it says")
        with pytest.raises(CohortError, match="must be a readable expression table"):
            read_expression(path)
    with pytest.raises(CohortError, match="no such file"):
        read_expression(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="layout must be one of auto, cases"):
        read_expression(tmp_path / "a.csv", layout="wide")  # type: ignore[arg-type]
    (tmp_path / "plain.csv").write_text("case_id,G\na,1\n")
    with pytest.raises(CohortError, match="must have the columns case_id and <GENE>_rnaseq"):
        read_expression(tmp_path / "plain.csv", layout="cbioportal")


@pytest.mark.shared
def test_real_tables_equal_what_pandas_reads(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "tcga"
    with zipfile.ZipFile(folder / "tcga_brca_all_clean.csv.zip") as archive:
        raw = pd.read_csv(io.BytesIO(archive.read(archive.namelist()[0])), low_memory=False)
    table = read_expression(folder / "tcga_brca_all_clean.csv.zip")
    assert table.index.is_unique
    assert set(table.index) == set(raw["case_id"])
    by_case = raw.drop_duplicates("case_id").set_index("case_id").loc[table.index]
    by_case = by_case.filter(like="_rnaseq")
    np.testing.assert_array_equal(table.to_numpy(), by_case.to_numpy().astype(np.float32))
    assert list(table.columns) == [name[: -len("_rnaseq")] for name in by_case.columns]

    coadread = folder / "tcga_coadread_rnaseq_xena.csv.gz"
    with pytest.raises(CohortError, match=r"differing rows for 3 cases: TCGA-G4-6317"):
        read_expression(coadread)
    assert read_expression(coadread, duplicate_cases="first").shape == (317, 1577)
    assert read_expression(folder / "tcga_blca_rnaseq_xena.csv.gz").shape == (360, 1577)
