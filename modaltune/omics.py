"""Expression tables of every usual kind as case x gene.

Text tables (also .gz, .zip) come in three layouts, told apart by their header:

* `cases`: a row per case, first column (or `case_id`) the case, the others genes;
* `cbioportal`: the columns `<GENE>_rnaseq` beside others, a row per slide;
* `xena`: a row per gene, a column per sample barcode. Of each case the primary tumour (01) is
  taken, else the metastasis (06), else another tumour, never normal tissue; of repeated genes the
  first; genes that are the same in all cases are dropped, as published. A symbol keeps its name
  without `|id`; `?|123` stays as it is and matches no pathway.

Parquet and AnnData (.h5ad) tables hold cases x genes. Rows named by a sample barcode
(TCGA-XX-XXXX-01A) instead of a case are chosen by sample type like columns of `xena`.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TextIO, get_args

import numpy as np
import pandas as pd

from modaltune.errors import CohortError, InputError
from modaltune.gene_scaler import GeneScaler
from modaltune.tables import (
    OnDrop,
    check_choice,
    name_few,
    naming_damage,
    open_text,
    read_header,
    repeated,
)

__all__ = ["GeneScaler", "read_expression"]

logger = logging.getLogger(__name__)

Layout = Literal["auto", "cases", "cbioportal", "xena"]
DuplicateCases = Literal["error", "first", "mean"]
NanPolicy = Literal["error", "keep"]

_KIND = "a readable expression table"
_RNASEQ = "_rnaseq"
_BARCODE = re.compile(r"(?P<case>[^-]+-[^-]+-[^-]+)-(?P<type>\d{2})(?:[A-Z].*|-.*)?")
# Among case ids of any hospital, only these are taken for sample barcodes.
_BARCODE_PREFIXES = ("TCGA-", "TARGET-")
# TCGA sample types: 01-09 are tumours (01 primary, 06 metastatic), 10-19 normal tissue.
_PREFERRED_SAMPLE_TYPES = {1: 0, 6: 1}
_LAST_TUMOUR_TYPE = 9
# "TP53|7157" names a gene twice; "?|123" has no symbol and keeps its number.
_SYMBOL_WITH_ID = re.compile(r"(?P<symbol>[^?|]+)\|\d+")


def read_expression(
    path: str | Path,
    *,
    layout: Layout = "auto",
    duplicate_cases: DuplicateCases = "error",
    nan_policy: NanPolicy = "error",
    drop_constant_genes: bool = True,
    on_drop: OnDrop | None = None,
) -> pd.DataFrame:
    """Read an expression table as case x gene.

    Understood are the layouts and files of this module's description. Rows of a case that agree
    count as one; where they differ, `duplicate_cases` decides.

    Args:
        path: The table.
        layout: How text is laid out; "auto" decides by the header.
        duplicate_cases: What to do with a case whose rows differ: "error", "first" row, "mean".
            In the xena layout, differing samples of the same type are settled by "first" always.
        nan_policy: "error", or "keep" to leave gaps for `GeneScaler.fit(nan_policy="mean")`.
        drop_constant_genes: For xena; False where few cases may agree in a gene the model needs.
        on_drop: Told which samples, cases and genes were left out, and why.

    Returns:
        float32, index `case_id` (unique), columns gene names (unique), in file order.

    Raises:
        CohortError: The file is damaged, a gene or case is repeated, or a value is not finite.
        InputError: An option is unknown.

    Source: FORMATS "Labels, clinical, genes"; METHOD 4.8, 4.10.
    """
    path = Path(path)
    check_choice("layout", layout, get_args(Layout))
    check_choice("duplicate_cases", duplicate_cases, get_args(DuplicateCases))
    check_choice("nan_policy", nan_policy, get_args(NanPolicy))
    if path.suffix in (".parquet", ".pq"):
        table = _read_parquet(path)
    elif path.suffix == ".h5ad":
        table = _read_h5ad(path)
    else:
        with open_text(path, _KIND) as text:
            table = _read_text(text, path, layout, drop_constant_genes, on_drop)
    table = _best_samples(table, path, on_drop)
    if table.empty:
        raise CohortError(
            f"{path} must hold cases and genes, got {len(table)} cases and {table.shape[1]} genes; "
            "check the layout"
        )
    table = _one_row_per_case(table, duplicate_cases, path, on_drop)
    _check_finite(table, nan_policy, path)
    logger.info("%s: %d cases, %d genes", path.name, *table.shape)
    return table


def _read_text(
    text: TextIO, path: Path, layout: Layout, drop_constant: bool, on_drop: OnDrop | None
) -> pd.DataFrame:
    """Read a text table of any layout; the index is the case, not yet unique."""
    header, delimiter = read_header(text, path)
    layout = _guess_layout(header) if layout == "auto" else layout
    logger.info("%s: read in the %s layout", path.name, layout)
    # Column numbers instead of names: pandas would rename repeated columns silently. All are read:
    # of chosen ones (usecols) pandas shifts or cuts a row that has more cells than the header.
    if layout == "cbioportal":
        key = _key_column(header, path)
        columns = [k for k, name in enumerate(header) if name.endswith(_RNASEQ)]
        names = [header[k].removesuffix(_RNASEQ) for k in columns]
    else:
        key = header.index("case_id") if "case_id" in header else 0
        columns = [k for k in range(len(header)) if k != key]
        names = [header[k] for k in columns]
    _check_width(text, header, delimiter, path)
    table = pd.read_csv(
        text,
        sep=delimiter,
        header=None,
        names=list(map(str, range(len(header)))),
        skiprows=1,
        dtype={str(key): str},
        index_col=False,
        low_memory=False,
    )
    keys = table[str(key)].str.strip()
    nameless = int((keys.isna() | (keys == "")).sum())
    if nameless:
        raise CohortError(
            f"{path} must name a case or gene in every row, got {nameless} rows without; "
            "delete or name them"
        )
    table = table[list(map(str, columns))].set_axis(pd.Index(keys, name="case_id"), axis=0)
    table.columns = pd.Index(names)
    if layout == "xena":
        return _cases_from_xena(_as_float32(table, path), path, drop_constant, on_drop)
    _refuse_repeated_genes(names, path)
    return _as_float32(table, path)


def _check_width(text: TextIO, header: list[str], delimiter: str, path: Path) -> None:
    """Refuse a table whose rows are wider than its header, and rewind the text.

    R writes such tables, with no name over the row names: read on, every column would be shifted.
    """
    first = next(csv.reader(text, delimiter=delimiter), header)
    text.seek(0)
    if len(first) != len(header):
        raise CohortError(
            f"{path}, line 2 must have {len(header)} cells like the header, got {len(first)}; "
            "give the column of cases or genes a name (in R: write.csv, or col.names=NA)"
        )


def _guess_layout(header: list[str]) -> Layout:
    """Tell the layout of a text table by its column names."""
    if any(name.endswith(_RNASEQ) for name in header):
        return "cbioportal"
    rest = header[1:]
    barcodes = sum(bool(_BARCODE.fullmatch(name)) for name in rest)
    return "xena" if header[0] == "sample" or (rest and 2 * barcodes > len(rest)) else "cases"


def _key_column(header: list[str], path: Path) -> int:
    """Find the column of case ids in a cBioPortal-derived table."""
    if "case_id" not in header or not any(name.endswith(_RNASEQ) for name in header):
        raise CohortError(
            f"{path} must have the columns case_id and <GENE>{_RNASEQ}, got {name_few(header)}; "
            "choose another layout"
        )
    return header.index("case_id")


def _as_float32(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Convert to float32, naming what is no number."""
    for position, dtype in enumerate(table.dtypes):
        column = table.iloc[:, position]
        if pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
            continue
        bad = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        if len(bad):
            raise CohortError(
                f"{path}, column {table.columns[position]!r} must hold numbers, got "
                f"{bad.iloc[0]!r} in row {bad.index[0]}; remove columns that are not expression"
            )
    return table.astype(np.float32)


