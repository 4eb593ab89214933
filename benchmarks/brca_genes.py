"""Genes alone on real cohorts: ModalTune, rivals on the same genes, and other cohorts.

    python -m modaltune.benchmarks.brca_genes TCGA --out DIR [--study brca-cbioportal ...]
        [--seeds 0 1 2 3 4] [--bootstrap 1000] [--set KEY=VALUE ...] [--picture PNG]

TCGA is the folder with the published splits, expression and pathways. Everything is built and
trained in DIR, and what is there already is not made again. Models learn from the training cases;
their settings were chosen inside training and validation cases (`brca_choice`), and the test cases
are scored with them. On other cohorts the tuned model stays as it is, and only the probes are
fitted, on the training cases there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modaltune.baseline_run import BaselineRun
from modaltune.benchmarks.brca_plot import plot_rows
from modaltune.benchmarks.brca_runs import (
    CLASS_PROMPT,
    LINEAR,
    ORIENTATION,
    OURS,
    SETTINGS,
    SURVIVAL_PROMPT,
    Linear,
    build,
    components_of,
    train,
)
from modaltune.benchmarks.brca_scores import Judged, Said, differences, said_by, scores
from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.cases_folder import CasesFolder
from modaltune.config import PUBLISHED_TASKS
from modaltune.engine.errors import InputError
from modaltune.evaluated_cases import EvaluatedCases, InputOptions, embed_cases
from modaltune.evaluation import EMBEDDING, evaluate_cases
from modaltune.result_rows import BootstrapOptions

CSV_NAME, DIFFERENCES_NAME = "brca_genes.csv", "brca_genes_differences.csv"
# A cohort that models are trained on, and those that they are taken to.
STUDIES: dict[str, tuple[str, ...]] = {
    "brca-cbioportal": ("blca-cbioportal", "coadread-cbioportal"),
    "blca-xena": ("coadread-xena",),
}
# Genes are scaled by the other cohort's training cases, as published (METHOD 4.6).
ELSEWHERE = InputOptions(genes_scaled_by="cases", missing_genes="mean")


def linear_model(cases: CasesFolder, linear: Linear, source: CasesFolder | None = None) -> Judged:
    """Return logistic regression and Cox on principal components of the genes.

    Args:
        cases: Whose training cases the probes are fitted on.
        linear: Components and clipping.
        source: Cohort that the components were fitted on; by default the same.
    """
    embedded = components_of(cases, linear, source=source)
    found = evaluate_cases(embedded, cases.split(), name=linear.name, parts=("test",))
    place = "" if source is None else f" of {source.path.name}"
    return Judged(f"{linear.name}{place}", "genes", (said_by(found, "genes", "genes"),))


def rival_model(name: str, runs: Sequence[Path], cases: CasesFolder | None = None) -> Judged:
    """Return a supervised rival: by its own heads at home, by probes on another cohort.

    Args:
        name: Of the rival.
        runs: Run folders, one per seed.
        cases: Another cohort, on whose training cases the probes are fitted.
    """
    found = []
    for run in runs:
        embedded = embedded_run(run, cases)
        if cases is None and isinstance(embedded.run, BaselineRun):
            own = embedded.cases
            said = embedded.run.predict_embedded(own.case_ids, own.embeddings)
            found.append(Said(said, said))
        else:
            probed = evaluate_cases(embedded.cases, embedded.split, parts=("test",))
            found.append(said_by(probed, EMBEDDING, EMBEDDING))
    return Judged(name, "its own heads" if cases is None else EMBEDDING, tuple(found))


def our_models(runs: Sequence[Path], cases: CasesFolder | None = None) -> list[Judged]:
    """Return ModalTune as it is judged, then each task prompt on its own.

    Args:
        runs: Run folders, one per seed.
        cases: Another cohort, on whose training cases the probes are fitted.
    """
    found = []
    for run in runs:
        embedded = embedded_run(run, cases)
        found.append(evaluate_cases(embedded.cases, embedded.split, parts=("test",)))
    judged = (CLASS_PROMPT, SURVIVAL_PROMPT)
    others = [(task, task) for task in PUBLISHED_TASKS if (task, task) != judged]
    return [
        Judged(OURS, one if one == two else f"{one}, {two}",
               tuple(said_by(evaluation, one, two) for evaluation in found))
        for one, two in (judged, *others)
    ]  # fmt: skip


def embedded_run(run: Path, cases: CasesFolder | None) -> EvaluatedCases:
    """Embed the cases that a run was trained on, or another cohort; kept in the run folder."""
    asked = () if cases is None else (cases.path,)
    options = None if cases is None else ELSEWHERE
    return embed_cases(run, cases=asked, options=options, cache=run / "embeddings")


def models_at_home(cases: CasesFolder, folder: Path, options: argparse.Namespace) -> list[Judged]:
    """Return every model of the cohort that it is trained on, ModalTune first."""
    runs = trained(cases, folder, options)
    rivals = [rival_model(name, own) for name, own in runs.items() if name != OURS]
    linear = [linear_model(cases, one) for one in (LINEAR, ORIENTATION)]
    return [*our_models(runs[OURS]), *linear, *rivals]


def models_elsewhere(
    cases: CasesFolder, other: CasesFolder, folder: Path, options: argparse.Namespace
) -> list[Judged]:
    """Return every model on a cohort it was not trained on, ModalTune first."""
    runs = trained(cases, folder, options)
    rivals = [rival_model(name, own, other) for name, own in runs.items() if name != OURS]
    linear = [linear_model(other, LINEAR, cases), linear_model(other, LINEAR)]
    return [*our_models(runs[OURS], other), *linear, *rivals]


def trained(cases: CasesFolder, folder: Path, options: argparse.Namespace) -> dict[str, list[Path]]:
    """Return the run folders of every model, trained where they are not there."""
    return {
        name: [
            train(name, cases, folder / f"{name}-{seed}", seed, options.set)
            for seed in options.seeds
        ]
        for name in SETTINGS
    }


def study(name: str, options: argparse.Namespace) -> Iterator[tuple[CasesFolder, list[Judged]]]:
    """Yield cohorts and the models judged on them: the training cohort first."""
    folder = options.out / f"{name}-runs"
    cases = build(options.tcga, options.out, *name.split("-"))
    yield cases, models_at_home(cases, folder, options)
    for other in () if options.at_home else STUDIES[name]:
        there = build(options.tcga, options.out, *other.split("-"))
        yield there, models_elsewhere(cases, there, folder, options)


def rows_of(
    name: str, cases: CasesFolder, models: Sequence[Judged], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of scores, and of ModalTune minus each rival."""
    draws, test = BootstrapOptions(options.bootstrap), cases.split().test
    common = {
        "time": timestamp(), "commit": commit_id(),
        "device": f"{cpu_model()}, {os.cpu_count()} cores", "trained_on": name,
        "cohort": cases.path.name, "settings": " ".join(options.set),
        "resamples": options.bootstrap,
    }  # fmt: skip
    found, compared = [], []
    for model in models:
        for row in scores(model, cases.clinical, test, draws):
            found.append(
                {
                    **common, "model": model.name, "reading": model.reading,
                    "seeds": len(model.seeds), "metric": row.metric, "value": row.value,
                    "sd": row.spread, "low": row.low, "high": row.high, "cases": row.n,
                    "events": row.events,
                }
            )  # fmt: skip
    ours = models[0]
    for rival in (model for model in models if model.name != OURS):
        for gap in differences(ours, rival, cases.clinical, test, draws):
            compared.append(
                {
                    **common, "model": ours.name, "rival": rival.name, "metric": gap.metric,
                    "value": gap.first, "rival_value": gap.second, "difference": gap.difference,
                    "low": gap.low, "high": gap.high, "p_bootstrap": gap.p_value,
                }
            )  # fmt: skip
    return found, compared


def printable(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its figures to four places; what is undefined is empty."""
    return {
        key: ("" if value != value else f"{value:.4f}") if isinstance(value, float) else value
        for key, value in row.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.brca_genes",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("tcga", type=Path, help="folder with splits, expression and pathways")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--study", choices=tuple(STUDIES), nargs="+", default=list(STUDIES))
    parser.add_argument("--at-home", action="store_true", help="leave other cohorts out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of patients")
    parser.add_argument("--set", action="append", default=[], help="key=value over genes.toml")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    try:
        results = results_folder(options.results)
        for name in options.study:
            for cases, models in study(name, options):
                rows, compared = rows_of(name, cases, models, options)
                found += rows
                for file, own in ((CSV_NAME, rows), (DIFFERENCES_NAME, compared)):
                    for row in map(printable, own):
                        print(json.dumps(row), flush=True)
                        if results is not None:
                            append_row(results / file, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.picture is not None:
        plot_rows(found, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
