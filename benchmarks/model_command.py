"""`modaltune bench model`: the whole model against its named rival."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modaltune.cli_parts import FAILED, JsonFlag, err_console, out_console, print_json


def model(
    tiles: Annotated[int, typer.Option(min=1, help="Tiles of the case.")] = 1000,
    mode: Annotated[
        Literal["forward", "train"], typer.Option(help="Embeddings, or one optimiser step.")
    ] = "forward",
    tasks: Annotated[int, typer.Option(min=1, max=3, help="Task prompts.")] = 3,
    rival: Annotated[Literal["literal"], typer.Option(help="What to compare with.")] = "literal",
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each side, in turn.")] = 5,
    size: Annotated[
        Literal["published", "small"],
        typer.Option(help="Of the model; small is a toy to try the benchmark."),
    ] = "published",
    trunk: Annotated[
        Literal["separate", "shared"],
        typer.Option(help="A pass for each task, or one for all; the rival has one for each."),
    ] = "separate",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where both sides run.")] = "cpu",
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="bfloat16: both sides under autocast."),
    ] = "float32",
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder of model_speed.csv.", show_default="benchmarks/results if it exists"
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time the whole model against the literal formulation of the method.

    Both sides have the same random weights, 1,536-d tiles and 331 pathways. Their answers are
    compared first; different ones are not timed, and exit 1.
    """
    from modaltune.benchmarks.harness import append_row, results_folder
    from modaltune.benchmarks.model_sides import Workload
    from modaltune.benchmarks.model_speed import CSV_NAME, measure, row_of

    folder = results_folder(results)
    work = Workload(tiles, mode, tasks, size, trunk, device, precision)
    try:
        found = measure(work, rounds).to_dict()
    except RuntimeError as error:
        err_console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from error
    found["rival"] = rival
    if folder is not None:
        append_row(folder / CSV_NAME, row_of(found))
    if as_json:
        print_json(found)
    else:
        _render(found)


def _render(found: dict[str, Any]) -> None:
    from rich.table import Table

    def text(value: float | None, unit: str) -> str:
        return "unknown" if value is None else f"{value:,.2f} {unit}"

    table = Table(title=f"{found['mode']}, {found['tiles']:,} tiles, {found['tasks']} task(s)")
    for column in ("", "ours", f"rival ({found['rival']})", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "time",
        text(found["ours_s"], "s"),
        text(found["rival_s"], "s"),
        f"{found['ratio']:.2f} x",
    )
    table.add_row(
        "processor time",
        text(found["ours_cpu_s"], "s"),
        text(found["rival_cpu_s"], "s"),
        f"{found['cpu_ratio']:.2f} x",
    )
    share = found["memory_share"]
    table.add_row(
        "peak memory",
        text(found["ours_peak_mib"], "MiB"),
        text(found["rival_peak_mib"], "MiB"),
        "unknown" if share is None else f"{share:.2f}",
    )
    out_console.print(table)
    parts = Table(title="where our time goes (under the profiler)")
    for column in ("part", "s", "share"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    total = sum(found["parts_s"].values()) or 1.0
    for name, seconds in found["parts_s"].items():
        parts.add_row(name, f"{seconds:.3f}", f"{seconds / total:.0%}")
    out_console.print(parts)
    for line in (
        f"{found['slides_per_h']:,.1f} slides/h; {found['useful_gflop']:,.0f} useful GFLOP at "
        f"{found['gflops']:,.0f} GFLOP/s; products by {found['products_by']}",
        f"limit {found['limit_s']:.3f} s (products {found['best_product_gflops']:,.0f}, attention "
        f"{found['best_attention_gflops']:,.0f} GFLOP/s): {found['share_of_limit']:.0%} reached",
        f"answers agree: {found['errors']}",
        f"memory: {found['memory_how']}; {found['kept_copies_mib']} MiB of reordered weights aside",
        f"{found['device']}, torch {found['torch']}, commit {found['commit']}",
        *(f"bar {name}: {said}" for name, said in found["bars"].items()),
    ):
        out_console.print(line, highlight=False, soft_wrap=True)