def _refuse_repeated_genes(genes: list[str], path: Path) -> None:
    """Refuse a gene or a nameless gene column that occurs twice."""
    twice = repeated(genes)
    if twice or "" in genes:
        raise CohortError(
            f"{path} must name every gene once, got repeated {name_few(twice) or 'none'}, "
            f"{genes.count('')} without a name; rename or merge the columns"
        )


def _cases_from_xena(
    by_gene: pd.DataFrame, path: Path, drop_constant: bool, on_drop: OnDrop | None
) -> pd.DataFrame:
    """Turn gene x sample into case x gene, with the best tumour sample of each case."""
    ranks = _sample_ranks(list(map(str, by_gene.columns)), by_barcode=True)
    best: dict[str, tuple[int, int]] = {}  # case -> (rank of its sample type, column)
    for position, (case, rank) in enumerate(ranks):
        if rank is not None:
            best[case] = min(best.get(case, (rank, position)), (rank, position))
    if not best:
        raise CohortError(
            f"{path} must have a column per tumour sample (TCGA-XX-XXXX-01), got "
            f"{name_few(list(by_gene.columns))}; check the layout"
        )
    kept = [position for _, position in best.values()]
    _tell_samples(by_gene.columns, ranks, set(kept), on_drop)
    chosen = by_gene.iloc[:, kept]
    symbols = [_SYMBOL_WITH_ID.sub(r"\g<symbol>", str(gene)) for gene in chosen.index]
    values = chosen.to_numpy().T
    is_repeat = pd.Index(symbols).duplicated()
    is_constant = np.zeros(len(symbols), dtype=bool)
    if drop_constant and len(best) > 1:
        is_constant = ~(values != values[:1]).any(axis=0) & ~is_repeat
    keep = ~is_repeat & ~is_constant
    names = np.asarray(symbols, dtype=object)
    _tell(on_drop, "gene listed again: first row taken", names[is_repeat])
    _tell(on_drop, "gene the same in all cases: dropped", names[is_constant])
    logger.info(
        "%s: %d of %d samples kept; %d genes repeated or without variation dropped",
        path.name,
        len(best),
        by_gene.shape[1],
        int((~keep).sum()),
    )
    return pd.DataFrame(
        values[:, keep],
        index=pd.Index(list(best), name="case_id"),
        columns=pd.Index(names[keep]),
    )


