"""The pictures of a report: matplotlib figures as small inline SVG.

Colours are those of Okabe and Ito, and never the only thing that tells two marks apart: classes
differ in shape, curves in dashes, and curves carry their name. Text stays text (`svg.fonttype`
none), so that a page can set its font and a reader can search it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score, roc_curve

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Interval = tuple[float, float, float]  # value, low, high

INK, MUTED, RULE = "#1c2230", "#5b6474", "#d9dce3"
BLUE, PINK, GREEN, SKY, VERMILION, ORANGE = (
    "#0072B2",
    "#CC79A7",
    "#009E73",
    "#56B4E9",
    "#D55E00",
    "#E69F00",
)
SERIES = ((BLUE, "-"), (PINK, (0, (5, 2))), (GREEN, (0, (1.5, 1.5))))
CLASS_MARKS = ((SKY, "o"), (VERMILION, "^"))
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class NotDrawableError(ValueError):
    """The data cannot carry this picture; the message says why, for the reader of the report."""


@dataclass(frozen=True)
class PlantedPoints:
    """What was planted in each case, and how the model did.

    Attributes:
        share: `[n]` planned share of discohesive growth, 0-1.
        activity: `[n]` of the planted pathways.
        classes: `[n]` 0 or 1.
        is_error: `[n]` the out-of-fold prediction is wrong.
        is_complete: `[n]` the case has both image and genes.
        activity_per_share: Slope of the class boundary, `activity = -slope * (share - 0.5)`; None
            where it is not known.
    """

    share: Floats
    activity: Floats
    classes: npt.NDArray[np.int64]
    is_error: Bools
    is_complete: Bools
    activity_per_share: float | None


@dataclass(frozen=True)
class RiskHalves:
    """Cases of known risk, split at the median, and how far the halves' survival differs.

    Attributes:
        high, low: `[n]` bool; cases of unknown risk are in neither.
        p_value: Of the two-sided log-rank test.
    """

    high: Bools
    low: Bools
    p_value: float


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def metric_bars(name: str, values: Mapping[str, Interval], axis_label: str) -> str:
    """Draw one bar per choice of inputs, with its interval, from 0 to 1; 0.5 is chance.

    Args:
        name: Prefix of all ids in the SVG, unique in its page.
        values: Value, low and high by name, drawn from the top; a NaN value has no bar.
        axis_label: What is shown.
    """
    figure, axes = _figure((4.7, 0.42 * len(values) + 0.85))
    for row, (value, low, high) in enumerate(values.values()):
        if not np.isfinite(value):
            axes.text(0.02, row, "not available", va="center", color=MUTED)
            continue
        axes.barh(row, value, height=0.62, color=SERIES[row % len(SERIES)][0], alpha=0.9)
        if np.isfinite([low, high]).all():
            # Twice: a pale line below the dark one keeps it apart from any bar.
            axes.plot([low, high], [row, row], color="white", linewidth=3.6, alpha=0.75)
            axes.plot([low, high], [row, row], color=INK, linewidth=1.5)
            axes.plot([low, high], [row, row], "|", color=INK, markersize=6, markeredgewidth=1.3)
        axes.text(1.04, row, f"{value:.2f}", va="center", fontweight="bold", fontsize=10.5)
    axes.axvline(0.5, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.text(0.5, -0.58, "chance", ha="center", va="bottom", color=MUTED, fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(values) - 0.5, -0.55), xticks=np.linspace(0, 1, 5))
    axes.set_yticks(range(len(values)), list(values))
    axes.set_xlabel(axis_label)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def planted_scatter(name: str, points: PlantedPoints) -> str:
    """Draw image against genes, with what each shows of the classes alone along the edges.

    Raises:
        NotDrawableError: No case has known values.
    """
    if not len(points.share):
        raise NotDrawableError("no case has known planted values")
    figure = Figure(figsize=(5.0, 4.9), layout="constrained")
    grid = figure.add_gridspec(
        2, 2, width_ratios=(5, 1), height_ratios=(1, 5), hspace=0.02, wspace=0.02
    )
    axes = figure.add_subplot(grid[1, 0])
    top = figure.add_subplot(grid[0, 0], sharex=axes)
    right = figure.add_subplot(grid[1, 1], sharey=axes)
    _boundary(axes, points.activity_per_share)
    _class_points(axes, points.share, points.activity, points.classes, points.is_complete)
    _rings(axes, points.share[points.is_error], points.activity[points.is_error])
    limit = 1.12 * max(float(np.abs(points.activity).max()), 0.1)
    axes.set(
        xlim=(-0.04, 1.04),
        ylim=(-limit, limit),
        xlabel="image: share of discohesive growth",
        ylabel="genes: activity of the planted pathways",
    )
    _margins(top, right, points, limit)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.2)
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def roc_curves(
    name: str, classes: npt.NDArray[np.int64], probabilities: Mapping[str, Floats]
) -> str:
    """Draw the receiver operating characteristic of each choice of inputs, with its area.

    Args:
        name: Prefix of all ids in the SVG.
        classes: `[n]` 0 or 1.
        probabilities: `[n]` of class 1 by name; cases with NaN are left out of their curve.

    Raises:
        NotDrawableError: The cases are all of one class.
    """
    if len(np.unique(classes)) < 2:
        raise NotDrawableError("all cases are of one class")
    figure, axes = _figure((4.7, 4.3))
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
    for (label, probability), (colour, dashes) in zip(probabilities.items(), SERIES, strict=False):
        known = np.isfinite(probability)
        if len(np.unique(classes[known])) < 2:
            axes.plot([], [], color=colour, linestyle=dashes, label=f"{label}: not available")
            continue
        wrong, right, _ = roc_curve(classes[known], probability[known])
        area = roc_auc_score(classes[known], probability[known])
        axes.plot(
            wrong, right, color=colour, linestyle=dashes, linewidth=2, label=f"{label}, {area:.2f}"
        )
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(title="area under the curve", loc="lower right", alignment="left", handlelength=2.6)
    return _svg(figure, name)


def split_by_risk(durations: Floats, events: Floats, risk: Floats) -> RiskHalves:
    """Split cases at the median of the known risks and test whether their survival differs.

    Args:
        durations: `[n]` months.
        events: `[n]` 1 where the event was seen, 0 where censored.
        risk: `[n]` log partial hazard, NaN where none is known.

    Raises:
        NotDrawableError: Fewer than two cases, or no two different risks.
    """
    known = np.isfinite(risk) & np.isfinite(durations) & np.isfinite(events)
    if known.sum() < 2:
        raise NotDrawableError("fewer than two cases have a predicted risk")
    middle = np.median(risk[known])
    high = known & (risk > middle)
    low = known & ~high
    if not high.any():
        # More than half of the cases share the highest risk.
        high, low = known & (risk >= middle), known & (risk < middle)
    if not low.any():
        raise NotDrawableError("all cases have the same predicted risk")
    test = logrank_test(durations[high], durations[low], events[high], events[low])
    return RiskHalves(high, low, float(test.p_value))


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def survival_curves(name: str, durations: Floats, events: Floats, halves: RiskHalves) -> str:
    """Draw Kaplan-Meier curves of both halves with 95 % bands, and how many are still at risk."""
    figure = Figure(figsize=(4.7, 4.3), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(6, 1))
    axes, table = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    end = 1.02 * float(durations[halves.high | halves.low].max())
    ticks = [t for t in axes.xaxis.get_major_locator().tick_values(0, end) if 0 <= t <= end]
    groups = (("lower risk", halves.low, ORANGE, "--"), ("higher risk", halves.high, INK, "-"))
    for row, (label, members, colour, dashes) in enumerate(groups):
        fitted = KaplanMeierFitter().fit(durations[members], events[members])
        alive = fitted.survival_function_.iloc[:, 0]
        band = fitted.confidence_interval_
        axes.fill_between(
            alive.index, band.iloc[:, 0], band.iloc[:, 1], step="post", color=colour, alpha=0.13
        )
        axes.step(alive.index, alive, where="post", color=colour, linestyle=dashes, linewidth=2)
        censored = durations[members & (events == 0)]
        axes.plot(censored, fitted.predict(censored), "|", color=colour, markersize=6)
        axes.plot([], [], color=colour, linestyle=dashes, linewidth=2, label=label)
        for tick in ticks:
            count = int((durations[members] >= tick).sum())
            table.text(tick, row, str(count), ha="center", va="center", fontsize=8.5)
    axes.set(xlim=(0, end), ylim=(0, 1.03), ylabel="surviving", xticks=ticks)
    axes.set_xlabel("months")
    axes.legend(loc="upper right", title=_p_text(halves.p_value), alignment="left")
    table.set(xlim=(0, end), ylim=(1.5, -0.5), xticks=[])
    table.set_yticks([0, 1], ["lower", "higher"])
    table.set_title("cases at risk", loc="left", fontsize=8.5, color=MUTED)
    table.tick_params(length=0, pad=12)
    table.spines[:].set_visible(False)
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def prediction_map(
    name: str, probability: Floats, risk: Floats, classes: npt.NDArray[np.int64]
) -> str:
    """Draw what a model says of each case: probability of class 1 and rank of its risk.

    Args:
        name: Prefix of all ids in the SVG.
        probability: `[n]` of class 1; cases with NaN in it or in the risk are left out.
        risk: `[n]` on any scale, higher is worse; drawn as a rank from 0 (lowest) to 1.
        classes: `[n]` 0 or 1, the truth.

    Raises:
        NotDrawableError: Fewer than three cases have both.
    """
    known = np.isfinite(probability) & np.isfinite(risk)
    if known.sum() < 3:
        raise NotDrawableError("fewer than three cases have a probability and a risk")
    rank = (rankdata(risk[known]) - 1) / (known.sum() - 1)
    figure, axes = _figure((5.0, 4.75))
    axes.axvline(0.5, color=MUTED, linestyle="--", linewidth=1.1, zorder=1, label="decision")
    _class_points(axes, probability[known], rank, classes[known], None)
    axes.set(xlabel="probability of class 1", ylabel="risk, rank (1 is the highest)")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _svg(figure, name)


def p_text(p_value: float) -> str:
    """Say a p value: `p < 0.001`, or two digits of it."""
    return _p_text(p_value).removeprefix("log-rank ")


def _p_text(p_value: float) -> str:
    if not np.isfinite(p_value):
        return "log-rank p not available"
    return "log-rank p < 0.001" if p_value < 0.001 else f"log-rank p = {p_value:.2g}"


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _class_points(
    axes: Axes, x: Floats, y: Floats, classes: npt.NDArray[np.int64], is_complete: Bools | None
) -> None:
    """Draw cases by class; those that lack a modality are hollow."""
    complete = np.ones(len(x), bool) if is_complete is None else is_complete
    for label, (colour, marker) in enumerate(CLASS_MARKS):
        full, hollow = (classes == label) & complete, (classes == label) & ~complete
        style: dict[str, Any] = {"marker": marker, "s": 34, "linewidths": 0.7, "zorder": 3}
        axes.scatter(x[full], y[full], c=colour, edgecolors=INK, label=f"class {label}", **style)
        style["linewidths"] = 1.4
        axes.scatter(x[hollow], y[hollow], facecolors="white", edgecolors=colour, **style)
    if not complete.all():
        axes.scatter(
            [], [], facecolors="white", edgecolors=MUTED, s=34, label="lacks image or genes"
        )


def _boundary(axes: Axes, slope: float | None) -> None:
    """Draw the line on which image and genes cancel: it takes both to know a case's side."""
    if slope is None:
        return
    ends = np.array([-0.04, 1.04])
    axes.plot(ends, -slope * (ends - 0.5), color=MUTED, linestyle="--", linewidth=1.1, zorder=1)
    axes.plot([], [], color=MUTED, linestyle="--", linewidth=1.1, label="planted boundary")


