"""The benchmark of intervals: a row has one form, and wrong numbers are not timed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from modaltune.benchmarks import evaluate_speed
from modaltune.benchmarks.evaluate_speed import CSV_NAME, made_up_scorers, main


def test_a_row_compares_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cases", "40", "--resamples", "20", "--plain", "4", "--json"]
    assert main([*words, "--results", str(tmp_path)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["cases"], row["resamples"], row["plain_timed"]) == (40, 20, 4)
    assert row["metrics"] == 12 + 7
    assert 0 < row["deaths"] < 40
    assert row["ratio"] == pytest.approx(row["plain_s"] / row["counts_s"], rel=0.02)
    with (tmp_path / CSV_NAME).open() as file:
        (written,) = csv.DictReader(file)
    assert float(written["ratio"]) == row["ratio"]


def test_other_numbers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from dataclasses import replace

    def wrong(cases: int) -> list[Any]:
        fine = made_up_scorers(cases)
        off = replace(fine[1], resampled=lambda counts: fine[1].resampled(counts) + 1e-8)
        return [fine[0], off]

    monkeypatch.setattr(evaluate_speed, "made_up_scorers", wrong)
    assert (
        main(["--cases", "40", "--resamples", "5", "--plain", "2", "--results", str(tmp_path)]) == 1
    )
    assert (
        "must give the plain numbers before they are timed, got 1.0e-08" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
