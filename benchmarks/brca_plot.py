"""A picture of the benchmark of genes alone: both metrics with intervals, a line per cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from modaltune.benchmarks.kernel_plots import INK, MUTED, PALETTE, RULE

OURS = "modaltune"
_LABELS = {OURS: "ModalTune", "pathway_mlp": "pathway MLP", "gene_mixer": "gene mixer"}
_PANELS = {
    "balanced_accuracy": "balanced accuracy",
    "c_index": "c-index",
    "mean_of_two": "mean of the two",
}


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows to draw: of ModalTune only the reading that is judged, which comes first."""
    judged: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["model"] == OURS:
            judged.setdefault((row["trained_on"], row["cohort"]), row["reading"])
    return [
        row
        for row in rows
        if row["metric"] in _PANELS
        and (row["model"] != OURS or row["reading"] == judged[row["trained_on"], row["cohort"]])
    ]


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw means over seeds with 95 % intervals over patients, a line of panels per cohort.

    Args:
        rows: Rows of the benchmark.
        path: PNG to write.

    Returns:
        The path.
    """
    drawn = shown(rows)
    places = list(dict.fromkeys((row["trained_on"], row["cohort"]) for row in drawn))
    counts = [len({r["model"] for r in drawn if _place(r) == place}) for place in places]
    figure, axes = plt.subplots(
        len(places),
        len(_PANELS),
        figsize=(11, 0.6 + sum(0.55 + 0.3 * n for n in counts)),
        height_ratios=[n + 1 for n in counts],
        squeeze=False,
        layout="constrained",
    )
    for line, place in zip(axes, places, strict=True):
        own = [row for row in drawn if _place(row) == place]
        models = list(dict.fromkeys(row["model"] for row in own))
        for panel, metric in zip(line, _PANELS, strict=True):
            _panel(panel, models, [row for row in own if row["metric"] == metric])
        line[0].set_yticks(range(len(models)), [*map(_label, models)], fontsize=8.5, color=INK)
        home, cohort = place
        title = cohort if home == cohort else f"{home} → {cohort}: only probes are fitted there"
        line[0].set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    for panel, name in zip(axes[-1], _PANELS.values(), strict=True):
        panel.set_xlabel(f"{name}, test cases", fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["trained_on"], row["cohort"]


def _label(model: str) -> str:
    return _LABELS.get(model, model)


def _panel(panel: Any, models: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        height, colour = models.index(row["model"]), PALETTE[0 if row["model"] == OURS else 1]
        panel.plot([row["low"], row["high"]], [height] * 2, color=colour, lw=2)
        panel.plot(row["value"], height, "o", color=colour, ms=6)
        panel.annotate(
            f"{row['value']:.3f}", (row["value"], height), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize=7.5, color=INK,
        )  # fmt: skip
    panel.axvline(0.5, color=MUTED, lw=0.8, ls=":")
    panel.set_xlim(0.2, 1.0)
    panel.set_ylim(len(models) - 0.4, -0.8)
    panel.set_yticks([])
    panel.tick_params(axis="x", labelsize=7.5, colors=MUTED)
    panel.grid(axis="x", color=RULE, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
