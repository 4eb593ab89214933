"""`modaltune cases build`: clinical, expression, pathways, features and a split, joined by case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from modaltune.build_report import BuildReport, count_parts
from modaltune.cases_folder import CasesContent, CasesFolder, file_sha256, write_cases_folder
from modaltune.cases_genes import read_genes
from modaltune.cases_join import (
    assign_slides,
    drop_unknown_codes,
    empty_clinical,
    merge_clinical,
    read_slide_table,
)
from modaltune.cases_request import SOURCES, CasesRequest
from modaltune.class_maps import UNCLASSIFIED, Classes, published_classes, read_labels
from modaltune.clinical import read_clinical
from modaltune.engine.feature_index import PT, FeatureFile, index_features
from modaltune.errors import CohortError, InputError
from modaltune.gdc_follow_up import read_follow_ups
from modaltune.published_splits import read_published_split
from modaltune.splits import Split, make_splits, read_splits
from modaltune.tables import name_few


def build_cases(request: CasesRequest, out: str | Path, *, replace: bool = False) -> CasesFolder:
    """Join a cohort by case id and write it as a cases folder, whole or not at all.

    Args:
        request: What to read and how.
        out: The folder to write.
        replace: Replace a cases folder that is there.

    Returns:
        The folder; its report says what was joined, and what was dropped and why.

    Raises:
        InputError: An input breaks a rule, or nothing is left; the message names file and cases.
    """
    if request.published_split and request.split:
        raise InputError(
            "published_split and split must not both be given, got two splits; choose one"
        )
    report = BuildReport()
    split, clinical = _read_clinical(request, report)
    expression, pathways = read_genes(request, report)
    slides = _read_slides(request, clinical, report)
    if clinical is None:
        clinical = _clinical_of_others(expression, slides)
    clinical, classes = _classify(drop_unknown_codes(clinical, report.teller("clinical")),
                                  request, report)  # fmt: skip
    given = (split,) if split is not None else read_splits(request.split) if request.split else None
    cases = _choose_cases(request, clinical, expression, slides, given, report)
    clinical = _list_slides(clinical.loc[cases], slides)
    expression = _rows_of(expression, cases, report)
    slides = _slides_of(slides, cases, report)
    splits = _make_splits(request, clinical, given, report)
    with_genes = set() if expression is None else set(expression.index)
    with_slides = set() if slides is None else set(slides["case_id"])
    report.parts = [count_parts(s, clinical, with_genes, with_slides) for s in splits]
    content = CasesContent(
        clinical=clinical,
        expression=expression,
        pathways=pathways,
        slides=slides,
        splits=splits,
        facts=_facts(request, classes, report),
        report=report.to_dict(),
        report_md=report.to_markdown(),
    )
    return write_cases_folder(out, content, replace=replace)


def _read_clinical(
    request: CasesRequest, report: BuildReport
) -> tuple[Split | None, pd.DataFrame | None]:
    """Read and merge every clinical table; the records of a published split are believed first."""
    tables: list[tuple[str, pd.DataFrame]] = []
    split = None
    if request.published_split is not None:
        split, records = read_published_split(*request.published_split, exclude=request.exclude)
        tables.append(("the published split", records))
        for path, cases in zip(request.published_split, split.parts.values(), strict=True):
            report.add_input("published split", path.name, cases=len(cases))
    follow_ups = _read_follow_ups(request, report)
    for path in request.clinical:
        table = read_clinical(
            path,
            death_without_date=request.death_without_date,
            exclude=request.exclude,
            on_drop=report.teller(path.name),
            follow_ups=follow_ups,
        )
        report.add_input("clinical", path.name, cases=len(table))
        # A record of the GDC would have taken them: who lives was last seen then.
        is_open = (table["event"] == 0) & table["survival_months"].isna()
        unused = [case for case in table.index[is_open] if follow_ups.get(str(case))]
        report.drop(path.name, "no GDC record: days of --follow-up not used", unused)
        tables.append((path.name, table))
    known = {str(case) for _, table in tables for case in table.index}
    report.drop("follow-up", "follow-up of no known case", set(follow_ups) - known)
    return split, merge_clinical(tables, report.teller("clinical")) if tables else None


def _read_follow_ups(request: CasesRequest, report: BuildReport) -> dict[str, set[float]]:
    """Read the days of all follow-up tables by case."""
    if request.follow_up and not request.clinical:
        raise InputError(
            "clinical must be given with follow_up, got none; give the clinical.tsv of the same "
            "download"
        )
    days: dict[str, set[float]] = {}
    for path in request.follow_up:
        found = read_follow_ups(path, request.exclude)
        report.add_input("follow-up", path.name, cases=len(found))
        for case, own in found.items():
            days.setdefault(case, set()).update(own)
    return days


def _read_slides(
    request: CasesRequest, clinical: pd.DataFrame | None, report: BuildReport
) -> pd.DataFrame | None:
    """Find the feature files and their cases."""
    if not request.features:
        return None
    files: list[tuple[Path, FeatureFile]] = []
    for root in request.features:
        index = index_features(root, encoder=request.encoder)
        report.add_input("features", root.name, slides=len(index.files))
        reasons: dict[str, list[str]] = {}
        for path, reason in index.skipped:
            reasons.setdefault(reason, []).append(path.relative_to(root).as_posix())
        for reason, names in sorted(reasons.items()):
            report.drop(root.name, f"not read: {reason}", names)
        files += [(root, file) for file in index.files]
    pt = [file.path.name for _, file in files if file.producer == PT]
    if pt and not request.import_pt:
        raise InputError(
            f"features must be HDF5 or zarr, got {len(pt)} .pt files, which may carry code: "
            f"{name_few(pt)}; give --import-pt to read them in child processes and store them as "
            "HDF5 in the cases folder"
        )
    told = [(root, file) for root, file in files if file.slide not in request.exclude]
    table = None if request.slides is None else read_slide_table(request.slides)
    slides = assign_slides(
        told, clinical, table, report.teller("features"), request.base_mpp, request.target_mpp
    )
    return slides[~slides["case_id"].isin(request.exclude)]


def _clinical_of_others(
    expression: pd.DataFrame | None, slides: pd.DataFrame | None
) -> pd.DataFrame:
    """Make rows for the cases of a cohort without clinical records."""
    cases = set() if expression is None else set(expression.index)
    cases |= set() if slides is None else set(slides["case_id"])
    if not cases:
        raise InputError(
            "clinical, published_split, expression or features must be given, got nothing with a "
            "case in it; give at least one"
        )
    return empty_clinical(map(str, cases))


def _classify(
    clinical: pd.DataFrame, request: CasesRequest, report: BuildReport
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Set the class of every case as asked; what the tables say stays unless asked otherwise."""
    if request.labels is None and request.classes == "file":
        return clinical, {"from": "the clinical tables", "names": {}}
    found: Classes
    if request.labels is not None:
        found = read_labels(request.labels)
        report.add_input("labels", request.labels.name, cases=len(found.of_case))
        strangers = set(found.of_case) - set(clinical.index) - set(request.exclude)
        report.drop(request.labels.name, "label of no known case", strangers)
    else:
        found = published_classes(clinical)
        for diagnosis, count in found.unmapped.items():
            report.notes.append(f"unclassified: {count} cases of {diagnosis}")
    classes = [found.of_case.get(case, UNCLASSIFIED) for case in clinical.index]
    source = request.labels.name if request.labels else "the published map of diagnoses"
    return clinical.assign(primary_class=classes), {"from": source, "names": found.names}


