"""Classes of a cohort: the published maps from diagnosis to class, or a table of the user's."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from modaltune.errors import CohortError, InputError
from modaltune.tables import is_missing, name_few, open_text, read_header, repeated

UNCLASSIFIED = -1

# Beginnings that the published diagnoses have where the recorded ones do not name the organ.
_ORGAN_OF_PROJECT = {
    "TCGA-LUAD": "Lung ",
    "TCGA-LUSC": "Lung ",
    "TCGA-COAD": "colon ",
    "TCGA-READ": "rectal ",
}
_KIND = "a readable label table (CSV with case_id and label, or primary_class)"


@dataclass(frozen=True)
class ClassMap:
    """Which diagnoses of some projects are which class.

    Attributes:
        projects: TCGA projects that are one classification task.
        names: Name of class 0, 1, ...
        diagnoses: Diagnosis, as `published_diagnosis` writes it, to class.
        otherwise: Class of every other diagnosis; -1: left unclassified.
    """

    projects: tuple[str, ...]
    names: tuple[str, ...]
    diagnoses: Mapping[str, int]
    otherwise: int = UNCLASSIFIED


#: The published maps (METHOD 4.12).
PUBLISHED_CLASSES = (
    ClassMap(
        ("TCGA-BRCA",),
        ("invasive ductal carcinoma", "invasive lobular carcinoma"),
        {"infiltrating duct carcinoma": 0, "lobular carcinoma": 1},
    ),
    ClassMap(
        ("TCGA-BLCA",),
        ("transitional cell carcinoma", "papillary transitional cell carcinoma"),
        {"transitional cell carcinoma": 0, "papillary transitional cell carcinoma": 1},
    ),
    ClassMap(
        ("TCGA-COAD", "TCGA-READ"),
        ("colon adenocarcinoma", "rectal adenocarcinoma"),
        {"colon adenocarcinoma": 0, "rectal adenocarcinoma": 1},
    ),
    ClassMap(
        ("TCGA-GBM", "TCGA-LGG"),
        ("glioblastoma", "lower grade glioma"),
        {"glioblastoma": 0},
        otherwise=1,
    ),
    ClassMap(
        ("TCGA-LUAD", "TCGA-LUSC"),
        ("lung adenocarcinoma", "lung squamous cell carcinoma"),
        {"Lung adenocarcinoma": 0, "Lung squamous cell carcinoma": 1},
    ),
    ClassMap(
        ("TCGA-KIRP", "TCGA-KIRC", "TCGA-KICH"),
        ("papillary", "clear cell", "chromophobe"),
        {
            "papillary adenocarcinoma": 0,
            "papillary renal cell carcinoma": 0,
            "clear cell adenocarcinoma": 1,
            "clear cell renal cell carcinoma": 1,
            "renal cell carcinoma, chromophobe type": 2,
            "chromophobe renal cell carcinoma": 2,
        },
    ),
    ClassMap(
        ("TCGA-UCEC",),
        ("endometrioid adenocarcinoma", "serous cystadenocarcinoma"),
        {
            "endometrioid adenocarcinoma": 0,
            "serous cystadenocarcinoma": 1,
            "papillary serous cystadenocarcinoma": 1,
        },
    ),
)
_BY_PROJECT = {project: one for one in PUBLISHED_CLASSES for project in one.projects}


def published_diagnosis(diagnosis: object, project: object) -> str | None:
    """Write a diagnosis as the published label sentences do: lower case, without ", NOS".

    Diagnoses of lung, colon and rectum get their organ in front; what is written so already stays.

    Source: METHOD 4.12.
    """
    if is_missing(diagnosis):
        return None
    text = str(diagnosis).strip().lower().replace(", nos", "")
    organ = _ORGAN_OF_PROJECT.get(str(project), "")
    named = next((o for o in _ORGAN_OF_PROJECT.values() if text.startswith(o.lower())), "")
    return (named or organ) + text.removeprefix(named.lower()) if organ else text


@dataclass(frozen=True)
class Classes:
    """The class of each case, and what could not be classified.

    Attributes:
        of_case: Case id to class, -1 where unclassified.
        names: Class to its name, per group of projects or for all ("").
        unmapped: Diagnoses without a class and how many cases have them.
    """

    of_case: dict[str, int]
    names: dict[str, dict[str, str]]
    unmapped: dict[str, int]


def published_classes(clinical: pd.DataFrame) -> Classes:
    """Classify the cases of a clinical table as published.

    Args:
        clinical: Index case ids, columns `project` and `diagnosis`.

    Raises:
        CohortError: A case is of a project that has no published classes.
    """
    unknown = sorted({str(p) for p in clinical["project"]} - set(_BY_PROJECT))
    if unknown:
        raise CohortError(
            f"project must be one of {', '.join(sorted(_BY_PROJECT))} for the published classes, "
            f"got {name_few(unknown)}; give the classes of your cases with a label table"
        )
    of_case: dict[str, int] = {}
    unmapped: Counter[str] = Counter()
    names = {}
    for case, project, diagnosis in zip(
        clinical.index, clinical["project"], clinical["diagnosis"], strict=True
    ):
        classes = _BY_PROJECT[project]
        text = published_diagnosis(diagnosis, project)
        of_case[str(case)] = (
            UNCLASSIFIED if text is None else classes.diagnoses.get(text, classes.otherwise)
        )
        if of_case[str(case)] == UNCLASSIFIED:
            unmapped[text or "(none recorded)"] += 1
        group = ", ".join(classes.projects)
        names[group] = {str(k): name for k, name in enumerate(classes.names)}
    return Classes(of_case, names, dict(sorted(unmapped.items())))


def read_labels(path: str | Path) -> Classes:
    """Read the user's own classes: a CSV with `case_id` and `label` or `primary_class`.

    Labels are text, numbered 0, 1, ... in alphabetical order; `primary_class` holds the numbers
    themselves. An empty cell or -1 means unclassified.

    Raises:
        CohortError: The file is damaged, or a case has two labels.
        InputError: A class is no whole number >= -1.
    """
    path = Path(path)
    found: dict[str, str] = {}
    with open_text(path, _KIND) as text:
        header, delimiter = read_header(text, path)
        column = next((c for c in ("primary_class", "label") if c in header), None)
        if "case_id" not in header or column is None or repeated(header):
            raise CohortError(
                f"{path} must have the columns case_id and label (or primary_class), got "
                f"{name_few(header)}; rename them"
            )
        for line, row in enumerate(csv.DictReader(text, header, delimiter=delimiter), start=2):
            if any(map(str.strip, row.get(None) or ())):
                raise CohortError(
                    f"{path}, line {line} must have {len(header)} cells like the header, got "
                    f"{len(header) + len(row[None])}; quote text that contains the delimiter"
                )
            case, value = str(row["case_id"]).strip(), str(row[column] or "").strip()
            value = "" if is_missing(value) else value
            if found.setdefault(case, value) != value:
                raise CohortError(
                    f"{path} must give every case one label, got {found[case]!r} and {value!r} for "
                    f"{case}; correct it"
                )
    if column == "label":
        labels = sorted({value for value in found.values() if value})
        number = {value: k for k, value in enumerate(labels)}
        names = {"": {str(k): value for value, k in number.items()}}
        return Classes({c: number.get(v, UNCLASSIFIED) for c, v in found.items()}, names, {})
    return Classes({case: _class_number(v, case, path) for case, v in found.items()}, {}, {})


def _class_number(value: str, case: str, path: Path) -> int:
    """Read a class number."""
    try:
        number = float(value) if value else float(UNCLASSIFIED)
    except ValueError:
        number = float("nan")
    if not number.is_integer() or number < UNCLASSIFIED:
        raise InputError(
            f"{path}: primary_class of case {case} must be a whole number >= 0, or -1, got "
            f"{value!r}; call the column label if it holds text"
        )
    return int(number)
