"""Nothing fitted knows held-out cases: their labels, genes and stages can be anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from modaltune.cases_build import build_cases
from modaltune.cases_folder import CasesContent, CasesFolder, write_cases_folder
from modaltune.errors import CohortError, InputError
from modaltune.fitting import fit_preprocessing, tile_recipe
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import SurvivalBins
from modaltune.preprocessing import Preprocessing
from modaltune.splits import Split
from modaltune.testing_raw_cohort import write_raw_cohort

Change = Callable[[CasesContent, list[str], np.random.Generator], CasesContent]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> CasesFolder:
    folder = tmp_path_factory.mktemp("cohort")
    return build_cases(write_raw_cohort(folder / "raw"), folder / "cases")


def change_labels(
    content: CasesContent, held_out: list[str], rng: np.random.Generator
) -> CasesContent:
    """Shuffle classes, events and times of held-out cases, and stretch the times."""
    table = content.clinical.copy()
    for column in ("primary_class", "event", "survival_months"):
        table.loc[held_out, column] = rng.permutation(table.loc[held_out, column].to_numpy())
    table.loc[held_out, "survival_months"] *= 10
    return dataclasses.replace(content, clinical=table)


def change_genes(
    content: CasesContent, held_out: list[str], rng: np.random.Generator
) -> CasesContent:
    """Shuffle the expression of held-out cases over cases and genes, and stretch it."""
    assert content.expression is not None
    table = content.expression.copy()
    rows = [case for case in held_out if case in table.index]
    values = rng.permutation(table.loc[rows].to_numpy().ravel()).reshape(len(rows), -1)
    table.loc[rows] = 100 * values
    return dataclasses.replace(content, expression=table)


def change_stages(
    content: CasesContent, held_out: list[str], rng: np.random.Generator
) -> CasesContent:
    """Shuffle stage, T, N, M, age, sex and site of held-out cases, and add unseen values."""
    table = content.clinical.copy()
    for column in ("stage", "t", "n", "m", "age", "sex", "site"):
        table.loc[held_out, column] = rng.permutation(table.loc[held_out, column].to_numpy())
    table.loc[held_out, "age"] = 110.0
    new = {"stage": "Stage IV", "t": "T4", "n": "N3", "m": "M1", "sex": "other", "site": "brain"}
    for column, value in new.items():
        table.loc[held_out, column] = value
    return dataclasses.replace(content, clinical=table)


def changed(cases: CasesFolder, change: Change, out: Path) -> CasesFolder:
    """Return the folder with other values for validation and test cases, and the same split."""
    held_out = [*cases.split().val, *cases.split().test]
    content = CasesContent(
        cases.clinical, cases.expression, cases.pathways, cases.slides, (cases.split(),)
    )
    return write_cases_folder(out, change(content, held_out, np.random.default_rng(0)))


def fitted(
    cases: CasesFolder,
    fitted_on: Literal["train", "published"],
    clinical: Literal["default", "published"],
) -> dict[str, Any]:
    preprocessing = fit_preprocessing(
        cases, cases.split(), fitted_on=fitted_on, clinical=clinical, stage_in_targets=False
    )
    state = preprocessing.to_dict()
    assert Preprocessing.from_dict(state).to_dict() == state
    return state


# Every fitted object, and which change reaches it when it is fitted on all parts.
OBJECTS = [
    ("genes", "default", change_genes),
    ("survival", "default", change_labels),
    ("clinical", "default", change_stages),
    ("clinical", "published", change_stages),
]


@pytest.mark.parametrize("change", [change_labels, change_genes, change_stages])
@pytest.mark.parametrize("clinical", ["default", "published"])
def test_values_of_held_out_cases_change_nothing_fitted(
    cases: CasesFolder, tmp_path: Path, change: Change, clinical: Any
) -> None:
    other = changed(cases, change, tmp_path / "other")
    assert other.sha256 != cases.sha256
    before, after = fitted(cases, "train", clinical), fitted(other, "train", clinical)
    assert set(before) == {"tiles", "pathways", "genes", "clinical", "survival"}
    for name in before:
        assert before[name] is not None, name
        assert before[name] == after[name], name


@pytest.mark.parametrize(("name", "clinical", "change"), OBJECTS)
def test_what_is_fitted_on_all_parts_as_published_does_change(
    cases: CasesFolder, tmp_path: Path, name: str, clinical: Any, change: Change
) -> None:
    other = changed(cases, change, tmp_path / "other")
    before, after = fitted(cases, "published", clinical), fitted(other, "published", clinical)
    assert before[name] != after[name]
    untouched = {"genes", "survival", "clinical", "pathways", "tiles"} - {name}
    assert all(before[key] == after[key] for key in untouched)


@pytest.mark.parametrize(("name", "clinical", "change"), OBJECTS)
def test_training_values_are_what_is_fitted(
    cases: CasesFolder, tmp_path: Path, name: str, clinical: Any, change: Change
) -> None:
    def of_training(
        content: CasesContent, held_out: list[str], rng: np.random.Generator
    ) -> CasesContent:
        train = [case for case in content.clinical.index if case not in held_out]
        return change(content, train, rng)

    other = changed(cases, of_training, tmp_path / "other")
    assert fitted(cases, "train", clinical)[name] != fitted(other, "train", clinical)[name]


def test_each_part_is_the_fit_of_the_training_rows(cases: CasesFolder) -> None:
    split = cases.split()
    got = fit_preprocessing(cases, split, clinical="default")
    genes = cases.expression
    assert genes is not None
    assert got.genes is not None
    assert got.clinical is not None
    rows = genes.loc[[case for case in split.train if case in genes.index]]
    np.testing.assert_array_equal(got.genes.mean, GeneScaler.fit(rows).mean)
    assert got.genes.num_cases == len(rows) < len(split.train)
    months = cases.clinical.loc[list(split.train), "survival_months"]
    assert got.survival == SurvivalBins.fit(months)
    assert got.clinical.age_fill == pytest.approx(
        cases.clinical.loc[list(split.train), "age"].mean()
    )
    published = fit_preprocessing(
        cases, split, fitted_on="published", clip_quantiles=None, clinical="published"
    )
    assert published.genes is not None
    np.testing.assert_allclose(published.genes.mean, genes.mean(), rtol=1e-5)
    np.testing.assert_allclose(published.genes.std, genes.std(ddof=0), rtol=1e-4)


def test_parts_that_are_not_there_or_not_wanted_are_none(
    cases: CasesFolder, tmp_path: Path
) -> None:
    got = fit_preprocessing(cases, cases.split(), use_genes=False, use_slides=False)
    assert (got.pathways, got.genes, got.tiles, got.clinical) == (None,) * 4
    assert got.survival is not None
    clinical = cases.clinical.assign(survival_months=np.nan)
    content = CasesContent(clinical, None, None, None, (cases.split(),))
    bare = fit_preprocessing(write_cases_folder(tmp_path / "bare", content), cases.split())
    assert bare == Preprocessing()


def test_the_tile_recipe_is_that_of_training_slides(cases: CasesFolder) -> None:
    got = tile_recipe(cases.cohort, cases.split().train)
    assert got is not None
    assert (got.width, got.encoder, got.target_mpp, got.tile_px) == (4, "small", 0.5, 16)
    assert tile_recipe(cases.cohort, ["unknown"]) is None


def test_no_training_case_or_an_unknown_option_is_refused(cases: CasesFolder) -> None:
    with pytest.raises(CohortError, match="split must have training cases to fit on, got none"):
        fit_preprocessing(cases, Split((), (), cases.case_ids))
    with pytest.raises(InputError, match="fitted_on must be one of train, published"):
        fit_preprocessing(cases, cases.split(), fitted_on="test")  # type: ignore[arg-type]


def test_clinical_stage_inputs_warn_when_the_targets_say_the_stage(
    cases: CasesFolder, caplog: pytest.LogCaptureFixture
) -> None:
    fit_preprocessing(cases, cases.split(), clinical="published", stage_in_targets=False)
    assert "leak" not in caplog.text
    fit_preprocessing(cases, cases.split(), clinical="published")
    assert "they leak the label" in caplog.text
    assert isinstance(cases.clinical, pd.DataFrame)
