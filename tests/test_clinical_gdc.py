"""GDC clinical records: the same patients as an old TSV, a new TSV and JSON; survival by policy."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from modaltune.clinical import read_clinical
from modaltune.clinical_gdc import DAYS_PER_MONTH
from modaltune.errors import CohortError, InputError

MISSING = "'--"
TREATMENTS = ("Radiation Therapy, NOS", "Pharmaceutical Therapy, NOS")


def patient(number: int, **facts: Any) -> dict[str, Any]:
    base = {
        "case_id": f"uuid-{number}",
        "submitter_id": f"TCGA-A{number}-0001",
        "project_id": "TCGA-LUAD",
        "primary_site": "Bronchus and lung",
        "demographic": {"vital_status": "Alive", "gender": "female", "age_at_index": 60 + number},
        "diagnoses": [
            {
                "primary_diagnosis": "Adenocarcinoma, NOS",
                "ajcc_pathologic_stage": "Stage IIA",
                "ajcc_pathologic_t": "T2a",
                "ajcc_pathologic_n": "N1",
                "ajcc_pathologic_m": "MX",
                "year_of_diagnosis": 2009,
                "days_to_last_follow_up": 304.4,
            }
        ],
    }
    base["demographic"] |= facts.pop("demographic", {})
    base["diagnoses"] = [base["diagnoses"][0] | d for d in facts.pop("diagnoses", [{}])]
    return base | facts


PATIENTS = [
    patient(1),
    patient(2, demographic={"vital_status": "Dead", "days_to_death": 913.2, "gender": "male"}),
    patient(3, demographic={"vital_status": "Dead"}),
    patient(4, demographic={"vital_status": "Not Reported", "age_at_index": None},
            diagnoses=[{"ajcc_pathologic_stage": "Not Reported", "year_of_diagnosis": None}]),
    patient(5, project_id="TCGA-XXXX", primary_site="Spleen"),
]  # fmt: skip


def write_old_tsv(path: Path, patients: list[dict[str, Any]], shuffle: int = 0) -> Path:
    rows = [
        {
            "case_id": p["case_id"],
            "case_submitter_id": p["submitter_id"],
            "project_id": p["project_id"],
            "primary_site": p["primary_site"],
            "days_to_death": None,
            **p["demographic"],
            **diagnosis,
            "treatment_type": treatment,
        }
        for p in patients
        for diagnosis in p["diagnoses"]
        for treatment in TREATMENTS
    ]
    random.Random(shuffle).shuffle(rows)
    pd.DataFrame(rows, dtype=object).to_csv(path, sep="\t", index=False, na_rep=MISSING)
    return path


def write_new_tsv(path: Path, patients: list[dict[str, Any]]) -> Path:
    rows = [
        {
            "project.project_id": p["project_id"],
            "cases.case_id": p["case_id"],
            "cases.submitter_id": p["submitter_id"],
            "cases.primary_site": p["primary_site"],
            "demographic.days_to_death": None,
            **{f"demographic.{k}": v for k, v in p["demographic"].items()},
            **{f"diagnoses.{k}": v for k, v in diagnosis.items()},
            "treatments.treatment_type": treatment,
        }
        for p in patients
        for diagnosis in p["diagnoses"]
        for treatment in TREATMENTS
    ]
    pd.DataFrame(rows, dtype=object).to_csv(path, sep="\t", index=False, na_rep=MISSING)
    return path


def write_json(path: Path, patients: list[dict[str, Any]]) -> Path:
    cases = []
    for p in patients:
        case = {k: v for k, v in p.items() if k != "project_id"}
        case["project"] = {"project_id": p["project_id"]}
        cases.append(case)
    path.write_text(json.dumps(cases))
    return path


def test_old_tsv_new_tsv_and_json_say_the_same(tmp_path: Path) -> None:
    old = read_clinical(write_old_tsv(tmp_path / "old.tsv", PATIENTS)).sort_index()
    new = read_clinical(write_new_tsv(tmp_path / "new.tsv", PATIENTS)).sort_index()
    path = write_json(tmp_path / "clinical.json", PATIENTS)
    portal = read_clinical(path).sort_index()
    path.write_text(json.dumps({"data": {"hits": json.loads(path.read_text())}}))
    api = read_clinical(path).sort_index()
    pd.testing.assert_frame_equal(old, new)
    pd.testing.assert_frame_equal(old, portal)
    pd.testing.assert_frame_equal(old, api)
    first = old.loc["TCGA-A1-0001"]
    assert first["case_uuid"] == "uuid-1"
    assert first["site"] == "lung"
    assert first["diagnosis"] == "Lung adenocarcinoma"
    assert (first["stage"], first["t"], first["sex"]) == ("Stage IIA", "T2a", "female")
    assert first["survival_months"] == pytest.approx(304.4 / DAYS_PER_MONTH)
    assert first["event"] == 0
    assert first["primary_class"] == -1
    died = old.loc["TCGA-A2-0001"]
    assert (died["survival_months"], died["event"]) == (pytest.approx(30.0), 1)
    unknown = old.loc["TCGA-A4-0001"]
    assert all(math.isnan(unknown[name]) for name in ("age", "survival_months", "event"))
    assert unknown["stage"] is None
    other = old.loc["TCGA-A5-0001"]
    assert (other["site"], other["diagnosis"]) == ("spleen", "adenocarcinoma")


@pytest.mark.parametrize("policy", ["censor", "drop", "published"])
def test_a_death_without_a_date_follows_the_policy(tmp_path: Path, policy: Any) -> None:
    told: dict[str, list[str]] = {}
    table = read_clinical(
        write_old_tsv(tmp_path / "c.tsv", PATIENTS),
        death_without_date=policy,
        on_drop=lambda reason, cases: told.update({reason: list(cases)}),
    )
    assert list(told.values()) == [["TCGA-A3-0001"]]
    assert "unrecorded day" in next(iter(told))
    if policy == "drop":
        assert "TCGA-A3-0001" not in table.index
        assert len(table) == 4
        return
    row = table.loc["TCGA-A3-0001"]
    assert row["survival_months"] == pytest.approx(10.0)
    assert row["event"] == (0 if policy == "censor" else 1)


def test_a_death_without_any_date_has_no_survival(tmp_path: Path) -> None:
    lost = patient(1, demographic={"vital_status": "Dead"},
                   diagnoses=[{"days_to_last_follow_up": None}])  # fmt: skip
    row = read_clinical(write_old_tsv(tmp_path / "c.tsv", [lost])).iloc[0]
    assert math.isnan(row["survival_months"])
    assert math.isnan(row["event"])


def test_negative_durations_are_errors_naming_all_cases_unless_excluded(tmp_path: Path) -> None:
    path = write_old_tsv(
        tmp_path / "c.tsv",
        [
            *PATIENTS[:1],
            patient(7, diagnoses=[{"days_to_last_follow_up": -7}]),
            patient(8, demographic={"vital_status": "Dead", "days_to_death": -1}),
        ],
    )
    message = r"got 2 negative: TCGA-A7-0001 \(-7 days\), TCGA-A8-0001 \(-1 days\); .*exclude"
    with pytest.raises(InputError, match=message):
        read_clinical(path)
    table = read_clinical(path, exclude=("TCGA-A7-0001", "TCGA-A8-0001"))
    assert list(table.index) == ["TCGA-A1-0001"]


def test_of_several_diagnoses_the_first_primary_one_counts(tmp_path: Path) -> None:
    later = {"primary_diagnosis": "Acinar cell carcinoma", "days_to_diagnosis": 400,
             "diagnosis_is_primary_disease": "true", "days_to_last_follow_up": 900}  # fmt: skip
    first = {"days_to_diagnosis": 0, "diagnosis_is_primary_disease": "true",
             "ajcc_pathologic_m": None}  # fmt: skip
    spread = {"primary_diagnosis": "Neoplasm, metastatic", "days_to_diagnosis": 0,
              "diagnosis_is_primary_disease": "false"}  # fmt: skip
    told: dict[str, list[str]] = {}
    seen = []
    for shuffle in range(4):
        path = tmp_path / f"{shuffle}.tsv"
        write_old_tsv(path, [patient(1, diagnoses=[later, spread, first])], shuffle)
        seen.append(read_clinical(path, on_drop=lambda why, ids: told.update({why: list(ids)})))
        pd.testing.assert_frame_equal(seen[0], seen[-1])
    row = seen[0].iloc[0]
    assert row["diagnosis"] == "Lung adenocarcinoma"
    assert row["m"] == "MX"  # filled from the later one
    assert row["survival_months"] == pytest.approx(900 / DAYS_PER_MONTH)
    assert told == {"several primary diagnoses: the earliest taken": ["TCGA-A1-0001"]}


def test_follow_ups_of_json_count_and_age_can_come_in_days(tmp_path: Path) -> None:
    case = patient(
        1,
        demographic={"age_at_index": None},
        diagnoses=[{"age_at_diagnosis": 22000}],
        follow_ups=[{"days_to_follow_up": 608.8}, {"days_to_follow_up": 100}],
    )
    row = read_clinical(write_json(tmp_path / "c.json", [case])).iloc[0]
    assert row["survival_months"] == pytest.approx(20.0)
    assert row["age"] == 60


def test_older_json_has_the_barcode_in_the_ids_of_its_parts(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", PATIENTS[:2])
    cases = json.loads(path.read_text())
    for case in cases:
        name = case.pop("submitter_id")
        case["demographic"]["submitter_id"] = f"{name}_demographic"
    path.write_text(json.dumps(cases))
    assert list(read_clinical(path).index) == ["TCGA-A1-0001", "TCGA-A2-0001"]
    del cases[0]["demographic"]["submitter_id"]
    cases[0]["diagnoses"][0]["submitter_id"] = "TCGA-A1-0001_diagnosis2"
    path.write_text(json.dumps(cases))
    assert list(read_clinical(path).index) == ["TCGA-A1-0001", "TCGA-A2-0001"]
    del cases[0]["diagnoses"][0]["submitter_id"]
    path.write_text(json.dumps(cases))
    with pytest.raises(CohortError, match="or a list of GDC cases, got another structure"):
        read_clinical(path)


def test_rows_that_contradict_each_other_or_break_are_refused(tmp_path: Path) -> None:
    path = write_old_tsv(
        tmp_path / "c.tsv", [patient(1), patient(1, demographic={"gender": "male"})]
    )
    with pytest.raises(CohortError, match=r"case TCGA-A1-0001 must agree in gender"):
        read_clinical(path)
    lines = write_old_tsv(path, PATIENTS).read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1].rsplit("\t", 1)[0]]))
    with pytest.raises(CohortError, match=r"line 12 must have \d+ cells like the header"):
        read_clinical(path)
    write_old_tsv(path, [patient(1, diagnoses=[{"days_to_last_follow_up": "soon"}])])
    with pytest.raises(InputError, match=r"days to a follow-up of case TCGA-A1-0001 .*'soon'"):
        read_clinical(path)
