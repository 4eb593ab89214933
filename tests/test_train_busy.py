"""The benchmark of the loop's time: it adds up, and its rows have one form."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from modaltune.benchmarks.train_busy import CSV_NAME, main
from modaltune.train_metrics import LoopClock


def test_a_row_says_how_the_time_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work").mkdir()
    words = ["--cases", "4", "--tiles", "1000", "--json", "--folder", str(tmp_path / "work")]
    code = main([*words, "--results", str(tmp_path)])
    row = json.loads(capsys.readouterr().out)
    assert code == (0 if row["busy"] >= 0.95 else 1)
    parts = row["compute_s"] + row["waited_s"] + row["other_s"]
    assert row["wall_s"] == pytest.approx(parts, abs=0.01)
    assert row["busy"] == pytest.approx(row["compute_s"] / row["wall_s"], abs=0.01)
    assert (row["width"], row["tiles"], row["cases"]) == (1536, 1000, 4)
    with (tmp_path / CSV_NAME).open() as file:
        (written,) = csv.DictReader(file)
    assert float(written["busy"]) == row["busy"]
    assert list((tmp_path / "work").iterdir()) == []


def test_time_that_is_not_computed_in_counts_against_the_loop() -> None:
    clock = LoopClock(compute_s=6.0, waited_s=3.0, other_s=1.0, cases=5, slides=10, tiles=2000)
    rates = clock.rates()
    assert rates["busy"] == 0.6
    assert (rates["slides_per_s"], rates["tiles_per_s"], rates["cases_per_s"]) == (1.0, 200.0, 0.5)
    assert LoopClock().rates()["busy"] == 0.0
