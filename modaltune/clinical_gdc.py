"""Clinical records as the GDC hands them out: TSV with old or new column names, or JSON.

A TSV has a row per treatment, `'--` for what is missing, and columns either bare (`vital_status`)
or with their entity in front (`demographic.vital_status`). JSON is a list of cases with
`demographic`, `diagnoses` and `follow_ups`, as the portal and the API give it. Days of follow-up
that a TSV lacks come from `modaltune.gdc_follow_up`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from modaltune.class_maps import published_diagnosis
from modaltune.errors import CohortError, InputError
from modaltune.tables import OnDrop, check_choice, is_missing, name_few

#: What becomes of a patient who died on an unrecorded day (REQUIREMENTS 32).
DeathWithoutDate = Literal["censor", "drop", "published"]

DAYS_PER_MONTH = 30.44  # as published
_DAYS_PER_YEAR = 365.25

#: How the GDC's tables call the barcode of a case: older downloads, newer ones.
CASE_ID_COLUMNS = ("case_submitter_id", "cases.submitter_id")
_NOT_KNOWN = frozenset(
    {"not reported", "unknown", "unspecified", "not allowed to collect", "not applicable"}
)
_DEMOGRAPHIC = ("vital_status", "days_to_death", "gender", "sex_at_birth", "age_at_index")
_DIAGNOSIS = (
    "primary_diagnosis",
    "ajcc_pathologic_stage",
    "ajcc_pathologic_t",
    "ajcc_pathologic_n",
    "ajcc_pathologic_m",
    "year_of_diagnosis",
    "age_at_diagnosis",
    "days_to_diagnosis",
    "days_to_last_follow_up",
    "classification_of_tumor",
    "diagnosis_is_primary_disease",
)
_OLD_HEAD = {"uuid": "case_id", "project": "project_id", "site": "primary_site"}
_NEW_HEAD = {
    "uuid": "cases.case_id",
    "project": "project.project_id",
    "site": "cases.primary_site",
}
_PART_ID = re.compile(r"(?P<case>.+)_(demographic|diagnosis)\d*")
_EVENTS = {"alive": 0.0, "dead": 1.0}


@dataclass
class _GdcCase:
    """What the rows of one case say, brought together."""

    uuid: str | None = None
    project: str | None = None
    site: str | None = None
    demographic: dict[str, str] = field(default_factory=dict)
    diagnoses: set[tuple[tuple[str, str], ...]] = field(default_factory=set)
    follow_up_days: set[float] = field(default_factory=set)


def is_gdc_header(header: Collection[str]) -> bool:
    """Tell whether a table's columns are those of the GDC."""
    return any(name in header for name in CASE_ID_COLUMNS)


def is_gdc_json(content: object) -> bool:
    """Tell whether JSON is a list of GDC cases, bare or as the API wraps it."""
    cases = _json_cases(content)
    return bool(cases) and all(isinstance(c, dict) and _json_case_id(c) for c in cases or ())


def _json_case_id(case: Mapping[str, Any]) -> str | None:
    """Return the barcode of a case; older exports have it in the ids of its parts only."""
    if own := known_text(case.get("submitter_id")):
        return own
    for name in ("demographic", "diagnoses"):
        for part in _dicts(case.get(name)):
            if match := _PART_ID.fullmatch(str(part.get("submitter_id"))):
                return match["case"]
    return None


def _json_cases(content: object) -> list[Any] | None:
    """Return the list of cases, wherever it is."""
    if isinstance(content, dict) and isinstance(content.get("data"), dict):
        content = content["data"].get("hits")
    if isinstance(content, dict):
        content = content.get("cases")
    return content if isinstance(content, list) else None


