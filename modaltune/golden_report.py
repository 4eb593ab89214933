"""Comparisons with golden tensors, told to people and to machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modaltune.golden import Comparison

Key = TypeVar("Key", bound=Hashable)


def render(rows: Sequence[Comparison], console: Console, *, every: bool = False) -> None:
    """Print the errors case by case, and every miss.

    Args:
        rows: The comparisons.
        console: Where to print.
        every: Print each tensor; else the worst of every group of tensors.
    """
    console.print("Golden tensors of the published implementation", style="bold", end="\n\n")
    for case, members in _grouped(rows, lambda r: r.case).items():
        missed = sum(not r.is_ok for r in members)
        verdict = f"[bold red]{missed} missed[/]" if missed else "[green]pass[/]"
        console.print(f"[bold]{escape(case)}[/]: {verdict}", soft_wrap=True)
        for note in dict.fromkeys(r.note for r in members if r.note.startswith("ran ")):
            console.print(f"  {escape(note)}", soft_wrap=True, highlight=False)
        console.print(_case_table(members, every))
    missed_rows = [row for row in rows if not row.is_ok]
    for row in missed_rows:
        where = escape(f"{row.case} {row.tensor}: {row.rule} {row.error:.3e} > {row.limit:.0e}")
        console.print(f"[red]MISS[/] {where} {escape(row.note)}", soft_wrap=True, highlight=False)
    cases = len({row.case for row in rows})
    console.print(f"{cases} cases, {len(rows)} comparisons, {len(missed_rows)} missed")


def _case_table(rows: Sequence[Comparison], every: bool) -> Table:
    """Return the table of one case, narrow enough for 80 columns."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("tensor (measure)" if every else "group (measure)", overflow="fold")
    if not every:
        table.add_column("tensors", justify="right")
        table.add_column("worst", overflow="fold")
    for column in ("error", "limit", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for (group, rule), members in _grouped(rows, lambda r: (_group(r, every), r.rule)).items():
        worst = max(members, key=lambda r: math.inf if math.isnan(r.error) else _share(r))
        detail = worst.note if group == worst.tensor else worst.tensor.split("/", 1)[-1]
        counted = [] if every else [str(len(members)), escape(detail)]
        table.add_row(
            escape(f"{group} ({rule})"),
            *counted,
            f"{worst.error:.1e}",
            f"{worst.limit:.0e}",
            "[green]pass[/]" if all(r.is_ok for r in members) else "[bold red]MISS[/]",
        )
    return table


def _group(row: Comparison, every: bool) -> str:
    return row.tensor if every else row.tensor.split("/")[0]


def _grouped(
    rows: Iterable[Comparison], key: Callable[[Comparison], Key]
) -> dict[Key, list[Comparison]]:
    groups: dict[Key, list[Comparison]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _share(row: Comparison) -> float:
    return row.error / row.limit if row.limit > 0 else row.error


def to_json(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Return all comparisons as plain data; NaN becomes null."""
    comparisons = [
        {
            **asdict(row),
            "error": None if math.isnan(row.error) else row.error,
            "ok": row.is_ok,
        }
        for row in rows
    ]
    missed = sum(not row.is_ok for row in rows)
    return {"comparisons": comparisons, "total": len(rows), "missed": missed, "ok": missed == 0}
