"""Building a cohort: joined by id in any order of rows, and everything left out is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from modaltune.cases import prepare_cases, scale_positions
from modaltune.cases_build import build_cases
from modaltune.cases_folder import CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.engine import foreign_pt, untrusted_pt
from modaltune.errors import CohortError, FeatureFileError, InputError
from modaltune.fitting import fit_preprocessing
from modaltune.omics import read_expression
from modaltune.published_splits import write_published_split
from modaltune.splits import source_site
from modaltune.testing_raw_cohort import CASES, GENES, NO_GENES, NO_SLIDES, write_raw_cohort


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> CasesRequest:
    return write_raw_cohort(tmp_path_factory.mktemp("cohort") / "raw")


@pytest.fixture(scope="module")
def built(raw: CasesRequest, tmp_path_factory: pytest.TempPathFactory) -> CasesFolder:
    return build_cases(raw, tmp_path_factory.mktemp("built") / "cases")


def reasons(folder: CasesFolder) -> dict[tuple[str, str], list[str]]:
    return {(d["source"], d["reason"]): d["items"] for d in folder.report["dropped"]}


def test_rows_of_every_input_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    first = build_cases(write_raw_cohort(tmp_path / "a"), tmp_path / "cases")
    for order in (1, 2):
        request = write_raw_cohort(tmp_path / "b", order=order)
        second = build_cases(request, tmp_path / f"cases{order}")
        assert second.sha256 == first.sha256
        assert sorted(os.listdir(second.path)) == sorted(os.listdir(first.path))
        for name in set(os.listdir(first.path)) - {"cases.json"}:
            assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
        assert {**second.description, "sources": 0} == {**first.description, "sources": 0}
        for ours, theirs in zip(
            first.description["sources"], second.description["sources"], strict=True
        ):
            assert ours["role"] == theirs["role"]
            if ours["role"] != "features":
                assert ours["sha256"] != theirs["sha256"]  # the rows were indeed shuffled


def test_values_stand_with_their_cases(raw: CasesRequest, built: CasesFolder) -> None:
    genes = read_expression(raw.expression[0], drop_constant_genes=False)
    assert built.expression is not None
    assert list(built.expression.columns) == list(GENES)
    pd.testing.assert_frame_equal(
        built.expression, genes.loc[built.expression.index, list(GENES)], check_names=False
    )
    rows = pd.read_csv(raw.clinical[0], sep="\t", na_values="'--")
    rows = rows.drop_duplicates("case_submitter_id").set_index("case_submitter_id")
    for case in built.case_ids:
        assert built.clinical.loc[case, "case_uuid"] == rows.loc[case, "case_id"]
        days = rows.loc[case, ["days_to_death", "days_to_last_follow_up"]].dropna().iloc[0]
        assert built.clinical.loc[case, "survival_months"] == pytest.approx(days / 30.44)
        for path in built.cohort.slides.get(case, ()):
            assert path.name.startswith(case)
            assert built.cohort.read_slide(path).slide == path.stem
    two = next(case for case in CASES[1::2] if case not in NO_SLIDES)
    assert len(built.cohort.slides[two]) == 2


def test_what_was_left_out_is_said(built: CasesFolder) -> None:
    said = reasons(built)
    assert said["cases", "neither expression nor slides"] == [CASES[-1]]
    assert said["expression", "case not in the folder"] == ["TCGA-ZZ-9999"]
    assert said["features", "slide of no known case"] == ["TCGA-ZZ-9999-01Z-00-DX1"]
    assert len(said["xena.tsv", "sample of normal tissue: dropped"]) == 4
    assert said["xena.tsv", "further tumour sample of a case: dropped"] == [f"{CASES[0]}-06"]
    assert said["expression", "gene of no pathway: not stored"] == ["UNUSED"]
    undated = "died on an unrecorded day: censored at the last follow-up"
    assert said["clinical.tsv", undated] == [CASES[1]]
    assert all("(Stage 0)" in item for item in
               said["clinical", "stage code without a wording: taken as missing"])  # fmt: skip
    assert built.report["genes"]["unmatched_in_pathways"] == ["ABSENT"]
    assert any("mucinous adenocarcinoma" in note for note in built.report["notes"])
    page = (built.path / "report.md").read_text()
    assert "| cases | neither expression nor slides | 1 | TCGA-D2-0047 |" in page
    assert "## Cases" in page
    counts = built.report["parts"][0]["all parts"]
    assert (counts["cases"], counts["neither"]) == (47, 0)
    assert counts["genes"] == 48 - len(NO_GENES)
    assert counts["slides"] == 48 - len(NO_SLIDES)
    assert counts["deaths"] == (built.clinical["event"] == 1).sum()


def test_the_folder_feeds_the_model(built: CasesFolder) -> None:
    split = built.split()
    fitted = fit_preprocessing(built, split, clinical="default")
    cases = prepare_cases(built.cohort, split.test, fitted)
    assert [case.case_id for case in cases] == list(split.test)
    for case in cases:
        assert ("genes" in case.values) == (case.case_id not in NO_GENES)
        assert bool(case.slides) == (case.case_id not in NO_SLIDES)


def test_requirements_exclusions_and_all_genes(raw: CasesRequest, tmp_path: Path) -> None:
    def build(name: str, **changes: Any) -> CasesFolder:
        return build_cases(raw.model_copy(update=changes), tmp_path / name)

    assert set(build("all", require=()).case_ids) == set(CASES)
    both = build("both", require=("genes", "slides"), genes="all", exclude=(CASES[0],))
    assert set(both.case_ids) == set(CASES) - set(NO_GENES) - set(NO_SLIDES) - {CASES[0]}
    assert both.expression is not None
    assert "UNUSED" in both.expression.columns
    classed = build("classed", require=("class", "survival"))
    assert (classed.clinical["primary_class"] >= 0).all()
    dropped = build("dropped", death_without_date="drop")
    assert CASES[1] not in dropped.case_ids
    with pytest.raises(CohortError, match="must be left after joining, got none"):
        build("none", features=(), expression=())


def test_splits_new_given_and_published(
    raw: CasesRequest, built: CasesFolder, tmp_path: Path
) -> None:
    folds = build_cases(raw.model_copy(update={"folds": 3, "by_site": True}), tmp_path / "folds")
    assert folds.num_folds == 3
    for fold in range(3):
        parts = folds.split(fold).parts.values()
        sites = [{source_site(case) for case in part} for part in parts]
        assert not sites[0] & sites[2]
    given = raw.model_copy(update={"split": folds.path / "splits.json"})
    again = build_cases(given, tmp_path / "again")
    assert [again.split(k) for k in range(3)] == [folds.split(k) for k in range(3)]
    table = tmp_path / "split.csv"
    table.write_text(f"case_id,split\n{CASES[0]},train\n{CASES[2]},test\nTCGA-XX-0000,test\n")
    own = build_cases(raw.model_copy(update={"split": table}), tmp_path / "own")
    assert own.case_ids == (CASES[0], CASES[2])
    assert reasons(own)["split", "case of the split that no table knows"] == ["TCGA-XX-0000"]
    assert len(reasons(own)["cases", "in no part of the split given"]) == 46
    files = write_published_split(tmp_path / "json", built.split(), built.clinical)
    changes = {"clinical": (), "published_split": tuple(files), "classes": "file"}
    published = build_cases(raw.model_copy(update=changes), tmp_path / "published")
    assert published.split() == built.split()
    pd.testing.assert_frame_equal(published.clinical.drop(columns="sex"),
                                  built.clinical.drop(columns="sex"))  # fmt: skip
    with pytest.raises(InputError, match="must not both be given"):
        build_cases(given.model_copy(update=changes), tmp_path / "x")


def test_of_several_clinical_tables_the_first_is_believed(
    raw: CasesRequest, tmp_path: Path
) -> None:
    first = tmp_path / "first.csv"
    first.write_text(
        f"case_id,age,survival_months,event,diagnosis\n{CASES[0]},33,,1,\n{CASES[2]},,1.5,1,x\n"
    )
    changes = {"clinical": (first, *raw.clinical), "classes": "file"}
    folder = build_cases(raw.model_copy(update=changes), tmp_path / "cases")
    alone = build_cases(raw, tmp_path / "alone").clinical
    rows = folder.clinical
    assert rows.loc[CASES[0], "age"] == 33
    # Time and event are never mixed from two tables.
    assert rows.loc[CASES[0], "survival_months"] == alone.loc[CASES[0], "survival_months"]
    assert rows.loc[CASES[0], "event"] == alone.loc[CASES[0], "event"]
    assert tuple(rows.loc[CASES[2], ["survival_months", "event"]]) == (1.5, 1.0)
    assert rows.loc[CASES[2], "diagnosis"] == "x"
    said = reasons(folder)
    assert said["clinical", "survival_months in clinical.tsv differs: the first kept"] == [CASES[2]]
    assert said["clinical", "diagnosis in clinical.tsv differs: the first kept"] == [CASES[2]]


def test_labels_of_the_user(raw: CasesRequest, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    lines = [f"{case},{'high' if k % 2 else 'low'}" for k, case in enumerate(CASES[:20])]
    labels.write_text("\n".join(["case_id,label", *lines, "P99,low"]))
    folder = build_cases(raw.model_copy(update={"labels": labels}), tmp_path / "cases")
    classes = folder.clinical["primary_class"]
    assert (classes[CASES[0]], classes[CASES[1]], classes[CASES[30]]) == (1, 0, -1)
    assert folder.description["classes"]["names"] == {"": {"0": "high", "1": "low"}}
    assert reasons(folder)["labels.csv", "label of no known case"] == ["P99"]


def test_genes_alone_and_slides_alone_make_a_cohort(raw: CasesRequest, tmp_path: Path) -> None:
    only = {"clinical": (), "classes": "file"}
    genes = build_cases(raw.model_copy(update={**only, "features": ()}), tmp_path / "genes")
    assert set(genes.case_ids) == set(CASES) - set(NO_GENES) | {"TCGA-ZZ-9999"}
    slides = build_cases(
        raw.model_copy(update={**only, "expression": (), "pathways": None}), tmp_path / "slides"
    )
    assert slides.expression is None
    assert set(slides.case_ids) == set(CASES) - set(NO_SLIDES) | {"TCGA-ZZ-9999"}
    with pytest.raises(InputError, match="must be given, got nothing with a case in it"):
        build_cases(CasesRequest(), tmp_path / "x")


def test_aliases_rename_expression_and_are_reported(raw: CasesRequest, tmp_path: Path) -> None:
    table = tmp_path / "xena.tsv"
    text = raw.expression[0].read_text()
    table.write_text(text.replace("G03\t", "NEW3\t").replace("G04\t", "TWICE\t"))
    hgnc = tmp_path / "hgnc.txt"
    hgnc.write_text(
        "symbol\talias_symbol\tprev_symbol\nNEW3\t\tG03\nNEW4\tTWICE\tG04\nNEW5\tTWICE\t\n"
    )
    changes = {"expression": (table,), "gene_aliases": str(hgnc)}
    folder = build_cases(raw.model_copy(update=changes), tmp_path / "cases")
    plain = build_cases(raw, tmp_path / "plain")
    assert folder.expression is not None
    assert plain.expression is not None
    np.testing.assert_array_equal(folder.expression["G03"], plain.expression["G03"])
    assert "G04" not in folder.expression.columns
    genes = folder.report["genes"]
    assert genes["renamed"] == {"NEW3": "G03"}
    assert genes["unmatched_in_pathways"] == ["ABSENT", "G04"]
    assert genes["aliases_from"] == "hgnc.txt"


def test_tables_of_several_sources_or_with_the_same_cases_are_refused(
    raw: CasesRequest, tmp_path: Path
) -> None:
    with pytest.raises(CohortError, match="must have different cases, got 45 in several"):
        build_cases(raw.model_copy(update={"expression": raw.expression * 2}), tmp_path / "x")
    other = tmp_path / "other.csv"
    other.write_text("case_id,G00,ZZZ\nTCGA-YY-0001,1,2\n")
    changes = {"expression": (*raw.expression, other)}
    with pytest.raises(CohortError, match=r"list the same genes, got 13 .*other.csv.*scale"):
        build_cases(raw.model_copy(update=changes), tmp_path / "x")
    changes = {"expression": (other,), "pathways": tmp_path / "sets.gmt"}
    (tmp_path / "sets.gmt").write_text("A\t\tQ1\tQ2\n")
    with pytest.raises(CohortError, match="got none in common: pathways have Q1, Q2"):
        build_cases(raw.model_copy(update=changes), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test the child's import of torch; what the child does stays the same."""

    def load(path: Path) -> dict[str, Any]:
        content = torch.load(path, weights_only=True)
        layout, tensors = untrusted_pt.dense_tensors(content, budget=1 << 20)
        return {"" if layout == "tensor" else k: v.numpy() for k, v in tensors.items()}

    monkeypatch.setattr(foreign_pt, "load_pt_tensors", load)


