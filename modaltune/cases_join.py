"""Joining a cohort by case id: clinical tables into one, feature files to cases, cases chosen."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from modaltune.cases_folder import SLIDE_COLUMNS, CasesFolder
from modaltune.clinical import COLUMNS
from modaltune.engine.feature_index import PT, FeatureFile
from modaltune.engine.tile_features import check_base_mpp
from modaltune.errors import CohortError, FeatureFileError
from modaltune.labels import is_known_code
from modaltune.tables import OnDrop, is_missing, name_few, open_text, read_header

_TOGETHER = ("survival_months", "event")
_CODES = ("stage", "t", "n", "m")
_SLIDE_SUFFIX = re.compile(
    r"\.(svs|ndpi|mrxs|tiff?|scn|bif|vms|svslide|dcm|czi|isyntax|png|jpe?g)$", re.IGNORECASE
)
# The GDC appends the file's UUID to the barcode of a slide.
_UUID = re.compile(r"\.[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}$", re.IGNORECASE)
_TCGA_SLIDE = re.compile(r"(?P<case>TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-(?P<type>\d{2})[A-Z]?-.*")
_FIRST_NORMAL_TYPE = 10
_MANIFEST_KIND = "a readable slide table (CSV with slide, case_id and, if wanted, mpp)"


def empty_clinical(case_ids: Iterable[str]) -> pd.DataFrame:
    """Return a clinical table in which nothing is known of these cases."""
    index = pd.Index(sorted(case_ids), name="case_id")
    table = pd.DataFrame(index=index, columns=list(COLUMNS), dtype=object)
    table[list(COLUMNS)] = None
    for name in ("age", *_TOGETHER):
        table[name] = math.nan
    table["primary_class"] = -1
    table["slides"] = [()] * len(table)
    return table


def merge_clinical(tables: Sequence[tuple[str, pd.DataFrame]], tell: OnDrop) -> pd.DataFrame:
    """Merge clinical tables by case: the first table that knows something is believed.

    Survival time and event are taken together, from the first table that has both. Slides are those
    of all tables.

    Args:
        tables: Name and rows of `modaltune.clinical.read_clinical`, in order of belief.
        tell: Told where tables differ.

    Returns:
        One row per case, sorted by case id.
    """
    cases = sorted({str(case) for _, table in tables for case in table.index})
    merged: dict[str, dict[str, Any]] = {case: {} for case in cases}
    differing: dict[str, set[str]] = {}
    for name, table in tables:
        records: list[dict[Any, Any]] = table.to_dict(orient="records")
        for case, record in zip(map(str, table.index), records, strict=True):
            for column in _merge_row(merged[case], record):
                differing.setdefault(f"{column} in {name} differs: the first kept", set()).add(case)
    for reason, found in sorted(differing.items()):
        tell(reason, sorted(found))
    result = empty_clinical(cases)
    for column in COLUMNS:
        default = {"primary_class": -1, "slides": ()}.get(column, math.nan)
        if column not in ("age", "primary_class", "slides", *_TOGETHER):
            default = None
        result[column] = [merged[case].get(column, default) for case in cases]
    return result


def _merge_row(old: dict[str, Any], new: Mapping[Any, Any]) -> list[str]:
    """Fill the gaps of a row from another; return the columns in which they differ."""
    differing = []
    for column in COLUMNS:
        value = new[column]
        if column == "slides":
            old[column] = tuple(sorted({*old.get(column, ()), *value}))
        elif column not in _TOGETHER and not is_missing(value):
            is_gap = column == "primary_class" and value == -1
            if not is_gap and old.setdefault(column, value) != value:
                differing.append(column)
    pair = {column: new[column] for column in _TOGETHER}
    if not any(is_missing(value) for value in pair.values()):
        if all(column in old for column in _TOGETHER):
            differing += [c for c in _TOGETHER if not math.isclose(old[c], pair[c], abs_tol=0.1)]
        else:
            old.update(pair)
    return differing


def drop_unknown_codes(clinical: pd.DataFrame, tell: OnDrop) -> pd.DataFrame:
    """Empty the stage, T, N and M codes that have no wording in the label sentences."""
    clinical = clinical.copy()
    for column in _CODES:
        unknown = {
            case: value
            for case, value in clinical[column].items()
            if not is_known_code(column, value)
        }
        if unknown:
            clinical[column] = clinical[column].where(~clinical.index.isin(list(unknown)), None)
            shown = [f"{case} ({value})" for case, value in unknown.items()]
            tell(f"{column} code without a wording: taken as missing", shown)
    return clinical


@dataclass(frozen=True)
class SlideTable:
    """The user's own table of slides.

    Attributes:
        case_of: Slide name without suffix to case.
        base_mpp: Slide name to microns per level-0 px, where given.
    """

    case_of: dict[str, str]
    base_mpp: dict[str, float]


def read_slide_table(path: str | Path) -> SlideTable:
    """Read which slide is of which case: columns `slide`, `case_id` and, if wanted, `mpp`.

    The manifest of `modaltune embed` is such a table; of its paths only the names count.

    Raises:
        CohortError: The file is damaged, or a slide has two cases.
        FeatureFileError: An mpp is absurd.
    """
    path = Path(path)
    case_of: dict[str, str] = {}
    base_mpp: dict[str, float] = {}
    with open_text(path, _MANIFEST_KIND) as text:
        header, delimiter = read_header(text, path)
        if not {"slide", "case_id"} <= set(header):
            raise CohortError(
                f"{path} must have the columns slide and case_id, got {name_few(header)}; rename "
                "them"
            )
        for line, row in enumerate(csv.DictReader(text, header, delimiter=delimiter), start=2):
            slide = slide_key(Path(row["slide"] or "").name)
            case = str(row["case_id"] or "").strip()
            if not slide or not case or case_of.setdefault(slide, case) != case:
                raise CohortError(
                    f"{path}, line {line} must give a slide its one case, got {row['slide']!r} and "
                    f"{case!r}; correct it"
                )
            if not is_missing(row.get("mpp")):
                base_mpp[slide] = _mpp(row["mpp"], path, line)
    return SlideTable(case_of, base_mpp)


def _mpp(text: str, path: Path, line: int) -> float:
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if math.isnan(mpp):
        raise CohortError(
            f"{path}, line {line}: mpp must be a number, got {text!r}; leave the cell empty if it "
            "is not known"
        )
    check_base_mpp(mpp)
    return mpp


def slide_key(name: str) -> str:
    """Return a slide's name without the suffix of its file, and without the GDC's UUID."""
    return _UUID.sub("", _SLIDE_SUFFIX.sub("", name.strip()))


def assign_slides(
    files: Sequence[tuple[Path, FeatureFile]],
    clinical: pd.DataFrame | None,
    table: SlideTable | None,
    tell: OnDrop,
    base_mpp: float | None = None,
    target_mpp: float | None = None,
) -> pd.DataFrame:
    """Find the case of every feature file, by what is listed, by barcode, or by equal name.

    Tried in this order: the user's slide table; the slides that clinical rows list; the case of a
    TCGA slide barcode; a case of the same name as the slide. For a case whose slides are listed,
    other slides are left out, and so is normal tissue.

    Args:
        files: Root folder and file.
        clinical: Clinical rows; None if there are none, when every slide is of a case.
        table: The user's slide table.
        tell: Told what was left out.
        base_mpp: Microns per level-0 px of slides that neither file nor table says it of.
        target_mpp: Microns per px of the tiles, for files that do not say it.

    Returns:
        The columns of `slides.parquet`, and `source`: the `.pt` file to import as `features`.

    Raises:
        FeatureFileError: Two files are of one slide, or one can't be read without an mpp.
    """
    _refuse_repeats(files)
    case_of = _case_finder(clinical, table)
    listed = _listed(clinical)
    rows: list[dict[str, Any]] = []
    left: dict[str, list[str]] = {}
    for root, file in files:
        key = slide_key(file.slide)
        case, reason = case_of(key)
        is_told = table is not None and key in table.case_of
        if not reason and not is_told and key not in listed.get(case, {key}):
            reason = "slide is not among those listed for its case"
        if reason:
            left.setdefault(reason, []).append(file.slide)
            continue
        mpp = (table.base_mpp if table else {}).get(key, base_mpp)
        if mpp is None and file.producer == "stamp":
            raise FeatureFileError(
                f"{file.path} holds coordinates in microns (STAMP): base_mpp must be given to "
                "place them on level 0, got none; give a slide table with mpp, or --base-mpp"
            )
        is_pt = file.producer == PT
        name = f"features/{key}.h5" if is_pt else file.path.relative_to(root).as_posix()
        rows.append(
            {
                "case_id": case,
                "slide": file.slide,
                "root": "" if is_pt else str(root.absolute()),
                "features": name,
                "source": file.path if is_pt else None,
                "producer": file.producer,
                "encoder": file.encoder,
                "tiles": file.tiles,
                "width": file.width,
                "base_mpp": math.nan if mpp is None else mpp,
                "target_mpp": math.nan if target_mpp is None else target_mpp,
            }
        )
    for reason, slides in sorted(left.items()):
        tell(reason, sorted(slides))
    missing = {key for found in listed.values() for key in found}
    missing -= {slide_key(row["slide"]) for row in rows}
    if rows and missing:
        tell("listed slide without a feature file", sorted(missing))
    return pd.DataFrame(rows, columns=[*SLIDE_COLUMNS, "source"])


def feature_names(cases: CasesFolder) -> dict[str, list[str]]:
    """Return the feature files of the slides that each case lists, in that order.

    Cases of which a listed slide has no features are left out.
    """
    paths = zip(cases.slides["slide"], cases.slides["path"], strict=True)
    files = {slide_key(slide): Path(path).name for slide, path in paths}
    names = {}
    for case, slides in zip(cases.clinical.index, cases.clinical["slides"], strict=True):
        found = [files.get(slide_key(slide)) for slide in slides]
        if found and all(found):
            names[str(case)] = [name for name in found if name]
    return names


def _case_finder(
    clinical: pd.DataFrame | None, table: SlideTable | None
) -> Callable[[str], tuple[str, str]]:
    """Return what tells the case of a slide name, or why there is none."""
    cases = None if clinical is None else set(map(str, clinical.index))
    listed = {name: case for case, names in _listed(clinical).items() for name in names}

    def find(key: str) -> tuple[str, str]:
        barcode = _TCGA_SLIDE.fullmatch(key)
        if barcode is not None and int(barcode["type"]) >= _FIRST_NORMAL_TYPE:
            return "", "slide of normal tissue"
        given = None if table is None else table.case_of.get(key)
        case = given or listed.get(key)
        if case is None and barcode is not None:
            case = barcode["case"]
        case = key if case is None else case
        return (case, "") if cases is None or case in cases else ("", "slide of no known case")

    return find


def _listed(clinical: pd.DataFrame | None) -> dict[str, set[str]]:
    """Return the slides that clinical rows list, of the cases that have any."""
    if clinical is None:
        return {}
    pairs = zip(map(str, clinical.index), clinical["slides"], strict=True)
    return {case: {slide_key(slide) for slide in slides} for case, slides in pairs if slides}


def _refuse_repeats(files: Sequence[tuple[Path, FeatureFile]]) -> None:
    """Refuse two files of one slide, in one folder or in several."""
    seen: dict[str, Path] = {}
    for _, file in files:
        other = seen.setdefault(slide_key(file.slide), file.path)
        if other != file.path:
            raise FeatureFileError(
                f"every slide must have one feature file, got {other} and {file.path}; give the "
                "folders of one tile encoder, each once"
            )
