"""A picture of the decoding benchmark: tiles per second of each reader, case by case."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from modaltune.benchmarks.kernel_plots import INK, MUTED, PALETTE, RULE

OURS = "modaltune"
# Readers in the order of their bars; hs2p is drawn at its faster way of each case.
_NAMES = {
    OURS: "ModalTune, at the consumer's end",
    "modaltune half-scale": "ModalTune, half-scale JPEG (option)",
    "modaltune on a GPU": "ModalTune, JPEG on a GPU (option)",
    "cucim": "cuCIM, raw batches",
    "hs2p": "hs2p, its faster way",
    "fastslide": "fastslide",
    "tiffslide": "tiffslide",
    "openslide": "openslide-python",
}
_COLOURS = dict(
    zip(
        _NAMES,
        (PALETTE[0], PALETTE[5], PALETTE[6], PALETTE[1], PALETTE[2], PALETTE[3], PALETTE[4], MUTED),
        strict=True,
    )
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read rows of the benchmark's CSV, the last of each case and reader."""
    with path.open(encoding="utf-8", newline="") as file:
        last = {(row["case"], row["impl"]): row for row in csv.DictReader(file)}
    return list(last.values())


def speeds(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return tiles/s by case and reader, hs2p's two ways as the faster one."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = "hs2p" if row["impl"].startswith("hs2p") else row["impl"]
        of_case = found.setdefault(row["case"], {})
        of_case[name] = max(of_case.get(name, 0.0), float(row["tiles_per_s_p50"]))
    return found


def plot_rows(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the medians as bars, a panel per case.

    Args:
        rows: Rows of the benchmark, one per case and reader.
        path: PNG to write.

    Returns:
        The path.
    """
    found = speeds(rows)
    columns = 3
    lines = -(-len(found) // columns)
    names = [name for name in _NAMES if any(name in of_case for of_case in found.values())]
    figure, axes = plt.subplots(
        lines, columns, figsize=(11, 0.55 + 1.9 * lines), squeeze=False, layout="constrained"
    )
    for place, (case, of_case) in enumerate(found.items()):
        panel = axes[place // columns][place % columns]
        shown = [name for name in names if name in of_case]
        for height, name in enumerate(reversed(shown)):
            value = of_case[name]
            panel.barh(height, value, color=_COLOURS[name], height=0.78)
            factor = "" if name == OURS else f"  (ours {of_case[OURS] / value:.1f} ×)"
            panel.annotate(
                f"{value:,.0f}{factor}", (value, height), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7.5, color=INK,
            )  # fmt: skip
        panel.set_title(case, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        panel.set_yticks([])
        panel.set_xlim(0, 1.55 * max(of_case.values()))
        panel.tick_params(axis="x", labelsize=7.5, colors=MUTED)
        panel.grid(axis="x", color=RULE, lw=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    for place in range(len(found), lines * columns):
        axes[place // columns][place % columns].set_visible(False)
    handles = [Patch(color=_COLOURS[name]) for name in names]
    figure.legend(
        handles, [_NAMES[name] for name in names], loc="outside upper left", ncols=4,
        frameon=False, fontsize=8.5,
    )  # fmt: skip
    figure.supxlabel(
        "tiles of 256 px at 0.5 mpp per second, 2 workers, median", fontsize=9, color=INK
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