def case_rows(
    text: TextIO,
    path: Path,
    header: Sequence[str],
    delimiter: str,
    key: str,
    exclude: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield case and cells by column, stripped, of every row of a table after its header.

    Args:
        text: The table, after its header.
        path: The file, for messages.
        header: Its columns.
        delimiter: What separates them.
        key: The column that names the case.
        exclude: Cases to leave out.

    Raises:
        CohortError: A row has more or fewer cells than the header, or names no case.
    """
    reader = csv.reader(text, delimiter=delimiter)
    for row in reader:
        if not any(map(str.strip, row)):
            continue
        line = reader.line_num + 1
        if len(row) != len(header):
            raise CohortError(
                f"{path}, line {line} must have {len(header)} cells like the header, got "
                f"{len(row)}; download the table again"
            )
        cells = dict(zip(header, map(str.strip, row), strict=True))
        if is_missing(cells[key]):
            raise CohortError(f"{path}, line {line} must name its case, got none; fill in {key}")
        if cells[key] not in exclude:
            yield cells[key], cells


def gdc_records_from_table(
    text: TextIO,
    header: list[str],
    delimiter: str,
    path: Path,
    death_without_date: DeathWithoutDate = "censor",
    exclude: Collection[str] = (),
    on_drop: OnDrop | None = None,
    follow_ups: Mapping[str, Collection[float]] | None = None,
) -> list[tuple[str, dict[str, Any]]]:
    """Read a GDC table as records of `modaltune.clinical.read_clinical`.

    Args:
        text: The table, after its header.
        header: Its columns.
        delimiter: What separates them.
        path: The file, for messages.
        death_without_date: "censor" at the last follow-up, "drop" the case, or as "published",
            died at the last follow-up.
        exclude: Cases to leave unread.
        on_drop: Told what was left out or not taken as it stood, and of which cases.
        follow_ups: Case -> further days on which it was seen.

    Raises:
        CohortError: A row is broken, or rows of one case contradict each other.
        InputError: A survival time is negative; names the cases.
    """
    key = next(name for name in CASE_ID_COLUMNS if name in header)
    cases: dict[str, _GdcCase] = {}
    for case_id, cells in case_rows(text, path, header, delimiter, key, exclude):
        is_new = key.startswith("cases.")
        _add_row(cases.setdefault(case_id, _GdcCase()), _by_entity(cells, is_new), case_id, path)
    return _records(_seen(cases, follow_ups), path, death_without_date, on_drop)


def gdc_records_from_json(
    content: object,
    path: Path,
    death_without_date: DeathWithoutDate = "censor",
    exclude: Collection[str] = (),
    on_drop: OnDrop | None = None,
    follow_ups: Mapping[str, Collection[float]] | None = None,
) -> list[tuple[str, dict[str, Any]]]:
    """Read GDC JSON as records; see `gdc_records_from_table`."""
    cases: dict[str, _GdcCase] = {}
    for raw in _json_cases(content) or ():
        case_id = str(_json_case_id(raw))
        if case_id in exclude:
            continue
        project = raw.get("project")
        head = {
            "uuid": raw.get("case_id") or raw.get("id"),
            "project": project.get("project_id") if isinstance(project, dict) else project,
            "site": raw.get("primary_site"),
        }
        case = cases.setdefault(case_id, _GdcCase())
        rows = [{"demographic": one} for one in _dicts(raw.get("demographic"))]
        rows += [{"diagnoses": one} for one in _dicts(raw.get("diagnoses"))]
        rows += [{"follow_ups": one} for one in _dicts(raw.get("follow_ups"))]
        for row in ({"head": head}, *rows):
            _add_row(case, row, case_id, path)
    return _records(_seen(cases, follow_ups), path, death_without_date, on_drop)


def _dicts(value: object) -> list[dict[str, Any]]:
    """Return the objects of a JSON value that may be one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, dict)]


def _by_entity(cells: Mapping[str, str], is_new: bool) -> dict[str, dict[str, Any]]:
    """Sort the cells of a row by what they describe."""
    if not is_new:
        head = {name: cells.get(c) for name, c in _OLD_HEAD.items()}
        return {"head": head, "demographic": dict(cells), "diagnoses": dict(cells)}
    entities: dict[str, dict[str, Any]] = {
        "head": {name: cells.get(column) for name, column in _NEW_HEAD.items()}
    }
    for name, value in cells.items():
        entity, _, column = name.partition(".")
        if entity in ("demographic", "diagnoses", "follow_ups"):
            entities.setdefault(entity, {})[column] = value
    return entities


def known_text(value: object) -> str | None:
    """Return the text of a value, None where the GDC says that nothing is known."""
    if is_missing(value) or str(value).strip().lower() in _NOT_KNOWN:
        return None
    return str(value).strip()


def _add_row(
    case: _GdcCase, row: Mapping[str, Mapping[str, Any]], case_id: str, path: Path
) -> None:
    """Add what one row says to a case; the facts of a person must agree."""
    head = row.get("head", {})
    case.uuid = case.uuid or known_text(head.get("uuid"))
    case.project = case.project or known_text(head.get("project"))
    case.site = case.site or known_text(head.get("site"))
    for name in _DEMOGRAPHIC:
        value = known_text(row.get("demographic", {}).get(name))
        if value is not None and case.demographic.setdefault(name, value) != value:
            raise CohortError(
                f"{path}: rows of case {case_id} must agree in {name}, got "
                f"{case.demographic[name]!r} and {value!r}; correct the table"
            )
    diagnosis = row.get("diagnoses", {})
    known = [(name, known_text(diagnosis.get(name))) for name in _DIAGNOSIS]
    if facts := tuple((name, value) for name, value in known if value is not None):
        case.diagnoses.add(facts)
    for days in (
        diagnosis.get("days_to_last_follow_up"),
        row.get("follow_ups", {}).get("days_to_follow_up"),
    ):
        if known_text(days) is not None:
            case.follow_up_days.add(as_days(days, "days to a follow-up", case_id, path))


def as_days(value: object, what: str, case_id: str, path: Path) -> float:
    """Read a number of days, negative ones included: they are judged later, together."""
    try:
        days = float(str(value))
    except ValueError:
        days = math.nan
    if not math.isfinite(days):
        raise InputError(
            f"{path}: {what} of case {case_id} must be a number, got {value!r}; correct it, or "
            "leave the cell empty"
        )
    return days


def _seen(
    cases: dict[str, _GdcCase], follow_ups: Mapping[str, Collection[float]] | None
) -> dict[str, _GdcCase]:
    """Add the days of a follow-up table, joined by case id."""
    for case_id, case in cases.items():
        case.follow_up_days.update((follow_ups or {}).get(case_id, ()))
    return cases


