"""`modaltune bench stream`: the whole engine on a cohort, and a picture of who worked when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modaltune.cli_parts import (
    FAILED,
    JsonFlag,
    err_console,
    out_console,
    print_json,
)
from modaltune.engine.encoders.registry import DEFAULT_ENCODER

if TYPE_CHECKING:
    from modaltune.benchmarks.stream import Measured


def stream(
    tile_encoder: Annotated[
        str, typer.Option(help="Tile encoder; vit-small is a random ViT-S/16, which is slower.")
    ] = DEFAULT_ENCODER,
    slides: Annotated[int, typer.Option(min=5, help="Slides of 30 to 300 tiles.")] = 24,
    runtime: Annotated[str, typer.Option(help="Runtime of the tile encoder.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding processes.", show_default="as embed")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of stream.csv.", show_default="benchmarks/results if it exists"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("modaltune-bench"),
    as_json: JsonFlag = False,
) -> None:
    """Embed a drawn cohort, and say how busy the encoder was and what the rest cost it.

    It is embedded once for the times and once for the memory, whose reading takes time. The rival
    is the encoder alone, on the same tiles in memory, before and after. Features are checked before
    anything is reported. Exits 1 where a bar is missed.
    """
    from modaltune.benchmarks import stream as bench
    from modaltune.benchmarks.harness import append_row, results_folder

    folder = results_folder(results)
    if not as_json:
        err_console.print(f"drawing and embedding {slides} slides ...", highlight=False)
    found = bench.measure(
        tile_encoder, slides=slides, runtime=runtime, device=device, workers=workers
    )
    if folder is not None:
        append_row(folder / bench.CSV_NAME, found.row)
    picture = plot_timeline(found, out / "stream.png")
    missed = bench.missed_bars(found.row)
    if as_json:
        print_json(
            {
                **found.row,
                "stages_s": found.stages_s,
                "rss_mib": found.rss_mib,
                "missed": missed,
                "plots": [str(picture)],
            }
        )
    else:
        _show(found.row)
        for line in missed:
            out_console.print(f"[red]missed[/] {line}", highlight=False)
        out_console.print(f"wrote {picture}", highlight=False, soft_wrap=True, markup=False)
    if missed:
        raise typer.Exit(FAILED)


def _show(row: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="Stream", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in row.items():
        table.add_row(name, str(value))
    out_console.print(table)


def plot_timeline(found: Measured, path: Path) -> Path:
    """Draw who worked when, and memory after each slide; return the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (lanes, memory) = plt.subplots(
        2, 1, figsize=(8, 4.6), height_ratios=[2, 1], layout="constrained"
    )
    colours = {"encode": "#3b6fb6", "write": "#c46a2f"}
    labels, bars = [], 0
    for stage, colour in colours.items():
        stretches = [s for s in found.stretches if s.stage == stage]
        for number, lane in enumerate(_lanes(stretches)):
            spans = [(s.start_s, s.end_s - s.start_s) for s in lane]
            lanes.broken_barh(spans, (bars, 0.8), facecolors=colour, edgecolor="white", lw=0.3)
            labels.append(stage if number == 0 else f"{stage}, second")
            bars += 1
    lanes.set_yticks([at + 0.4 for at in range(bars)], labels)
    lanes.set_xlabel("seconds")
    row = found.row
    lanes.set_title(
        f"{row['encoder']} in {row['runtime']}, {row['slides']} slides, {row['tiles']} tiles: "
        f"encoder busy {row['encoder_busy']:.1%}, {row['tiles_per_s']:.0f} tiles/s "
        f"({row['ratio']:.0%} of alone)",
        loc="left", fontsize=9,
    )  # fmt: skip
    memory.plot(range(1, len(found.rss_mib) + 1), found.rss_mib, color="#555", marker=".")
    memory.axhline(row["bound_mib"], color="#b02a33", lw=1, ls="--")
    memory.annotate("bound", (len(found.rss_mib), row["bound_mib"]), va="bottom", ha="right")
    memory.set_ylim(0, 1.15 * max(row["bound_mib"], *found.rss_mib))
    memory.set_xlabel("slides finished")
    memory.set_ylabel("MiB, all processes")
    for axis in (lanes, memory):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _lanes(stretches: Sequence[Any]) -> list[list[Any]]:
    """Share stretches out to lanes in which none overlap."""
    lanes: list[list[Any]] = []
    for stretch in sorted(stretches, key=lambda s: s.start_s):
        free = next((lane for lane in lanes if lane[-1].end_s <= stretch.start_s), None)
        if free is None:
            lanes.append([stretch])
        else:
            free.append(stretch)
    return lanes
