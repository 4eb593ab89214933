"""Predictions for new cases: class probabilities, risk and survival from saved probes.

Nothing is fitted here. A row per case and task prompt; a missing modality is left out of its case.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from modaltune.cases import Cohort, SlideReading
from modaltune.cases_folder import CasesFolder
from modaltune.cases_join import SlideTable, assign_slides, read_slide_table, slide_key
from modaltune.checkpoint import WEIGHTS, Run, file_sha256, load_run
from modaltune.clinical import read_clinical
from modaltune.cohort_embeddings import CohortEmbeddings, case_modalities, embed_cohort
from modaltune.engine.atomic import atomic_path
from modaltune.engine.feature_index import PT, index_features
from modaltune.errors import CohortError, FeatureFileError, InputError
from modaltune.evaluated_cases import MissingGenes, fill_missing_genes
from modaltune.fitted_probes import POOLED, FittedProbes, site_names
from modaltune.omics import read_expression
from modaltune.predictions import Predictions, predict_sites, predict_with
from modaltune.probe_files import load_probes
from modaltune.run_evaluation import check_probes
from modaltune.survival_groups import group_of
from modaltune.tables import name_few

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
            tables.append(_rows(fitted, said, task, scope, rows))
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


def _rows(
    fitted: FittedProbes, said: Predictions, task: str, scope: str, rows: Any
) -> pd.DataFrame:
    own = fitted.probes[task, scope]
    columns: dict[str, Any] = {"row": rows, "case_id": list(said.case_ids)}
    columns |= {"task": task, "scope": scope}
    if said.probabilities is not None and said.labels is not None:
        for k, label in enumerate(said.labels):
            columns[f"class_{label}"] = said.probabilities[:, k]
        columns["predicted_class"] = said.labels[said.probabilities.argmax(1)]
    if said.risk is not None and said.survival is not None and said.months is not None:
        columns["risk"] = said.risk
        columns["risk_group"] = group_of(
            said.risk, np.nan if own.risk_cut is None else own.risk_cut
        )
        for k, month in enumerate(said.months):
            columns[f"survival_{month:g}m"] = said.survival[:, k]
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
    run = load_run(request.run, device=request.device)
    fitted = load_probes(request.probes or request.run)
    check_probes(fitted, file_sha256(request.run / WEIGHTS), request.probes or request.run)
    cohort = _cohort(request)
    if (
        run.preprocessing.genes is not None
        and cohort.expression is not None
        and (request.missing_genes == "mean")
    ):
        filled = fill_missing_genes(cohort.expression, run.preprocessing.genes)
        cohort = replace(cohort, expression=filled)
    embedded = _embed(run, cohort, console)
    ids = [case.case_id for case in embedded.cases]
    sites = None
    if cohort.clinical is not None:
        known = cohort.clinical.set_axis(cohort.clinical.index.map(str), axis=0)
        sites = list(site_names(known.reindex(ids)))
    table = predict_table(fitted, ids, embedded.values.numpy(), sites=sites)
    write_predictions(request.out, table, run, embedded, fitted)
    skipped = sorted(set(cohort.case_ids) - set(ids))
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
        "tasks": list(fitted.tasks),
        "random_backbone": run.model.config.random_backbone,
    }


def _embed(run: Run, cohort: Cohort, console: Console | None) -> CohortEmbeddings:
    if console is None:
        return embed_cohort(run, cohort)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("embed", total=None)
        return embed_cohort(
            run,
            cohort,
            on_case=lambda done, all_: progress.update(task, completed=done, total=all_),
        )


def _cohort(request: PredictRequest) -> Cohort:
    """Put the new cases together, from a cases folder or from files, joined by case id."""
    given = (request.features, request.expression, request.clinical, request.slides)
    if request.cases is not None:
        if any(given):
            raise InputError(
                "--cases must stand alone, got other inputs beside it; a cases folder holds them"
            )
        return CasesFolder.open(request.cases).cohort
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


def write_predictions(
    path: Path, table: pd.DataFrame, run: Run, embedded: CohortEmbeddings, fitted: FittedProbes
) -> Path:
    """Write predictions with their embeddings as Parquet, CSV or h5ad, by the file's suffix.

    Parquet and CSV have a row per case and task prompt. h5ad has a row per case: X is the embedding
    of the first prompt, `obsm` those of all, `obs` the predictions as `<task>_<column>`.
    """
    used = {c.case_id: "+".join(case_modalities(c)) for c in embedded.cases}
    tiles = {c.case_id: sum(len(s) for s in c.slides) for c in embedded.cases}
    full = table.copy()
    full.insert(2, "modalities", full["case_id"].map(used))
    full.insert(3, "tiles", full["case_id"].map(tiles).astype("int64"))
    full.insert(4, "random_backbone", run.model.config.random_backbone)
    provenance = {
        **run.info,
        "random_backbone": run.model.config.random_backbone,
        "probes": dict(fitted.info),
    }
    with atomic_path(path) as temporary:
        if path.suffix == ".h5ad":
            _write_h5ad(temporary, full, embedded, fitted, provenance)
        elif path.suffix == ".csv":
            flat = embedded.values.reshape(len(full), -1).numpy()
            names = [f"embedding_{k}" for k in range(flat.shape[1])]
            wide = pd.concat([full, pd.DataFrame(flat, columns=names)], axis=1)
            wide.to_csv(temporary, index=False)
        else:
            width = embedded.values.shape[-1]
            flat = pa.array(embedded.values.reshape(-1).numpy())
            rows = pa.Table.from_pandas(full, preserve_index=False)
            rows = rows.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, width))
            text = json.dumps(provenance)
            pq.write_table(rows.replace_schema_metadata({"modaltune": text}), temporary)
    return path


def _write_h5ad(
    path: Path,
    full: pd.DataFrame,
    embedded: CohortEmbeddings,
    fitted: FittedProbes,
    provenance: dict[str, Any],
) -> None:
    try:
        import anndata
    except ImportError as error:
        raise InputError(
            "h5ad must be written by anndata, got an installation without it; pip install "
            "'modaltune[anndata]', or write Parquet"
        ) from error
    about = ["modalities", "tiles", "random_backbone"]
    per_case = full.drop_duplicates("case_id").set_index("case_id")[about].copy()
    for task in fitted.tasks:
        own = full[full["task"] == task].set_index("case_id").drop(columns=["task", *about])
        per_case = per_case.join(own.add_prefix(f"{task}_"))
    values = embedded.values.numpy()
    data = anndata.AnnData(X=values[:, 0], obs=per_case)
    for column, task in enumerate(fitted.tasks):
        data.obsm[f"X_{task}"] = values[:, column]
    data.uns["modaltune"] = json.dumps(provenance)
    data.write_h5ad(path)
