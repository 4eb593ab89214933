"""The benchmark of the ledger, on few slides: its row, and that it times only what is right."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from modaltune.benchmarks import ledger


def test_a_row_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--slides", "40", "--commits", "6", "--rounds", "2", "--results", str(tmp_path)]
    assert ledger.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    with (tmp_path / ledger.CSV_NAME).open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row == {name: str(value) for name, value in shown.items()}
    assert (row["slides"], row["commits"]) == ("40", "6")
    for name in ("open_p50_s", "reconcile_p50_s", "claim_mean_ms", "commit_mean_ms"):
        assert float(row[name]) > 0


def test_a_wrong_ledger_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = ledger.linked_cohort

    def with_a_hole(folder: Path, count: int) -> object:
        out, items = make(folder, count)
        (out / ledger.FEATURES / f"{items[0].slide_id}.h5").unlink()
        return out, items

    monkeypatch.setattr(ledger, "linked_cohort", with_a_hole)
    words = ["--slides", "10", "--rounds", "1", "--results", str(tmp_path)]
    assert ledger.main(words) == 1
    assert "must find 10 finished slides" in capsys.readouterr().err
    assert not (tmp_path / ledger.CSV_NAME).exists()
