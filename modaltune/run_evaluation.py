"""`modaltune evaluate`: from run and cases folders to tables, pictures and saved probes."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modaltune.baseline_run import BaselineRun
from modaltune.checkpoint import file_sha256
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.errors import CheckpointError, CohortError
from modaltune.evaluated_cases import (
    EvaluatedCases,
    InputOptions,
    embed_cases,
    run_split,
    seen_cases,
)
from modaltune.evaluation import Evaluation, evaluate_cases, evaluate_predictions, fit_on
from modaltune.evaluation_pictures import draw_evaluation, draw_forest
from modaltune.evaluation_report import class_names, report_markdown
from modaltune.evaluation_tables import (
    all_predictions,
    comparison_table,
    fit_table,
    headline_table,
    json_rows,
    score_table,
    seeds_table,
    write_table,
)
from modaltune.fitted_probes import FittedProbes, ScopeProbes, site_names
from modaltune.predictions import read_predictions
from modaltune.probe_files import load_probes, save_probes
from modaltune.result_rows import BootstrapOptions
from modaltune.run_names import TABLES, check_distinct, names_of_runs

logger = logging.getLogger(__name__)

ProbesFrom = Literal["cases", "run"]


@dataclass(frozen=True)
class EvaluateRequest:
    """What `modaltune evaluate` was asked for; see its help."""

    run: Path
    cases: tuple[Path, ...] = ()
    out: Path | None = None
    fold: int | None = None
    seeds: tuple[Path, ...] = ()
    compare: tuple[tuple[Path, ...], ...] = ()
    probes: ProbesFrom = "cases"
    bootstrap: BootstrapOptions = field(default_factory=BootstrapOptions)
    penalizer: float = 0.1
    inputs: InputOptions = field(default_factory=InputOptions)
    pictures: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class EvaluateResult:
    """What was found, and where it lies.

    Attributes:
        headline: The main metrics of the test cases.
        scores: All metrics, a row each.
        fits: How the probes' fits went.
        comparison: Differences to other runs; empty if none was asked for.
        summary: `evaluation.json`.
        written: Files and folders.
    """

    headline: pd.DataFrame
    scores: pd.DataFrame
    fits: pd.DataFrame
    comparison: pd.DataFrame
    summary: dict[str, Any]
    written: tuple[Path, ...]


def evaluate_run(request: EvaluateRequest, console: Console | None = None) -> EvaluateResult:
    """Evaluate a run, and write everything.

    Args:
        request: What to do.
        console: Where progress is drawn; None for silence.

    Raises:
        InputError: Something asked for breaks a rule.
    """
    for side in ((request.run, *request.seeds), *request.compare):
        check_distinct(side)
    folders = [request.run, *request.seeds, *(path for side in request.compare for path in side)]
    names = dict(zip(folders, names_of_runs(folders), strict=True))
    with _progress(console) as progress:
        runs = _Runs(names, progress)
        main = _embedded(request, request.run, runs)
        out = request.out or default_folder(request.run, main)
        seeds = [_embedded(request, path, runs) for path in request.seeds]
        for path, run in zip(request.seeds, seeds, strict=True):
            _check_unseen(main, run, path)
        rivals = [[_rival(request, main, path, runs) for path in side] for side in request.compare]
        fitted, kept = _probes(request, main, out)
        evaluations = [_evaluated(request, main, main, fitted)]
        evaluations += [
            _evaluated(request, run, main, _saved(request, path, run))
            for path, run in zip(request.seeds, seeds, strict=True)
        ]
        waiting = progress.add_task("score and resample", total=None)
        scores, comparison = _tables(request, evaluations, rivals)
        progress.remove_task(waiting)
    summary = _summary(request, main, evaluations[0], list(runs.told.values()))
    result = _write(out, main, evaluations[0], scores, comparison, summary, request.pictures)
    return replace(result, written=(*kept, *result.written))


@dataclass(frozen=True)
class _Runs:
    """The names of all runs, the bar that shows how they are embedded, and what is told of each."""

    names: Mapping[Path, str]
    progress: Progress
    told: dict[Path, dict[str, Any]] = field(default_factory=dict)


def default_folder(run_folder: Path, main: EvaluatedCases) -> Path:
    """Return RUN/evaluation, or for other cases than the run's RUN/evaluation-<cases folder>."""
    own = "evaluation" if main.is_own else f"evaluation-{main.cases_name}"
    return run_folder / own


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
        transient=True,
    )


