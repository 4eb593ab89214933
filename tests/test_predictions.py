"""Predictions: what they may hold, and their way through a table and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modaltune.errors import CohortError, InputError
from modaltune.predictions import Predictions, predictions_table, read_predictions


def test_months_keep_all_digits(tmp_path: Path) -> None:
    """A rounded month is another one: the Brier score would be taken over other times."""
    months = np.array([12.0, 12.3456789, 12.34567891, 1e-5])
    said = Predictions(("a",), risk=np.zeros(1), survival=np.full((1, 4), 0.5), months=months)
    table = predictions_table(said)
    assert "survival_12m" in table
    table.to_csv(tmp_path / "p.csv", index=False)
    again = read_predictions(tmp_path / "p.csv")
    assert again.months is not None
    assert again.months.tolist() == sorted(months)
    table = pd.DataFrame({"case_id": ["a"], "risk": [1.0], "survival_12.0m": [0.5]})
    table.to_csv(tmp_path / "q.csv", index=False)
    again = read_predictions(tmp_path / "q.csv")
    assert again.months is not None
    assert again.months.tolist() == [12]
    assert np.array_equal(again.survival, [[0.5]])


def test_predictions_in_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chance, curves = rng.random(6), np.sort(rng.random((6, 2)))[:, ::-1]
    said = Predictions(
        tuple(f"P{k}" for k in range(6)), np.array([0, 1]), np.stack([1 - chance, chance], axis=1),
        rng.normal(size=6), curves, np.array([10.0, 20]),
    )  # fmt: skip
    table = predictions_table(said)
    table.to_csv(tmp_path / "p.csv", index=False)
    table.assign(task="risk").to_parquet(tmp_path / "p.parquet")
    for name in ("p.csv", "p.parquet"):
        again = read_predictions(tmp_path / name)
        assert again.case_ids == said.case_ids
        for part in ("probabilities", "risk", "survival", "months"):
            np.testing.assert_allclose(getattr(again, part), getattr(said, part))
    (tmp_path / "x.csv").write_text("case_id,value\na,1\n")
    with pytest.raises(CohortError, match="must have the column case_id and of class_<k>, risk"):
        read_predictions(tmp_path / "x.csv")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(CohortError, match=r"torn\.parquet must be a readable table of predictions"):
        read_predictions(tmp_path / "torn.parquet")
    (tmp_path / "w.csv").write_text("case_id,risk\na,0.5\nb,high\n")
    with pytest.raises(CohortError, match=r"w\.csv must hold numbers .* got 'high' in risk"):
        read_predictions(tmp_path / "w.csv")
    pd.concat([table.assign(task=t) for t in "ab"]).to_csv(tmp_path / "t.csv")
    with pytest.raises(CohortError, match="must hold rows of one task prompt, got a, b"):
        read_predictions(tmp_path / "t.csv")
    assert read_predictions(tmp_path / "t.csv", "b").case_ids == said.case_ids


def test_predictions_that_contradict_themselves() -> None:
    two = np.array([0, 1])
    with pytest.raises(InputError, match="must name each case once"):
        Predictions(("a", "a"), risk=np.zeros(2))
    with pytest.raises(InputError, match="must come with labels"):
        Predictions(("a",), two)
    with pytest.raises(InputError, match=r"risk must have shape \[2\]"):
        Predictions(("a", "b"), risk=np.zeros(3))
    with pytest.raises(InputError, match="sum to 1"):
        Predictions(("a",), two, np.array([[0.5, 0.6]]))
    with pytest.raises(InputError, match="got 1 without, such as z"):
        Predictions(("a",), risk=np.zeros(1)).take(["z"])
