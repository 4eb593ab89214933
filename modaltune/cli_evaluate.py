"""`modaltune evaluate` and `predict`: how good a run is, and what it says of new cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modaltune.cli_parts import (
    JsonFlag,
    err_console,
    out_console,
    print_json,
    reports_errors,
)

if TYPE_CHECKING:
    from modaltune.run_evaluation import EvaluateResult

RunFolder = Annotated[Path, typer.Argument(help="Run folder of a trained model.", metavar="RUN")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
MissingGenes = Annotated[
    Literal["error", "mean"],
    typer.Option(help="Genes that the model reads and the table lacks: refused, or at their mean."),
]


@reports_errors
def evaluate(
    run: RunFolder,
    cases: Annotated[
        list[Path] | None,
        typer.Option(
            help="Cases folder; those the run was trained on if not set. Give it again for more."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; RUN/evaluation if not set, -CASES appended for other cases."
        ),
    ] = None,
    seeds: Annotated[
        list[Path] | None,
        typer.Option(help="Run of the same recipe with another seed; give it again for more."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Rival: a run folder, several (seeds) separated by commas, or a CSV or Parquet "
            "table of its predictions; give it again for more.",
            metavar="RUN2[,RUN3...]",
        ),
    ] = None,
    fold: Annotated[
        int | None, typer.Option(min=0, help="Split of the cases folder; the run's own if not set.")
    ] = None,
    probes: Annotated[
        Literal["cases", "run"],
        typer.Option(
            help="Fit the probes on the training part of the cases, or use those saved with the "
            "run: with other --cases, everything is then fitted on the first cohort."
        ),
    ] = "cases",
    genes_scaled_by: Annotated[
        Literal["run", "cases"],
        typer.Option(help="Scale expression as in training, or by the cases' training part."),
    ] = "run",
    missing_genes: MissingGenes = "error",
    penalizer: Annotated[
        float, typer.Option(min=0, help="L2 penalty of the Cox probe; the published one is 0.1.")
    ] = 0.1,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamples of patients per interval; 0 for none.")
    ] = 1000,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    stratified: Annotated[
        bool, typer.Option("--stratified", help="Resample within classes, dead and censored.")
    ] = False,
    pictures: Annotated[bool, typer.Option(help="Draw PNG and SVG pictures.")] = True,
    device: Device = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Score a run: probes fitted on training cases, judged on validation and test cases.

    Per task prompt a logistic regression and a penalised Cox model are fitted on the embeddings of
    the training cases, for a run of several sites also per site, and saved in RUN for `modaltune
    predict` (probes.json). Tables (CSV, Markdown, JSON), pictures and report.md go to --out; every
    figure has a 95 % bootstrap interval over patients, its number of cases, and what was left out.
    """
    from modaltune.evaluated_cases import InputOptions
    from modaltune.result_rows import BootstrapOptions
    from modaltune.run_evaluation import EvaluateRequest, evaluate_run

    result = evaluate_run(
        EvaluateRequest(
            run=run,
            cases=tuple(cases or ()),
            out=out,
            fold=fold,
            seeds=tuple(seeds or ()),
            compare=tuple(tuple(map(Path, side.split(","))) for side in compare or ()),
            probes=probes,
            bootstrap=BootstrapOptions(bootstrap, bootstrap_seed, stratified),
            penalizer=penalizer,
            inputs=InputOptions(genes_scaled_by, missing_genes),
            pictures=pictures,
            device=device,
        ),
        console=None if as_json else err_console,
    )
    if as_json:
        print_json(_as_json(result))
    else:
        _render(result)


def _as_json(result: EvaluateResult) -> dict[str, Any]:
    from modaltune.evaluation_tables import json_rows

    return {
        **result.summary,
        "scores": json_rows(result.scores),
        "comparison": json_rows(result.comparison),
        "written": [str(path) for path in result.written],
    }


def _render(result: EvaluateResult) -> None:
    from modaltune.console_tables import comparison_tables, headline_tables
    from modaltune.evaluation_report import report_warnings
    from modaltune.evaluation_tables import HEADLINES

    for table in headline_tables(result.headline):
        out_console.print(table)
    if result.headline.empty:
        out_console.print("no test case has a class or a survival time and an embedding: no scores")
    if not result.comparison.empty:
        shown = result.comparison
        shown = shown[(shown["split"] == "test") & shown["metric"].isin(HEADLINES)]
        for table in comparison_tables(shown):
            out_console.print(table)
    for warning in report_warnings(result.summary):
        out_console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for part, missing in result.summary["without_embedding"].items():
        if missing:
            out_console.print(f"{len(missing)} {part} cases hold nothing that the run reads")
    for path in result.written:
        out_console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


@reports_errors
def predict(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="File to write: .parquet, .csv or .h5ad.")],
    features: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of tile features of any producer; give it again for more."),
    ] = None,
    slides: Annotated[
        Path | None,
        typer.Option(
            help="CSV: slide, case_id. If not set, TCGA barcodes, else the slide is a case."
        ),
    ] = None,
    expression: Annotated[
        Path | None, typer.Option(help="Expression on the scale of the training table.")
    ] = None,
    clinical: Annotated[
        Path | None, typer.Option(help="Clinical table: case_id, and what the model reads, site.")
    ] = None,
    cases: Annotated[
        Path | None, typer.Option(help="Cases folder, in place of the four above.")
    ] = None,
    base_mpp: Annotated[
        float | None,
        typer.Option(help="Microns per level-0 pixel of slides whose features do not say it."),
    ] = None,
    target_mpp: Annotated[
        float | None,
        typer.Option(help="Microns per pixel of tiles whose features do not say it."),
    ] = None,
    probes: Annotated[
        Path | None, typer.Option(help="Folder of fitted probes; RUN if not set.")
    ] = None,
    missing_genes: MissingGenes = "error",
    device: Device = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Predict new cases: embeddings, class probabilities, risk and survival. Nothing is fitted.

    A case is whatever a slide, an expression row or a clinical row names; what it lacks is left
    out. The probes are those that `modaltune evaluate RUN` saved. A row per case and task prompt
    (Parquet, CSV), or per case (h5ad).
    """
    from modaltune.predict import PredictRequest, predict_request

    summary = predict_request(
        PredictRequest(
            run=run,
            out=out,
            features=tuple(features or ()),
            slides=slides,
            expression=expression,
            clinical=clinical,
            cases=cases,
            base_mpp=base_mpp,
            target_mpp=target_mpp,
            probes=probes,
            missing_genes=missing_genes,
            device=device,
        ),
        console=None if as_json else err_console,
    )
    if as_json:
        print_json(summary)
        return
    for kind, count in summary["cases_by_inputs"].items():
        out_console.print(f"{count} cases predicted from {kind}", highlight=False)
    if summary["random_backbone"]:
        out_console.print("[yellow]the slide encoder of this model is random, not pretrained[/]")
    out_console.print(f"wrote {out}", highlight=False, soft_wrap=True, markup=False)
