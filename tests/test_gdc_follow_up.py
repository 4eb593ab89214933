"""The GDC's follow-up table: days of follow-up joined to clinical records by case."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from modaltune.cases_build import build_cases
from modaltune.cases_folder import CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.cli import app
from modaltune.clinical import read_clinical
from modaltune.clinical_gdc import DAYS_PER_MONTH
from modaltune.errors import CohortError, InputError
from modaltune.gdc_follow_up import read_follow_ups

MISSING = "'--"
IDS = [f"TCGA-A{k}-0001" for k in range(1, 6)]
#: Case -> visits: days and what kind of visit; a visit may have no day.
VISITS: dict[str, list[tuple[Any, str]]] = {
    IDS[0]: [(0, "Initial Diagnosis"), (1522, "Last Contact"), (361, "Follow-up")],
    IDS[1]: [(700, "Last Contact")],  # died on day 913
    IDS[2]: [(410, "Follow-up"), (None, "Post Initial Treatment")],  # died on an unrecorded day
    IDS[3]: [(None, "Last Contact")],
    "TCGA-ZZ-9999": [(10, "Last Contact")],
}


def _clinical(path: Path) -> Path:
    """Write clinical.tsv as the portal does since 2025: nobody's last follow-up is in it."""
    status = ["Alive", "Dead", "Dead", "Alive", "Alive"]
    rows = [
        {
            "project.project_id": "TCGA-BRCA",
            "cases.case_id": f"uuid-{case}",
            "cases.primary_site": "Breast",
            "cases.submitter_id": case,
            "demographic.age_at_index": 50 + k,
            "demographic.days_to_death": 913 if k == 1 else None,
            "demographic.gender": "female",
            "demographic.vital_status": status[k],
            "diagnoses.ajcc_pathologic_stage": "Stage IIA",
            "diagnoses.days_to_last_follow_up": None,
            "diagnoses.primary_diagnosis": "Infiltrating duct carcinoma, NOS",
            "treatments.treatment_type": treatment,
        }
        for k, case in enumerate(IDS)
        for treatment in ("Radiation Therapy, NOS", "Pharmaceutical Therapy, NOS")
    ]
    pd.DataFrame(rows, dtype=object).to_csv(path, sep="\t", index=False, na_rep=MISSING)
    return path


def _follow_up(path: Path, *, old: bool = False, order: int = 0) -> Path:
    """Write follow_up.tsv: a row per visit and molecular test, under new or old names."""
    prefix, ids = ("", ("case_id", "case_submitter_id")) if old else (
        "follow_ups.", ("cases.case_id", "cases.submitter_id"))  # fmt: skip
    rows = [
        {
            ids[0]: f"uuid-{case}",
            ids[1]: case,
            f"{prefix}days_to_follow_up": days,
            f"{prefix}disease_response": "TF-Tumor Free",
            f"{prefix}timepoint_category": kind,
            "molecular_tests.gene_symbol": gene,
        }
        for case, visits in VISITS.items()
        for days, kind in visits
        for gene in ("ESR1", "PGR")
    ]
    random.Random(order).shuffle(rows)
    table = pd.DataFrame(rows, dtype=object)
    table.to_csv(path, sep="\t", index=False, na_rep=MISSING)
    return path


@pytest.mark.parametrize("old", [False, True])
def test_the_last_day_of_any_visit_counts(tmp_path: Path, old: bool) -> None:
    clinical = _clinical(tmp_path / "clinical.tsv")
    alone = read_clinical(clinical)
    assert alone["survival_months"].notna().tolist() == [False, True, False, False, False]
    days = read_follow_ups(_follow_up(tmp_path / "follow_up.tsv", old=old))
    assert days[IDS[0]] == {0, 361, 1522}
    assert days[IDS[3]] == set()
    told: dict[str, list[str]] = {}
    table = read_clinical(
        clinical, follow_ups=days, on_drop=lambda why, ids: told.update({why: list(ids)})
    )
    got = (table["survival_months"] * DAYS_PER_MONTH).to_numpy()
    # A death has its own day; without one it is censored when the patient was last seen.
    np.testing.assert_allclose(got, [1522, 913, 410, np.nan, np.nan])
    assert table["event"].tolist()[:4] == [0, 1, 0, 0]
    assert told == {
        "died on an unrecorded day: censored at the last follow-up": [IDS[2]],
        "alive, but no day of a follow-up: no survival time": IDS[3:],
    }