def _choose_cases(
    request: CasesRequest,
    clinical: pd.DataFrame,
    expression: pd.DataFrame | None,
    slides: pd.DataFrame | None,
    given: tuple[Split, ...] | None,
    report: BuildReport,
) -> list[str]:
    """Choose the cases of the folder, and say of all others why they are not."""
    genes = set() if expression is None else set(expression.index)
    with_slides = set() if slides is None else set(slides["case_id"])
    survival = clinical["survival_months"].notna() & clinical["event"].notna()
    have: Mapping[str, set[str]] = {
        "inputs": genes | with_slides,
        "genes": genes,
        "slides": with_slides,
        "class": set(clinical.index[clinical["primary_class"] != UNCLASSIFIED]),
        "survival": set(clinical.index[survival]),
    }
    what = {"inputs": "neither expression nor slides", "genes": "no expression",
            "slides": "no slides", "class": "no class", "survival": "no survival time"}  # fmt: skip
    kept = set(map(str, clinical.index))
    if given is not None:
        inside = {case for split in given for case in split.case_ids}
        report.drop("split", "case of the split that no table knows", inside - kept)
        report.drop("cases", "in no part of the split given", kept - inside)
        kept &= inside
    for one in request.require:
        report.drop("cases", what[one], kept - have[one])
        kept &= have[one]
    if not kept:
        raise CohortError(
            "cases must be left after joining, got none; the ids of the inputs may differ, or "
            f"require less than {', '.join(request.require)}: clinical has "
            f"{name_few(list(clinical.index), 3)}; expression has "
            f"{name_few(sorted(genes), 3) or 'none'}; slides are of "
            f"{name_few(sorted(with_slides), 3) or 'none'}"
        )
    return sorted(kept)


