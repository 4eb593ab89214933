"""Expression and pathways of a cases folder: tables of one source, genes under the same names."""

from __future__ import annotations

import pandas as pd

from modaltune.build_report import BuildReport
from modaltune.cases_request import CasesRequest
from modaltune.errors import CohortError
from modaltune.gene_aliases import load_aliases, match_genes
from modaltune.omics import read_expression
from modaltune.pathways import PathwayTable, read_pathways
from modaltune.tables import name_few, repeated


def read_genes(
    request: CasesRequest, report: BuildReport
) -> tuple[pd.DataFrame | None, PathwayTable | None]:
    """Read expression and pathways, and bring their gene names together.

    Returns:
        Case x gene, named as the pathways name genes, and the pathways; either may be None.

    Raises:
        CohortError: Tables are damaged, of different sources, or share no gene with the pathways.
    """
    pathways = None
    if request.pathways is not None:
        pathways = read_pathways(request.pathways)
        counts = {"pathways": len(pathways.names), "memberships": pathways.num_memberships}
        report.add_input("pathways", request.pathways.name, **counts)
    tables = []
    for path in request.expression:
        table = read_expression(
            path,
            layout=request.layout,
            duplicate_cases=request.duplicate_cases,
            nan_policy=request.nan_policy,
            drop_constant_genes=request.drop_constant_genes,
            on_drop=report.teller(path.name),
        )
        report.add_input("expression", path.name, cases=len(table), genes=table.shape[1])
        tables.append(table)
    if not tables:
        return None, pathways
    expression = _one_expression(tables, request)
    expression = expression[~expression.index.isin(request.exclude)]
    if pathways is not None:
        expression = _match_genes(expression, pathways, request, report)
    return expression, pathways


def _one_expression(tables: list[pd.DataFrame], request: CasesRequest) -> pd.DataFrame:
    """Put the tables of one source together; different genes mean different sources."""
    genes = set(tables[0].columns)
    for path, table in zip(request.expression, tables, strict=True):
        if set(table.columns) != genes:
            others = sorted(genes ^ set(table.columns))
            raise CohortError(
                f"expression tables must list the same genes, got {len(others)} that only one has "
                f"({path.name}: {name_few(others)}); tables of different sources also differ in "
                "scale, so build a cases folder from each"
            )
    expression = pd.concat([table[sorted(genes)] for table in tables])
    twice = repeated(list(expression.index))
    if twice:
        raise CohortError(
            f"expression tables must have different cases, got {len(twice)} in several: "
            f"{name_few(twice)}; remove them from one"
        )
    return expression


def _match_genes(
    expression: pd.DataFrame, pathways: PathwayTable, request: CasesRequest, report: BuildReport
) -> pd.DataFrame:
    """Name genes as the pathways do, and keep those of pathways unless all are wanted."""
    wanted = {gene for genes in pathways.genes for gene in genes}
    aliases = load_aliases(request.gene_aliases)
    match = match_genes(list(expression.columns), wanted, aliases)
    expression = expression.rename(columns=match.renamed)
    measured = set(expression.columns)
    filled = [any(gene in measured for gene in genes) for genes in pathways.genes]
    report.genes = {
        "aliases_from": match.source or "none: exact names only",
        "in_the_expression_table": expression.shape[1],
        "in_pathways": len(wanted),
        "matched": len(wanted & measured),
        "renamed": match.renamed,
        "ambiguous": list(match.ambiguous),
        "unmatched_in_pathways": list(match.unmatched),
        "pathways_with_a_gene": sum(filled),
        "pathways_without_a_gene": sorted(
            name for name, is_filled in zip(pathways.names, filled, strict=True) if not is_filled
        ),
    }
    if not wanted & measured:
        raise CohortError(
            f"pathways must share genes with the expression table, got none in common: pathways "
            f"have {name_few(sorted(wanted))}, the table has {name_few(sorted(measured))}; map "
            "both to gene symbols"
        )
    if request.genes == "all":
        return expression
    report.drop("expression", "gene of no pathway: not stored", measured - wanted)
    return expression[sorted(wanted & measured)]
