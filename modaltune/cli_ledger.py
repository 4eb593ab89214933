"""`modaltune status` and `modaltune retry`: look at an output folder's ledger, try slides again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modaltune.cli_parts import JsonFlag, out_console, print_json, reports_errors

Folder = Annotated[
    Path, typer.Argument(help="The --out folder of `modaltune embed`.", metavar="DIR")
]


@reports_errors
def status(folder: Folder, as_json: JsonFlag = False) -> None:
    """Show how far an embedding is: counts, rate, who works on what, what failed and why.

    Reads the folder's ledger and changes nothing; runs may be going on. A slide is pending,
    running, done, empty (no tissue), failed (will be tried again) or quarantined (failed three
    times: mend it, then `modaltune retry`).
    """
    from modaltune.engine.ledger_report import read_status
    from modaltune.engine.ledger_schema import LEDGER_NAME

    sets = read_status(folder)
    if as_json:
        print_json({"ledger": str(folder / LEDGER_NAME), "sets": [one.to_dict() for one in sets]})
        return
    from modaltune.console_tables import status_tables

    for table in status_tables(sets):
        out_console.print(table)


@reports_errors
def retry(
    folder: Folder,
    slide: Annotated[
        list[str] | None,
        typer.Option(help="Only this slide, finished or not; may be given again.", metavar="ID"),
    ] = None,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="Only the quarantined slides.")
    ] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only the failed slides.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Let slides be tried again, from the first attempt: all that failed, unless told otherwise.

    Nothing runs here: the next `modaltune embed` with the same --out does, or one that is going on.
    A finished slide that is named is made again; its file stays until the new one is whole.
    """
    if slide and (quarantined or failed):
        raise typer.BadParameter("give --slide, or --quarantined and --failed, not both")
    from modaltune.engine.ledger_report import retry_slides

    chosen = [name for name, asked in (("failed", failed), ("quarantined", quarantined)) if asked]
    ids = retry_slides(folder, slide or None, chosen or ("failed", "quarantined"))
    if as_json:
        print_json({"retried": ids})
        return
    for slide_id in ids:
        out_console.print(f"{slide_id} is pending", highlight=False, markup=False)
    out_console.print(
        f"{len(ids)} slides will be tried again: run `modaltune embed` with --out {folder}"
        if ids
        else "no slide has failed: nothing to try again",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
