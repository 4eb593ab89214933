"""`modaltune bench decode`: reading tiles against other readers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modaltune.cli_parts import FAILED, JsonFlag


def decode(
    slide: Annotated[
        Path | None,
        typer.Argument(help="H&E slide to make a mosaic of.", show_default="the shared one"),
    ] = None,
    case: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each reader, in turn.")] = 7,
    rivals: Annotated[
        list[str] | None,
        typer.Option(help="Python of an environment with rivals; may be given again."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of decode.csv.", show_default="benchmarks/results if it exists"),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Our decoder on a GPU, too (JPEG).")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time decoded tiles at the consumer's end against cuCIM, hs2p, OpenSlide and others.

    The slide is mosaicked to 20,000 x 20,000 px in several codecs, kept in the temporary folder.
    Our pixels are checked first; wrong ones are not timed, and exit 1. Rivals that are not
    installed are named.
    """
    from modaltune.benchmarks.decode import main

    arguments = [str(slide)] if slide else []
    arguments += ["--case", case, "--rounds", str(rounds)]
    for python in rivals or []:
        arguments += ["--rivals", python]
    for name, value in (("--results", results), ("--plot", plot)):
        arguments += [name, str(value)] if value else []
    arguments += [word for word, wanted in (("--gpu", gpu), ("--json", as_json)) if wanted]
    if main(arguments):
        raise typer.Exit(FAILED)
