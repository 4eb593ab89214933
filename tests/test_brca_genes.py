"""The benchmark of genes alone: linear probes and runs on the same patients, on a real cohort."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from modaltune.benchmarks import brca_genes
from modaltune.cases_folder import CasesFolder
from modaltune.result_rows import BootstrapOptions
from modaltune.testing_cohort import small_cohort, small_run


@pytest.mark.shared
def test_the_smallest_real_cohort(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(shared_dir / "data" / "tcga"), "--out", str(tmp_path), "--cohort", "blca",
                 "--components", "8", "--bootstrap", "2", "--json",
                 "--results", str(tmp_path)]  # fmt: skip
    assert brca_genes.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["differences"] == []
    rows = [r for r in said["scores"] if r["split"] == "test" and r["metric"] == "c_index"]
    assert len(rows) == 1
    assert 60 < rows[0]["n"] <= 76  # the published test cases, those with expression
    assert 0.35 < rows[0]["value"] < 0.9
    with (tmp_path / brca_genes.CSV_NAME).open() as file:
        written = list(csv.DictReader(file))
    assert {row["metric"] for row in written} == set(brca_genes.SHOWN)
    assert {row["cohort"] for row in written} == {"blca-cbioportal"}


def test_components_know_the_training_cases_only(tmp_path: Path) -> None:
    cases = small_cohort(tmp_path / "small")
    whole = brca_genes.components_of(cases, 3)
    genes = cases.expression
    assert genes is not None
    judged = [case for case in genes.index if case not in cases.split().train]
    genes.loc[judged] = genes.loc[judged].to_numpy() * 9
    again = brca_genes.components_of(cases, 3)
    train = [case for case in genes.index if case in cases.split().train]
    np.testing.assert_array_equal(whole.take(train), again.take(train))
    assert not np.array_equal(whole.take(judged), again.take(judged))


def test_runs_are_compared_on_the_same_patients(tmp_path: Path) -> None:
    cases = small_cohort(tmp_path / "cases")
    runs = [small_run(tmp_path / f"seed{k}", cases, seed=k) for k in (0, 1)]
    options = BootstrapOptions(resamples=2)
    scores, differences = brca_genes.scored(CasesFolder.open(cases.path), runs, options, 4)
    assert set(scores["run"]) == {"linear, 4 components", "ModalTune, 2 seeds"}
    assert set(differences["task"]) == {"general", "diagnosis", "survival"}
    row = differences[(differences["metric"] == "auroc") & (differences["split"] == "test")].iloc[0]
    assert row["difference"] == pytest.approx(row["first_value"] - row["second_value"])
    assert row["seeds"] == "2 and 1"
