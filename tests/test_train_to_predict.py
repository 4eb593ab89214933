"""The three commands in a row on small real files: train, evaluate, predict."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from typer.testing import CliRunner

from modaltune.cli import app
from modaltune.probe_files import load_probes
from modaltune.testing_cohort import small_cohort


def _run(*arguments: str) -> str:
    said = CliRunner().invoke(app, [str(a) for a in arguments])
    assert said.exit_code == 0, said.output
    return said.stdout


def test_train_evaluate_predict(tmp_path: Path) -> None:
    """What training records is what evaluation needs: cases, split, weights."""
    cases = small_cohort(tmp_path / "cases", cases=60)
    run = tmp_path / "run"
    _run("train", "--preset", "small", "--set", f'cases.folders=["{cases.path}"]',
         "--set", "training.epochs=1", "--out", str(run))  # fmt: skip
    read = json.loads(_run("evaluate", str(run), "--bootstrap", "0", "--no-pictures", "--json"))
    assert read["own_cases"]
    split = cases.split()
    assert read["split"] == {part: len(ids) for part, ids in split.parts.items()}
    gone = len(read["without_embedding"]["test"])
    fitted = load_probes(run).info
    assert fitted["train_cases"] + fitted["train_cases_without_embedding"] == len(split.train)
    _run("predict", str(run), "--cases", str(cases.path), "--out", str(tmp_path / "p.parquet"))
    table = pd.read_parquet(tmp_path / "p.parquet")
    tested = table[table["case_id"].isin(split.test)]
    assert tested["case_id"].nunique() == len(split.test) - gone
    assert table[["class_1", "risk", "survival_12m"]].notna().all().all()
