"""The suite for a GPU: its commands and their options exist; without a GPU it says so."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from modaltune.benchmarks import gpu_suite
from modaltune.cli import app


def test_every_step_is_a_command_that_parses(tmp_path: Path) -> None:
    """Words are parsed by the command line itself; nothing is run."""
    for step in gpu_suite.steps(tmp_path, golden=tmp_path):
        assert step.words[0] == "modaltune"
        command, words = get_command(app), list(step.words[1:])
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(step.name, words)


def test_the_list_and_the_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_suite.main(["--results", str(tmp_path), "--list", "--only", "stream"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[6] for line in lines] == ["torch", "torch-compile", "tensorrt"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--results", str(tmp_path)]) == 1
    assert "machine with a GPU" in capsys.readouterr().err


def test_a_step_that_fails_is_named_and_the_next_runs(capfd: pytest.CaptureFixture[str]) -> None:
    failing = gpu_suite.Step("bad", ("modaltune", "no-such-command"))
    good = gpu_suite.Step("good", ("modaltune", "--version"))
    assert gpu_suite.run([failing, good]) == ["bad"]
    out = capfd.readouterr().out
    assert f"modaltune {sys.modules['modaltune'].__version__}" in out
    assert "good: exit 0" in out
