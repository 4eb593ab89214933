"""Blocks of the page: numbers, tables and escaping."""

from __future__ import annotations

import pytest

from modaltune import report_html as blocks
from modaltune.plots import NotDrawableError


@pytest.mark.parametrize(
    ("value", "said"), [(0.946, "0.95"), (None, "not available"), (float("nan"), "not available")]
)
def test_numbers(value: float | None, said: str) -> None:
    assert blocks.number(value) == said


def test_intervals_are_said_in_words() -> None:
    assert blocks.interval((0.5, 0.251, 0.749)) == "0.50 (0.25 to 0.75)"


def test_text_and_attributes_are_escaped() -> None:
    evil = "\"><b>&'"
    assert "<b>" not in blocks.table({evil: evil}) + blocks.note(evil)
    assert "<b>" not in blocks.plot(evil, "", evil, evil) + blocks.stage_rows({evil: 1.0})


def test_nested_settings_become_paths() -> None:
    assert blocks.flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == [
        ("a / b", 1),
        ("a / c / d", [2]),
        ("e", None),
    ]


def test_stages_scale_to_the_longest_and_skip_the_idle() -> None:
    rows = blocks.stage_rows({"idle": 0.0, "long": 8.0, "short": 2.0}, 12.0)
    assert "idle" not in rows
    assert "width:100.0%" in rows
    assert "width:25.0%" in rows
    assert "12.0 s" in rows
    assert blocks.stage_rows({}) == ""


def test_a_picture_that_cannot_be_drawn_says_why() -> None:
    def refuse() -> str:
        raise NotDrawableError("no <data>")

    assert blocks.drawn("Title", refuse, "alt", "caption") == (
        '<p class="missing">Title: not drawn, no &lt;data&gt;.</p>'
    )
