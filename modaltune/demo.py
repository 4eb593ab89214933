"""The whole pipeline on a synthetic cohort, offline: what `modaltune demo` runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from modaltune.cases import Cohort
from modaltune.checkpoint import save_run
from modaltune.clinical import read_clinical
from modaltune.cohort_embeddings import embed_cohort, write_embeddings
from modaltune.demo_study import BOTH, DemoStudy, StudyResult, load_study
from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.cohort import read_manifest
from modaltune.engine.encoders import load_encoder
from modaltune.engine.folder import EmbedOptions, EmbedReport, embed_slides
from modaltune.engine.ledger_schema import LEDGER_NAME
from modaltune.engine.profile import StageTimer
from modaltune.errors import InputError
from modaltune.omics import read_expression
from modaltune.pathways import read_pathways
from modaltune.report import ReportData, write_report
from modaltune.synthetic import NOTICE, write_cohort

MARKER = "demo.json"  # what tells a demo's folder from anybody else's
# All that a demo leaves in its folder; what else lies there is its owner's.
_MADE = (
    MARKER, "cohort", "features_*", "overlays", "run", "embeddings.parquet", "report.html",
    "result.json", f"{LEDGER_NAME}*",
)  # fmt: skip
RANDOM_BACKBONE = (
    "RANDOM SLIDE ENCODER: the small LongNet of this demo is random, not pretrained. It shows how "
    "the pipeline works, not how well a foundation model does."
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it put it."""

    out: Path
    study: StudyResult
    seed: int
    stages_s: dict[str, float]
    elapsed_s: float

    @property
    def margin(self) -> float:
        """Balanced accuracy of image and genes together minus the better one alone."""
        return self.study.margin

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "synthetic": True,
            "random_backbone": True,
            "notice": f"{NOTICE} {RANDOM_BACKBONE}",
            "seed": self.seed,
            "cases": len(self.study.case_ids),
            "results": {
                name: {
                    "balanced_accuracy": list(found.balanced_accuracy),
                    "c_index": list(found.c_index),
                    "without_its_modality": found.unpredictable,
                }
                for name, found in self.study.variants.items()
            },
            "margin": self.margin,
            "stages_s": self.stages_s,
            "elapsed_s": self.elapsed_s,
            "report": str(self.out / "report.html"),
            "run": str(self.out / "run"),
            "embeddings": str(self.out / "embeddings.parquet"),
        }

    def render(self, console: Console) -> None:
        """Print the three figures, where things are, and what they are not."""
        table = Table(title="Out of fold over all cases (95 % interval over patients)")
        for column in ("inputs", "balanced accuracy", "c-index"):
            table.add_column(column, justify="left" if column == "inputs" else "right")
        for name, found in self.study.variants.items():
            table.add_row(name, *(_interval(v) for v in (found.balanced_accuracy, found.c_index)))
        console.print(table)
        console.print(f"together ahead of the better one alone by {self.margin:.2f}")
        console.print(f"[yellow]{NOTICE} {RANDOM_BACKBONE}[/]")
        report = self.out / "report.html"
        console.print(f"report: {report}", highlight=False, soft_wrap=True, markup=False)
        console.print(
            f"model:  {self.out / 'run'} ({self.elapsed_s:.0f} s in all)",
            highlight=False,
            markup=False,
        )


def _interval(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.2f}, {value[2]:.2f}]"


