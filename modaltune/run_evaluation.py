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
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.errors import CheckpointError, CohortError
from modaltune.evaluated_cases import EvaluatedCases, InputOptions, embed_cases, run_split
from modaltune.evaluation import Evaluation, evaluate_cases, evaluate_predictions, fit_on
from modaltune.evaluation_pictures import draw_evaluation, draw_forest
from modaltune.evaluation_tables import (
    HEADLINES,
    comparison_table,
    fit_table,
    headline_table,
    json_rows,
    markdown,
    score_table,
    seeds_table,
    write_table,
)
from modaltune.fitted_probes import FittedProbes
from modaltune.predictions import predictions_table, read_predictions
from modaltune.probe_files import load_probes, save_probes
from modaltune.result_rows import BootstrapOptions

logger = logging.getLogger(__name__)

TABLES = (".csv", ".parquet", ".pq")  # of predictions, where a run folder could stand
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
    folders = [request.run, *request.seeds, *(path for side in request.compare for path in side)]
    names = dict(zip(folders, run_names(folders), strict=True))
    with _progress(console) as progress:
        main = _embedded(request, request.run, names, progress)
        out = request.out or default_folder(request.run, main)
        seeds = [_embedded(request, path, names, progress) for path in request.seeds]
        for path, run in zip(request.seeds, seeds, strict=True):
            _check_unseen(main, run, path)
        rivals = [
            [_rival(request, main, path, names, progress) for path in side]
            for side in request.compare
        ]
        fitted, kept = _probes(request, main, out)
        evaluations = [_evaluated(request, main, main, fitted)]
        evaluations += [_evaluated(request, run, main, None) for run in seeds]
        waiting = progress.add_task("score and resample", total=None)
        scores, comparison = _tables(request, evaluations, rivals)
        progress.remove_task(waiting)
    result = _write(request, out, main, evaluations, scores, comparison)
    return replace(result, written=(*kept, *result.written))


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each run: its folder's, with the parent's where that repeats."""
    own = [path.resolve() for path in folders]
    short = {path: path.stem if path.suffix in TABLES else path.name for path in own}
    taken = list(short.values())
    return [
        short[path] if taken.count(short[path]) == 1 else f"{path.parent.name}/{short[path]}"
        for path in own
    ]


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


def _embedded(
    request: EvaluateRequest, path: Path, names: Mapping[Path, str], progress: Progress
) -> EvaluatedCases:
    """Embed the cases with one run, or read what an earlier evaluation embedded."""
    task = progress.add_task(f"embed with {names[path]}", total=None)
    found = embed_cases(
        path,
        cases=request.cases,
        fold=request.fold,
        device=request.device,
        options=request.inputs,
        cache=(request.out or path) / "embeddings",
        progress=lambda done, total: progress.update(task, completed=done, total=total),
        name=names[path],
    )
    progress.remove_task(task)
    return found


def _check_unseen(main: EvaluatedCases, other: EvaluatedCases, path: Path) -> None:
    """Refuse a run that would be judged on cases it was trained on, or on other cases."""
    if other.cases_sha256 != main.cases_sha256:
        raise CohortError(
            f"runs must be evaluated on the same cases, got another cases folder for {path}; give "
            "--cases"
        )
    own = run_split(path)
    seen = set() if own is None else set(own.train) & {*main.split.val, *main.split.test}
    if seen:
        raise CohortError(
            f"validation and test cases must be new to every run, got {len(seen)} that {path} was "
            "trained on; compare runs of one split"
        )


def _rival(
    request: EvaluateRequest,
    main: EvaluatedCases,
    path: Path,
    names: Mapping[Path, str],
    progress: Progress,
) -> Evaluation:
    """Evaluate another run, or a table of predictions, on the cases of the main run."""
    if path.suffix in TABLES:
        said = read_predictions(path)
        return evaluate_predictions(said, main.cases.clinical, main.split, name=names[path])
    other = _embedded(request, path, names, progress)
    _check_unseen(main, other, path)
    return _evaluated(request, other, main, None)


def _probes(
    request: EvaluateRequest, main: EvaluatedCases, out: Path
) -> tuple[FittedProbes, tuple[Path, ...]]:
    """Return the probes to use, and where they were written if they were fitted here."""
    if request.probes == "run":
        fitted = load_probes(request.run)
        check_probes(fitted, main.key["weights_sha256"], request.run)
        return fitted, ()
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
    sites = set(own.info["sites"])
    site = cases.clinical["site"].dropna() if "site" in cases.clinical else pd.Series(dtype=object)
    foreign = {str(case) for case in site[~site.isin(sites)].index} if sites else set()
    direct = evaluate_predictions(said, cases.clinical, main.split, name=run.name, foreign=foreign)
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
    request: EvaluateRequest,
    out: Path,
    main: EvaluatedCases,
    evaluations: Sequence[Evaluation],
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
) -> EvaluateResult:
    """Write tables, pictures, predictions and the summary; the summary comes last."""
    first, headline, fits = evaluations[0], headline_table(scores), fit_table(evaluations[0])
    written = [*write_table(out, "scores", scores), *write_table(out, "fits", fits)]
    if not comparison.empty:
        written += write_table(out, "comparison", comparison)
    with atomic_path(out / "predictions.parquet") as temporary:
        all_predictions(first).to_parquet(temporary, index=False)
    written.append(out / "predictions.parquet")
    summary = _summary(request, main, first, headline)
    if request.pictures:
        own = scores[scores["run"] == first.name]
        classes = class_names(main)
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


def class_names(main: EvaluatedCases) -> tuple[str, ...]:
    """Return the names of the classes, as far as the cases folder knows them."""
    known = main.folders[0].description.get("classes")
    if not isinstance(known, dict) or len(known) != 1 or len(main.folders) > 1:
        return ()
    names = next(iter(known.values()))
    if not isinstance(names, dict):
        return ()
    return tuple(str(names.get(str(k), f"class {k}")) for k in range(len(names)))


def all_predictions(evaluation: Evaluation) -> pd.DataFrame:
    """Return the predictions of all places as one table: split, task, scope, case and values."""
    tables = []
    for place in evaluation.predictions:
        twin = place._replace(kind="class")
        if place.kind == "site" or (place.kind == "survival" and twin in evaluation.predictions):
            continue
        table = predictions_table(evaluation.predictions[place])
        for column, value in zip(("scope", "task", "split"), place[2::-1], strict=True):
            table.insert(0, column, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _summary(
    request: EvaluateRequest, main: EvaluatedCases, first: Evaluation, headline: pd.DataFrame
) -> dict[str, Any]:
    parts = {part: len(cases) for part, cases in main.split.parts.items()}
    return {
        "run": main.name,
        "cases": main.cases_name,
        "cases_sha256": main.cases_sha256,
        "own_cases": main.is_own,
        "probes": request.probes,
        "penalizer": request.penalizer,
        "bootstrap": vars(request.bootstrap),
        "inputs": vars(request.inputs),
        "random_backbone": main.run.random_backbone,
        "split": parts,
        "without_embedding": {part: list(cases) for part, cases in first.missing.items()},
        "seeds": [str(path) for path in request.seeds],
        "headline": json_rows(headline),
        "software_version": importlib.metadata.version("modaltune"),
    }


def report_markdown(
    summary: Mapping[str, Any], scores: pd.DataFrame, fits: pd.DataFrame, comparison: pd.DataFrame
) -> str:
    """Return the report as Markdown: what was done, headlines, comparisons, fits."""
    parts = ", ".join(f"{count} {part}" for part, count in summary["split"].items())
    lines = [
        f"# {summary['run']} on {summary['cases']}",
        "",
        f"Cases: {parts}. Probes: "
        + ("those saved with the run." if summary["probes"] == "run" else "fitted on train.")
        + f" Intervals: 95 %, {summary['bootstrap']['resamples']} bootstrap resamples of patients.",
        "",
    ]
    if summary["random_backbone"]:
        lines += ["**The slide encoder of this model is random, not pretrained.**", ""]
    for part, cases in summary["without_embedding"].items():
        if cases:
            lines += [f"{len(cases)} {part} cases hold nothing that the run reads.", ""]
    for part in ("test", "val"):
        table = headline_table(scores, part)
        if not table.empty:
            lines += [f"## {'Test' if part == 'test' else 'Validation'} cases", "", markdown(table)]
    if not comparison.empty:
        shown = comparison[comparison["metric"].isin(HEADLINES) & (comparison["split"] == "test")]
        lines += ["## Differences, first minus second, test cases", "", markdown(shown)]
    lines += ["## Fits of the probes", "", markdown(fits)]
    return "\n".join(lines)
