"""Training runs that are killed for real, and go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_runs_killed_five_times_end_in_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    words = ["-m", "modaltune.benchmarks.train_crash", "--kills", "5", "--seed", "1", "--json"]
    done = subprocess.run(
        [sys.executable, *words, "--epochs", "2", "--results", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert (found["kills"], found["changed"]) == (5, 0)
    assert found["finished"] >= 1
    assert found["steps"] == 16
    where = ("before_checkpoint", "in_epoch", "between_epochs")
    assert sum(found[name] for name in where) == 5
    assert (tmp_path / "train_crash.csv").is_file()
