"""From a run folder and a cases folder to embedded cases with their split."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from modaltune.cases import Cohort
from modaltune.cases_folder import CasesFolder
from modaltune.checkpoint import WEIGHTS, Run, file_sha256, load_run
from modaltune.cohort_embeddings import (
    case_modalities,
    embed_cohort,
    read_embeddings,
    write_embeddings,
)
from modaltune.errors import CohortError, InputError
from modaltune.evaluation import EmbeddedCases
from modaltune.gene_scaler import GeneScaler
from modaltune.preprocessing import Preprocessing
from modaltune.splits import Split, read_splits

logger = logging.getLogger(__name__)

SPLIT = "split.json"
GenesScaledBy = Literal["run", "cases"]
MissingGenes = Literal["error", "mean"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class InputOptions:
    """How the inputs of another cohort than the run's own are prepared.

    Attributes:
        genes_scaled_by: "run" scales expression as in training; "cases" by the training part of
            the cases folder, as published for other cohorts (METHOD 4.6).
        missing_genes: "mean" gives genes that the table lacks their training mean.
    """

    genes_scaled_by: GenesScaledBy = "run"
    missing_genes: MissingGenes = "error"


@dataclass(frozen=True)
class EvaluatedCases:
    """A run's embeddings of a cases folder.

    Attributes:
        name: Of the run's folder.
        run: The loaded run.
        folder: The cases folder.
        split: Parts of the cases.
        is_own: The folder and split that the run was trained on.
        cases: The embeddings.
        modalities: Case -> what its embedding is made of.
        key: What the embeddings were made from.
    """

    name: str
    run: Run
    folder: CasesFolder
    split: Split
    is_own: bool
    cases: EmbeddedCases
    modalities: dict[str, tuple[str, ...]]
    key: dict[str, Any]


def run_split(run_folder: Path) -> Split | None:
    """Return the split that a run was trained on, None if it recorded none."""
    path = run_folder / SPLIT
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    if "folds" in state:
        return read_splits(path)[0]
    return Split.from_dict(state.get("split", state))


def find_cases(run_folder: Path, run: Run, cases: Path | None) -> CasesFolder:
    """Open the cases folder given, or the one that the run was trained on.

    Raises:
        InputError: The run does not say which cases it was trained on.
        CohortError: The folder is gone or changed.
    """
    recorded = run.info.get("cases")
    if cases is None and not isinstance(recorded, dict):
        raise InputError(
            f"--cases must be given, since run {run_folder} does not say which cases it was "
            "trained on, got none; build a cases folder with: modaltune cases build"
        )
    return CasesFolder.open(cases if cases is not None else recorded["path"])  # type: ignore[index]


def choose_split(run_folder: Path, run: Run, folder: CasesFolder, fold: int | None) -> Split:
    """Return the run's own split of its own cases, else a fold of the cases folder.

    Raises:
        CohortError: There is no such fold, or training cases of the run would be judged.
    """
    own = run_split(run_folder)
    if own is not None and is_own_cases(run, folder) and fold is None:
        return own
    split = folder.split(0 if fold is None else fold)
    if own is not None:
        seen = set(own.train) & {*split.val, *split.test}
        if seen:
            raise CohortError(
                f"validation and test cases must be new to run {run_folder}, got {len(seen)} that "
                "it was trained on; leave --fold out to use the run's own split"
            )
    return split


def is_own_cases(run: Run, folder: CasesFolder) -> bool:
    """Tell whether these are the cases that a run was trained on, by their content."""
    recorded = run.info.get("cases")
    return isinstance(recorded, dict) and recorded.get("sha256") == folder.sha256


def embed_cases(
    run_folder: Path,
    *,
    cases: Path | None = None,
    fold: int | None = None,
    device: str = "cpu",
    options: InputOptions | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> EvaluatedCases:
    """Embed every case of a cases folder that holds something the run can read.

    Args:
        run_folder: The trained run.
        cases: The cases folder; the run's own by default.
        fold: Of the cases folder; the run's own split by default.
        device: cpu or cuda.
        options: For cohorts that the run was not trained on.
        cache: Folder that keeps the embeddings, a Parquet file per run and cases; what is there
            already is not embedded again.
        progress: Called with cases done and cases in all.
        name: In tables; the run folder's name by default.

    Raises:
        InputError: The run, the cases or their values break a rule.
    """
    chosen = options or InputOptions()
    run = load_run(run_folder, device=device)
    folder = find_cases(run_folder, run, cases)
    split = choose_split(run_folder, run, folder, fold)
    key = {
        "weights_sha256": file_sha256(run_folder / WEIGHTS),
        "cases_sha256": folder.sha256,
        **vars(chosen),
        "scaled_by_fold": fold if chosen.genes_scaled_by == "cases" else None,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    kept = None if cache is None else cache / f"{digest[:16]}.parquet"
    table = _reusable(kept, key)
    if table is None:
        ready, cohort = _prepared(run.preprocessing, folder, split, chosen)
        told = replace(run, preprocessing=ready, info={**run.info, "embedded": key})
        embedded = embed_cohort(told, cohort, on_case=progress)
        ids = tuple(case.case_id for case in embedded.cases)
        tasks, values = told.model.config.tasks, embedded.values.numpy()
        if kept is not None:
            write_embeddings(kept, told, embedded)
        used = {case.case_id: tuple(case_modalities(case)) for case in embedded.cases}
    else:
        ids, tasks, values, used = table
    embeddings = EmbeddedCases(ids, np.asarray(values), tuple(tasks), folder.clinical)
    is_own = is_own_cases(run, folder) and split == run_split(run_folder)
    return EvaluatedCases(
        name or run_folder.resolve().name, run, folder, split, is_own, embeddings, used, key
    )


def _reusable(path: Path | None, key: dict[str, Any]) -> Any:
    """Return embeddings kept from the same run and cases, None if there are none."""
    if path is None or not path.is_file():
        return None
    table = read_embeddings(path)
    if table.provenance.get("embedded") != key:
        logger.info("%s was made from something else: embedded again", path)
        return None
    used = dict(zip(table.case_ids, table.modalities, strict=True))
    return table.case_ids, table.tasks, table.values, used


def _prepared(
    ready: Preprocessing, folder: CasesFolder, split: Split, options: InputOptions
) -> tuple[Preprocessing, Cohort]:
    """Return preprocessing and cohort as the options want them."""
    cohort, expression = folder.cohort, folder.expression
    if ready.genes is None or expression is None:
        return ready, cohort
    if options.missing_genes == "mean":
        expression = fill_missing_genes(expression, ready.genes)
        cohort = replace(cohort, expression=expression)
    if options.genes_scaled_by == "cases":
        own = [case for case in split.train if case in expression.index]
        genes = GeneScaler.fit(
            expression.loc[own, list(ready.genes.genes)],
            ready.genes.clip_quantiles,
            ready.genes.nan_policy,
        )
        ready = replace(ready, genes=genes)
    return ready, cohort


def fill_missing_genes(expression: pd.DataFrame, scaler: GeneScaler) -> pd.DataFrame:
    """Return a case x gene table in which genes that it lacks have their training mean."""
    means = dict(zip(scaler.genes, scaler.mean, strict=True))
    missing = [gene for gene in scaler.genes if gene not in expression.columns]
    if not missing:
        return expression
    logger.warning("%d genes missing, taken at their training mean", len(missing))
    filled = pd.DataFrame({gene: means[gene] for gene in missing}, index=expression.index)
    return pd.concat([expression, filled.astype("float32")], axis=1)