def write_featvec(width: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = {"features": torch.ones(2, width), "coords": torch.tensor([[0, 0], [256, 0]])}
        torch.save(content, path)

    return write


@pytest.mark.usefixtures("in_process")
def test_pt_features_are_imported_only_when_asked(raw: CasesRequest, tmp_path: Path) -> None:
    folder = tmp_path / "gigapath"
    folder.mkdir()
    for k, case in enumerate(CASES[:3]):
        write_featvec(5)(folder / f"{case}-01Z-00-DX1_featvec.pt")
        write_featvec(5)(folder / f"{case}-11A-01-TS{k}_featvec.pt")
    request = raw.model_copy(update={"features": (folder,), "slides": None})
    with pytest.raises(InputError, match=r"got 6 \.pt files, .*--import-pt"):
        build_cases(request, tmp_path / "cases")
    request = request.model_copy(update={"import_pt": True, "base_mpp": 0.25, "target_mpp": 0.5})
    built = build_cases(request, tmp_path / "cases")
    assert len(reasons(built)["features", "slide of normal tissue"]) == 3
    (slide,) = built.cohort.read_slides(CASES[0])
    assert (slide.features.shape, slide.coords.tolist()) == ((2, 5), [[0, 0], [256, 0]])
    assert (slide.base_mpp, slide.target_mpp) == (0.25, 0.5)
    assert scale_positions(slide, "scaled").tolist() == [[0.25, 0.25], [128.25, 0.25]]
    assert built.slides["tiles"].tolist() == [2, 2, 2]
    moved = (tmp_path / "cases").rename(tmp_path / "moved")
    assert len(CasesFolder.open(moved).cohort.read_slides(CASES[0])) == 1
    write_featvec(6)(folder / f"{CASES[4]}-01Z-00-DX1_featvec.pt")
    with pytest.raises(FeatureFileError, match=r"must have one width, got 5 .*6 "):
        build_cases(request, tmp_path / "cases")
    assert not (tmp_path / "cases").exists()


def test_a_build_that_fails_leaves_the_old_folder(raw: CasesRequest, tmp_path: Path) -> None:
    first = build_cases(raw, tmp_path / "cases")
    with pytest.raises(CohortError, match="--replace"):
        build_cases(raw, tmp_path / "cases")
    broken = raw.model_copy(update={"encoder": None, "pathways": tmp_path / "absent.gmt"})
    with pytest.raises(CohortError, match="no such file"):
        build_cases(broken, tmp_path / "cases", replace=True)
    assert CasesFolder.open(tmp_path / "cases").sha256 == first.sha256
    second = build_cases(raw.model_copy(update={"seed": 5}), tmp_path / "cases", replace=True)
    assert second.sha256 != first.sha256
    assert os.listdir(tmp_path) == ["cases"]
    assert json.loads((tmp_path / "cases" / "cases.json").read_text())["options"]["seed"] == 5