def _sample_ranks(names: list[str], *, by_barcode: bool) -> list[tuple[str, int | None]]:
    """Return case and preference of each sample, 0 the best, None for normal tissue.

    Args:
        names: Barcodes or case ids.
        by_barcode: Take every name of the form a-b-c-01 for a barcode, not only TCGA's.
    """
    ranks: list[tuple[str, int | None]] = []
    for name in names:
        match = _BARCODE.fullmatch(name)
        if match is None or not (by_barcode or name.startswith(_BARCODE_PREFIXES)):
            ranks.append((name, 0))
            continue
        kind = int(match["type"])
        rank = _PREFERRED_SAMPLE_TYPES.get(kind, kind + len(_PREFERRED_SAMPLE_TYPES))
        ranks.append((match["case"], rank if 1 <= kind <= _LAST_TUMOUR_TYPE else None))
    return ranks


def _best_samples(table: pd.DataFrame, path: Path, on_drop: OnDrop | None) -> pd.DataFrame:
    """Keep the rows of each case's best tumour sample, and name rows by case."""
    names = list(map(str, table.index))
    ranks = _sample_ranks(names, by_barcode=False)
    if [case for case, _ in ranks] == names:
        return table
    best: dict[str, int] = {}
    for case, rank in ranks:
        if rank is not None:
            best[case] = min(best.get(case, rank), rank)
    if not best:
        raise CohortError(
            f"{path} must hold tumour samples, got only normal tissue: {name_few(names)}; check "
            "the sample types of the barcodes (01 primary tumour, 11 normal)"
        )
    kept = [k for k, (case, rank) in enumerate(ranks) if rank is not None and best[case] == rank]
    _tell_samples(table.index, ranks, set(kept), on_drop)
    index = pd.Index([ranks[k][0] for k in kept], name="case_id")
    return table.iloc[kept].set_axis(index, axis=0)


