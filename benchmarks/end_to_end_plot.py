"""The picture of the end-to-end comparison: seconds of each command, and memory."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_KINDS = {
    "torch": "eager PyTorch, as it comes",
    "session": "ModalTune's ONNX Runtime session",
    "null": "an encoder that costs nothing",
}
_COLOURS = {"modaltune": "#3b6fb6", "slide2vec": "#c46a2f", "lazyslide": "#7a9a3d"}
_LOOKS = {"modaltune": "ModalTune", "slide2vec": "slide2vec", "lazyslide": "LazySlide"}


_NUMBERS = ("wall_s", "slide_s", "wall_ratio", "slide_ratio", "peak_mib")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows of the benchmark's CSV, the last of each side."""
    with path.open(encoding="utf-8", newline="") as file:
        last = {(row["tool"], row["encoder"]): row for row in csv.DictReader(file)}
    return [{**row, **{key: float(row[key]) for key in _NUMBERS}} for row in last.values()]


def plot_rows(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw one bar per side: its second slide, and the rest of the command; return the file.

    Args:
        rows: One for each side.
        path: PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    bars = [(kind, row) for kind in _KINDS for row in rows if row["encoder"] == kind]
    figure, (time, memory) = plt.subplots(
        1, 2, figsize=(10, 0.6 + 0.42 * len(bars)), width_ratios=[3, 1], sharey=True,
        layout="constrained",
    )  # fmt: skip
    for place, (_, row) in enumerate(bars):
        colour, rest = _COLOURS[row["tool"]], row["wall_s"] - row["slide_s"]
        time.barh(place, rest, color=colour, alpha=0.35)
        time.barh(place, row["slide_s"], left=rest, color=colour)
        said = f"{row['wall_s']:.1f} s"
        if row["tool"] != "modaltune":
            said += f"   {row['wall_ratio']:.1f} x; slide {row['slide_ratio']:.1f} x"
        time.annotate(said, (row["wall_s"], place), (4, 0), textcoords="offset points", va="center")
        memory.barh(place, row["peak_mib"], color=colour)
        memory.annotate(
            f"{row['peak_mib']:.0f}", (row["peak_mib"], place), (4, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    time.set_yticks(
        range(len(bars)), [f"{_LOOKS[row['tool']]}: {_KINDS[kind]}" for kind, row in bars]
    )
    time.invert_yaxis()
    time.set_xlim(0, 1.7 * max(row["wall_s"] for _, row in bars))
    time.set_xlabel("seconds: second slide (dark) and the rest of the command")
    memory.set_xlim(0, 1.45 * max(row["peak_mib"] for _, row in bars))
    memory.set_xlabel("MiB at most")
    for axis in (time, memory):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
