"""How settings for genes alone are chosen: cross-validation inside the training and validation set.

    python -m modaltune.benchmarks.brca_choice TCGA --out DIR [--model modaltune]
        [--set KEY=VALUE ...] [--epochs 4 8 12] [--repeats 2]

No test case is looked at: the folds are cut from the training and validation cases of the published
split, stratified by class and death. In each fold everything is fitted on the other folds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from modaltune.baseline_run import BaselineRun
from modaltune.benchmarks.brca_runs import (
    LINEAR,
    OURS,
    SETTINGS,
    Linear,
    build,
    components_of,
    config_of,
)
from modaltune.benchmarks.harness import append_row, commit_id, results_folder, timestamp
from modaltune.cases_folder import DESCRIPTION, CasesContent, CasesFolder, write_cases_folder
from modaltune.engine.errors import InputError
from modaltune.evaluation import EmbeddedCases, Evaluation, evaluate_cases, evaluate_predictions
from modaltune.fitting import fit_preprocessing
from modaltune.labels import label_cohort
from modaltune.learner import embed_all
from modaltune.run_config import RunConfig
from modaltune.splits import Split
from modaltune.text_encoders import embed_labels, load_text_encoder
from modaltune.train import EpochLog, Training, Watcher, fit
from modaltune.train_prepare import Prepared, prepare

CSV_NAME = "brca_choice.csv"
METRICS = ("balanced_accuracy", "auroc", "c_index")
FOLDS = 5


def folds(cases: CasesFolder, repeats: int) -> Iterator[Split]:
    """Yield splits of the training and validation cases with genes: a fold is `val`, no `test`."""
    own, genes = cases.split(), cases.expression
    known = set() if genes is None else set(genes.index)
    ids = [case for case in (*own.train, *own.val) if case in known]
    rows = cases.clinical.loc[ids]
    strata = rows["primary_class"].fillna(-1).astype(int) * 2 + rows["event"].fillna(0).astype(int)
    for repeat in range(repeats):
        cut = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat)
        for learned, judged in cut.split(ids, strata):
            yield Split(tuple(ids[i] for i in learned), tuple(ids[i] for i in judged), ())


def folds_folder(cases: CasesFolder, repeats: int) -> CasesFolder:
    """Write the training and validation cases as a cases folder with a split per fold, or open it.

    The test cases are not in it.
    """
    folder = cases.path.with_name(f"{cases.path.name}-folds{repeats}")
    if (folder / DESCRIPTION).is_file():
        return CasesFolder.open(folder)
    splits = list(folds(cases, repeats))
    ids, genes = [*splits[0].train, *splits[0].val], cases.expression
    content = CasesContent(
        clinical=cases.clinical.loc[ids],
        expression=None if genes is None else genes.loc[ids],
        pathways=cases.pathways,
        slides=None,
        splits=splits,
    )
    return write_cases_folder(folder, content)


def embedded_labels(cases: CasesFolder, fold: int) -> Path:
    """Return a file with the label embeddings of a fold's training cases, made once."""
    path = cases.path.with_name(f"{cases.path.name}-text{fold}.safetensors")
    if not path.is_file():
        split = cases.split(fold)
        bins = fit_preprocessing(cases, split, use_slides=False).survival
        sentences = label_cohort(cases.clinical.loc[list(split.train)], bins)
        embed_labels(sentences, load_text_encoder()).save(path)
    return path


class _EachEpoch(Watcher):
    """Scores the validation fold after some epochs: by probes, or a rival by its own heads."""

    def __init__(self, prepared: Prepared, epochs: Sequence[int]) -> None:
        self.prepared, self.epochs = prepared, epochs
        self.found: dict[int, Evaluation] = {}

    def epoch(self, training: Training, log: EpochLog) -> bool:
        if log.epoch + 1 in self.epochs:
            self.found[log.epoch + 1] = self._judge()
        return False

    def _judge(self) -> Evaluation:
        prepared, run = self.prepared, self.prepared.run
        labels, split = prepared.pooled.clinical, prepared.pooled.split
        prepared.learner.model.eval()
        parts, size = (prepared.train, prepared.val), prepared.config.training.cases_per_batch
        values = [embed_all(prepared.learner, p, range(len(p)), size).numpy() for p in parts]
        if isinstance(run, BaselineRun):
            said = run.predict_embedded(parts[1].case_ids, values[1])
            return evaluate_predictions(said, labels, split, name="rival", parts=("val",))
        ids = (*parts[0].case_ids, *parts[1].case_ids)
        cases = EmbeddedCases(ids, np.concatenate(values), run.tasks, labels)
        return evaluate_cases(cases, split, parts=("val",))


