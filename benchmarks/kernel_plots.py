"""Pictures of the kernel benchmarks: rooflines, modelled; medians against each other, measured.

Colours are those of Okabe and Ito, and never the only thing that tells two marks apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.patheffects as patheffects
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from modaltune.kernels.roofline import DEVICES, Device

INK, MUTED, RULE = "#1c2230", "#5b6474", "#d9dce3"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1c2230", "#8c6d31")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.dpi": 100,
}
_X = (0.2, 60_000.0)  # FLOP per byte
_FLOOR = 1e11  # FLOP/s where the axes begin


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a mark per name: none like the first, no pair twice among 49 others."""
    looks = {names[0]: (PALETTE[0], MARKS[0])} if names else {}
    for i, name in enumerate(names[1:]):
        looks[name] = (PALETTE[1 + i % 7], MARKS[1 + (i + i // 7) % 7])
    return looks


def _roof(axes: Axes, device: Device) -> None:
    x = np.geomspace(*_X, 200)
    axes.plot(x, np.minimum(device.half_flops, x * device.bytes_per_s), color=INK, lw=1.6)
    axes.fill_between(
        x,
        _FLOOR,
        np.minimum(device.half_flops, x * device.bytes_per_s),
        color=RULE,
        alpha=0.35,
        lw=0,
    )
    ridge = device.half_flops / device.bytes_per_s
    axes.axvline(ridge, color=MUTED, lw=0.8, ls=(0, (2, 3)))
    axes.annotate(
        f"{device.half_flops / 1e12:,.0f} TFLOP/s bf16",
        (_X[1], device.half_flops), xytext=(-2, 9), textcoords="offset points",
        ha="right", va="bottom", color=INK, fontsize=8.5,
    )  # fmt: skip
    axes.annotate(
        f"{device.bytes_per_s / 1e12:.2f} TB/s",
        (2.2, 2.2 * device.bytes_per_s), xytext=(-7, 5), textcoords="offset points",
        ha="right", va="bottom", color=INK, fontsize=8.5,
    )  # fmt: skip
    axes.annotate(
        f"ridge {ridge:.0f}", (ridge, _FLOOR), xytext=(3, 4), textcoords="offset points",
        color=MUTED, fontsize=8,
    )  # fmt: skip


def _marks(axes: Axes, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> None:
    """A mark per op where our kernel stands at best; a line to where the least bytes lie."""
    for row in rows:
        colour, mark = looks[row["op"]]
        height = row["gflop"] * 1e9 / (row["ours_us"] * 1e-6)
        ours = row["gflop"] * 1e3 / row["moved_mb"]
        least = row["gflop"] * 1e3 / row["least_mb"]
        axes.plot([ours, least], [height, height], color=colour, lw=1.2, alpha=0.7)
        filled = row["mode"] == "forward"
        axes.plot(
            ours, height, mark, ms=7.5 if filled else 7, mec=colour, mew=1.5,
            mfc=colour if filled else "white", alpha=0.95, zorder=5 if filled else 4,
        )  # fmt: skip


def plot_rooflines(rows: Sequence[Mapping[str, Any]], tiles: int, path: Path) -> Path:
    """Draw every op under the roofs of four GPUs, as modelled, and return the file written.

    Args:
        rows: Of `modaltune.benchmarks.kernel_tables.modelled_rows`.
        tiles: The size to draw.
        path: PNG to write.
    """
    chosen = [row for row in rows if row["tiles"] == tiles and row["gflop"] > 0]
    looks = _looks(sorted({row["op"] for row in rows}))
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(11, 8.2), sharex=True, sharey=True)
        for axes, device in zip(grid.flat, DEVICES.values(), strict=True):
            _roof(axes, device)
            _marks(axes, [row for row in chosen if row["device"] == device.name], looks)
            axes.set_title(device.name)
            axes.set(xscale="log", yscale="log", xlim=_X, ylim=(_FLOOR, 8e15))
            axes.grid(True, which="major", color=RULE, lw=0.6)
            axes.set_axisbelow(True)
        for axes in grid[1]:
            axes.set_xlabel("arithmetic intensity, FLOP per byte moved")
        for axes in grid[:, 0]:
            axes.set_ylabel("FLOP/s")
        _legend(figure, looks, {row["op"] for row in chosen})
        figure.suptitle(
            f"Modelled, not measured: the kernels at their roofs, {tiles:,} tiles, bf16",
            x=0.06, y=0.975, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        figure.text(
            0.06, 0.938,
            "A mark stands at the bytes our kernel moves; its line ends at the least bytes. "
            "Below the flat roof right of the ridge: bound by exponentials.",
            color=MUTED, fontsize=9.5,
        )  # fmt: skip
        figure.subplots_adjust(
            left=0.07, right=0.98, top=0.89, bottom=0.15, wspace=0.06, hspace=0.14
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return path


def _legend(figure: Any, looks: Mapping[str, tuple[str, str]], shown: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, marker=m, ls="", ms=7.5, label=op)
        for op, (c, m) in looks.items()
        if op in shown
    ]
    handles += [
        Line2D([], [], color=MUTED, marker="o", ls="", ms=7.5, label="filled: forward"),
        Line2D([], [], color=MUTED, marker="o", mfc="white", mew=1.5, ls="", ms=7,
               label="hollow: backward"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncol=5, fontsize=9, columnspacing=1.6)


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the rows by op, mode and size, in the order they came."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = f"{row['op']} {row['variant']}".strip()
        size = f", {row['tiles']:,} tiles" if row["tiles"] else ""
        groups.setdefault(f"{name}\n{row['mode']}{size}", []).append(row)
    return list(groups.items())


def plot_results(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the median of every contender, with its p20 to p80, and return the file written.

    Args:
        rows: Of `modaltune.benchmarks.kernel_runs.rows_of`, from one run on one device.
        path: PNG to write.
    """
    groups = _groups(rows)
    names = list(dict.fromkeys(row["impl"] for row in rows))
    looks = _looks(names)
    with plt.rc_context(_STYLE):
        height = 1.9 + 0.62 * max(len(groups), 1)
        figure, axes = plt.subplots(figsize=(10, height))
        for place, (_, members) in enumerate(groups):
            if place % 2:
                axes.axhspan(place - 0.5, place + 0.5, color=RULE, alpha=0.35, lw=0)
            _contenders(axes, place, members, looks)
        axes.set(xscale="log", ylim=(max(len(groups), 1) - 0.5, -0.5), xlabel="milliseconds (log)")
        axes.set_xlim(right=1.8 * max((row["p80_ms"] for row in rows), default=1.0))
        axes.set_yticks(range(len(groups)), [label for label, _ in groups], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x", which="major", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        for name, (colour, mark) in looks.items():
            axes.plot([], [], mark, color=colour, ms=7, label=name)
        columns = min(len(names), 5) or 1
        top = 1 - (0.65 + 0.2 * -(-len(names) // columns)) / height
        figure.subplots_adjust(left=0.24, right=0.97, top=top, bottom=0.55 / height)
        if names:
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.3, 1.0), ncol=columns, fontsize=9,
                columnspacing=1.4, handletextpad=0.3,
            )  # fmt: skip
        about = f"{rows[0]['device']}, {rows[0]['dtype']}" if rows else "nothing was timed"
        figure.suptitle(
            f"Measured: medians and p20 to p80; 2× takes twice as long as ours. {about}",
            x=0.02, y=1 - 0.12 / height, ha="left", va="top", fontsize=11, fontweight="bold",
        )  # fmt: skip
        figure.savefig(path, dpi=160)
        plt.close(figure)
    return path


def _contenders(
    axes: Axes,
    place: int,
    members: Sequence[Mapping[str, Any]],
    looks: Mapping[str, tuple[str, str]],
) -> None:
    """One line of the picture: ours with its label, the others with their distance from it."""
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    ours = next((row["p50_ms"] for row in members if row["impl"] == "ours"), None)
    step = 0.6 / max(len(members), 1)
    for i, row in enumerate(members):
        colour, mark = looks[row["impl"]]
        y = place - 0.3 + step * (i + 0.5)
        axes.plot([row["p20_ms"], row["p80_ms"]], [y, y], color=colour, lw=2, alpha=0.6)
        axes.plot(row["p50_ms"], y, mark, color=colour, ms=7, mec="white", mew=0.6, zorder=5)
        if ours is None:
            continue
        ratio = row["p50_ms"] / ours
        times = f"{ratio:.2f}×" if ratio < 100 else f"{ratio:,.0f}×"
        said = f"{row['p50_ms']:.3g} ms" if row["impl"] == "ours" else times
        axes.annotate(
            said, (max(row["p50_ms"], row["p80_ms"]), y), xytext=(7, 0), fontsize=7.5,
            textcoords="offset points", va="center", color=colour, path_effects=halo,
        )  # fmt: skip
