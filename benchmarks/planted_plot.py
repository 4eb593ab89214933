"""The picture of the planted benchmark: scores with intervals, what is possible, and chance."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modaltune.benchmarks.planted import SCORES_NAME
from modaltune.planted import PlantedConfig, plant

_LOOKS = {
    "modaltune": "ModalTune",
    "modaltune_shared": "ModalTune, shared trunk",
    "late_fusion": "late fusion",
    "mcat": "MCAT",
    "abmil": "ABMIL (image)",
    "pathway_mlp": "pathway MLP (genes)",
    "gene_mixer": "gene mixer (genes)",
}
_METRICS = {"balanced_accuracy": "balanced accuracy", "c_index": "c-index"}
_OURS, _RIVALS, _SHUFFLED = "#3b6fb6", "#b9a58c", "#555555"


def plot_scores(
    rows: Sequence[Mapping[str, Any]],
    shuffled: Sequence[Mapping[str, Any]],
    best: Mapping[str, Mapping[str, float]],
    path: Path,
) -> Path:
    """Draw a bar per model and metric with its 95 % interval; return the file.

    Args:
        rows: Of `modaltune.benchmarks.planted_scores.scores`, one per metric and model.
        shuffled: The same with shuffled labels, drawn as points; may be empty.
        best: Scores of the best predictor that sees `image`, `genes` or `both`, by metric.
        path: PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in _LOOKS if any(row["model"] == name for row in rows)]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.4 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (metric, said) in zip(axes, _METRICS.items(), strict=True):
        for every, is_shuffled in ((rows, False), (shuffled, True)):
            _draw(axis, [row for row in every if row["metric"] == metric], names, is_shuffled)
        top = -0.75
        found = sorted((scores[metric], seen) for seen, scores in best.items())
        for (value, seen), side in zip(found, ("right", "left", "center"), strict=True):
            axis.axvline(value, color="black", linestyle=":", linewidth=1)
            axis.text(value, top, seen, ha=side, va="bottom", fontsize=8)
        axis.axvline(0.5, color="black", linewidth=1)
        axis.set_xlim(0.4, 1.0)
        axis.set_xlabel(f"{said}, with 95 % interval")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [_LOOKS[name] for name in names])
    axes[0].invert_yaxis()
    axes[0].plot([], [], color="black", linestyle=":", label="the best predictor that knows ...")
    if shuffled:
        axes[0].errorbar([], [], xerr=[], fmt="o", color=_SHUFFLED, ms=3, label="labels shuffled")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw(
    axis: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str], is_shuffled: bool
) -> None:
    """Draw the rows of one metric: bars, or points for shuffled labels."""
    for row in rows:
        place, value = names.index(row["model"]), row["value"]
        ends = [[value - row["value_low"]], [row["value_high"] - value]]
        if is_shuffled:
            axis.errorbar(value, place + 0.28, xerr=ends, fmt="o", color=_SHUFFLED, ms=3, lw=1)
            continue
        colour = _OURS if row["model"].startswith("modaltune") else _RIVALS
        axis.barh(place, value - 0.5, left=0.5, color=colour, height=0.7)
        axis.errorbar(value, place, xerr=ends, color="black", capsize=3, lw=1)
        said = axis.text(row["value_high"] + 0.01, place, f"{value:.3f}", va="center", fontsize=9)
        said.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})


def read_scores(path: Path, *, cohort_seed: int, shuffled: bool) -> list[dict[str, Any]]:
    """Read the last row of each model and metric of a cohort, with its own settings."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if not row["settings"]
            and row["cohort_seed"] == str(cohort_seed)
            and row["shuffled"] == str(shuffled)
        ]
    last = {(row["model"], row["metric"]): row for row in rows}
    numbers = ("value", "value_low", "value_high")
    return [{**row, **{name: float(row[name]) for name in numbers}} for row in last.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.planted_plot",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cohort-seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/images/planted.png"))
    options = parser.parse_args(arguments)
    path, seed = options.results / SCORES_NAME, options.cohort_seed
    rows = read_scores(path, cohort_seed=seed, shuffled=False)
    chance = read_scores(path, cohort_seed=seed, shuffled=True)
    best = plant(PlantedConfig(seed=seed)).facts()["best_test_scores"]
    print(plot_scores(rows, chance, best, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
