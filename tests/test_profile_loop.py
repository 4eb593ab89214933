"""How busy the training loop is on given cases: `modaltune profile --config`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modaltune.batch import CaseBatch
from modaltune.cli import app
from modaltune.config_text import to_toml
from modaltune.errors import InputError
from modaltune.profile_loop import profile_loop
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train_cases import StreamedCases


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_cases(tmp_path_factory.mktemp("study"))


def test_waiting_for_data_is_told_from_computing(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run_config([cases], tmp_path / "run", "learner.kind=pathway_mlp")
    quick = profile_loop(config, 6)
    assert (quick["steps"], quick["learner"], quick["device"]) == (5, "pathway_mlp", "cpu")
    assert not (tmp_path / "run").exists()  # no run is written
    real = StreamedCases.batch

    def slowly(self: StreamedCases, indices: Sequence[int]) -> CaseBatch:
        time.sleep(0.2)  # a slow disk
        return real(self, indices)

    monkeypatch.setattr(StreamedCases, "batch", slowly)
    slow = profile_loop(config, 6)
    assert slow["waited_s"] > 0.2
    assert slow["busy"] < 0.7
    assert slow["busy"] == pytest.approx(slow["compute_s"] / (slow["compute_s"] + slow["waited_s"]))


def test_a_run_of_one_step_has_nothing_to_time(cases: Path, tmp_path: Path) -> None:
    sets = ("training.epochs=1", "training.cases_per_step=99")
    with pytest.raises(InputError, match=r"steps must be 2 or more.*got 1; raise --steps, or tra"):
        profile_loop(tiny_run_config([cases], tmp_path / "run", *sets))


def test_the_command_says_the_busy_share(cases: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(to_toml(tiny_run_config([cases], tmp_path / "run")))
    words = ["profile", "--config", str(path), "--steps", "4", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    found = json.loads((tmp_path / "out" / "loop.json").read_text())
    assert f"busy {found['busy']:.1%}" in said.stdout
    assert "waits for data" in said.stdout
    assert found["steps"] == 3
    as_json = CliRunner().invoke(app, [*words, "--json", "--set", "training.cases_per_step=5"])
    assert json.loads(as_json.stdout)["cases_per_s"] > 0
    refused = CliRunner().invoke(app, [*words, "--run", str(tmp_path)])
    assert refused.exit_code == 1
    assert "--run must not stand beside --config" in " ".join(refused.stderr.split())