def judge(
    cases: CasesFolder, fold: int, config: RunConfig, epochs: Sequence[int]
) -> dict[int, Evaluation]:
    """Train on a fold's training cases; return the scores of the others after some epochs."""
    update: dict[str, Any] = {"cases": config.cases.model_copy(update={"fold": fold})}
    if config.learner.kind == OURS:
        path = embedded_labels(cases, fold)
        update["text"] = config.text.model_copy(update={"embeddings": path})
    prepared = prepare(config.model_copy(update=update))
    watcher = _EachEpoch(prepared, epochs)
    fit(prepared.learner, prepared.train, config.training, watcher=watcher)
    return watcher.found


def judge_linear(cases: CasesFolder, fold: int, linear: Linear) -> Evaluation:
    """Fit components and probes on a fold's training cases and score the others."""
    split = cases.split(fold)
    embedded = components_of(cases, linear, split)
    return evaluate_cases(embedded, split, name=linear.name, parts=("val",))


def values_of(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the metrics of one evaluation, a row per task prompt."""
    found: dict[str, dict[str, Any]] = {}
    for place, scorer in evaluation.scorers.items():
        values = scorer.score(np.arange(len(scorer.case_ids)))
        row = found.setdefault(place.task, {"task": place.task})
        row |= {n: v for n, v in zip(scorer.names, values, strict=True) if n in METRICS}
    return list(found.values())


def judged(
    cases: CasesFolder, options: argparse.Namespace
) -> Iterator[tuple[str, int, Evaluation]]:
    """Yield model, epochs and evaluation of every fold."""
    for fold in range(cases.num_folds):
        if options.model == "linear":
            for count in options.components:
                linear = Linear(count, LINEAR.clip)
                yield linear.name, 0, judge_linear(cases, fold, linear)
            continue
        config = config_of(options.model, cases, fold, options.set)
        epochs = options.epochs or [config.training.epochs]
        if max(epochs) > config.training.epochs:
            raise InputError(
                f"--epochs must be at most training.epochs = {config.training.epochs}, got "
                f"{max(epochs)}; raise it with --set training.epochs=N"
            )
        for count, evaluation in judge(cases, fold, config, epochs).items():
            yield options.model, count, evaluation


def summary(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return means and standard deviations over folds, a row per model, epochs and prompt."""
    table = pd.DataFrame(found)
    groups = table.groupby(["model", "epochs", "task"], sort=False)[list(METRICS)]
    both = groups.mean().join(groups.std(ddof=1), rsuffix="_sd").reset_index()
    both["mean_of_two"] = (both["balanced_accuracy"] + both["c_index"]) / 2
    return both.assign(folds=groups.size().to_numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    """Cross-validate from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.brca_choice",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("tcga", type=Path, help="folder with splits, expression and pathways")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--cohort", choices=("brca", "blca", "coadread"), default="brca")
    parser.add_argument("--source", choices=("cbioportal", "xena"), default="cbioportal")
    parser.add_argument("--model", choices=(*SETTINGS, "linear"), default=OURS)
    parser.add_argument("--set", action="append", default=[], help="key=value over the model's")
    parser.add_argument("--epochs", type=int, nargs="+", help="judged after; the last by default")
    parser.add_argument("--components", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=2, help="of the five folds")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        results = results_folder(options.results)
        whole = build(options.tcga, options.out, options.cohort, options.source)
        cases = folds_folder(whole, options.repeats)
        found = [
            {"model": name, "epochs": epochs, **row}
            for name, epochs, evaluation in judged(cases, options)
            for row in values_of(evaluation)
        ]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in summary(found).to_dict(orient="records"):
        own = {str(k): f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
        told: dict[str, object] = {
            "time": timestamp(), "commit": commit_id(), "cores": os.cpu_count(),
            "cohort": whole.path.name, "settings": " ".join(options.set), **own,
        }  # fmt: skip
        print(json.dumps(told), flush=True)
        if results is not None:
            append_row(results / CSV_NAME, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