def _tell_samples(
    names: pd.Index, ranks: list[tuple[str, int | None]], kept: set[int], on_drop: OnDrop | None
) -> None:
    """Report samples that were not taken."""
    normal = [str(names[k]) for k, (_, rank) in enumerate(ranks) if rank is None]
    others = [str(names[k]) for k in range(len(names)) if k not in kept and ranks[k][1] is not None]
    _tell(on_drop, "sample of normal tissue: dropped", normal)
    _tell(on_drop, "further tumour sample of a case: dropped", others)


def _tell(on_drop: OnDrop | None, reason: str, items: Iterable[object]) -> None:
    if on_drop is not None and (names := sorted(map(str, items))):
        on_drop(reason, names)


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet table: cases in `case_id`, in a named or text index, or the first column."""
    with naming_damage(path, _KIND):
        try:
            table = pd.read_parquet(path)
        except ValueError as error:  # what pyarrow raises on foreign files
            raise OSError(str(error)) from error
    if "case_id" in table.columns:
        table = table.set_index("case_id")
    elif isinstance(table.index, pd.RangeIndex) and len(table.columns):
        table = table.set_index(table.columns[0])
    return _named(table, path)


def _read_h5ad(path: Path) -> pd.DataFrame:
    """Read an AnnData file: observations are cases, variables genes."""
    try:
        import anndata
    except ImportError:
        raise InputError(
            f"{path.name} must be read with the package anndata, got none installed; "
            "run: pip install 'modaltune[anndata]'"
        ) from None
    with naming_damage(path, _KIND):
        try:
            data = anndata.read_h5ad(path)
        except (KeyError, TypeError, ValueError) as error:  # HDF5, but no AnnData
            raise OSError(str(error)) from error
    return _named(data.to_df(), path)


def _named(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Give a binary table text names and float32 values."""
    table = table.set_axis(pd.Index(table.index.astype(str), name="case_id"), axis=0)
    table = table.set_axis(pd.Index([str(name) for name in table.columns]), axis=1)
    _refuse_repeated_genes(list(table.columns), path)
    return _as_float32(table, path)


def _one_row_per_case(
    table: pd.DataFrame, policy: DuplicateCases, path: Path, on_drop: OnDrop | None
) -> pd.DataFrame:
    """Merge rows of one case: equal ones silently, differing ones by the policy."""
    if table.index.is_unique:
        return table
    again = table.index.duplicated(keep=False)
    rows = table[again]
    first = rows.groupby(level=0, sort=False).transform("first")
    # A gap equals a gap; groupby's "first" skips gaps, so they are compared on their own.
    same = (rows == first) | (rows.isna() & first.isna())
    differing = list(dict.fromkeys(rows.index[~same.all(axis=1)]))
    if differing and policy == "error":
        raise CohortError(
            f"{path} must have one row per case, got differing rows for {len(differing)} cases: "
            f"{name_few(differing)}; choose duplicate_cases='first' or 'mean', or correct the table"
        )
    if differing:
        logger.warning(
            "%s: %d cases with differing rows, taken the %s", path.name, len(differing), policy
        )
        _tell(on_drop, f"case with differing rows: {policy} taken", differing)
    if policy == "mean":
        return table.groupby(level=0, sort=False).mean()
    return table[~table.index.duplicated(keep="first")]


def _check_finite(table: pd.DataFrame, policy: NanPolicy, path: Path) -> None:
    """Refuse infinite values, and gaps unless they are to be kept."""
    values = table.to_numpy()
    bad = np.isinf(values) if policy == "keep" else ~np.isfinite(values)
    if not bad.any():
        return
    cases = list(table.index[bad.any(axis=1)])
    genes = list(table.columns[bad.any(axis=0)])
    raise CohortError(
        f"{path} must hold finite numbers, got NaN or infinity in {len(genes)} genes "
        f"({name_few(genes)}) of {len(cases)} cases ({name_few(cases)}); remove these genes or "
        "cases (a case without genes is allowed), or fill gaps by the training mean with "
        "nan_policy='keep' here and nan_policy='mean' in GeneScaler.fit"
    )
