"""Predictions for new cases: class probabilities, risk and survival from saved probes.

Nothing is fitted here. A row per case and task prompt; a missing modality is left out of its case.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from modaltune.baseline_run import BaselineRun, open_run
from modaltune.cases import Cohort, SlideReading
from modaltune.cases_join import SlideTable, assign_slides, read_slide_table, slide_key
from modaltune.checkpoint import WEIGHTS, file_sha256
from modaltune.clinical import read_clinical
from modaltune.cohort_embeddings import CohortEmbeddings, case_modalities, embed_cohort
from modaltune.engine.feature_index import PT, index_features
from modaltune.errors import CohortError, FeatureFileError, InputError
from modaltune.evaluated_cases import MissingGenes, fill_missing_genes, open_cases
from modaltune.evaluation import DIRECT
from modaltune.fitted_probes import POOLED, FittedProbes, site_names
from modaltune.omics import read_expression
from modaltune.prediction_files import write_predictions
from modaltune.predictions import Predictions, predict_sites, predict_with, survival_column
from modaltune.probe_files import load_probes
from modaltune.run_evaluation import check_probes
from modaltune.survival_groups import group_of
from modaltune.tables import name_few
from modaltune.trained_run import TrainedRun

logger = logging.getLogger(__name__)

FORMATS = (".parquet", ".csv", ".h5ad")
MONTHS_STEP = 12.0


@dataclass(frozen=True)
class PredictRequest:
    """What `modaltune predict` was asked for; see its help."""

    run: Path
    out: Path
    features: tuple[Path, ...] = ()
    slides: Path | None = None
    expression: Path | None = None
    clinical: Path | None = None
    cases: Path | None = None
    base_mpp: float | None = None
    target_mpp: float | None = None
    probes: Path | None = None
    missing_genes: MissingGenes = "error"
    device: str = "cpu"


def predict_table(
    fitted: FittedProbes,
    case_ids: Sequence[str],
    embeddings: ArrayLike,
    *,
    sites: Sequence[str] | None = None,
    months: ArrayLike | None = None,
) -> pd.DataFrame:
    """Predict cases from their embeddings.

    Args:
        fitted: Saved probes, `load_probes(run_folder)`.
        case_ids: n patients.
        embeddings: `[n, T, d]` of the same run, `run.embed(cases)`.
        sites: `[n]` cancer site of each case, for a run of several sites; "" where unknown. Such a
            case gets its risk from all sites together and no class.
        months: When survival is given; every 12 months of the training follow-up by default.

    Returns:
        A row per case and task prompt: `case_id`, `task`, `scope` (which probes were used),
        `class_<k>` probabilities, `predicted_class`, `risk` (log hazard relative to the mean
        training case), `risk_group` (high above the training median), `survival_<months>m`, and
        `site_<name>` probabilities for a run of several sites. NaN where a probe is missing, or
        months lie after the training follow-up.
    """
    ids = [str(case) for case in case_ids]
    x = np.asarray(embeddings)
    given = [""] * len(ids) if sites is None else [str(site) for site in sites]
    if len(given) != len(ids):
        raise InputError(
            f"sites must have one entry per case ({len(ids)}), got {len(given)}; write '' where "
            "unknown"
        )
    scopes = np.array([s if s in fitted.scopes else POOLED for s in given], dtype=object)
    when = _months(fitted) if months is None else np.asarray(months, np.float64)
    tables = []
    for task in fitted.tasks:
        for scope in dict.fromkeys(scopes):
            rows = np.flatnonzero(scopes == scope)
            said = predict_with(fitted, [ids[r] for r in rows], x[rows], task, scope, when)
            cut = fitted.probes[task, scope].risk_cut
            tables.append(_rows(said, task, scope, cut, rows))
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if len(table):
        order = {task: k for k, task in enumerate(fitted.tasks)}
        table["place"] = table["task"].map(order)
        table = table.sort_values(["row", "place"], kind="stable", ignore_index=True)
        table = _with_sites(fitted, table, ids, x)
    return table[_columns(table)]


def _months(fitted: FittedProbes) -> Any:
    """Return every 12 months up to the shortest training follow-up of the probes."""
    ends = [own.cox.times[-1] for own in fitted.probes.values() if own.cox is not None]
    return np.arange(MONTHS_STEP, min(ends, default=0.0) + 1e-9, MONTHS_STEP)


def direct_table(run: BaselineRun, case_ids: Sequence[str], embeddings: ArrayLike) -> pd.DataFrame:
    """Predict cases by a baseline's own heads, in the columns of `predict_table`.

    Args:
        run: The trained baseline.
        case_ids: n patients.
        embeddings: `[n, 1, d]` of the same run.

    Returns:
        A row per case, its task `direct`; survival at the times that the head knows.
    """
    said = run.predict_embedded(case_ids, embeddings)
    table = _rows(said, DIRECT, POOLED, run.info.get("risk_cut"), np.arange(len(case_ids)))
    return table[_columns(table)]


def _rows(
    said: Predictions, task: str, scope: str, risk_cut: float | None, rows: Any
) -> pd.DataFrame:
    columns: dict[str, Any] = {"row": rows, "case_id": list(said.case_ids)}
    columns |= {"task": task, "scope": scope}
    if said.probabilities is not None and said.labels is not None:
        for k, label in enumerate(said.labels):
            columns[f"class_{label}"] = said.probabilities[:, k]
        columns["predicted_class"] = said.labels[said.probabilities.argmax(1)]
    if said.risk is not None:
        columns["risk"] = said.risk
        columns["risk_group"] = group_of(said.risk, np.nan if risk_cut is None else risk_cut)
    if said.survival is not None and said.months is not None:
        for k, month in enumerate(said.months):
            columns[survival_column(month)] = said.survival[:, k]
    return pd.DataFrame(columns)


def _with_sites(
    fitted: FittedProbes, table: pd.DataFrame, ids: Sequence[str], x: Any
) -> pd.DataFrame:
    for task in fitted.site_probes:
        said = predict_sites(fitted, ids, x, task)
        rows = table["task"] == task
        if said.probabilities is None or said.labels is None:
            continue
        for k, label in enumerate(said.labels):
            name = f"site_{fitted.sites[label]}"
            table.loc[rows, name] = said.probabilities[table.loc[rows, "row"], k]
    return table


def _columns(table: pd.DataFrame) -> list[str]:
    """Return the columns in the order a reader wants them."""

    def is_class(name: str) -> bool:
        return name.startswith("class_")

    names = [str(name) for name in table.columns if name not in ("row", "place")]
    classes = sorted((n for n in names if is_class(n)), key=lambda n: int(n.removeprefix("class_")))
    first = ["case_id", "task", "scope", *classes, "predicted_class", "risk", "risk_group"]
    return [n for n in first if n in names] + [n for n in names if n not in first]


def predict_request(request: PredictRequest, console: Console | None = None) -> dict[str, Any]:
    """Embed and predict new cases, and write them.

    Args:
        request: What to do.
        console: Where progress is drawn; None for silence.

    Returns:
        A summary as JSON values.

    Raises:
        InputError: Something asked for breaks a rule.
    """
    if request.out.suffix not in FORMATS:
        raise InputError(
            f"--out must end in {', '.join(FORMATS)}, got {request.out.name}; choose one"
        )
    run = open_run(request.run, device=request.device)
    speaker = _speaker(request, run)
    cohort = _cohort(request, run)
    if (
        run.preprocessing.genes is not None
        and cohort.expression is not None
        and (request.missing_genes == "mean")
    ):
        filled = fill_missing_genes(cohort.expression, run.preprocessing.genes)
        cohort = replace(cohort, expression=filled)
    embedded = _embed(run, cohort, console)
    ids = [case.case_id for case in embedded.cases]
    skipped = sorted(set(cohort.case_ids) - set(ids))
    if not ids:
        raise CohortError(
            f"cases must hold something that run {request.run} reads, got none of {len(skipped)} "
            f"cases: {name_few(skipped)}; give what it was trained on (--features, --expression)"
        )
    sites = None
    if cohort.clinical is not None:
        known = cohort.clinical.set_axis(cohort.clinical.index.map(str), axis=0)
        sites = list(site_names(known.reindex(ids)))
    values = embedded.values.numpy()
    if isinstance(speaker, BaselineRun):
        fitted, table = None, direct_table(speaker, ids, values)
    else:
        fitted, table = speaker, predict_table(speaker, ids, values, sites=sites)
    write_predictions(request.out, table, run, embedded, fitted)
    if skipped:
        logger.warning(
            "%d cases hold nothing that the run reads: %s", len(skipped), name_few(skipped)
        )
    used = ["+".join(case_modalities(case)) for case in embedded.cases]
    return {
        "out": str(request.out),
        "cases": len(ids),
        "cases_by_inputs": {kind: used.count(kind) for kind in sorted(set(used))},
        "without_inputs": skipped,
        "tasks": list(dict.fromkeys(table["task"])),
        "random_backbone": run.random_backbone,
    }


def _speaker(request: PredictRequest, run: TrainedRun) -> FittedProbes | BaselineRun:
    """Return what predicts: saved probes, or a baseline's own heads unless probes are given."""
    if isinstance(run, BaselineRun) and not run.is_probed and request.probes is None:
        return run
    folder = request.probes or request.run
    fitted = load_probes(folder)
    check_probes(fitted, file_sha256(request.run / WEIGHTS), folder)
    return fitted