def _rings(axes: Axes, x: Floats, y: Floats) -> None:
    axes.scatter(
        x,
        y,
        s=120,
        facecolors="none",
        edgecolors=INK,
        linewidths=1.5,
        zorder=4,
        label="predicted wrong",
    )


def _margins(top: Axes, right: Axes, points: PlantedPoints, limit: float) -> None:
    """Draw how the classes overlap on either axis alone."""
    columns, rows = np.linspace(0, 1, 15).tolist(), np.linspace(-limit, limit, 15).tolist()
    for label, (colour, _) in enumerate(CLASS_MARKS):
        chosen = points.classes == label
        style: dict[str, Any] = {"color": colour, "histtype": "stepfilled", "alpha": 0.55}
        top.hist(points.share[chosen], columns, **style)
        right.hist(points.activity[chosen], rows, orientation="horizontal", **style)
    top.set_title("the image alone", fontsize=8.5, color=MUTED, pad=2)
    right.set_ylabel("the genes alone", fontsize=8.5, color=MUTED, rotation=270, labelpad=12)
    right.yaxis.set_label_position("right")
    for axes in (top, right):
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        axes.set_yticks([]) if axes is top else axes.set_xticks([])
        axes.spines[:].set_visible(False)


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element for a page: no prologue, no addresses, ids of its own."""
    buffer = io.StringIO()
    # The salt makes ids, and so the file, the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"url\(#", f"url(#{name}-", text).strip()


__all__: Sequence[str] = [
    "NotDrawableError",
    "PlantedPoints",
    "RiskHalves",
    "metric_bars",
    "p_text",
    "planted_scatter",
    "prediction_map",
    "roc_curves",
    "split_by_risk",
    "survival_curves",
]