def run_demo(
    out: Path,
    *,
    cases: int = 64,
    seed: int = 0,
    console: Console | None = None,
    study: DemoStudy | None = None,
) -> DemoResult:
    """Write a cohort, embed it, tune and evaluate out of fold, report.

    Args:
        out: Folder for everything; new, empty, or an earlier demo's (slides and features of the
            same seed and size are kept then).
        cases: Synthetic patients.
        seed: Of cohort, folds and training.
        console: Where progress is drawn; None for silence.
        study: Settings of model, training and folds.

    Raises:
        InputError: The folder holds something else.
    """
    study = study or DemoStudy()
    timer = StageTimer()
    _claim(out, cases, seed)
    with _progress(console) as step:
        with timer.stage("cohort"):
            if not (out / "cohort").is_dir():
                write_cohort(
                    out / "cohort", cases=cases, seed=seed, on_progress=step("drawing slides")
                )
        with timer.stage("slides"):
            embedded = _embed(out, step("slides to features"))
        cohort = _read(out, embedded)
        with timer.stage("tuning"):
            data = load_study(cohort, read_pathways(out / "cohort" / "pathways.gmt"), seed)
            found = study.evaluate(data, step("tuning, out of fold"))
        with timer.stage("final model"):
            run = study.final_run(data, {"synthetic": NOTICE, "seed": seed})
            save_run(out / "run", run)
            embeddings = embed_cohort(run, cohort, found.case_ids)
            write_embeddings(out / "embeddings.parquet", run, embeddings)
    with timer.stage("report"):
        write_report(
            out / "report.html",
            ReportData(
                title="ModalTune demo",
                notice=f"{NOTICE} {RANDOM_BACKBONE}",
                random_backbone=True,
                seed=seed,
                settings=study.model_dump(mode="json"),
                cohort_root=out / "cohort",
                features_folder=_features(embedded),
                overlays_folder=out / "overlays",
                case_ids=list(found.case_ids),
                modalities=found.modalities,
                classes=found.classes,
                durations=found.durations,
                events=found.events,
                variants=dict(found.variants),
                embedding=embeddings.values[:, 0].numpy(),
                truth=json.loads((out / "cohort" / "truth.json").read_text(encoding="utf-8")),
                stages_s=_stages(timer),
                elapsed_s=timer.elapsed_s,
                embed_report=embedded.to_dict(),
            ),
        )
    result = DemoResult(out, found, seed, _stages(timer), timer.elapsed_s)
    write_json_atomic(out / "result.json", result.to_dict())
    return result


def _stages(timer: StageTimer) -> dict[str, float]:
    return {name: seconds for name, seconds in timer.split().items() if seconds}


def _claim(out: Path, cases: int, seed: int) -> None:
    """Take a new folder or an earlier demo's; clear what that one made for another seed or size.

    Raises:
        InputError: The folder holds something else, or can't be written.
    """
    wanted = {"cases": cases, "seed": seed}
    if out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder, got the file {out}; choose another")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise InputError(
                f"--out must be a new or empty folder, or an earlier demo's, got {out} with other "
                "files; choose another"
            )
        if json.loads((out / MARKER).read_text(encoding="utf-8")) != wanted:
            for path in {path for name in _MADE for path in out.glob(name)}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / MARKER, wanted)
    except InputError:  # a full disk
        raise
    except OSError as error:
        raise InputError(
            f"--out must be a folder that can be written, got {out} ({error}); choose another"
        ) from error


def _embed(out: Path, step: Callable[[int, int], None]) -> EmbedReport:
    items = read_manifest(out / "cohort" / "manifest.csv")
    done = 0

    def advance(_: object) -> None:
        nonlocal done
        done += 1
        step(done, len(items))

    report = embed_slides(items, load_encoder(), out, EmbedOptions(), on_slide=advance)
    for lost in report.lost:
        raise InputError(f"slide {lost.slide_id} of the demo failed: {lost.reason}")
    return report


def _features(report: EmbedReport) -> Path:
    return next(o.features.parent for o in report.outcomes if o.features is not None)


def _read(out: Path, report: EmbedReport) -> Cohort:
    slides: dict[str, tuple[Path, ...]] = {}
    for outcome in report.outcomes:
        if outcome.features is not None:
            slides[outcome.case_id] = (*slides.get(outcome.case_id, ()), outcome.features)
    return Cohort(
        slides,
        read_expression(out / "cohort" / "expression.csv"),
        read_clinical(out / "cohort" / "clinical.csv"),
    )


@contextmanager
def _progress(console: Console | None) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Give a maker of `(done, total)` callbacks, each of which drives a bar of its own."""
    if console is None:
        yield lambda title: lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:

        def step(title: str) -> Callable[[int, int], None]:
            task = bars.add_task(title, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield step


__all__ = ["BOTH", "DemoResult", "run_demo"]
