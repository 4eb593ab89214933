"""Clinical records from CSV or published splits: one row per case under fixed names."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from modaltune.clinical_encoder import ClinicalEncoder, ClinicalFeatures, check_age
from modaltune.clinical_gdc import (
    DeathWithoutDate,
    gdc_records_from_json,
    gdc_records_from_table,
    is_gdc_header,
    is_gdc_json,
)
from modaltune.errors import CohortError, InputError
from modaltune.gdc_follow_up import is_follow_up_header
from modaltune.labels import check_duration, check_event
from modaltune.tables import OnDrop, is_missing, name_few, open_text, read_header, repeated

__all__ = [
    "COLUMNS",
    "PROJECT_SITES",
    "REFERENCE_NAMES",
    "ClinicalEncoder",
    "ClinicalFeatures",
    "read_clinical",
]

logger = logging.getLogger(__name__)

#: Columns of a clinical table; its index is `case_id`.
COLUMNS = (
    "case_uuid",
    "project",
    "age",
    "sex",
    "site",
    "stage",
    "t",
    "n",
    "m",
    "diagnosis",
    "year",
    "survival_months",
    "event",
    "primary_class",
    "slides",
)
#: TCGA projects and the cancer location that the published sentences give them.
PROJECT_SITES = {
    "TCGA-BRCA": "breast",
    "TCGA-BLCA": "bladder urothelial",
    "TCGA-COAD": "colorectal",
    "TCGA-READ": "colorectal",
    "TCGA-GBM": "brain",
    "TCGA-LGG": "brain",
    "TCGA-LUAD": "lung",
    "TCGA-LUSC": "lung",
    "TCGA-KICH": "kidney",
    "TCGA-KIRC": "kidney",
    "TCGA-KIRP": "kidney",
    "TCGA-STAD": "stomach",
    "TCGA-UCEC": "uterus",
}

_KIND = "a readable clinical table (CSV, GDC TSV or JSON, or JSON records of a published split)"
_Records = list[tuple[str, dict[str, Any]]]
#: Names of a published record and ours.
REFERENCE_NAMES = {
    "case_id": "case_uuid",
    "case_submitter_id": "case_id",
    "project_id": "project",
    "age_at_index": "age",
    "ajcc_pathologic_stage": "stage",
    "ajcc_pathologic_t": "t",
    "ajcc_pathologic_n": "n",
    "ajcc_pathologic_m": "m",
    "primary_diagnosis": "diagnosis",
    "year_of_diagnosis": "year",
    "durations": "survival_months",
    "vital_status": "event",
    "primary_class": "primary_class",
    "slide_submitter_id": "slide",
}
_TEXT_FIELDS = ("case_uuid", "project", "site", "stage", "t", "n", "m", "diagnosis", "year")
_SEXES = {"f": "female", "m": "male"}
_UNCLASSIFIED = -1


def read_clinical(
    path: str | Path,
    *,
    death_without_date: DeathWithoutDate = "censor",
    exclude: Collection[str] = (),
    on_drop: OnDrop | None = None,
    allow_empty: bool = False,
    follow_ups: Mapping[str, Collection[float]] | None = None,
) -> pd.DataFrame:
    """Read clinical records as one row per case.

    Understood are CSV or TSV with our column names, the clinical TSV and JSON of the GDC
    (`modaltune.clinical_gdc`), and the JSON of a published split (bare NaN allowed), each also as
    .gz or .zip. A CSV needs `case_id`; of the others (`COLUMNS`, `slide`)
    any may be absent. `slide_id` is read as `slide`, `censorship` (1 = censored) as the reverse of
    `event`, `is_female` as `sex`; a `site` that only repeats the hospital code of a TCGA barcode is
    no organ and counts as missing; further columns are left out. Rows of one case (a row per slide)
    are merged, a gap in one being filled from another.

    Args:
        path: The table.
        death_without_date: For GDC records of patients who died on an unrecorded day: "censor" at
            the last follow-up, "drop" the case, or as "published", died at the last follow-up.
        exclude: Cases to leave unread.
        on_drop: Told what was not taken as it stood, and of which cases.
        allow_empty: Give an empty table for a file without cases instead of refusing it.
        follow_ups: For GDC records, further days on which a case was seen, as of
            `modaltune.gdc_follow_up.read_follow_ups`.

    Returns:
        Index `case_id` (unique, in order of appearance), columns `COLUMNS`: `age` (years),
        `survival_months` and `event` (1 died, 0 censored) float64 with NaN for missing,
        `primary_class` int64 with -1 for unclassified, `slides` a tuple of slide ids, others text
        or None. A published record gets its `site` from its project.

    Raises:
        CohortError: The file is damaged or lacks case ids, or rows of a case contradict each other.
        InputError: A duration or age is negative, or a value is no number; names the case.

    Source: FORMATS "Labels, clinical, genes"; REQUIREMENTS 32.
    """
    path = Path(path)
    with open_text(path, _KIND) as text:
        records = _read_records(text, path, death_without_date, exclude, on_drop, follow_ups)
    cases: dict[str, dict[str, Any]] = {}
    for where, record in records:
        if is_missing(record.get("case_id")):
            raise CohortError(f"{path}, {where} must name its case, got none; fill in case_id")
        case = str(record["case_id"]).strip()
        if case in exclude:
            continue
        parsed = {name: parse(record.get(name), case) for name, parse in _PARSERS.items()}
        slide = _text(record.get("slide"), case)
        parsed["slides"] = () if slide is None else (slide,)
        cases[case] = _merge(cases[case], parsed, case, path) if case in cases else parsed
    if not cases and not allow_empty:
        raise CohortError(f"{path} must hold at least one case, got none; check the file")
    index = pd.Index(list(cases), name="case_id")
    table = pd.DataFrame(list(cases.values()), index=index, columns=list(COLUMNS))
    logger.info("%s: %d cases", path.name, len(table))
    return table


def _read_records(
    text: TextIO,
    path: Path,
    policy: DeathWithoutDate,
    exclude: Collection[str],
    on_drop: OnDrop | None,
    follow_ups: Mapping[str, Collection[float]] | None,
) -> _Records:
    """Read a table of any kind as records under our names, each with where it stands."""
    if ".json" in (suffix.lower() for suffix in path.suffixes):
        content = json.load(text)
        if not is_gdc_json(content):
            return _reference_records(content, path)
        records = gdc_records_from_json(content, path, policy, exclude, on_drop, follow_ups)
    else:
        header, delimiter = read_header(text, path)
        if not is_gdc_header(header):
            return _csv_records(text, header, delimiter, path)
        if is_follow_up_header(header):
            raise CohortError(
                f"{path} must say who lived and died, got the GDC's follow-up table; give it by "
                "--follow-up, beside clinical.tsv"
            )
        records = gdc_records_from_table(
            text, header, delimiter, path, policy, exclude, on_drop, follow_ups
        )
    for _, record in records:
        record["site"] = PROJECT_SITES.get(str(record["project"]), record["site"])
    return records


def _reference_records(content: Any, path: Path) -> _Records:
    """Read the records of a published split under our names."""
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise CohortError(
            f'{path} must be {{"data": [record, ...]}}, or a list of GDC cases, got another '
            "structure; give a split of the published layout, clinical JSON of the GDC, or a CSV"
        )
    records = []
    for number, raw in enumerate(data, start=1):
        record = {ours: raw.get(name) for name, ours in REFERENCE_NAMES.items()}
        record["site"] = PROJECT_SITES.get(str(raw.get("project_id")))
        records.append((f"record {number}", record))
    return records


def _csv_records(text: TextIO, header: list[str], delimiter: str, path: Path) -> _Records:
    """Read the rows of a CSV under our names."""
    if "case_id" not in header or repeated(header):
        raise CohortError(
            f"{path} must have a column case_id, and no column twice, got {name_few(header, 12)}; "
            "rename the columns"
        )
    records = []
    reader = csv.reader(text, delimiter=delimiter)
    for row in reader:
        if not any(map(str.strip, row)):
            continue
        where = f"line {reader.line_num + 1}"
        if len(row) != len(header):
            raise CohortError(
                f"{path}, {where} must have {len(header)} cells like the header, got {len(row)}; "
                "quote text that contains the delimiter"
            )
        records.append((where, _from_aliases(dict(zip(header, row, strict=True)))))
    return records


def _from_aliases(row: dict[str, Any]) -> dict[str, Any]:
    """Bring the columns of cBioPortal-derived tables under our names, where ours are absent."""
    case = row["case_id"]
    if not is_missing(row.get("censorship")) and is_missing(row.get("event")):
        row["event"] = 1.0 - check_event(row["censorship"], f"{case} (column censorship)")
    if not is_missing(row.get("is_female")) and is_missing(row.get("sex")):
        is_female = check_event(row["is_female"], f"{case} (column is_female)")
        row["sex"] = "female" if is_female == 1.0 else "male"
    if is_missing(row.get("slide")):
        row["slide"] = row.get("slide_id")
    # The middle of a TCGA barcode is the hospital; tables that repeat it as `site` mean that.
    if case.startswith("TCGA-") and case.split("-")[1] == row.get("site"):
        row["site"] = None
    return row


def _text(value: object, case: str) -> str | None:
    """Return stripped text, None where missing."""
    return None if is_missing(value) else str(value).strip()


def _sex(value: object, case: str) -> str | None:
    """Return `female`, `male` or other text in lower case, None where missing."""
    text = _text(value, case)
    return None if text is None else _SEXES.get(text.lower(), text.lower())


def _primary_class(value: object, case: str) -> int:
    """Return a class number, -1 where missing."""
    if is_missing(value):
        return _UNCLASSIFIED
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (number >= _UNCLASSIFIED and number.is_integer()):
        raise InputError(
            f"primary_class of case {case} must be a whole number >= 0, or -1 for unclassified, "
            f"got {value!r}; number the classes"
        )
    return int(number)


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "age": check_age,
    "sex": _sex,
    "survival_months": check_duration,
    "event": check_event,
    "primary_class": _primary_class,
    **dict.fromkeys(
        ("case_uuid", "project", "site", "stage", "t", "n", "m", "diagnosis", "year"), _text
    ),
}


def _merge(old: dict[str, Any], new: dict[str, Any], case: str, path: Path) -> dict[str, Any]:
    """Merge two rows of a case; a contradiction is an error, a gap is filled."""
    merged = dict(old)
    for name, value in new.items():
        if name == "slides":
            merged[name] = tuple(dict.fromkeys((*old[name], *value)))
        elif is_missing(old[name]):
            merged[name] = value
        elif not is_missing(value) and value != old[name]:
            raise CohortError(
                f"{path}: rows of case {case} must agree in {name}, got {old[name]!r} and "
                f"{value!r}; correct the table"
            )
    return merged
