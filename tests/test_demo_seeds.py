"""The demo's benchmark: figures of a result, in the columns they are named for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from modaltune.benchmarks import demo_seeds
from modaltune.demo import DemoResult
from modaltune.demo_study import StudyResult, VariantResult


def result(seed: int, out: Path) -> DemoResult:
    def found(accuracy: float) -> VariantResult:
        half = np.full(2, 0.5)
        return VariantResult(half, half, (accuracy, 0.1, 0.9), (accuracy - 0.1, 0.2, 0.8), 0)

    variants = {"image + genes": found(0.85), "image only": found(0.7), "genes only": found(0.6)}
    classes, times = np.array([0, 1]), np.ones(2)
    study = StudyResult(("a", "b"), classes, times, times, {}, variants)
    return DemoResult(out, study, seed, {}, 12.34)


def test_a_row_per_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def fake(out: Path, *, cases: int, seed: int) -> DemoResult:
        asked.append((cases, seed))
        return result(seed, out)

    monkeypatch.setattr(demo_seeds, "run_demo", fake)
    assert demo_seeds.main(["3", "5", "--cases", "20", "--results", str(tmp_path)]) == 0
    assert asked == [(20, 3), (20, 5)]
    with (tmp_path / demo_seeds.CSV_NAME).open() as file:
        first, second = csv.DictReader(file)
    assert (first["seed"], second["seed"]) == ("3", "5")
    assert float(first["image_and_genes_balanced_accuracy"]) == 0.85
    assert float(first["image_only_balanced_accuracy_low"]) == 0.1
    assert float(first["genes_only_c_index"]) == 0.5
    assert float(first["margin"]) == pytest.approx(0.15)
    assert first["seconds"] == "12.3"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert demo_seeds.main(["0", "--results", str(tmp_path / "none")]) == 1
