"""What `modaltune bench kernels` prints: tables of modelled and of measured figures, and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modaltune.benchmarks.kernel_runs import Case, roof_share
from modaltune.benchmarks.kernel_timing import MIB, Roof
from modaltune.benchmarks.model_roofline import ATTAINABLE, WholeModel, whole_model
from modaltune.kernels.roofline import (
    DEVICES,
    LAUNCHES,
    MODES,
    MOVED_BARS,
    costed_ops,
    on_device,
    op_cost,
    published,
)

TILES = (1_000, 10_000, 25_000)
_PIPE_COLUMNS = 140


def modelled_rows(tiles: Sequence[int] = TILES) -> list[dict[str, Any]]:
    """Return one row per op, mode, size and device, in the published configuration (bf16)."""
    rows: list[dict[str, Any]] = []
    for op in costed_ops():
        for mode in MODES:
            for count in tiles:
                for device in DEVICES.values():
                    cost = op_cost(op, published(op, count), mode=mode, device=device)
                    if cost is None:
                        continue
                    found = on_device(cost, device)
                    rows.append(
                        {
                            "op": op,
                            "mode": mode,
                            "tiles": count,
                            "device": device.name,
                            "modelled": True,
                            "gflop": cost.flops / 1e9,
                            "least_mb": cost.least_bytes / 1e6,
                            "moved_mb": cost.moved_bytes / 1e6,
                            "moved_over_least": found.moved_ratio,
                            "bar": MOVED_BARS.get(op) if mode == "forward" else None,
                            "roof_us": found.roof_s * 1e6,
                            "ours_us": found.ours_s * 1e6,
                            "bound": found.bound,
                            "launches": LAUNCHES[op][mode == "backward"],
                        }
                    )
    return rows


def whole_models(tiles: Sequence[int] = TILES) -> list[WholeModel]:
    """Return the sums over a three-task forward and train step."""
    return [
        whole_model(count, mode, device)
        for mode in ("forward", "train")
        for count in tiles
        for device in DEVICES.values()
    ]


def modelled_json(rows: Sequence[Mapping[str, Any]], sums: Sequence[WholeModel]) -> dict[str, Any]:
    """Return everything modelled, with the sources of the peaks."""
    return {
        "modelled": True,
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "rows": list(rows),
        "whole_model": [asdict(one) for one in sums],
    }


def _microseconds(value: float) -> str:
    return f"{value / 1e3:.2f} ms" if value >= 1e3 else f"{value:.3g} µs"


def _large(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(row: Mapping[str, Any]) -> str:
    """Our time at best, and moved over least bytes; red where it misses its bar."""
    ratio, bar = f"{row['moved_over_least']:.2f}", row["bar"]
    if bar and row["moved_over_least"] > bar:
        ratio = f"[bold red]{ratio}[/]"
    return f"{_microseconds(row['ours_us'])}  {ratio}"


def wide(console: Console) -> Console:
    """Let a console that is no terminal, such as a pipe, be as wide as the tables."""
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    return console


def print_modelled(
    console: Console, rows: Sequence[Mapping[str, Any]], sums: Sequence[WholeModel]
) -> None:
    """Print the modelled table of the ops and of the whole model."""
    table = Table(title="Modelled, not measured: bf16, published configuration")
    for name in ("op", "pass", "H100 bound by"):
        table.add_column(name)
    for name in ("tiles", "GFLOP", "least MB", *DEVICES):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["mode"], row["tiles"]), []).append(row)
    before = ("", "")
    for (op, mode, tiles), group in groups.items():
        h100 = next(row for row in group if row["device"] == "H100")
        if before[0] not in ("", op):
            table.add_section()
        table.add_row(
            "" if before[0] == op else op,
            "" if before == (op, mode) else mode,
            h100["bound"],
            f"{tiles:,}",
            _large(h100["gflop"]),
            _large(h100["least_mb"]),
            *(_cell(row) for row in group),
        )
        before = (op, mode)
    console.print(table)
    bars = ", ".join(f"{op} {bar:g}" for op, bar in MOVED_BARS.items())
    console.print(
        "Per GPU: the time that peaks and the bytes our kernel moves allow, and moved / least "
        f"bytes. Bars of the latter, forward (red where missed): {bars}. A re-read is free only "
        "while what is re-read fits half the L2.",
        highlight=False,
    )
    _print_sums(console, sums)


def _print_sums(console: Console, sums: Sequence[WholeModel]) -> None:
    table = Table(title="Modelled, not measured: the whole model, three tasks, bf16")
    for name in ("pass", "device"):
        table.add_column(name)
    for name in ("tiles", "TFLOP", f"floor, {ATTAINABLE:.0%} of peak",
                 "every launch at its roof", "launches, tasks packed", "one by one"):  # fmt: skip
        table.add_column(name, justify="right")
    for one in sums:
        table.add_row(
            one.mode,
            one.device,
            f"{one.tiles:,}",
            f"{one.gflop / 1e3:.1f}",
            f"{one.floor_s * 1e3:.1f} ms",
            f"{one.roof_s * 1e3:.1f} ms",
            str(one.launches),
            str(one.launches_separate),
        )
    console.print(table)
    console.print(
        "Bars at 25,000 tiles on an H100: forward 50 ms and 250 launches, train step 160 ms.",
        highlight=False,
    )
    missing = sorted({op for one in sums for op in one.missing})
    if missing:
        console.print(
            f"[bold]Not in the sums[/], for want of a cost.py: {', '.join(missing)}.",
            highlight=False,
        )


def _share_text(case: Case, seconds: float, roof: Roof | None) -> str:
    share = roof_share(case, seconds, roof)
    return f"{share:.0%}" if isinstance(share, float) else "-"


def print_case(console: Console, case: Case, roof: Roof | None) -> None:
    """Print what became of one op, mode and size."""
    tiles = f", {case.tiles:,} tiles" if case.tiles else ""
    table = Table(title=f"{case.spec.name}, {case.mode}{tiles}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("p20 ms", "p50 ms", "p80 ms", "eager / this", "peak MiB", "of roof"):
        table.add_column(name, justify="right")
    eager = case.seconds("eager")
    for one in case.outcomes:
        if one.timing is None:
            continue
        t = one.timing
        table.add_row(
            one.impl,
            *(f"{value * 1e3:.3f}" for value in (t.p20_s, t.p50_s, t.p80_s)),
            f"{eager / t.p50_s:.2f}" if eager else "-",
            f"{one.peak_bytes / MIB:.1f}" if one.peak_bytes >= 0 else "-",
            _share_text(case, t.p50_s, roof),
        )
    console.print(table)
    for one in case.outcomes:
        if one.timing is None:
            colour = "bold red" if one.is_wrong else "dim"
            said = Text(f"  {one.impl}: {one.reason}", style=colour)
            console.print(said, soft_wrap=True)


def not_timed(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return who was not timed and why."""
    return [
        {
            "op": case.spec.op,
            "variant": case.spec.variant,
            "mode": case.mode,
            "tiles": case.tiles,
            "impl": one.impl,
            "reason": one.reason,
            "wrong": one.is_wrong,
        }
        for case in cases
        for one in case.outcomes
        if one.timing is None
    ]