def _embedded(request: EvaluateRequest, path: Path, runs: _Runs) -> EvaluatedCases:
    """Embed the cases with one run, or read what an earlier evaluation embedded."""
    name, progress = runs.names[path], runs.progress
    task = progress.add_task(f"embed with {name}", total=None)
    found = embed_cases(
        path,
        cases=request.cases,
        fold=request.fold,
        device=request.device,
        options=request.inputs,
        cache=(request.out or path) / "embeddings",
        progress=lambda done, total: progress.update(task, completed=done, total=total),
        name=name,
    )
    progress.remove_task(task)
    runs.told[path.resolve()] = {
        "name": name,
        "path": str(path.resolve()),
        "weights_sha256": found.key["weights_sha256"],
        "fit_on": found.run.info.get("fit_on", "train"),
        "random_backbone": found.run.random_backbone,
    }
    return found


def _check_unseen(main: EvaluatedCases, other: EvaluatedCases, path: Path) -> None:
    """Refuse a run that would be judged on cases it was trained on, or on other cases."""
    if other.cases_sha256 != main.cases_sha256:
        raise CohortError(
            f"runs must be evaluated on the same cases, got another cases folder for {path}; give "
            "--cases"
        )
    if seen := seen_cases(run_split(path), main.split):
        raise CohortError(
            f"validation and test cases must be new to every run, got {len(seen)} that {path} was "
            "trained on or chosen by; compare runs of one split"
        )


def _rival(request: EvaluateRequest, main: EvaluatedCases, path: Path, runs: _Runs) -> Evaluation:
    """Evaluate another run, or a table of predictions, on the cases of the main run."""
    if path.suffix in TABLES:
        said, name = read_predictions(path), runs.names[path]
        runs.told[path.resolve()] = {
            "name": name,
            "path": str(path.resolve()),
            "sha256": file_sha256(path),
        }
        saved = _saved(request, request.run, main)
        return evaluate_predictions(
            said,
            main.cases.clinical,
            main.split,
            name=name,
            sites=_sites_of(main) if saved is None else saved.sites,
            fitted=_direct_scopes(saved, None),
        )
    other = _embedded(request, path, runs)
    _check_unseen(main, other, path)
    return _evaluated(request, other, main, _saved(request, path, other))


def _saved(request: EvaluateRequest, path: Path, run: EvaluatedCases) -> FittedProbes | None:
    """Return a run's own saved probes where nothing is to be fitted, else None."""
    if request.probes != "run":
        return None
    fitted = load_probes(path)
    check_probes(fitted, run.key["weights_sha256"], path)
    return fitted


def _sites_of(cases: EvaluatedCases) -> list[str]:
    """Return the cancer sites of the training cases."""
    clinical = cases.cases.clinical
    train = clinical.loc[[case for case in cases.split.train if case in clinical.index]]
    return sorted(set(site_names(train)) - {""})


def _direct_scopes(
    saved: FittedProbes | None, risk_cut: float | None
) -> dict[str, ScopeProbes] | None:
    """Return weights and times of saved probes by scope, for what a model predicts itself."""
    if saved is None:
        return None
    first = saved.tasks[0]  # weights and times are those of the training cases, whatever the prompt
    return {
        scope: ScopeProbes(None, None, risk_cut, saved.probes[first, scope].reference)
        for scope in saved.scopes
    }


def _probes(
    request: EvaluateRequest, main: EvaluatedCases, out: Path
) -> tuple[FittedProbes, tuple[Path, ...]]:
    """Return the probes to use, and where they were written if they were fitted here."""
    if (saved := _saved(request, request.run, main)) is not None:
        return saved, ()
    info = {
        "weights_sha256": main.key["weights_sha256"],
        "cases_sha256": main.cases_sha256,
        "cases": main.cases_name,
        "penalizer": request.penalizer,
        "software_version": importlib.metadata.version("modaltune"),
    }
    fitted = fit_on(main.cases, main.split.train, penalizer=request.penalizer, info=info)
    return fitted, (save_probes(request.run if main.is_own else out, fitted),)


def check_probes(fitted: FittedProbes, weights_sha256: str, folder: Path) -> None:
    """Refuse probes that belong to other weights.

    Raises:
        CheckpointError: They do.
    """
    if fitted.info.get("weights_sha256") != weights_sha256:
        raise CheckpointError(
            f"probes in {folder} must be fitted on embeddings of this run, got probes of other "
            f"weights; fit them again with: modaltune evaluate {folder}"
        )


