"""Building blocks of a report's page: every text that goes in is escaped here."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from modaltune.plots import NotDrawableError

MISSING = "not available"


def escape(text: object) -> str:
    """Return a text as HTML, safe in elements and in quoted attributes."""
    return html.escape(str(text), quote=True)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed digits, or that there is none."""
    if value is None or not np.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}"


def interval(value: tuple[float, float, float]) -> str:
    """Return a value with its low and high end in words."""
    return f"{number(value[0])} ({number(value[1])} to {number(value[2])})"


def section(name: str, title: str, prose: str, body: str) -> str:
    """Return a section of HTML parts under a heading."""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{prose}\n{body}\n</section>'


def plot(title: str, svg: str, alt: str, caption: str) -> str:
    """Return a picture on its card, with what it shows for who cannot see it."""
    return (
        f'<figure class="card plot"><h3>{escape(title)}</h3>'
        f'<div role="img" aria-label="{escape(alt)}">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def drawn(title: str, draw: Callable[[], str], alt: str, caption: str) -> str:
    """Return a picture on its card, or why it could not be drawn."""
    try:
        return plot(title, draw(), alt, caption)
    except NotDrawableError as reason:
        return note(f"{title}: not drawn, {reason}")


def note(text: str) -> str:
    """Return a remark that stands where something else would."""
    return f'<p class="missing">{escape(text)}.</p>'


def table(rows: Mapping[str, str]) -> str:
    """Return names and values as a table."""
    cells = (
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def stage_rows(stages_s: Mapping[str, float], total_s: float | None = None) -> str:
    """Return table rows of seconds per stage with bars, without stages that took no time."""
    split = {name: seconds for name, seconds in stages_s.items() if seconds > 0}
    longest = max([*split.values(), 1e-9])
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td class="track"><span class="bar" '
        f'style="width:{100 * seconds / longest:.1f}%"></span></td>'
        f'<td class="num">{seconds:.1f} s</td></tr>'
        for name, seconds in split.items()
    ]
    if total_s is not None:
        rows.append(
            f'<tr><th scope="row">in all</th><td></td><td class="num">{total_s:.1f} s</td></tr>'
        )
    return "".join(rows)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as (path, value) pairs, in their order."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += flatten(value, f"{name} / ")
        else:
            found.append((name, value))
    return found
