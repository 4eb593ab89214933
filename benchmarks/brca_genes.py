"""Genes alone on a real cohort: what probes read off them, and off the embeddings of runs.

    python -m modaltune.benchmarks.brca_genes TCGA --out DIR [--cohort brca] [--source cbioportal]
        [--runs RUN ...] [--bootstrap 1000] [--json]

TCGA is the folder with the published splits, expression and pathways. The cases folder is built in
DIR (kept if it is there), the published probes are fitted on principal components of the training
cases' genes, and scored on the test cases; runs (seeds of one recipe, trained on that cases folder)
are scored beside them, with paired differences. Everything is fitted on training cases.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.cases_build import build_cases
from modaltune.cases_folder import DESCRIPTION, CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.engine.errors import InputError
from modaltune.evaluated_cases import embed_cases
from modaltune.evaluation import EmbeddedCases, Evaluation, evaluate_cases
from modaltune.evaluation_tables import comparison_table, json_rows, score_table, seeds_table
from modaltune.fitting import fit_preprocessing
from modaltune.result_rows import BootstrapOptions

CSV_NAME = "brca_genes.csv"
COMPONENTS = 32
SHOWN = ("balanced_accuracy", "auroc", "c_index", "uno_c_index")
TABLES = {"cbioportal": "tcga_{}_all_clean.csv.zip", "xena": "tcga_{}_rnaseq_xena.csv.gz"}


def build(tcga: Path, out: Path, cohort: str, source: str) -> CasesFolder:
    """Build the cases folder of a cohort with its published split, or open it."""
    folder = out / f"{cohort}-{source}"
    if (folder / DESCRIPTION).is_file():
        return CasesFolder.open(folder)
    train, val, test = (
        tcga / "splits" / f"{cohort}_{part}.json.gz" for part in ("train", "val", "test")
    )
    request = CasesRequest(
        published_split=(train, val, test),
        clinical=(tcga / TABLES["cbioportal"].format(cohort),),
        expression=(tcga / TABLES[source].format(cohort),),
        pathways=tcga / "pathways_hallmark_reactome_331.csv.gz",
        duplicate_cases="first",
    )
    return build_cases(request, folder)


def components_of(cases: CasesFolder, count: int = COMPONENTS) -> EmbeddedCases:
    """Return principal components of standardised genes as an embedding; fitted on train."""
    split, genes = cases.split(), cases.expression
    if genes is None:
        raise InputError(
            "cases must have expression, got none; build them with an expression table"
        )
    fitted = fit_preprocessing(cases, split, use_slides=False)
    values = fitted.gene_values(genes).numpy().astype(np.float64)
    train = genes.index.isin(split.train)
    components = PCA(count, random_state=0).fit(values[train]).transform(values)
    return EmbeddedCases(tuple(genes.index), components[:, None], ("genes",), cases.clinical)


def scored(
    cases: CasesFolder, runs: Sequence[Path], options: BootstrapOptions, components: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the scores of the linear model and of runs, and the paired differences per prompt."""
    split = cases.split()
    name = f"linear, {components} components"
    linear = evaluate_cases(components_of(cases, components), split, name=name)
    tables, differences = [score_table(linear, options)], []
    found = [_run(path, cases, split) for path in runs]
    if len(found) > 1:
        tables.append(seeds_table(found, options, f"ModalTune, {len(found)} seeds"))
    elif found:
        tables.append(score_table(found[0], options))
    for task in found[0].fitted.tasks if found and found[0].fitted else ():
        own = [_one_prompt(evaluation, task) for evaluation in found]
        differences.append(comparison_table(own, [linear], options).assign(task=task))
    empty = pd.DataFrame()
    return pd.concat(tables), pd.concat(differences) if differences else empty


def _run(path: Path, cases: CasesFolder, split: Any) -> Evaluation:
    embedded = embed_cases(path, cases=(cases.path,), cache=path / "embeddings")
    return evaluate_cases(embedded.cases, split, name=path.name)


def _one_prompt(evaluation: Evaluation, task: str) -> Evaluation:
    """Return the scores of one prompt under the name that the linear model has."""

    def renamed(parts: Any) -> dict[Any, Any]:
        return {p._replace(task="genes"): v for p, v in parts.items() if p.task == task}

    return Evaluation(
        evaluation.name,
        evaluation.fitted,
        evaluation.labels,
        renamed(evaluation.predictions),
        renamed(evaluation.scorers),
        renamed(evaluation.groups),
        evaluation.missing,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Score from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.brca_genes",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("tcga", type=Path, help="folder with splits, expression and pathways")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--cohort", choices=("brca", "blca", "coadread"), default="brca")
    parser.add_argument("--source", choices=tuple(TABLES), default="cbioportal")
    parser.add_argument("--runs", type=Path, nargs="*", default=(), help="seeds of one recipe")
    parser.add_argument("--components", type=int, default=COMPONENTS)
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        results = results_folder(options.results)
        cases = build(options.tcga, options.out, options.cohort, options.source)
        draws = BootstrapOptions(options.bootstrap)
        scores, differences = scored(cases, options.runs, draws, options.components)
        shown = scores[scores["metric"].isin(SHOWN)]
        for row in shown.to_dict(orient="records"):
            if results is not None:
                append_row(results / CSV_NAME, _row(row, options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"scores": json_rows(shown), "differences": json_rows(differences)}))
        return 0
    columns = ["run", "split", "task", "metric", "value", "low", "high", "n", "events"]
    print(shown[columns].round(3).to_string(index=False))
    if not differences.empty:
        own = differences[differences["metric"].isin(SHOWN)]
        columns = ["split", "task", "metric", "first_value", "second_value", "difference", "low",
                   "high", "p_bootstrap"]  # fmt: skip
        print(own[columns].round(3).to_string(index=False))
    return 0


def _row(row: dict[Any, Any], options: argparse.Namespace) -> dict[str, object]:
    return {
        "time": timestamp(),
        "commit": commit_id(),
        "device": f"{cpu_model()}, {os.cpu_count()} cores",
        "cohort": f"{options.cohort}-{options.source}",
        "model": row["run"],
        "split": row["split"],
        "task": row["task"],
        "metric": row["metric"],
        "value": f"{row['value']:.4f}",
        "low": f"{row['low']:.4f}",
        "high": f"{row['high']:.4f}",
        "cases": row["n"],
        "events": row["events"],
        "resamples": options.bootstrap,
        "seeds": "" if pd.isna(row.get("seeds", np.nan)) else int(row["seeds"]),
        "sd": "" if pd.isna(row.get("sd", np.nan)) else f"{row['sd']:.4f}",
    }


if __name__ == "__main__":
    sys.exit(main())