def _embed(run: TrainedRun, cohort: Cohort, console: Console | None) -> CohortEmbeddings:
    if console is None:
        return embed_cohort(run, cohort)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("embed", total=None)
        return embed_cohort(
            run,
            cohort,
            on_case=lambda done, all_: progress.update(task, completed=done, total=all_),
        )


def _cohort(request: PredictRequest, run: TrainedRun) -> Cohort:
    """Put the new cases together, from a cases folder or from files, joined by case id."""
    given = (request.features, request.expression, request.clinical, request.slides)
    if request.cases is not None:
        if any(given):
            raise InputError(
                "--cases must stand alone, got other inputs beside it; a cases folder holds them"
            )
        return open_cases(run, [request.cases])[0].cohort
    if not (request.features or request.expression or request.clinical):
        raise InputError(
            "--features, --expression, --clinical or --cases must be given, got none; say which "
            "cases to predict"
        )
    clinical = None if request.clinical is None else read_clinical(request.clinical)
    expression = None
    if request.expression is not None:
        expression = read_expression(request.expression, drop_constant_genes=False)
    slides, reading = _slides(request, clinical)
    return Cohort(slides, expression, clinical, reading)


def _slides(
    request: PredictRequest, clinical: pd.DataFrame | None
) -> tuple[dict[str, tuple[Path, ...]], dict[Path, SlideReading]]:
    """Find the case of every feature file: by --slides, clinical rows, barcode, or equal name."""
    files = [(root, file) for root in request.features for file in index_features(root).files]
    pt = [file.slide for _, file in files if file.producer == PT]
    if pt:
        raise FeatureFileError(
            f"features must be HDF5 or zarr, got {len(pt)} .pt files, which may carry code: "
            f"{name_few(pt)}; import them with: modaltune cases build --import-pt"
        )
    told = SlideTable({}, {}) if request.slides is None else read_slide_table(request.slides)
    if clinical is not None:
        listed = {
            slide_key(slide): str(case) for case, own in clinical["slides"].items() for slide in own
        }
        told = replace(told, case_of={**listed, **told.case_of})

    def tell(reason: str, slides: Sequence[str]) -> None:
        logger.warning("%d slides left out, %s: %s", len(slides), reason, name_few(slides))

    table = assign_slides(files, None, told, tell, request.base_mpp, request.target_mpp)
    if files and table.empty:
        raise CohortError(
            f"features must belong to cases, got {len(files)} files of none; name their cases with "
            "--slides (CSV: slide, case_id)"
        )
    found: dict[str, tuple[Path, ...]] = {}
    reading: dict[Path, SlideReading] = {}
    rows: list[dict[Any, Any]] = table.to_dict(orient="records")
    for row in rows:
        path = Path(row["root"]) / row["features"]
        found[row["case_id"]] = (*found.get(row["case_id"], ()), path)
        if row["producer"] != "modaltune":
            base, target = (
                None if pd.isna(row[name]) else float(row[name])
                for name in ("base_mpp", "target_mpp")
            )
            reading[path] = SlideReading(base, target, row["encoder"])
    return found, reading