def _list_slides(clinical: pd.DataFrame, slides: pd.DataFrame | None) -> pd.DataFrame:
    """Let cases whose clinical rows list no slides list those that have features."""
    if slides is None:
        return clinical
    found = slides.groupby("case_id")["slide"].apply(lambda names: tuple(sorted(names)))
    pairs = zip(clinical.index, clinical["slides"], strict=True)
    return clinical.assign(slides=[listed or found.get(case, ()) for case, listed in pairs])


def _rows_of(
    expression: pd.DataFrame | None, cases: list[str], report: BuildReport
) -> pd.DataFrame | None:
    """Keep the expression of the chosen cases."""
    if expression is None:
        return None
    has_row = expression.index.isin(cases)
    report.drop("expression", "case not in the folder", expression.index[~has_row])
    return expression[has_row] if has_row.any() else None


def _slides_of(
    slides: pd.DataFrame | None, cases: list[str], report: BuildReport
) -> pd.DataFrame | None:
    """Keep the slides of the chosen cases."""
    if slides is None:
        return None
    is_kept = slides["case_id"].isin(cases)
    report.drop("features", "slide of a case not in the folder", slides["slide"][~is_kept])
    return slides[is_kept] if is_kept.any() else None


def _make_splits(
    request: CasesRequest,
    clinical: pd.DataFrame,
    given: tuple[Split, ...] | None,
    report: BuildReport,
) -> tuple[Split, ...]:
    """Take the split given, without cases that were dropped, or make new ones."""
    if given is not None:
        if request.split is not None:
            report.add_input("split", request.split.name, folds=len(given))
        return tuple(split.restrict(set(clinical.index)) for split in given)
    return make_splits(
        clinical,
        folds=request.folds,
        test_share=request.test_share,
        val_share=request.val_share,
        stratify=request.stratify,
        by_site=request.by_site,
        unclassified=request.unclassified,
        seed=request.seed,
    )


def _facts(request: CasesRequest, classes: dict[str, Any], report: BuildReport) -> dict[str, Any]:
    """Return what `cases.json` says beside checksums: sources, options, classes and counts."""
    sources = []
    for role in SOURCES:
        value = getattr(request, role)
        for path in value if isinstance(value, tuple) else [value] if value else []:
            size = path.stat().st_size
            entry = {"role": role, "path": str(path), "bytes": size, "sha256": file_sha256(path)}
            sources.append(entry)
    sources += [{"role": "features", "path": str(path)} for path in request.features]
    options = request.model_dump(mode="json", exclude={*SOURCES, "features"})
    return {"sources": sources, "options": options, "classes": classes, "counts": report.parts}
