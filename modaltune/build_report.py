"""What building a cases folder joined, what it dropped and why: JSON, Markdown and on screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from modaltune.splits import Split
from modaltune.tables import OnDrop, name_few

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from modaltune.cases_folder import CasesFolder

_EXAMPLES = 3
# In this order on screen; JSON sorts its keys.
_PARTS = ("train", "val", "test", "all parts", "in no part")
_GENE_FACTS = (
    "aliases_from",
    "in_the_expression_table",
    "in_pathways",
    "matched",
    "renamed",
    "ambiguous",
    "unmatched_in_pathways",
    "pathways_with_a_gene",
    "pathways_without_a_gene",
)
_PART_COLUMNS = ("cases", "genes", "slides", "both", "neither", "survival", "deaths")


@dataclass
class BuildReport:
    """Collects what happened; nothing in it depends on the order of rows or on folders.

    Attributes:
        inputs: What was read: role, file name, and counts.
        dropped: What was left out or changed: source, reason, and the items, sorted.
        genes: How pathways and expression met; empty without both.
        parts: Fold by fold, part by part: counts of `count_parts`.
        notes: Further remarks.
    """

    inputs: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    genes: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_input(self, role: str, name: str, **counts: int | str) -> None:
        """Say what was read."""
        self.inputs.append({"role": role, "file": name, **counts})

    def drop(self, source: str, reason: str, items: Iterable[object]) -> None:
        """Say what was left out; nothing is recorded for no items."""
        names = sorted(map(str, items))
        if names:
            entry = {"source": source, "reason": reason, "count": len(names), "items": names}
            self.dropped.append(entry)

    def teller(self, source: str) -> OnDrop:
        """Return what a reader of `source` reports to."""

        def tell(reason: str, items: Sequence[str]) -> None:
            self.drop(source, reason, items)

        return tell

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> BuildReport:
        """Rebuild a report from `to_dict`."""
        return cls(**state)

    def _dropped_rows(self, shown: int) -> list[tuple[str, str, int, str]]:
        return [
            (d["source"], d["reason"], d["count"], name_few(d["items"], shown))
            for d in self.dropped
        ]

    def to_markdown(self) -> str:
        """Return the report as a page of Markdown."""
        lines = ["# Cases folder", "", "## Read", ""]
        lines += _markdown(("role", "file", "held"), map(_input_row, self.inputs))
        for number, parts in enumerate(self.parts):
            lines += ["", f"## Fold {number}" if len(self.parts) > 1 else "## Cases", ""]
            header, rows = part_rows(parts)
            lines += _markdown(header, rows)
        if self.genes:
            lines += ["", "## Genes", ""]
            lines += [f"- {name}: {value}" for name, value in gene_lines(self.genes)]
        lines += ["", "## Left out or changed", ""]
        lines += _markdown(("source", "reason", "count", "which"), self._dropped_rows(10))
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def render(self, console: Console) -> None:
        """Print the report."""
        console.print(_table("Read", ("role", "file", "held"), map(_input_row, self.inputs)))
        render_parts(self.parts, console)
        if self.genes:
            console.print(_table("Genes", ("", ""), gene_lines(self.genes)))
        if self.dropped:
            columns = ("source", "reason", "count", "which")
            console.print(_table("Left out or changed", columns, self._dropped_rows(_EXAMPLES)))
        for note in self.notes:
            console.print(note, highlight=False, markup=False, style="yellow")


def count_parts(
    split: Split, clinical: pd.DataFrame, with_genes: set[str], with_slides: set[str]
) -> dict[str, dict[str, Any]]:
    """Count the cases of each part, of all parts and of none: by modality, class and survival."""
    inside = set(split.case_ids)
    groups: dict[str, tuple[str, ...]] = {str(part): ids for part, ids in split.parts.items()}
    groups["all parts"] = split.case_ids
    if outside := tuple(case for case in clinical.index if case not in inside):
        groups["in no part"] = outside
    counts = {}
    for part, cases in groups.items():
        rows, ids = clinical.loc[list(cases)], set(cases)
        genes, slides = ids & with_genes, ids & with_slides
        has_survival = rows["survival_months"].notna() & rows["event"].notna()
        classes = rows["primary_class"].value_counts()
        counts[part] = {
            "cases": len(ids),
            "genes": len(genes),
            "slides": len(slides),
            "both": len(genes & slides),
            "neither": len(ids - genes - slides),
            "survival": int(has_survival.sum()),
            "deaths": int((rows["event"][has_survival] == 1).sum()),
            "classes": {str(k): int(n) for k, n in classes.sort_index().items()},
        }
    return counts


def folder_parts(cases: CasesFolder) -> list[dict[str, dict[str, Any]]]:
    """Return `count_parts` of every fold of a cases folder."""
    genes = set() if cases.expression is None else set(cases.expression.index)
    slides = set(cases.slides["case_id"])
    folds = map(cases.split, range(cases.num_folds))
    return [count_parts(split, cases.clinical, genes, slides) for split in folds]


def part_rows(parts: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Return the counts of a fold as a header and a row per part; classes get a column each."""
    found = {int(k) for counts in parts.values() for k in counts["classes"]}
    classes = sorted(found, key=lambda k: (k < 0, k))
    names = [f"class {k}" if k >= 0 else "unclassified" for k in classes]
    rows: list[list[object]] = []
    for part in (part for part in _PARTS if part in parts):
        counts = parts[part]
        by_class = [counts["classes"].get(str(k), 0) for k in classes]
        rows.append([part, counts["cases"], *by_class, *(counts[c] for c in _PART_COLUMNS[1:])])
    return ["part", "cases", *names, *_PART_COLUMNS[1:]], rows


def render_parts(parts: Sequence[Mapping[str, Mapping[str, Any]]], console: Console) -> None:
    """Print the counts of every fold, a column per part: so they fit the narrowest screen."""
    for number, counts in enumerate(parts):
        title = f"Cases, fold {number}" if len(parts) > 1 else "Cases"
        header, rows = part_rows(counts)
        names, *columns = zip(*rows, strict=True)
        turned = [(name, *values) for name, values in zip(header[1:], columns, strict=True)]
        console.print(_table(title, ("", *map(str, names)), turned))


def gene_lines(genes: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return the facts about genes as name and value, long lists shortened."""
    lines: list[tuple[str, object]] = []
    for name in (name for name in _GENE_FACTS if name in genes):
        value = genes[name]
        if isinstance(value, dict):
            value = [f"{old} = {new}" for old, new in value.items()]
        if isinstance(value, (list, tuple)):
            value = f"{len(value)}" + (f" ({name_few(value)})" if value else "")
        lines.append((name.replace("_", " "), value))
    return lines


def _input_row(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    held = (f"{value} {name.replace('_', ' ')}" for name, value in entry.items()
            if name not in ("role", "file"))  # fmt: skip
    return entry["role"], entry["file"], ", ".join(held)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table for the screen, numbers to the right."""
    from rich.markup import escape
    from rich.table import Table

    cells = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for k, name in enumerate(columns):
        is_number = bool(cells) and all(isinstance(row[k], int) for row in cells)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Make a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    return lines
