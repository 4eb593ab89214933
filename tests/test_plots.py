"""Pictures: what they say, what they refuse, and that pages can hold several of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from lifelines.statistics import logrank_test
from matplotlib.axes import Axes

from modaltune import plots

CLASSES = np.array([0, 1] * 10)
RNG = np.random.default_rng(3)


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()).strip() for t in ET.fromstring(svg).iter("text")]


def points(**changes: object) -> plots.PlantedPoints:
    values: dict[str, object] = {
        "share": np.linspace(0, 1, 20),
        "activity": RNG.normal(size=20),
        "classes": CLASSES,
        "is_error": np.arange(20) < 3,
        "is_complete": np.arange(20) > 1,
        "activity_per_share": 3.5,
    }
    return plots.PlantedPoints(**(values | changes))  # type: ignore[arg-type]


def test_bars_show_each_value_and_its_name() -> None:
    svg = plots.metric_bars("b", {"both": (0.947, 0.9, 1.0), "$x$ & <y>": (0.5, 0.4, 0.6)}, "score")
    assert {"0.95", "0.50", "both", "$x$ & <y>", "chance", "score"} <= set(texts(svg))


def test_a_bar_is_as_long_as_its_value() -> None:
    svg = plots.metric_bars("b", {"a": (0.25, 0.2, 0.3), "b": (0.75, 0.7, 0.8)}, "score")
    bars = re.findall(
        r'<path d="([^"]*)"[^>]*fill: #0072b2|<path d="([^"]*)"[^>]*fill: #cc79a7', svg
    )
    widths = []
    for found in bars:
        x = [float(v) for v in re.findall(r"[ML] ([\d.]+)", "".join(found))]
        widths.append(max(x) - min(x))
    assert len(widths) == 2
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3)


def test_bars_without_a_value_say_so() -> None:
    nothing = (float("nan"),) * 3
    svg = plots.metric_bars("b", {"a": nothing, "b": (0.7, float("nan"), float("nan"))}, "score")
    assert "not available" in texts(svg)
    assert "nan" not in svg


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_picture_is_plain_svg_with_ids_of_its_own(name: str) -> None:
    svg = plots.planted_scatter(name, points())
    assert svg.startswith("<svg")
    assert "http" not in svg
    assert "<metadata" not in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids
    assert len(ids) == len(set(ids))
    assert all(i.startswith(f"{name}-") for i in ids)
    referred = re.findall(r'href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
    assert referred
    assert set(referred) <= set(ids)
    root = ET.fromstring(svg)
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib


def test_the_same_data_gives_the_same_picture() -> None:
    some = points()
    assert plots.planted_scatter("a", some) == plots.planted_scatter("a", some)


def test_scatter_rings_errors_and_names_incomplete_cases() -> None:
    assert {
        "class 0",
        "class 1",
        "predicted wrong",
        "lacks image or genes",
        "planted boundary",
    } <= (set(texts(plots.planted_scatter("s", points()))))
    plain = points(is_complete=np.ones(20, bool), activity_per_share=None)
    assert not {"lacks image or genes", "planted boundary"} & set(
        texts(plots.planted_scatter("s", plain))
    )


def test_scatter_of_nobody_is_refused() -> None:
    empty = np.zeros(0)
    with pytest.raises(plots.NotDrawableError, match="no case"):
        plots.planted_scatter(
            "s",
            plots.PlantedPoints(
                empty, empty, empty.astype(int), empty.astype(bool), empty.astype(bool), 1.0
            ),
        )


def test_roc_names_the_area() -> None:
    perfect, reverse = CLASSES.astype(float), 1.0 - CLASSES
    partly = np.where(np.arange(20) < 8, np.nan, perfect)
    svg = plots.roc_curves("r", CLASSES, {"a": perfect, "b": reverse, "c": partly})
    assert {"a, 1.00", "b, 0.00", "c, 1.00"} <= set(texts(svg))


def test_roc_without_predictions_says_so() -> None:
    svg = plots.roc_curves("r", CLASSES, {"a": np.full(20, np.nan)})
    assert "a: not available" in texts(svg)


def test_roc_of_one_class_is_refused() -> None:
    with pytest.raises(plots.NotDrawableError, match="one class"):
        plots.roc_curves("r", np.ones(5, np.int64), {"a": np.ones(5)})


def test_halves_split_at_the_median_and_leave_out_the_unknown() -> None:
    risk = np.array([3.0, 1.0, np.nan, 2.0, 4.0])
    durations, events = np.array([2.0, 9.0, 5.0, 8.0, 1.0]), np.ones(5)
    halves = plots.split_by_risk(durations, events, risk)
    assert halves.high.tolist() == [True, False, False, False, True]
    assert halves.low.tolist() == [False, True, False, True, False]
    expected = logrank_test([2.0, 1.0], [9.0, 8.0], [1, 1], [1, 1]).p_value
    assert halves.p_value == pytest.approx(expected)


def test_halves_survive_many_equal_risks() -> None:
    durations, events = np.arange(1.0, 6.0), np.ones(5)
    halves = plots.split_by_risk(durations, events, np.array([0.0, 5.0, 5.0, 5.0, 5.0]))
    assert halves.low.tolist() == [True, False, False, False, False]
    assert halves.high.sum() == 4


@pytest.mark.parametrize(
    ("risk", "reason"), [([np.nan] * 4, "fewer than two"), ([1.0] * 4, "the same predicted risk")]
)
def test_halves_need_different_risks(risk: list[float], reason: str) -> None:
    with pytest.raises(plots.NotDrawableError, match=reason):
        plots.split_by_risk(np.arange(1.0, 5.0), np.ones(4), np.array(risk))


def test_survival_counts_cases_at_risk() -> None:
    durations, events = np.linspace(1, 60, 20), (np.arange(20) % 3 > 0).astype(float)
    halves = plots.split_by_risk(durations, events, -durations)
    svg = plots.survival_curves("k", durations, events, halves)
    shown = texts(svg)
    assert {"lower risk", "higher risk", "cases at risk", "log-rank p < 0.001"} <= set(shown)
    # All ten low-risk cases live past month 30, and no other.
    assert shown.count("10") >= 2


@pytest.mark.parametrize(
    ("p_value", "said"), [(0.0004, "p < 0.001"), (0.0312, "p = 0.031"), (np.nan, "p not available")]
)
def test_p_values_in_words(p_value: float, said: str) -> None:
    assert plots.p_text(p_value) == said


def test_prediction_map_places_cases_by_probability_and_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: set[tuple[float, float]] = set()
    real = Axes.scatter

    def spy(axes: Axes, x: np.ndarray, y: np.ndarray, **style: object) -> object:
        drawn.update(zip(np.asarray(x).tolist(), np.asarray(y).tolist(), strict=True))
        return real(axes, x, y, **style)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "scatter", spy)
    probability = np.array([0.9, 0.2, np.nan, 0.6, 0.4])
    risk = np.array([7.0, -1.0, 3.0, 100.0, np.nan])
    svg = plots.prediction_map("p", probability, risk, np.array([1, 0, 1, 1, 0]))
    assert {"probability of class 1", "class 0", "class 1", "decision"} <= set(texts(svg))
    assert drawn == {(0.9, 0.5), (0.2, 0.0), (0.6, 1.0)}


def test_prediction_map_needs_three_cases() -> None:
    risk = np.array([1.0, 2.0, np.nan])
    with pytest.raises(plots.NotDrawableError, match="fewer than three"):
        plots.prediction_map("p", np.full(3, 0.5), risk, np.zeros(3, np.int64))


def test_palette_tells_series_apart_in_grey() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    # Where lightness is close, dashes or markers differ.
    for series in (plots.SERIES, plots.CLASS_MARKS):
        assert len({str(mark) for _, mark in series}) == len(series)
        greys = sorted(luminance(colour) for colour, _ in series)
        assert all(high - low > 5 for low, high in pairwise(greys))
