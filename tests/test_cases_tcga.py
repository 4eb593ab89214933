"""The real cohorts: BRCA, BLCA and COADREAD from their published splits and expression tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from modaltune.cases_build import build_cases
from modaltune.cases_folder import CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.errors import CohortError
from modaltune.omics import read_expression
from modaltune.pathways import PathwayIndex
from modaltune.published_splits import read_published_split
from modaltune.splits import PARTS, count_by_class

# Cases by class 0 / 1 / unclassified, as the README of the shared data has them.
CLASSES = {
    "brca": {"train": (506, 130, 113), "val": (90, 23, 0), "test": (150, 38, 0)},
    "blca": {"train": (215, 46, 2), "val": (38, 8, 0), "test": (63, 13, 0)},
    "coadread": {"train": (296, 111, 90), "val": (30, 8, 0), "test": (50, 14, 0)},
}
EXPRESSION = {
    "brca-cbioportal": "tcga_brca_all_clean.csv.zip",
    "blca-cbioportal": "tcga_blca_all_clean.csv.zip",
    "blca-xena": "tcga_blca_rnaseq_xena.csv.gz",
    "coadread-cbioportal": "tcga_coadread_all_clean.csv.zip",
    "coadread-xena": "tcga_coadread_rnaseq_xena.csv.gz",
}
PATHWAYS = {name: 331 if name.endswith("xena") else 182 for name in EXPRESSION}
PATHWAYS["coadread-cbioportal"] = 181
pytestmark = pytest.mark.shared


def request_for(shared: Path, cohort: str, expression: str) -> CasesRequest:
    tcga = shared / "data" / "tcga"
    train, val, test = (tcga / "splits" / f"{cohort}_{part}.json.gz" for part in PARTS)
    return CasesRequest(
        published_split=(train, val, test),
        clinical=(tcga / f"tcga_{cohort}_all_clean.csv.zip",),
        expression=(tcga / expression,),
        pathways=tcga / "pathways_hallmark_reactome_331.csv.gz",
        duplicate_cases="first",
        gene_aliases="none",
        require=(),
    )


@pytest.fixture(scope="module", params=list(EXPRESSION))
def built(
    request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, CasesFolder]:
    cohort = request.param.split("-")[0]
    out = tmp_path_factory.mktemp("tcga") / "cases"
    asked = request_for(shared_dir, cohort, EXPRESSION[request.param])
    return request.param, build_cases(asked, out)


def test_cases_by_part_and_class_are_the_published_ones(built: tuple[str, CasesFolder]) -> None:
    name, folder = built
    want = {
        part: {k: n for k, n in zip(("0", "1", "-1"), counts, strict=True) if n}
        for part, counts in CLASSES[name.split("-")[0]].items()
    }
    assert count_by_class(folder.split(), folder.clinical) == want
    counted = folder.report["parts"][0]
    assert {part: counted[part]["classes"] for part in PARTS} == want
    assert folder.clinical["survival_months"].notna().all()
    assert folder.clinical["event"].isin([0.0, 1.0]).all()


def test_expression_is_joined_by_case(built: tuple[str, CasesFolder], shared_dir: Path) -> None:
    name, folder = built
    genes = folder.expression
    assert genes is not None
    counted, split = folder.report["parts"][0], folder.split()
    with_genes = {part: [c for c in ids if c in genes.index] for part, ids in split.parts.items()}
    assert {part: counted[part]["genes"] for part in PARTS} == {
        part: len(cases) for part, cases in with_genes.items()
    }
    facts = folder.report["genes"]
    assert facts["pathways_with_a_gene"] == PATHWAYS[name]
    assert folder.pathways is not None
    assert len(PathwayIndex.build(folder.pathways, genes.columns).names) == PATHWAYS[name]
    path = shared_dir / "data" / "tcga" / EXPRESSION[name]
    raw = read_expression(path, duplicate_cases="first", drop_constant_genes=False)
    pd.testing.assert_frame_equal(genes, raw.loc[genes.index, list(genes.columns)])
    if name == "brca-cbioportal":
        classes = folder.clinical["primary_class"]
        assert len(with_genes["train"]) == 677
        assert len(with_genes["test"]) == 172
        assert sum(classes[case] == 1 for case in with_genes["test"]) == 30
        assert len(genes.columns) == 769


def test_clinical_rows_are_those_of_the_split_with_gaps_filled(
    built: tuple[str, CasesFolder], shared_dir: Path
) -> None:
    name, folder = built
    asked = request_for(shared_dir, name.split("-")[0], EXPRESSION[name])
    assert asked.published_split is not None
    _, records = read_published_split(*asked.published_split)
    rows = folder.clinical.loc[records.index]
    for column in ("case_uuid", "project", "diagnosis", "survival_months", "event"):
        pd.testing.assert_series_equal(rows[column], records[column], check_dtype=False)
    assert records["sex"].isna().all()
    in_both = rows["sex"].notna()
    assert in_both.sum() == folder.report["parts"][0]["all parts"]["genes"] or "xena" in name
    assert set(rows["sex"][in_both]) <= {"female", "male"}


def test_two_sources_of_expression_are_never_mixed(shared_dir: Path, tmp_path: Path) -> None:
    asked = request_for(shared_dir, "blca", EXPRESSION["blca-xena"])
    other = asked.expression[0].with_name(EXPRESSION["coadread-cbioportal"])
    mixed = asked.model_copy(update={"expression": (*asked.expression, other)})
    with pytest.raises(CohortError, match=r"must list the same genes, .*differ in scale"):
        build_cases(mixed, tmp_path / "cases")


def test_a_new_split_by_hospital_of_a_real_cohort(shared_dir: Path, tmp_path: Path) -> None:
    asked = request_for(shared_dir, "blca", EXPRESSION["blca-xena"])
    changes = {"published_split": None, "by_site": True, "require": ("inputs",)}
    folder = build_cases(asked.model_copy(update=changes), tmp_path / "cases")
    parts = folder.split().parts
    assert sum(map(len, parts.values())) == 360
    sites = {part: {case[5:7] for case in cases} for part, cases in parts.items()}
    assert not sites["train"] & sites["test"]
    assert not sites["train"] & sites["val"]
    assert len(parts["test"]) == pytest.approx(72, abs=20)