def _evaluated(
    request: EvaluateRequest,
    run: EvaluatedCases,
    main: EvaluatedCases,
    fitted: FittedProbes | None,
) -> Evaluation:
    """Score one run on the parts of the main run's split; a baseline's own heads, too."""
    probed = evaluate_cases(
        run.cases, main.split, name=run.name, fitted=fitted, penalizer=request.penalizer
    )
    own = run.run
    if not isinstance(own, BaselineRun) or own.is_probed:
        return probed
    cases = run.cases
    said = own.predict_embedded(cases.case_ids, cases.embeddings)
    direct = evaluate_predictions(
        said,
        cases.clinical,
        main.split,
        name=run.name,
        sites=own.info["sites"],
        fitted=_direct_scopes(
            fitted if request.probes == "run" else None, own.info.get("risk_cut")
        ),
    )
    return direct.beside(probed)


def _tables(
    request: EvaluateRequest,
    evaluations: Sequence[Evaluation],
    rivals: Sequence[Sequence[Evaluation]],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return all scores, of the runs, their mean and the rivals, and all comparisons."""
    sides = [evaluations, *rivals]
    tables: list[pd.DataFrame] = []
    scored: set[str] = set()
    for side in sides:
        new = [evaluation for evaluation in side if evaluation.name not in scored]
        scored |= {evaluation.name for evaluation in side}  # a rival may be one of the seeds
        tables += [score_table(evaluation, request.bootstrap) for evaluation in new]
        if len(side) > 1:
            name = f"{side[0].name} and {len(side) - 1} more seeds"
            tables.append(seeds_table(side, request.bootstrap, name))
    found = [comparison_table(evaluations, side, request.bootstrap) for side in rivals]
    comparison = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return pd.concat(tables, ignore_index=True), comparison


def _write(
    out: Path,
    main: EvaluatedCases,
    first: Evaluation,
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
    summary: dict[str, Any],
    pictures: bool,
) -> EvaluateResult:
    """Write tables, pictures, predictions and the summary; the summary comes last."""
    headline, fits = headline_table(scores), fit_table(first)
    written = [*write_table(out, "scores", scores), *write_table(out, "fits", fits)]
    if not comparison.empty:
        written += write_table(out, "comparison", comparison)
    with atomic_path(out / "predictions.parquet") as temporary:
        all_predictions(first).to_parquet(temporary, index=False)
    written.append(out / "predictions.parquet")
    summary["headline"] = json_rows(headline)
    if pictures:
        own = scores[scores["run"] == first.name]
        classes = class_names(main.folders)
        drawn = draw_evaluation(
            out / "pictures", first, own, cases=main.cases, split=main.split, class_names=classes
        )
        if scores["run"].nunique() > 1:
            title = f"{first.name} and others: test cases, 95 % bootstrap intervals"
            drawn += draw_forest(out / "pictures", scores, "test", title, name="forest_runs")
        summary["pictures"] = sorted(path.name for path in drawn)
        written += [out / "pictures"] if drawn else []
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(report_markdown(summary, scores, fits, comparison), encoding="utf-8")
    write_json_atomic(out / "evaluation.json", summary)
    files = (*written, out / "report.md", out / "evaluation.json")
    return EvaluateResult(headline, scores, fits, comparison, summary, files)


def _summary(
    request: EvaluateRequest,
    main: EvaluatedCases,
    first: Evaluation,
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what was done with what: enough to do it again."""
    parts = {part: len(cases) for part, cases in main.split.parts.items()}
    return {
        "run": main.name,
        "runs": list(runs),
        "run_folder": str(request.run.resolve()),
        "weights_sha256": main.key["weights_sha256"],
        "cases": main.cases_name,
        "cases_folders": [str(folder.path.resolve()) for folder in main.folders],
        "cases_sha256": main.cases_sha256,
        "own_cases": main.is_own,
        "fold": request.fold,
        "device": request.device,
        "probes": request.probes,
        "penalizer": request.penalizer,
        "bootstrap": vars(request.bootstrap),
        "inputs": vars(request.inputs),
        "fit_on": main.run.info.get("fit_on", "train"),
        "random_backbone": main.run.random_backbone,
        "split": parts,
        "without_embedding": {part: list(cases) for part, cases in first.missing.items()},
        "seeds": [str(path.resolve()) for path in request.seeds],
        "compare": [[str(path.resolve()) for path in side] for side in request.compare],
        "software_version": importlib.metadata.version("modaltune"),
    }
