"""The command line: a thin layer over the library. Heavy modules load inside each command."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modaltune.benchmarks.command import bench_app
from modaltune.cli_cases import cases_app
from modaltune.cli_evaluate import evaluate, predict
from modaltune.cli_export import export_encoder
from modaltune.cli_ledger import retry, status
from modaltune.cli_measure import plan, profile
from modaltune.cli_parts import (
    FAILED,
    AllowDownload,
    JsonFlag,
    TileEncoderName,
    TileEncoderWeights,
    TrustedRevision,
    err_console,
    out_console,
    print_json,
    reports_errors,
)
from modaltune.cli_train import train

if TYPE_CHECKING:
    from modaltune.engine.folder import EmbedReport

app = typer.Typer(
    name="modaltune",
    help="Turn whole-slide images, genes and clinical records into patient embeddings.\n\n"
    "Start with [bold]modaltune demo[/]: it needs no data and no network.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
slides_app = typer.Typer(help="Look at slide files.", no_args_is_help=True)
app.add_typer(slides_app, name="slides")
app.add_typer(cases_app, name="cases")
app.add_typer(bench_app, name="bench")

BaseMpp = Annotated[
    float | None,
    typer.Option("--base-mpp", help="Microns per level-0 pixel of slides that do not say it."),
]
Impl = Literal["auto", "cpu", "reference", "triton"]
RuntimeName = Annotated[
    Literal["auto", "torch", "torch-compile", "onnxruntime", "tensorrt"],
    typer.Option(help="What runs the tile encoder; auto: the fastest, measured once a machine."),
]
Reader = Literal["cucim", "openslide", "image"]


def _version(value: bool) -> None:
    if value:
        from modaltune import __version__

        typer.echo(f"modaltune {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="-v says what is done, -vv more.")
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Set up logging for every command."""
    del version
    from rich.logging import RichHandler

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = RichHandler(console=err_console, show_path=False, show_time=verbose > 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("modaltune").setLevel(level)


@app.command()
@reports_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "modaltune-demo"
    ),
    cases: Annotated[int, typer.Option(min=20, help="Synthetic patients.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the cohort and of training.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Run everything on a synthetic cohort, offline: slides, features, tuning, report.

    Writes small pyramidal slides, genes and clinical rows in which subtype and risk need image and
    genes together; embeds them, tunes a Modal Adapter on a small RANDOM slide encoder, and shows
    image-only, genes-only and both, out of fold, in report.html. About four minutes on two cores.
    """
    from modaltune.demo import run_demo

    result = run_demo(out, cases=cases, seed=seed, console=None if as_json else err_console)
    if as_json:
        print_json(result.to_dict())
    else:
        result.render(out_console)


@app.command()
@reports_errors
def doctor(as_json: JsonFlag = False) -> None:
    """Say what is installed, what that enables, what is missing and how to get it."""
    from modaltune.doctor import exit_code, render, run_doctor, to_json

    checks = run_doctor()
    if as_json:
        sys.stdout.write(to_json(checks) + "\n")
    else:
        render(checks, out_console)
    if exit_code(checks):
        raise typer.Exit(FAILED)


@slides_app.command("info")
@reports_errors
def slides_info(
    slides: Annotated[list[Path], typer.Argument(help="Slide files.", metavar="SLIDE...")],
    base_mpp: BaseMpp = None,
    reader: Annotated[
        Reader | None, typer.Option(help="That one only; else the first that fits.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show size, levels, resolution and compression of slides, and which reader takes them."""
    from modaltune.engine.errors import InputError
    from modaltune.engine.readers import slide_info

    found, failed = [], False
    for path in slides:
        try:
            found.append(slide_info(path, base_mpp=base_mpp, reader=reader))
        except InputError as error:
            failed = True
            found.append({"path": str(path), "error": str(error)})
    if as_json:
        print_json(found)
    else:
        from modaltune.console_tables import slide_table

        for info in found:
            out_console.print(slide_table(info))
    if failed:
        raise typer.Exit(FAILED)


@app.command()
@reports_errors
def embed(
    slides: Annotated[
        list[Path] | None, typer.Argument(help="Slide files.", metavar="[SLIDE]...")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="CSV with columns slide, and if wanted case_id and mpp."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("modaltune-out"),
    root: Annotated[
        Path | None, typer.Option(help="Folder that the manifest's slides must lie in.")
    ] = None,
    tile_encoder: TileEncoderName = None,
    tile_encoder_weights: TileEncoderWeights = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustedRevision = None,
    mpp: Annotated[
        float | None, typer.Option(help="Microns per pixel of a tile.", show_default="0.5")
    ] = None,
    tile_px: Annotated[
        int | None, typer.Option(help="Side of a tile in px.", show_default="256")
    ] = None,
    base_mpp: BaseMpp = None,
    min_foreground: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of tissue in a tile.")
    ] = 0.95,
    tissue: Annotated[
        Literal["lab", "lab-mean", "otsu", "hsv"], typer.Option(help="Rule of the tissue mask.")
    ] = "lab",
    reader: Annotated[
        Reader | None, typer.Option(help="That one only; else the first that fits.")
    ] = None,
    overlays: Annotated[bool, typer.Option(help="Write a picture of mask and tiles.")] = True,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decoding processes.",
            show_default="2, and more while the encoder waits for them",
        ),
    ] = None,
    half_scale_jpeg: Annotated[
        bool,
        typer.Option(
            "--half-scale-jpeg",
            help="Decode JPEG at half scale where a level has twice the resolution: faster, and "
            "pixels differ by about half a grey level.",
        ),
    ] = False,
    bad_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a slide's tiles that may be unreadable."),
    ] = 0.01,
    decode_timeout: Annotated[
        float,
        typer.Option(help="Seconds for a block of tiles, and five times that for finding tissue."),
    ] = 120.0,
    model: Annotated[
        Path | None, typer.Option(help="Run folder: also write ModalTune embeddings per case.")
    ] = None,
    genes: Annotated[
        Path | None, typer.Option(help="Expression table for --model: case x gene.")
    ] = None,
    clinical: Annotated[
        Path | None, typer.Option(help="Clinical table for --model, with a case_id column.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    new_recipe: Annotated[
        bool,
        typer.Option("--new-recipe", help="Make slides again that other settings finished."),
    ] = False,
    runtime: RuntimeName = "auto",
    runtime_fallback: Annotated[
        bool,
        typer.Option("--runtime-fallback", help="Eager PyTorch where --runtime can't be had."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn slides into tile features, and with --model into patient embeddings.

    Features go to OUT/features_<encoder>/<slide>.h5, embeddings to OUT/embeddings.parquet. Run it
    again to go on: OUT/ledger.sqlite knows what is finished. Several processes with the same --out
    share the work. A slide that fails three times is left alone: `modaltune status OUT` says why,
    `modaltune retry OUT` tries again. Exits 1 when a slide could not be embedded.
    """
    from modaltune.embedding import EmbedRequest, embed_request

    if bool(slides) == bool(manifest):
        raise typer.BadParameter("give slide files or --manifest, one of the two")
    if model is None and (genes or clinical):
        raise typer.BadParameter("--genes and --clinical need --model")
    request = EmbedRequest(
        slides=tuple(slides or ()),
        manifest=manifest,
        out=out,
        root=root,
        tile_encoder=tile_encoder,
        tile_encoder_weights=tile_encoder_weights,
        allow_download=allow_download,
        trust_remote_code=trust_remote_code,
        mpp=mpp,
        tile_px=tile_px,
        base_mpp=base_mpp,
        min_foreground=min_foreground,
        tissue=tissue,
        reader=reader,
        overlays=overlays,
        workers=workers,
        half_scale_jpeg=half_scale_jpeg,
        bad_share=bad_share,
        decode_timeout_s=decode_timeout,
        model=model,
        genes=genes,
        clinical=clinical,
        device=device,
        new_recipe=new_recipe,
        runtime=runtime,
        runtime_fallback=runtime_fallback,
    )
    report, summary = embed_request(request, console=None if as_json else err_console)
    if as_json:
        print_json(summary)
    else:
        _render_embed(report, summary, out)
    if report.lost:
        raise typer.Exit(FAILED)


def _render_embed(report: EmbedReport, summary: dict[str, Any], out: Path) -> None:
    from modaltune.console_tables import outcome_table, stage_table

    out_console.print(outcome_table(report))
    out_console.print(stage_table(report))
    used = summary["runtime"]
    out_console.print(
        f"tile encoder ran in {used['runtime']} {used['runtime_version']} on {used['device']}, "
        f"{used['precision']}, batches of {used['batch_size']}",
        highlight=False,
    )
    for kind, count in summary.get("cases_by_modalities", {}).items():
        out_console.print(f"{count} cases embedded from {kind}", highlight=False)
    if summary.get("random_backbone"):
        out_console.print("[yellow]the slide encoder of this model is random, not pretrained[/]")
    for line in summary["written"]:
        out_console.print(f"wrote {line}", highlight=False, soft_wrap=True, markup=False)
    if report.lost:
        out_console.print(
            f"{len(report.lost)} of {len(report.outcomes)} slides could not be embedded: mend them "
            f"(the notes and `modaltune status {out}` say why), then `modaltune retry {out}` and "
            "the same command again",
            highlight=False, soft_wrap=True, markup=False, style="bold red",
        )  # fmt: skip


for command in (status, retry, plan, profile, train, evaluate, predict):
    app.command()(command)
app.command("export-encoder")(export_encoder)


@app.command()
@reports_errors
def golden(
    folder: Annotated[Path, typer.Argument(help="Folder of golden cases.", metavar="DIR")],
    impl: Annotated[Impl, typer.Option(help="Implementation of the kernels.")] = "auto",
    every: Annotated[
        bool, typer.Option("--all", help="Print every tensor, not the worst of each group.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare every tensor of golden cases with the published model; exit 1 on any miss."""
    from modaltune.golden import run_folder
    from modaltune.golden_report import render, to_json

    rows = run_folder(folder, impl)
    result = to_json(rows)
    if as_json:
        print_json(result)
    else:
        render(rows, out_console, every=every)
    if not result["ok"]:
        raise typer.Exit(FAILED)


@app.command("import-checkpoint")
@reports_errors
def import_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(help="Published state_dict (.pt, .pth, .safetensors), or a run folder."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write (or .safetensors to export).")],
    pathways: Annotated[
        Path | None, typer.Option(help="Pathway table of its training: CSV or GMT.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON of published options that the tensors do not tell."),
    ] = None,
    to_published: Annotated[
        bool, typer.Option("--to-published", help="The other way: run folder to state_dict.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn a published ModalTune checkpoint into a run folder, or back, without loss."""
    from modaltune import imported_runs

    if to_published:
        state = imported_runs.export_checkpoint(source, out)
        result = {"out": str(out), "tensors": len(state)}
    else:
        run = imported_runs.import_checkpoint(source, out, pathways=pathways, options=config)
        result = {
            "out": str(out),
            "tasks": list(run.model.config.tasks),
            "trainable": sum(p.numel() for p in run.model.trainable_parameters()),
            "frozen": sum(p.numel() for p in run.model.slide_encoder.parameters()),
            "position_convention": run.model.config.position_convention,
        }
    if as_json:
        print_json(result)
    else:
        for name, value in result.items():
            out_console.print(f"{name}: {value}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run the command line (the `modaltune` script)."""
    # Before torch is loaded: its threads sleep when they have nothing to do, instead of keeping a
    # processor from ours. Somebody's own setting stands.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    app()


if __name__ == "__main__":
    main()
