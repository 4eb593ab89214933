"""Pathways: sets of genes from GMT or CSV, and their place in the gene vector of a case."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from modaltune.errors import CohortError, InputError
from modaltune.tables import name_few, open_text, read_header, repeated

logger = logging.getLogger(__name__)

_KIND = "a readable pathway table (GMT, 0/1 CSV or wide CSV)"
_GENE_COLUMN_NAMES = frozenset({"gene", "genes", "symbol", "gene_symbol", ""})
# Line number, the cell before the first pathway if there is one, and the cells of the pathways.
_Row = tuple[int, list[str], list[str]]
_MEMBER = {"0": False, "1": True, "0.0": False, "1.0": True}


@dataclass(frozen=True)
class PathwayTable:
    """Named sets of genes, as a file lists them.

    Attributes:
        names: `P` distinct pathway names in file order.
        genes: The genes of each pathway in file order (row order of a CSV), without repeats.
    """

    names: tuple[str, ...]
    genes: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.genes) or repeated(self.names):
            raise CohortError(
                f"names must be distinct, one per gene set, got {len(self.names)} names for "
                f"{len(self.genes)} sets, repeated: {name_few(repeated(self.names)) or 'none'}; "
                "rename them"
            )

    @property
    def num_memberships(self) -> int:
        """Number of (gene, pathway) pairs."""
        return sum(map(len, self.genes))


def read_pathways(path: str | Path) -> PathwayTable:
    """Read pathways from any of the three usual files, told apart by their content.

    * `.gmt`: a line per pathway, `name<TAB>description<TAB>gene<TAB>gene...`;
    * 0/1 CSV: the first column, `gene`, holds symbols; then one 0/1 column per pathway;
    * wide CSV: a column per pathway, gene symbols down the rows, ragged ends left empty.

    Each may be gzipped or the only file of a .zip.

    Args:
        path: The file.

    Raises:
        CohortError: The file is unreadable or breaks its format; names file and line.

    Source: FORMATS "Labels, clinical, genes"; METHOD 4.9.
    """
    path = Path(path)
    with open_text(path, _KIND) as text:
        if ".gmt" in (suffix.lower() for suffix in path.suffixes):
            table = _read_gmt(text, path)
        else:
            table = _read_csv(text, path)
    if not table.names:
        raise CohortError(f"{path} must hold at least one pathway, got none; check the file")
    logger.info(
        "%s: %d pathways, %d memberships", path.name, len(table.names), table.num_memberships
    )
    return table


def _read_gmt(text: TextIO, path: Path) -> PathwayTable:
    """Read a set per line."""
    sets: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        name, *rest = (cell.strip() for cell in line.rstrip("\r\n").split("\t"))
        genes = [gene for gene in rest[1:] if gene]
        if not name or not genes:
            raise CohortError(
                f"{path}, line {number} must be `name<TAB>description<TAB>gene...`, got "
                f"{line[:60].rstrip()!r}; separate by tabs, and give every set a gene"
            )
        if name in sets:
            raise CohortError(
                f"{path}, line {number} must name a new pathway, got {name!r} again; rename it"
            )
        sets[name] = _without_repeats(genes, name, path)
    return PathwayTable(tuple(sets), tuple(sets.values()))


def _read_csv(text: TextIO, path: Path) -> PathwayTable:
    """Read a 0/1 table or a wide table, whichever it is."""
    header, delimiter = read_header(text, path)
    reader = csv.reader(text, delimiter=delimiter)
    # The header is line 1 of the file, and not known to this reader.
    rows = [(reader.line_num + 1, row) for row in reader if any(map(str.strip, row))]
    # An unnamed first column is either genes (0/1 table) or a row number (wide table).
    first_line, first_row = (rows[0][0], rows[0][1][1:]) if rows else (2, [])
    is_membership = header[0].lower() in _GENE_COLUMN_NAMES and all(
        cell.strip() in _MEMBER for cell in first_row
    )
    if header[0].lower() in _GENE_COLUMN_NAMES - {""} and not is_membership:
        bad = next(cell for cell in first_row if cell.strip() not in _MEMBER)
        raise CohortError(
            f"{path}, line {first_line} must hold 0 or 1 in every column after {header[0]!r}, "
            f"got {bad!r}; a wide table has no gene column"
        )
    skip = 1 if is_membership or not header[0] else 0
    names = header[skip:]
    unnamed = [number for number, name in enumerate(names, start=1) if not name]
    if repeated(names) or unnamed:
        raise CohortError(
            f"{path}, line 1 must name every pathway once, got repeated "
            f"{name_few(repeated(names)) or 'none'}, {len(unnamed)} without a name; rename them"
        )
    read = _read_membership if is_membership else _read_wide
    return read(names, [(line, row[:skip], row[skip:]) for line, row in rows], path)


def _read_membership(names: list[str], rows: list[_Row], path: Path) -> PathwayTable:
    """Read the body of a gene x pathway 0/1 table."""
    genes: list[list[str]] = [[] for _ in names]
    line_of: dict[str, int] = {}
    for number, first, cells in rows:
        gene = first[0].strip()
        if not gene or gene in line_of:
            raise CohortError(
                f"{path}, line {number} must begin with a new gene symbol, got "
                f"{f'{gene!r} of line {line_of[gene]}' if gene else 'none'}; merge or name the rows"
            )
        line_of[gene] = number
        if len(cells) != len(names):
            raise CohortError(
                f"{path}, line {number} must have {len(names)} cells after the gene, got "
                f"{len(cells)}; check that the file was downloaded whole"
            )
        for column, cell in enumerate(cells):
            # The plain digits are nearly all of millions of cells: no strip for them.
            member = _MEMBER.get(cell) if cell in _MEMBER else _MEMBER.get(cell.strip())
            if member is None:
                raise CohortError(
                    f"{path}, line {number}, column {names[column]!r} must be 0 or 1, got "
                    f"{cell!r}; correct it"
                )
            if member:
                genes[column].append(gene)
    return PathwayTable(tuple(names), tuple(map(tuple, genes)))


def _read_wide(names: list[str], rows: list[_Row], path: Path) -> PathwayTable:
    """Read the body of a table with a pathway per column."""
    columns: list[list[str]] = [[] for _ in names]
    for number, _, cells in rows:
        if len(cells) > len(names):
            raise CohortError(
                f"{path}, line {number} must have at most {len(names)} cells, got {len(cells)}; "
                "quote names that contain the delimiter"
            )
        for column, cell in enumerate(cells):
            if cell.strip() and cell.strip().lower() != "nan":
                columns[column].append(cell.strip())
    genes = (_without_repeats(c, name, path) for name, c in zip(names, columns, strict=True))
    return PathwayTable(tuple(names), tuple(genes))


def _without_repeats(genes: list[str], name: str, path: Path) -> tuple[str, ...]:
    """Drop later repeats of a gene in a set: they say nothing new."""
    unique = tuple(dict.fromkeys(genes))
    if len(unique) < len(genes):
        logger.warning("%s: pathway %s repeats %s", path.name, name, name_few(repeated(genes)))
    return unique


@dataclass(frozen=True, eq=False)
class PathwayIndex:
    """Where each pathway finds its genes in the gene vector of a case; saved with the model.

    Attributes:
        genes: The `G` genes used, sorted, so that the vector does not depend on the order of the
            expression table; case vectors are `[G]` in this order.
        names: The `P` pathways kept, in file order.
        indices: `[nnz]` int64 into `genes`, pathway after pathway, file order within each.
        offsets: `[P + 1]` int64; pathway p owns `indices[offsets[p]:offsets[p + 1]]`.
        dropped: Pathways none of whose genes is available.
        unmatched: Genes of the table that are not available, sorted.
        table_sizes: Genes that each kept pathway has in the table, matched or not.
    """

    genes: tuple[str, ...]
    names: tuple[str, ...]
    indices: Tensor
    offsets: Tensor
    dropped: tuple[str, ...]
    unmatched: tuple[str, ...]
    table_sizes: tuple[int, ...]

    @classmethod
    def build(
        cls,
        table: PathwayTable,
        available_genes: Iterable[str],
        on_empty: Literal["drop", "error"] = "drop",
    ) -> PathwayIndex:
        """Restrict pathways to the genes that were measured.

        Args:
            table: Pathways from `read_pathways`.
            available_genes: Gene names of the expression table.
            on_empty: What to do with a pathway none of whose genes is available: "drop" leaves it
                out and reports it, "error" refuses.

        Raises:
            CohortError: All pathways are empty, or one is and `on_empty` is "error".
            InputError: `on_empty` is neither.

        Source: METHOD 4.8, 4.9; REQUIREMENTS 38.
        """
        if on_empty not in ("drop", "error"):
            raise InputError(f"on_empty must be 'drop' or 'error', got {on_empty!r}; pick one")
        available = set(available_genes)
        matched = [[gene for gene in genes if gene in available] for genes in table.genes]
        used = sorted({gene for genes in matched for gene in genes})
        dropped = [name for name, genes in zip(table.names, matched, strict=True) if not genes]
        _refuse_empty(table, available, dropped, used, on_empty)
        place = {gene: position for position, gene in enumerate(used)}
        kept = [genes for genes in matched if genes]
        sizes = torch.tensor([0, *map(len, kept)], dtype=torch.int64)
        every_gene = {gene for genes in table.genes for gene in genes}
        return cls(
            genes=tuple(used),
            names=tuple(name for name, genes in zip(table.names, matched, strict=True) if genes),
            indices=torch.tensor([place[gene] for genes in kept for gene in genes]),
            offsets=sizes.cumsum(0),
            dropped=tuple(dropped),
            unmatched=tuple(sorted(every_gene - available)),
            table_sizes=tuple(
                len(all_genes)
                for all_genes, genes in zip(table.genes, matched, strict=True)
                if genes
            ),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of genes `n_i` of each kept pathway: input widths of the pathway networks."""
        return tuple(self.offsets.diff().tolist())

    def report(self) -> dict[str, Any]:
        """Say what was kept, dropped and unmatched, as JSON values."""
        shares = [n / total for n, total in zip(self.sizes, self.table_sizes, strict=True)]
        return {
            "pathways": len(self.names) + len(self.dropped),
            "pathways_kept": len(self.names),
            "pathways_dropped": list(self.dropped),
            "genes_used": len(self.genes),
            "genes_unmatched": len(self.unmatched),
            "memberships": len(self.indices),
            "smallest_matched_share": min(shares),
            "mean_matched_share": sum(shares) / len(shares),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the index as JSON values."""
        return {
            "genes": list(self.genes),
            "names": list(self.names),
            "indices": self.indices.tolist(),
            "offsets": self.offsets.tolist(),
            "dropped": list(self.dropped),
            "unmatched": list(self.unmatched),
            "table_sizes": list(self.table_sizes),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PathwayIndex:
        """Rebuild an index from `to_dict`."""
        return cls(
            genes=tuple(state["genes"]),
            names=tuple(state["names"]),
            indices=torch.tensor(state["indices"], dtype=torch.int64),
            offsets=torch.tensor(state["offsets"], dtype=torch.int64),
            dropped=tuple(state["dropped"]),
            unmatched=tuple(state["unmatched"]),
            table_sizes=tuple(state["table_sizes"]),
        )


def _refuse_empty(
    table: PathwayTable,
    available: set[str],
    dropped: list[str],
    used: list[str],
    on_empty: Literal["drop", "error"],
) -> None:
    """Raise where no pathway is left, or one is lost against the policy; log what is dropped."""
    if not used:
        wanted = sorted({gene for genes in table.genes for gene in genes})
        raise CohortError(
            f"pathways must share genes with the expression table, got none in common: pathways "
            f"have {name_few(wanted)}, the table has {name_few(sorted(available)) or 'no genes'}; "
            "map both to the same gene symbols"
        )
    if dropped and on_empty == "error":
        raise CohortError(
            f"every pathway must have a gene in the expression table, got {len(dropped)} without: "
            f"{name_few(dropped)}; use on_empty='drop' to leave them out"
        )
    if dropped:
        logger.warning(
            "%d of %d pathways have no gene in the expression table and are dropped: %s",
            len(dropped),
            len(table.names),
            name_few(dropped),
        )
