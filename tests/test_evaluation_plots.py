"""Pictures of an evaluation: what they show, that nothing overlaps, and what cannot be drawn."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from modaltune.classification_metrics import reliability
from modaltune.evaluation_plots import (
    ForestPanel,
    Ranked,
    calibration_figure,
    embedding_figure,
    forest_figure,
    kaplan_meier_figure,
    precision_recall_figure,
    roc_figure,
    save_figure,
)
from modaltune.plots import NotDrawableError
from modaltune.survival_groups import risk_groups

rng = np.random.default_rng(0)
TRUTH = rng.random(80) < 0.3
SCORE = np.clip(0.3 * TRUTH + 0.6 * rng.random(80), 0, 1)
MONTHS, DIED = np.ceil(rng.exponential(40, 80)), (rng.random(80) < 0.6) * 1.0


def _texts(figure: Figure) -> list[Text]:
    """Return the texts that are drawn: labels of ticks outside an axis are not."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    found = figure.findobj(Text)
    return [t for t in found if t.get_visible() and t.get_text().strip() and t not in hidden]  # type: ignore[attr-defined,misc]


def _words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in _texts(figure))


def _figures() -> dict[str, Figure]:
    curves = [
        Ranked("general", TRUTH, rng.random(80), "0.51 (0.40–0.62)"),
        Ranked("diagnosis", TRUTH, SCORE, "0.81 (0.70–0.90)"),
    ]
    given = np.stack([1 - SCORE, SCORE], axis=1)
    groups = risk_groups(MONTHS, DIED, -MONTHS + rng.normal(size=80) * 30, -30.0)
    values = np.array([[0.7, 0.6, 0.8], [np.nan] * 3, [0.55, 0.45, 0.66]])
    points, where = rng.normal(size=(60, 5)), rng.integers(-1, 2, 60)
    return {
        "roc": roc_figure(curves, "run: test cases"),
        "precision_recall": precision_recall_figure(curves, "run: test cases"),
        "calibration": calibration_figure(reliability(TRUTH, given, (0, 1)), "run", "class 1"),
        "kaplan_meier": kaplan_meier_figure(groups, "a very long name of a run: survival prompt, "
                                            "head and neck, test cases"),
        "forest": forest_figure(
            ["general", "diagnosis", "survival · mean of sites"],
            [ForestPanel("AUROC", values), ForestPanel("c-index", values, None)], "run",
        ),
        "embeddings": embedding_figure(points, points, where, ["ductal", "lobular"], "run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return _figures()


@pytest.mark.parametrize(
    "name", ["roc", "precision_recall", "calibration", "kaplan_meier", "forest", "embeddings"]
)
def test_texts_do_not_overlap_and_lie_inside(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    boxes = [(t.get_text(), t.get_window_extent()) for t in _texts(figure)]
    frame = figure.bbox
    for text, box in boxes:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1
        assert inside, text
    for (a, one), (b, two) in combinations(boxes, 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        height = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert width < 1 or height < 2, (a, b)


def test_what_the_pictures_say(figures: dict[str, Figure]) -> None:
    assert "diagnosis, 0.81 (0.70–0.90)" in _words(figures["roc"])
    assert "calibration error" in _words(figures["calibration"])
    words = _words(figures["kaplan_meier"])
    assert "cases at risk" in words
    assert "log-rank p" in words
    assert "low risk" in words
    assert "high risk" in words
    assert "died, median " in words
    words = _words(figures["forest"])
    assert "0.700 (0.60–0.80)" in words
    assert "dashed: chance" in words
    assert "–" in words
    assert "ductal (" in _words(figures["embeddings"])
    assert "no class (" in _words(figures["embeddings"])


def test_numbers_at_risk() -> None:
    groups = risk_groups(MONTHS, DIED, np.arange(80.0), 39.5)
    figure = kaplan_meier_figure(groups, "t")
    table = figure.axes[1]
    at_zero = [t.get_text() for t in table.texts if t.get_position()[0] == 0]
    assert at_zero == ["40", "40"]
    low, high = groups.curves
    assert low.at_risk([0, 20]).tolist() == [40, int((MONTHS[:40] >= 20).sum())]
    assert len(high.durations) == 40


def test_panels_of_a_forest_have_one_scale_and_say_what_chance_is() -> None:
    wide, narrow = np.array([[0.4, 0.2, 0.9]]), np.array([[0.7, 0.69, 0.71]])
    figure = forest_figure(["x"], [ForestPanel("a", wide, 1 / 3), ForestPanel("b", narrow)], "t")
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim()
    assert [line.get_xdata()[0] for line in (first.lines[0], second.lines[0])] == [1 / 3, 0.5]
    alone = forest_figure(["x"], [ForestPanel("a", wide, None)], "t")
    assert "chance" not in _words(alone)


def test_a_median_that_is_not_reached_is_said() -> None:
    groups = risk_groups(MONTHS, np.zeros(80), np.arange(80.0), 39.5)
    assert "low risk: 0 of 40 died, median not reached" in _words(kaplan_meier_figure(groups, "t"))


def test_one_group_is_drawn_without_a_test() -> None:
    groups = risk_groups(MONTHS, DIED, np.zeros(80), 1.0)
    assert (groups.names, len(groups.curves)) == (("low",), 1)
    assert np.isnan(groups.p_value)
    assert "log-rank p not available" in _words(kaplan_meier_figure(groups, "t"))


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        figure = roc_figure([Ranked("x", TRUTH, SCORE)], "t")
        paths = save_figure(figure, tmp_path / folder, "roc")
        assert [p.name for p in paths] == ["roc.png", "roc.svg"]
    for name in ("roc.png", "roc.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "<text" in (tmp_path / "a" / "roc.svg").read_text()  # text stays text


def _nothing() -> list[Any]:
    none = np.zeros(4, bool)
    empty = reliability([], np.zeros((0, 2)), (0, 1))
    return [
        (lambda: roc_figure([Ranked("x", none, np.zeros(4))], "t"), "all cases are of one class"),
        (lambda: precision_recall_figure([], "t"), "all cases are of one class"),
        (lambda: calibration_figure(empty, "t", "x"), "no case has a probability"),
        (
            lambda: embedding_figure(np.zeros((2, 3)), np.zeros((1, 3)), np.zeros(1, int), [], "t"),
            "fewer than three training cases",
        ),
    ]


@pytest.mark.parametrize("case", range(4))
def test_what_cannot_be_drawn(case: int) -> None:
    draw, message = _nothing()[case]
    with pytest.raises(NotDrawableError, match=message):
        draw()
