"""The memory benchmark: the published size, its bars, its rows and exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modaltune.benchmarks import model_memory
from modaltune.benchmarks.model_memory import (
    Bar,
    bar_of,
    in_fresh_process,
    main,
)

COLUMNS = ["time", "commit", "device", "torch", "what", "tiles", "seconds", "peak_mib", "status"]


def test_bars() -> None:
    assert bar_of("build", 10_000) == Bar(5.0, 1.5 * 1024)
    assert bar_of("forward", 10_000) == Bar(None, 5.0 * 1024)
    assert bar_of("forward", 10_001) == bar_of("import", 10_000) == Bar()
    build = bar_of("build", 0)
    assert build.status(5.0, 1536.0) == "pass"
    assert build.status(5.1, 1.0) == build.status(0.1, 1536.1) == "missed"
    assert bar_of("forward", 10).status(1e9, 5120.0) == "pass"
    assert Bar().status(1e9, 1e9) == "no bar"


def test_short_form_appends_rows_and_prints_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published size is built for real (its parameters are counted) and run on 200 tiles.

    With one thread: on a busy machine two wait for each other longer than they compute.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = main(["--tiles", "200", "--results", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    path = tmp_path / "model_memory.csv"
    assert told["saved"] == str(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [COLUMNS] * 3
    assert rows == [{k: str(v) for k, v in row.items()} for row in told["rows"]]
    imported, build, forward = rows
    assert [row["what"] for row in rows] == ["import", "build", "forward"]
    assert forward["tiles"] == "200"
    assert build["device"].endswith(", 1 threads")
    assert build["torch"] == torch.__version__
    # 119.9 million float32 parameters lie between an import and a build.
    grown = float(build["peak_mib"]) - float(imported["peak_mib"])
    assert 457 < grown < 600
    assert float(build["peak_mib"]) <= 1536
    assert forward["status"] == "pass"
    # The seconds of a busy test machine are no verdict: only memory was judged above.
    assert code == int(build["status"] == "missed")


def fake(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    found = {"seconds": 1.0, "peak_mib": 1000.0, "torch": "2", "threads": 2, **changes}
    monkeypatch.setattr(model_memory, "in_fresh_process", lambda what, tiles: found)


def test_a_missed_bar_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    assert main(["--results", str(tmp_path)]) == 0
    fake(monkeypatch, seconds=5.5)
    assert main(["--results", str(tmp_path), "--only", "build"]) == 1
    assert main(["--results", str(tmp_path), "--only", "forward"]) == 0
    fake(monkeypatch, peak_mib=5121.0)
    assert main(["--results", str(tmp_path), "--only", "forward"]) == 1
    assert main(["--results", str(tmp_path), "--only", "forward", "--tiles", "20000"]) == 0
    shown = capsys.readouterr().out
    assert "5 s, 1536 MiB" in shown
    assert "missed" in shown
    assert f"rows appended to {tmp_path / 'model_memory.csv'}" in shown


def test_without_a_folder_nothing_is_saved_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "rows not saved: give a folder with --results" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert main([]) == 0
    assert (tmp_path / "benchmarks" / "results" / "model_memory.csv").exists()


def test_a_failed_measurement_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"measuring forward failed with exit code 1: .*invalid"):
        in_fresh_process("forward", "ten")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiles", "0"], "--tiles must be at least 1, got 0"),
        (["--tiles", "many"], "invalid int value"),
        (["--results", "nowhere"], "--results must be an existing folder, got nowhere"),
        (["--only", "train"], "invalid choice: 'train'"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