def _records(
    cases: Mapping[str, _GdcCase],
    path: Path,
    policy: DeathWithoutDate,
    on_drop: OnDrop | None,
) -> list[tuple[str, dict[str, Any]]]:
    """Turn what was collected into records, judging survival times of all cases at once."""
    check_choice("death_without_date", policy, get_args(DeathWithoutDate))
    records, undated, negative, several, unseen = [], [], [], [], []
    for case_id, case in cases.items():
        months, event, is_undated = _survival(case, policy, case_id, path)
        undated += [case_id] * is_undated
        unseen += [case_id] * (event == 0 and math.isnan(months))
        negative += [f"{case_id} ({months * DAYS_PER_MONTH:.0f} days)"] * (months < 0)
        if is_undated and policy == "drop":
            continue
        diagnosis, is_several = _main_diagnosis(case.diagnoses)
        several += [case_id] * is_several
        record = _record(case, diagnosis, case_id, path)
        records.append((f"case {case_id}", {**record, "survival_months": months, "event": event}))
    if negative:
        raise InputError(
            f"{path}: survival times must be >= 0, got {len(negative)} negative: "
            f"{name_few(sorted(negative), 20)}; correct the dates, or exclude these cases"
        )
    if on_drop is not None:
        done = {
            "censor": "died on an unrecorded day: censored at the last follow-up",
            "drop": "died on an unrecorded day: case left out",
            "published": "died on an unrecorded day: taken as died at the last follow-up",
        }
        _tell(on_drop, done[policy], undated)
        _tell(on_drop, "alive, but no day of a follow-up: no survival time", unseen)
        _tell(on_drop, "several primary diagnoses: the earliest taken", several)
    return records


def _tell(on_drop: OnDrop, reason: str, cases: Iterable[str]) -> None:
    if found := sorted(cases):
        on_drop(reason, found)


def _survival(
    case: _GdcCase, policy: DeathWithoutDate, case_id: str, path: Path
) -> tuple[float, float, bool]:
    """Return months and event, NaN where unknown, and whether a death has no date."""
    event = _EVENTS.get(case.demographic.get("vital_status", "").lower(), math.nan)
    death = case.demographic.get("days_to_death")
    last = max(case.follow_up_days, default=math.nan) / DAYS_PER_MONTH
    if math.isnan(event):
        return math.nan, math.nan, False
    if event == 0.0:
        return last, event, False
    if death is not None:
        return as_days(death, "days to death", case_id, path) / DAYS_PER_MONTH, event, False
    if policy == "published":
        return last, event, True
    return last, math.nan if math.isnan(last) else 0.0, True


def _main_diagnosis(
    diagnoses: Iterable[tuple[tuple[str, str], ...]],
) -> tuple[dict[str, str], bool]:
    """Choose the primary diagnosis, the earliest of several, and fill its gaps from the others.

    Returns:
        The facts, and whether others contradicted them.
    """
    rows = [dict(facts) for facts in diagnoses]
    primary = [
        row
        for row in rows
        if row.get("diagnosis_is_primary_disease", "").lower() == "true"
        or row.get("classification_of_tumor", "").lower() == "primary"
    ]
    rows = sorted(primary or rows, key=_earliest)
    main: dict[str, str] = {}
    is_several = False
    for row in rows:
        for name, value in row.items():
            kept = main.setdefault(name, value)
            is_several |= kept != value and name in _DIAGNOSIS[:5]
    return main, is_several


def _earliest(diagnosis: Mapping[str, str]) -> tuple[float, str, list[tuple[str, str]]]:
    """Order diagnoses by their distance from the first one, then by what they say."""
    try:
        distance = abs(float(diagnosis["days_to_diagnosis"]))
    except (KeyError, ValueError):
        distance = math.inf
    return distance, diagnosis.get("year_of_diagnosis", "9999"), sorted(diagnosis.items())


def _record(
    case: _GdcCase, diagnosis: Mapping[str, str], case_id: str, path: Path
) -> dict[str, Any]:
    """Put a case under our names."""
    age = case.demographic.get("age_at_index")
    if age is None and "age_at_diagnosis" in diagnosis:
        days = as_days(diagnosis["age_at_diagnosis"], "age_at_diagnosis", case_id, path)
        age = str(math.floor(days / _DAYS_PER_YEAR))
    return {
        "case_id": case_id,
        "case_uuid": case.uuid,
        "project": case.project,
        "site": None if case.site is None else case.site.lower(),
        "age": age,
        "sex": case.demographic.get("gender") or case.demographic.get("sex_at_birth"),
        "stage": diagnosis.get("ajcc_pathologic_stage"),
        "t": diagnosis.get("ajcc_pathologic_t"),
        "n": diagnosis.get("ajcc_pathologic_n"),
        "m": diagnosis.get("ajcc_pathologic_m"),
        "diagnosis": published_diagnosis(diagnosis.get("primary_diagnosis"), case.project),
        "year": diagnosis.get("year_of_diagnosis"),
    }
