"""From a run folder and cases folders to embedded cases with their split."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from modaltune.baseline_run import open_run
from modaltune.cases import Cohort
from modaltune.cases_folder import CasesFolder
from modaltune.checkpoint import WEIGHTS, file_sha256
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
from modaltune.splits import Split
from modaltune.train_cases import PooledCases, pool_cases
from modaltune.trained_run import TrainedRun

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
    """A run's embeddings of one or several cases folders.

    Attributes:
        name: Of the run.
        run: The loaded run.
        folders: The cases folders.
        split: Parts of the cases.
        is_own: The folders and split that the run was trained on.
        cases: The embeddings.
        modalities: Case -> what its embedding is made of.
        key: What the embeddings were made from.
    """

    name: str
    run: TrainedRun
    folders: tuple[CasesFolder, ...]
    split: Split
    is_own: bool
    cases: EmbeddedCases
    modalities: dict[str, tuple[str, ...]]
    key: dict[str, Any]

    @property
    def cases_name(self) -> str:
        """The names of the cases folders."""
        return "+".join(folder.path.resolve().name for folder in self.folders)

    @property
    def cases_sha256(self) -> str:
        """What tells these cases from others: the folders' hash, or the hash of several."""
        return cases_sha256(self.folders)


def cases_sha256(folders: Sequence[CasesFolder]) -> str:
    """Return the hash of a cases folder's content, or one of several folders, in any order."""
    digests = sorted(folder.sha256 for folder in folders)
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def run_split(run_folder: Path) -> Split | None:
    """Return the split that a run was trained on, None if it recorded none."""
    path = run_folder / SPLIT
    if not path.is_file():
        return None
    return Split.from_dict(json.loads(path.read_text(encoding="utf-8")))


def find_cases(run_folder: Path, run: TrainedRun, cases: Sequence[Path]) -> tuple[CasesFolder, ...]:
    """Open the cases folders given, or those that the run was trained on.

    Raises:
        InputError: The run does not say which cases it was trained on.
        CohortError: A folder is gone or changed.
    """
    recorded = run.info.get("cases")
    if not cases and not recorded:
        raise InputError(
            f"--cases must be given, since run {run_folder} does not say which cases it was "
            "trained on, got none; build a cases folder with: modaltune cases build"
        )
    return open_cases(run, cases or [source["path"] for source in recorded or ()])


def open_cases(run: TrainedRun, paths: Sequence[str | Path]) -> tuple[CasesFolder, ...]:
    """Open cases folders; features of the run's own are looked for where training found them.

    Raises:
        CohortError: A folder is gone or changed.
    """
    folders = tuple(CasesFolder.open(path) for path in paths)
    moved = run.info.get("run_config", {}).get("cases", {}).get("features")
    if moved is None:
        return folders
    own = {source["sha256"] for source in run.info.get("cases") or ()}
    return tuple(
        replace(folder, features_root=Path(moved)) if folder.sha256 in own else folder
        for folder in folders
    )


def is_own_cases(run: TrainedRun, folders: Sequence[CasesFolder]) -> bool:
    """Tell whether these are the cases that a run was trained on, by their content."""
    recorded = {source["sha256"] for source in run.info.get("cases") or ()}
    return recorded == {folder.sha256 for folder in folders}


def _choose(
    run_folder: Path, run: TrainedRun, folders: Sequence[CasesFolder], fold: int | None
) -> PooledCases:
    """Pool the folders, with the run's own split of its own cases, else a fold of the folders.

    Raises:
        CohortError: There is no such fold, or training cases of the run would be judged.
    """
    own = run_split(run_folder)
    pooled = pool_cases(folders, 0 if fold is None else fold)
    if own is not None and is_own_cases(run, folders) and fold is None:
        return replace(pooled, split=own)
    if seen := seen_cases(own, pooled.split):
        raise CohortError(
            f"validation and test cases must be new to run {run_folder}, got {len(seen)} that "
            "it was trained on or chosen by; leave --fold out to use the run's own split"
        )
    return pooled


def seen_cases(own: Split | None, judged: Split) -> set[str]:
    """Return the cases to be judged that a run knows: trained on, or, of test cases, chosen by.

    Args:
        own: The split that the run was trained on; its epoch was chosen on the validation part.
        judged: The split whose validation and test parts are scored.
    """
    if own is None:
        return set()
    return (set(own.train) & {*judged.val, *judged.test}) | (set(own.val) & set(judged.test))


def with_sites(pooled: PooledCases, folders: Sequence[CasesFolder]) -> pd.DataFrame:
    """Return the clinical rows; where folders are several, a folder is a site for want of one."""
    clinical = pooled.clinical
    if len(folders) < 2:
        return clinical
    names = [folders[pooled.site[str(case)]].path.resolve().name for case in clinical.index]
    own = pd.Series(names, index=clinical.index)
    return clinical.assign(site=clinical["site"].where(clinical["site"].notna(), own))


def embed_cases(
    run_folder: Path,
    *,
    cases: Sequence[Path] = (),
    fold: int | None = None,
    device: str = "cpu",
    options: InputOptions | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> EvaluatedCases:
    """Embed every case of one or several cases folders that holds something the run can read.

    All tiles of a case are used, whatever limit the run was trained with.

    Args:
        run_folder: The trained run.
        cases: The cases folders; the run's own by default.
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
    run = open_run(run_folder, device=device)
    folders = find_cases(run_folder, run, cases)
    pooled = _choose(run_folder, run, folders, fold)
    key = {
        "weights_sha256": file_sha256(run_folder / WEIGHTS),
        "cases_sha256": cases_sha256(folders),
        **vars(chosen),
        "scaled_by_fold": fold if chosen.genes_scaled_by == "cases" else None,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    kept = None if cache is None else cache / f"{digest[:16]}.parquet"
    table = _reusable(kept, key)
    if table is None:
        ready, cohort = _prepared(run.preprocessing, pooled, chosen)
        told = run.with_inputs(ready, {**run.info, "embedded": key})
        embedded = embed_cohort(told, cohort, on_case=progress)
        ids = tuple(case.case_id for case in embedded.cases)
        tasks, values = told.tasks, embedded.values.numpy()
        if kept is not None:
            write_embeddings(kept, told, embedded)
        used = {case.case_id: tuple(case_modalities(case)) for case in embedded.cases}
    else:
        ids, tasks, values, used = table
    clinical = with_sites(pooled, folders)
    embeddings = EmbeddedCases(ids, np.asarray(values), tuple(tasks), clinical)
    is_own = is_own_cases(run, folders) and pooled.split == run_split(run_folder)
    return EvaluatedCases(
        name or run_folder.resolve().name,
        run,
        folders,
        pooled.split,
        is_own,
        embeddings,
        used,
        key,
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
    ready: Preprocessing, pooled: PooledCases, options: InputOptions
) -> tuple[Preprocessing, Cohort]:
    """Return preprocessing and cohort as the options want them."""
    cohort, expression = pooled.cohort, pooled.cohort.expression
    if ready.genes is None or expression is None:
        return ready, cohort
    if options.missing_genes == "mean":
        expression = fill_missing_genes(expression, ready.genes)
        cohort = replace(cohort, expression=expression)
    if options.genes_scaled_by == "cases":
        own = [case for case in pooled.split.train if case in expression.index]
        ready.genes.check_genes(list(expression.columns))
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
