"""The pictures of an evaluation: ranking, calibration, survival by risk, forest, embeddings.

Each function returns a matplotlib figure; `save_figure` writes it as PNG and SVG. Colours are those
of Okabe and Ito, and never the only thing that tells two marks apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binomtest
from sklearn.decomposition import PCA
from sklearn.metrics import precision_recall_curve, roc_curve

from modaltune.classification_metrics import Reliability
from modaltune.engine.atomic import atomic_path
from modaltune.plots import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RULE,
    SKY,
    STYLE,
    VERMILION,
    NotDrawableError,
    p_text,
)
from modaltune.probes import Floats, Ints
from modaltune.survival_groups import RiskGroups

LINES: tuple[tuple[str, Any], ...] = (
    (BLUE, "-"),
    (VERMILION, (0, (5, 2))),
    (GREEN, (0, (1.5, 1.5))),
    (PINK, (0, (7, 2, 1.5, 2))),
    (ORANGE, (0, (3, 1, 1, 1, 1, 1))),
    (SKY, (0, (8, 3))),
)
MARKS = ((SKY, "o"), (VERMILION, "^"), (GREEN, "s"), (ORANGE, "D"), (PINK, "v"), (BLUE, "P"))
GROUP_LINES = {"low": (ORANGE, "--"), "high": (INK, "-")}
MONTH_STEPS = (1, 2, 3, 6, 12, 24, 36, 60, 120)  # between ticks of a survival picture
DPI = 200


@dataclass(frozen=True)
class Ranked:
    """One curve of a ranking picture.

    Attributes:
        label: In the legend.
        positive: `[n]` bool.
        score: `[n]`, higher = positive.
        area: Text behind the label, such as "0.86 (0.80–0.91)".
    """

    label: str
    positive: Any
    score: Floats
    area: str = ""


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def roc_figure(curves: Sequence[Ranked], title: str, legend: str = "area under it") -> Figure:
    """Draw receiver operating characteristics.

    Raises:
        NotDrawableError: No curve has both classes.
    """
    curves = _drawable(curves)
    figure, axes = _figure((4.6, 4.9), title)
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
    for curve, (colour, dashes) in zip(curves, _lines(len(curves)), strict=True):
        wrong, right, _ = roc_curve(curve.positive, curve.score)
        axes.plot(wrong, right, color=colour, linestyle=dashes, linewidth=2, label=_name(curve))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    _legend_below(figure, axes, legend)
    return figure


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def precision_recall_figure(
    curves: Sequence[Ranked], title: str, legend: str = "average precision"
) -> Figure:
    """Draw precision against recall, with the share of positives, which is chance.

    Raises:
        NotDrawableError: No curve has both classes.
    """
    curves = _drawable(curves)
    figure, axes = _figure((4.6, 4.9), title)
    for share in sorted({round(float(np.mean(c.positive)), 3) for c in curves}):
        axes.axhline(share, color=RULE, linewidth=1, zorder=0)
    for curve, (colour, dashes) in zip(curves, _lines(len(curves)), strict=True):
        precision, recall, _ = precision_recall_curve(curve.positive, curve.score)
        # The last point, precision 1 at recall 0, is a convention and no measurement.
        axes.plot(
            recall[:-1], precision[:-1], drawstyle="steps-post", color=colour, linestyle=dashes,
            linewidth=1.8, label=_name(curve),
        )  # fmt: skip
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), aspect="equal")
    axes.set(xlabel="recall", ylabel="precision")
    _legend_below(figure, axes, f"{legend}; grey: share of positives")
    return figure


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def calibration_figure(curve: Reliability, title: str, what: str) -> Figure:
    """Draw how often predictions come true, with 95 % intervals, above how many there are.

    Args:
        curve: The bins.
        title: Over the picture.
        what: What the probability is of, for the axes, such as "class 1".

    Raises:
        NotDrawableError: There is no bin.
    """
    if not len(curve.counts):
        raise NotDrawableError("no case has a probability")
    figure = Figure(figsize=(4.6, 5.0), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 1))
    axes = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=axes)
    _title(figure, title)
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
    for said, seen, count in zip(curve.predicted, curve.observed, curve.counts, strict=True):
        ends = binomtest(round(seen * count), int(count)).proportion_ci(method="wilson")
        axes.plot([said, said], [ends.low, ends.high], color=BLUE, linewidth=1.2, alpha=0.6)
    axes.plot(curve.predicted, curve.observed, "o-", color=BLUE, markersize=5, linewidth=1.6)
    told = f"calibration error {curve.error:.3f}; bars: 95 % intervals; grey: as predicted"
    axes.set_title(told, loc="left", fontsize=8.5, color=MUTED)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel=f"observed share of {what}")
    axes.tick_params(labelbottom=False)
    below.bar(curve.predicted, curve.counts, width=0.05, color=SKY, edgecolor=INK, linewidth=0.6)
    below.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    below.set(xlabel=f"predicted probability of {what}", ylabel="cases")
    return figure


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def kaplan_meier_figure(groups: RiskGroups, title: str) -> Figure:
    """Draw survival by risk group with 95 % bands, cases at risk, and the log-rank p value."""
    figure = Figure(figsize=(5.0, 5.0), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(6, 1))
    axes, table = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    _title(figure, title)
    end = 1.02 * max(float(curve.durations.max()) for curve in groups.curves) or 1.0
    step = next((months for months in MONTH_STEPS if end / months <= 7), end)
    ticks = [float(tick) for tick in np.arange(0, end, step)]
    for row, (name, curve) in enumerate(zip(groups.names, groups.curves, strict=True)):
        colour, dashes = GROUP_LINES[name]
        axes.fill_between(
            curve.times, curve.low, curve.high, step="post", color=colour, alpha=0.13, linewidth=0
        )
        median = f"{curve.median:.0f} months" if np.isfinite(curve.median) else "not reached"
        label = f"{name} risk: {int(curve.events.sum())} of {len(curve.events)} died, "
        label += f"median {median}"
        axes.step(curve.times, curve.surviving, where="post", color=colour, linestyle=dashes,
                  linewidth=2, label=label)  # fmt: skip
        gone = np.unique(curve.durations[curve.events == 0])
        index = np.searchsorted(curve.times, gone, side="right") - 1
        axes.plot(gone, curve.surviving[index], "|", color=colour, markersize=6)
        for tick, count in zip(ticks, curve.at_risk(ticks), strict=True):
            table.text(tick, row, str(count), ha="center", va="center_baseline", fontsize=8.5)
    axes.set(xlim=(0, end), ylim=(0, 1.03), ylabel="share surviving", xticks=ticks)
    axes.set_xlabel("months")
    _legend_below(figure, axes, f"log-rank {p_text(groups.p_value)}; bands: 95 %; ticks: censored")
    table.set(xlim=(0, end), ylim=(len(groups.names) - 0.5, -0.5), xticks=[])
    table.set_yticks(range(len(groups.names)), list(groups.names))
    table.set_title("cases at risk", loc="left", fontsize=8.5, color=MUTED)
    table.tick_params(length=0, pad=20)
    table.spines[:].set_visible(False)
    return figure


@dataclass(frozen=True)
class ForestPanel:
    """One metric of a forest picture.

    Attributes:
        title: The metric.
        values: `[r, 3]` value, low and high, NaN where undefined.
        chance: Where a model that knows nothing stands; None if that is no fixed number.
        limits: Of the axis; fitted to the values of all panels if None.
    """

    title: str
    values: Floats
    chance: float | None = 0.5
    limits: tuple[float, float] | None = None


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def forest_figure(rows: Sequence[str], panels: Sequence[ForestPanel], title: str) -> Figure:
    """Draw metrics with their intervals side by side, a row per run, prompt or site."""
    height = 1.25 + 0.34 * len(rows)
    figure = Figure(figsize=(1.4 + 2.7 * len(panels), height), layout="constrained")
    has_chance = any(panel.chance is not None for panel in panels)
    _title(figure, title + ("; dashed: chance" if has_chance else ""))
    limits = _forest_limits(panels)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _forest_panel(axes, panel, panel.limits or limits)
    all_axes[0].set_yticks(range(len(rows)), list(rows))
    all_axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _forest_panel(axes: Axes, panel: ForestPanel, limits: tuple[float, float]) -> None:
    low, high = limits
    width = high - low
    if panel.chance is not None:
        axes.axvline(panel.chance, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
    for row, (value, start, end) in enumerate(panel.values):
        if not np.isfinite(value):
            axes.text(high + 0.04 * width, row, "–", va="center", color=MUTED)
            continue
        label = f"{value:.3f}"
        if np.isfinite([start, end]).all():
            label += f" ({start:.2f}–{end:.2f})"
            axes.plot([start, end], [row, row], color=BLUE, linewidth=1.6, solid_capstyle="butt")
        axes.plot(value, row, "s", color=INK, markersize=5)
        axes.text(high + 0.04 * width, row, label, va="center", fontsize=8)
    axes.set_xlim(low, high + 0.85 * width)
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.hlines(range(len(panel.values)), low, high, color=RULE, linewidth=0.6, zorder=0)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(low, high)


def _forest_limits(panels: Sequence[ForestPanel]) -> tuple[float, float]:
    """Return limits that hold every panel, so that intervals compare by eye."""
    chances = [panel.chance for panel in panels if panel.chance is not None]
    ends = [*(float(v) for p in panels for v in p.values[np.isfinite(p.values)]), *chances]
    if not ends:
        return 0.0, 1.0
    pad = 0.06 * max(max(ends) - min(ends), 0.05)
    return min(ends) - pad, max(ends) + pad


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def embedding_figure(
    train: Floats, shown: Floats, groups: Ints, names: Sequence[str], title: str
) -> Figure:
    """Draw embeddings on the two main components of the training cases.

    Args:
        train: `[n, d]`; the components are fitted on these, drawn in grey.
        shown: `[m, d]` the other cases.
        groups: `[m]` index into `names`, -1 for none.
        names: Of the groups.
        title: Over the picture.

    Raises:
        NotDrawableError: Fewer than three training cases, or one dimension.
    """
    if len(train) < 3 or train.shape[1] < 2 or not len(shown):
        raise NotDrawableError("fewer than three training cases, or nothing to show")
    components = PCA(n_components=2, random_state=0).fit(train)
    behind, front = components.transform(train), components.transform(shown)
    figure, axes = _figure((4.8, 4.9), title)
    grey = {"s": 9, "c": "#c3c8d1", "linewidths": 0}
    _scatter(axes, behind, f"training ({len(train)})", grey)
    for index, name in enumerate(names):
        colour, marker = MARKS[index % len(MARKS)]
        look = {"s": 30, "c": colour, "marker": marker, "edgecolors": INK, "linewidths": 0.6}
        own = front[groups == index]
        _scatter(axes, own, f"{name} ({len(own)})", {**look, "zorder": 3})
    if (groups < 0).any():
        own = front[groups < 0]
        hollow = {"s": 24, "facecolors": "white", "edgecolors": MUTED, "linewidths": 1.1}
        _scatter(axes, own, f"no class ({len(own)})", hollow)
    share = components.explained_variance_ratio_
    axes.set(xlabel=f"component 1 ({share[0]:.0%} of variance)")
    axes.set(ylabel=f"component 2 ({share[1]:.0%} of variance)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _scatter(axes: Axes, points: Floats, label: str, look: dict[str, Any]) -> None:
    axes.scatter(points[:, 0], points[:, 1], label=label, **look)


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write a figure as `<name>.png` and `<name>.svg`, the same bytes every time."""
    paths = [Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"]
    for path in paths:
        # The salt makes the ids of an SVG the same in every run; without a date, so is the rest.
        style: Any = {**STYLE, "svg.hashsalt": name}
        with atomic_path(path) as temporary, matplotlib.rc_context(style):
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(temporary, dpi=DPI, metadata=metadata)
    return paths


def _drawable(curves: Sequence[Ranked]) -> list[Ranked]:
    kept = [c for c in curves if 0 < np.sum(c.positive) < len(c.positive)]
    if not kept:
        raise NotDrawableError("all cases are of one class")
    return kept


def _lines(count: int) -> list[tuple[str, Any]]:
    return [LINES[k % len(LINES)] for k in range(count)]


def _name(curve: Ranked) -> str:
    return f"{curve.label}, {curve.area}" if curve.area else curve.label


def _legend_below(figure: Figure, axes: Axes, title: str) -> None:
    legend = figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", title=title,
        alignment="left", handlelength=3.2,
    )  # fmt: skip
    legend.get_title().set(fontsize=8.5, color=MUTED)


def _figure(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    _title(figure, title)
    return figure, figure.add_subplot()


def _title(figure: Figure, title: str) -> None:
    """Write the title from the left edge of the figure, in lines that fit it."""
    wrapped = textwrap.fill(title, int(figure.get_figwidth() * 12))
    figure.suptitle(wrapped, x=0.02, ha="left", fontsize=10, fontweight="bold")
