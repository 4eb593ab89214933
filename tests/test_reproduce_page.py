"""docs/reproduce.md: its shell blocks run in bash, and every command of ours in them parses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from modaltune.cli import app
from modaltune.errors import InputError
from modaltune.learner_config import BaselineSection
from modaltune.run_config import RunConfig, load_run_config
from modaltune.testing_cohort import small_cohort
from modaltune.text_embeddings import PrecomputedText

PAGE = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text(encoding="utf-8")
#: Programs of others that the page calls; here each says that it was called, and does nothing.
OTHERS = ("curl", "gdc-client", "hf")
ROOT = typer.main.get_command(app)
#: What typer raises for a wrong command line.
USAGE = typer.BadParameter.__mro__[1]
SITES = ("brca", "gbmlgg", "nsclc", "rcc", "coadread", "blca", "brca-titan")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Run the page's shell from top to bottom with programs that write down their arguments."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is needed to run shell as it stands")
    folder = tmp_path_factory.mktemp("page")
    log, programs = folder / "log", folder / "bin"
    programs.mkdir()
    for name in ("modaltune", *OTHERS):
        path = programs / name
        path.write_text(f'#!{bash}\nprintf "%s\\0" {name} "$@" >> {log}\nprintf "\\n" >> {log}\n')
        path.chmod(0o755)
    script = "set -eu\n" + "".join(_blocks("sh"))
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [record.split("\0") for record in log.read_text().split("\0\n") if record]


def _ours(called: list[list[str]]) -> list[list[str]]:
    return [words[1:] for words in called if words[0] == "modaltune"]


def _parse(words: list[str]) -> dict[str, Any]:
    """Parse a command line without running it; an unknown option or a bad value raises."""
    command: Any = ROOT
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return dict(command.make_context(command.name, words).params)


def _configs(called: list[list[str]]) -> dict[str, RunConfig]:
    found = {}
    for words in _ours(called):
        if words[0] == "train":
            given = _parse(words)
            found[str(given["out"])] = load_run_config(preset=given["preset"], sets=given["sets"])
    return found


def test_every_command_parses(called: list[list[str]]) -> None:
    kinds = [words[0] for words in _ours(called)]
    assert set(kinds) == {"train", "evaluate", "cases", "embed", "doctor", "plan"}
    for words in _ours(called):
        _parse(words)
    assert {words[0] for words in called} == {"modaltune", *OTHERS}
    with pytest.raises(USAGE, match="No such option"):
        _parse(["evaluate", "run", "--no-such-option"])
    with pytest.raises(USAGE):
        _parse(["train", "--preset", "nonsense"])


def test_every_set_is_a_field(called: list[list[str]]) -> None:
    configs = _configs(called)
    assert len(configs) > 80
    for out, config in configs.items():
        assert config.cases.folders, out
        assert {path.name for path in config.cases.folders} <= set(SITES)
        assert config.model.weights is not None
    pan = configs["runs/pan-cancer-modaltune-0"]
    assert [path.name for path in pan.cases.folders] == ["brca", "gbmlgg", "nsclc", "rcc"]
    seeds = [configs[f"runs/brca-modaltune-{k}"].training.seed for k in range(3)]
    assert seeds == [0, 1, 2]
    with pytest.raises(InputError, match="must be a known field"):
        load_run_config(preset="small", sets=["learner.nonsense=1"])


def test_a_rival_is_trained_on_the_class_and_on_survival_apart(called: list[list[str]]) -> None:
    rivals = {
        out: config.learner
        for out, config in _configs(called).items()
        if isinstance(config.learner, BaselineSection)
    }
    kinds = {getattr(rival, "kind", "") for rival in rivals.values()}
    assert kinds == {"linear_probe", "abmil", "pathway_mlp", "gene_mixer", "mcat", "late_fusion"}
    for out, rival in rivals.items():
        heads = (rival.classes, rival.survival)
        if "-class-" in out:
            assert heads == (True, "none")
        elif "-survival-" in out:
            assert heads == (False, "hazard")


def test_what_is_judged_was_trained(called: list[list[str]]) -> None:
    """Runs are trained before they are judged or compared, under the same names."""
    trained: set[str] = set()
    judged = 0
    for words in _ours(called):
        given = _parse(words)
        if words[0] == "train":
            trained.add(str(given["out"]))
        elif words[0] == "evaluate":
            sides = [given["run"], *given["seeds"], *",".join(given["compare"] or []).split(",")]
            assert {str(side) for side in sides if str(side)} <= trained
            judged += 1
    assert judged >= 20


def test_sentences_for_another_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = _blocks("python")
    cases = small_cohort(tmp_path / "cases" / "brca", cases=30)
    monkeypatch.chdir(tmp_path)
    read: list[str] = []

    def encode_text(texts: list[str]) -> np.ndarray:
        read.extend(texts)
        return np.full((len(texts), 512), len(read), np.float32)

    exec(snippet, {"encode_text": encode_text})
    split = cases.split()
    stored = PrecomputedText.load("conch.safetensors")
    assert sorted(stored.embeddings) == sorted([*split.train, *split.val])
    assert stored.width == 512
    assert len(read) == 4 * len(stored.embeddings)
    assert all(text.startswith("Cancer location: ") for text in read)