def test_rows_and_files_in_any_order_give_the_same_folder(tmp_path: Path) -> None:
    clinical = _clinical(tmp_path / "clinical.tsv")
    genes = tmp_path / "genes.csv"
    pd.DataFrame({"case_id": IDS, "TP53": range(5), "BRCA1": range(5)}).to_csv(genes, index=False)
    built = []
    for order in range(2):
        path = _follow_up(tmp_path / f"follow_up{order}.tsv", order=order)
        packed = path.with_suffix(".tsv.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        request = CasesRequest.checked(
            clinical=(clinical,),
            follow_up=((path, packed), (packed,))[order],
            expression=(genes,),
            split=_all_train(tmp_path),
        )
        built.append(build_cases(request, tmp_path / f"cases{order}"))
    assert built[0].clinical.equals(built[1].clinical)
    assert built[0].clinical["survival_months"].notna().sum() == 3
    dropped = {(d["source"], d["reason"]): d["items"] for d in built[0].report["dropped"]}
    assert dropped["follow-up", "follow-up of no known case"] == ["TCGA-ZZ-9999"]
    roles = [source["role"] for source in built[0].description["sources"]]
    assert roles.count("follow_up") == 2


def _all_train(folder: Path) -> Path:
    path = folder / "split.csv"
    parts = ["train", "train", "val", "test", "test"]
    pd.DataFrame({"case_id": IDS, "split": parts}).to_csv(path, index=False)
    return path


def test_the_command_takes_it(tmp_path: Path) -> None:
    _clinical(tmp_path / "clinical.tsv")
    _follow_up(tmp_path / "follow_up.tsv")
    words = ["cases", "build", "--clinical", str(tmp_path / "clinical.tsv"),
             "--follow-up", str(tmp_path / "follow_up.tsv"), "--require", "survival",
             "--split", str(_all_train(tmp_path)),
             "--out", str(tmp_path / "cases"), "--json"]  # fmt: skip
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    report = json.loads(said.stdout)["report"]
    assert {"role": "follow-up", "file": "follow_up.tsv", "cases": 5} in report["inputs"]
    assert list(CasesFolder.open(tmp_path / "cases").case_ids) == IDS[:3]


def test_days_that_no_gdc_record_takes_are_listed(tmp_path: Path) -> None:
    rows = pd.DataFrame({"case_id": IDS, "survival_months": [None] * 2 + [9.0, 3.0, 4.0]})
    rows.assign(event=[0, 1, 0, 1, 0]).to_csv(tmp_path / "own.csv", index=False)
    _follow_up(tmp_path / "follow_up.tsv")
    request = CasesRequest.checked(
        clinical=(tmp_path / "own.csv",), follow_up=(tmp_path / "follow_up.tsv",), require=(),
        split=_all_train(tmp_path),
    )  # fmt: skip
    dropped = build_cases(request, tmp_path / "cases").report["dropped"]
    (said,) = (d for d in dropped if d["source"] == "own.csv")
    assert said["reason"] == "no GDC record: days of --follow-up not used"
    assert said["items"] == [IDS[0]]


def test_what_is_no_follow_up_table_is_refused(tmp_path: Path) -> None:
    clinical = _clinical(tmp_path / "clinical.tsv")
    path = _follow_up(tmp_path / "follow_up.tsv")
    with pytest.raises(CohortError, match=r"got the GDC's follow-up table; give it by --follow-up"):
        read_clinical(path)
    with pytest.raises(CohortError, match=r"one of follow_ups.days_to_follow_up or .*, got "):
        read_follow_ups(clinical)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1].rsplit("\t", 1)[0]]))
    with pytest.raises(CohortError, match=r"line 18 must have 6 cells like the header, got 5"):
        read_follow_ups(path)
    path.write_text(f"{lines[0]}\nuuid\t{MISSING}\t3\tTF\tLast Contact\tESR1\n")
    with pytest.raises(CohortError, match=r"line 2 must name its case, got none"):
        read_follow_ups(path)
    path.write_text(f"{lines[0]}\nuuid\tTCGA-A1-0001\tsoon\tTF\tLast Contact\tESR1\n")
    with pytest.raises(InputError, match=r"days to a follow-up of case TCGA-A1-0001 .*'soon'"):
        read_follow_ups(path)
    assert read_follow_ups(path, exclude=("TCGA-A1-0001",)) == {}
    with pytest.raises(InputError, match=r"clinical must be given with follow_up"):
        build_cases(CasesRequest.checked(follow_up=(path,)), tmp_path / "cases")
