"""Pathway files of three kinds and their index into the gene vector, checked against pandas."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modaltune.errors import CohortError, InputError
from modaltune.omics import read_expression
from modaltune.pathways import PathwayIndex, PathwayTable, read_pathways

TABLE = PathwayTable(names=("p2", "p1", "p0"), genes=(("D", "B"), ("A",), ("C", "B", "E")))
GMT = "p2\thttp://x\tD\tB\np1\t\tA\n\np0\tnote\tC\tB\tE\n"
# Rows are in the order that gives p2 = D, B and p0 = C, B, E.
MEMBERSHIP = "gene,p2,p1,p0\nD,1,0,0\nC,0,0,1\nB,1,0,1\nA,0,1,0\nE,0.0,0,1.0\nZ,0,0,0\n"
WIDE = "p2,p1,p0\nD,A,C\nB,,B\n,,E\n"
WIDE_WITH_ROW_NUMBERS = ",p2,p1,p0\n0,D,A,C\n1,B,,B\n2,,nan,E\n"


def write(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sets.gmt", GMT),
        ("sets.gmt.gz", GMT),
        ("sets.csv", MEMBERSHIP),
        ("sets.csv.gz", MEMBERSHIP),
        ("sets.tsv", MEMBERSHIP.replace(",", "\t")),
        ("unnamed.csv", MEMBERSHIP.removeprefix("gene")),
        ("wide.csv", WIDE),
        ("wide_numbered.csv", WIDE_WITH_ROW_NUMBERS),
        ("windows.csv", MEMBERSHIP.replace("\n", "\r\n")),
    ],
)
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, name: str, content: str) -> None:
    assert read_pathways(write(tmp_path / name, content)) == TABLE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gmt", "p1\tx\tA\n\np2 B C\n", r"a\.gmt, line 3 must be `name<TAB>.*'p2 B C'"),
        ("a.gmt", "p1\tx\tA\np1\tx\tB\n", r"line 2 must name a new pathway, got 'p1' again"),
        ("a.gmt", "\n", "at least one pathway, got none"),
        ("a.csv", "", "an empty file"),
        ("a.csv", "gene,p1\nA,1\n\nB,2\n", r"line 4, column 'p1' must be 0 or 1, got '2'"),
        ("a.csv", "gene,p1\nA,TP53\n", r"line 2 must hold 0 or 1 .* got 'TP53'"),
        ("a.csv", "gene,p1\nA,1\nB,0\nA,1\n", r"line 4 must begin with a new gene.*'A' of line 2"),
        ("a.csv", "gene,p1,p2\nA,1,0\nB,1\n", r"line 3 must have 2 cells after the gene, got 1"),
        ("a.csv", "gene,p1,p1\nA,1,0\n", r"line 1 must name every pathway once, got repeated p1"),
        ("a.csv", "p1,p2\nA,B,C\n", r"line 2 must have at most 2 cells, got 3"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(CohortError, match=message) as caught:
        read_pathways(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_repeats_within_a_set_are_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        table = read_pathways(write(tmp_path / "a.gmt", "p1\tx\tB\tA\tB\n"))
    assert table.genes == (("B", "A"),)
    assert "p1 repeats B" in caplog.text


def test_index_points_into_sorted_genes_in_file_order() -> None:
    index = PathwayIndex.build(TABLE, ["Q", "E", "D", "C", "B"])
    assert index.names == ("p2", "p0")
    assert index.dropped == ("p1",)
    assert index.genes == ("B", "C", "D", "E")
    assert index.unmatched == ("A",)
    assert index.indices.tolist() == [2, 0, 1, 0, 3]
    assert index.offsets.tolist() == [0, 2, 5]
    assert index.indices.dtype == index.offsets.dtype == torch.int64
    assert index.sizes == (2, 3)
    shuffled = PathwayIndex.build(TABLE, ["B", "C", "Q", "D", "E"])
    assert shuffled.to_dict() == index.to_dict()
    back = PathwayIndex.from_dict(json.loads(json.dumps(index.to_dict())))
    assert back.to_dict() == index.to_dict()
    assert torch.equal(back.indices, index.indices)


def test_report_counts_what_was_kept() -> None:
    report = PathwayIndex.build(TABLE, ["D", "C", "A"]).report()
    assert report == {
        "pathways": 3,
        "pathways_kept": 3,
        "pathways_dropped": [],
        "genes_used": 3,
        "genes_unmatched": 2,
        "memberships": 3,
        "smallest_matched_share": pytest.approx(1 / 3),
        "mean_matched_share": pytest.approx((1 / 2 + 1 + 1 / 3) / 3),
    }


def test_empty_pathways_follow_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        PathwayIndex.build(TABLE, ["B"])
    assert "1 of 3 pathways" in caplog.text
    with pytest.raises(CohortError, match=r"got 1 without: p1; use on_empty='drop'"):
        PathwayIndex.build(TABLE, ["B"], on_empty="error")
    for policy in ("drop", "error"):
        with pytest.raises(CohortError, match=r"none in common: pathways have A, B.*ENSG1"):
            PathwayIndex.build(TABLE, ["ENSG1"], on_empty=policy)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="on_empty must be 'drop' or 'error', got 'skip'"):
        PathwayIndex.build(TABLE, ["B"], on_empty="skip")  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="repeated: a"):
        PathwayTable(("a", "a"), (("x",), ("y",)))


@pytest.mark.shared
def test_shared_table_and_brca_expression_have_the_stated_sizes(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "tcga"
    table = read_pathways(folder / "pathways_hallmark_reactome_331.csv.gz")
    assert len(table.names) == 331
    assert table.num_memberships == 9745
    frame = pd.read_csv(folder / "pathways_hallmark_reactome_331.csv.gz", index_col=0)
    for name, genes in zip(table.names, table.genes, strict=True):
        assert list(frame.index[frame[name] == 1]) == list(genes)

    expression = read_expression(folder / "tcga_brca_all_clean.csv.zip")
    assert expression.shape == (956, 1558)
    index = PathwayIndex.build(table, expression.columns)
    assert len(index.genes) == 769
    assert len(index.names) == 182
    assert len(index.dropped) == 331 - 182
    # Gathering through the index equals picking each pathway's genes by name.
    vector = expression[list(index.genes)].iloc[0].to_numpy()
    gathered = np.split(vector[index.indices.numpy()], index.offsets[1:-1].numpy())
    for name, values in zip(index.names, gathered, strict=True):
        members = [gene for gene in frame.index[frame[name] == 1] if gene in expression.columns]
        assert np.array_equal(values, expression[members].iloc[0].to_numpy())


@pytest.mark.shared
@pytest.mark.parametrize("cancer", ["blca", "coadread"])
def test_no_pathway_is_empty_with_the_xena_tables(shared_dir: Path, cancer: str) -> None:
    folder = shared_dir / "data" / "tcga"
    table = read_pathways(folder / "pathways_hallmark_reactome_331.csv.gz")
    genes = pd.read_csv(folder / f"tcga_{cancer}_rnaseq_xena.csv.gz", nrows=0).columns[1:]
    assert PathwayIndex.build(table, genes, on_empty="error").dropped == ()
