"""`modaltune bench encoders`: time the runtimes of tile encoders. Heavy modules load inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modaltune.cli_parts import (
    FAILED,
    JsonFlag,
    err_console,
    out_console,
    print_json,
    reports_errors,
)


@reports_errors
def encoders(
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="efficientnet-lite0 or vit-small; may be given again.", show_default="both"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 9,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile takes part: a minute more.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Folder of encoders.csv.", show_default="benchmarks/results if it exists"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("modaltune-bench"),
    as_json: JsonFlag = False,
) -> None:
    """Time uint8 tiles to features: plain PyTorch, ours eager, and the runtime that auto chooses.

    Preprocessing is included on every side, features are compared before anything is timed, and the
    sides take turns. Exits 1 where the chosen runtime is below its bar.
    """
    from modaltune.benchmarks import encoders as bench
    from modaltune.benchmarks.harness import append_row, results_folder

    folder = results_folder(results)
    rows: list[dict[str, Any]] = []
    for name in encoder or bench.ENCODERS:
        if not as_json:
            err_console.print(f"timing {name} ...", highlight=False)
        rows += bench.measure(name, rounds, compiled=compiled)
    if folder is not None:
        for row in rows:
            append_row(folder / bench.CSV_NAME, row)
    picture = bench.plot(rows, out / "encoders.png")
    missed = bench.missed_bars(rows)
    if as_json:
        print_json({"rows": rows, "missed": missed, "plots": [str(picture)]})
    else:
        _show(rows)
        for line in missed:
            out_console.print(f"[yellow]{line}[/]", highlight=False)
        out_console.print(f"wrote {picture}", highlight=False, soft_wrap=True)
    if missed:
        raise typer.Exit(FAILED)


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("encoder", "side"):
        table.add_column(name, no_wrap=True)
    table.add_column("setting", overflow="fold")
    for name in ("tiles/s", "p20", "p80", "x plain", "GFLOP/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["encoder"], row["side"], row["setting"], f"{row['tiles_per_s']:.1f}",
            f"{row['tiles_per_s_p20']:.1f}", f"{row['tiles_per_s_p80']:.1f}",
            f"{row['ratio']:.2f}", f"{row['gflops_per_s']:.0f}",
        )  # fmt: skip
    out_console.print(table)
