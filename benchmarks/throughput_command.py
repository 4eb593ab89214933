"""`modaltune bench throughput`: what a GPU would need around it, modelled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modaltune.cli_parts import JsonFlag, out_console, print_json


def throughput(
    tile_encoder: Annotated[
        list[str] | None, typer.Option(help="Registered encoder; may be given again.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Folder with decode.csv, for the rate of one core.")
    ] = Path("benchmarks/results"),
    as_json: JsonFlag = False,
) -> None:
    """Model tiles/s, decoding cores and traffic per GPU and tile encoder; nothing is run.

    FLOPs are counted over the real networks; the GPU is taken at half its dense peak; what one core
    decodes is the last measured row of decode.csv.
    """
    from modaltune.benchmarks import throughput as bench

    rows = bench.table(tile_encoder or bench.ENCODERS, results)
    if as_json:
        print_json({"rows": rows, "attainable": bench.ATTAINABLE, "modelled": True})
        return
    from rich.table import Table

    shown = Table(title="Modelled: tile encoding on GPUs", title_justify="left")
    for name in rows[0]:
        shown.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        shown.add_row(*(f"{v:,}" if isinstance(v, int | float) else v for v in row.values()))
    out_console.print(shown)
