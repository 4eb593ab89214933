"""What the command line says where something is odd: names, options, interrupts."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

import modaltune
from modaltune.cli import app
from modaltune.engine.pyramid import write_pyramid
from modaltune.testing_cohort import small_cohort


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result: Result) -> str:
    """Everything printed, on one line."""
    return re.sub(r"\s+", " ", result.output)


def pink(path: Path, mpp: float | None = 0.5) -> Path:
    rgb = np.random.default_rng(1).integers(100, 190, (512, 512, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    return write_pyramid(path, rgb, mpp=mpp)


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modaltune.embedding.embed_request", interrupted)
    result = run("embed", pink(tmp_path / "a.tiff"), "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "run the same command to go on" in said(result)


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_path_that_the_system_refuses_is_named(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(kind, os.strerror(kind), str(tmp_path / "a[b]"))

    monkeypatch.setattr("modaltune.embedding.embed_request", refused)
    result = run("embed", pink(tmp_path / "a.tiff"), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "a[b] must be a path" in said(result)
    assert os.strerror(kind) in said(result)


def test_decoders_that_cannot_start_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = run("embed", pink(tmp_path / "a.tiff"), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "slides can't be decoded: decoder processes can't start: exit code 1" in said(result)
    assert "Traceback" not in said(result)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    cases = small_cohort(tmp_path / "cases", cases=20).path
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        result = run("cases", "export-split", cases, "--out", tmp_path / out)
        assert isinstance(result.exception, SystemExit), result.exception
        assert "must be a path that can be used" in said(result)


def test_names_that_look_like_markup(tmp_path: Path) -> None:
    (tmp_path / "we[").mkdir()
    slide = pink(tmp_path / "we[" / "ird].tiff", mpp=None)
    for words in (["slides", "info", slide], ["embed", slide, "--out", tmp_path / "out"]):
        result = run(*words)
        assert "ird].tiff" in said(result).replace(" ", "")
        assert result.exception is None or isinstance(result.exception, SystemExit)
    bold = pink(tmp_path / "a[red]b.tiff")
    result = run("embed", bold, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "a[red]b" in said(result).replace(" ", "")


@pytest.mark.parametrize(
    ("option", "value"), [("--mpp", "0"), ("--mpp", "1e6"), ("--mpp", "nan"), ("--tile-px", "0")]
)
def test_tiles_no_slide_has(tmp_path: Path, option: str, value: str) -> None:
    result = run("embed", pink(tmp_path / "a.tiff"), "--out", tmp_path / "out", option, value)
    assert result.exit_code == 1
    assert f"{option} must lie in" in said(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("mps", "device must be cpu or cuda, got 'mps'"),
        ("cuda:77", "GPUs that torch sees, got 'cuda:77'; use cpu, or see"),
    ],
)
def test_devices_that_cannot_be(tmp_path: Path, device: str, message: str) -> None:
    result = run("embed", pink(tmp_path / "a.tiff"), "--out", tmp_path / "out", "--device", device)
    assert result.exit_code == 1
    assert message in said(result)
    assert not (tmp_path / "out").exists()


def parameters(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Command and help of every parameter of every command."""
    for name, one in getattr(command, "commands", {}).items():
        yield from parameters(one, (*words, name))
    for parameter in command.params:
        yield " ".join((*words, str(parameter.name))), getattr(parameter, "help", None) or ""


def test_the_help_shows_every_word_of_it() -> None:
    """Words in brackets are markup, and would not be shown: defaults in words, for example."""
    found = dict(parameters(get_command(app)))
    assert "bench stream workers" in found
    for name, text in found.items():
        assert Text.from_markup(text).plain == text, name
    shown = run("embed", "--help").output
    assert "[default: (0.5)]" in shown
    assert "[default: (256)]" in shown


def test_python_dash_m_is_the_command_line() -> None:
    words = [sys.executable, "-m", "modaltune", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"modaltune {modaltune.__version__}"


def test_an_unknown_reader_is_a_usage_error(tmp_path: Path) -> None:
    for words in (["slides", "info"], ["embed", "--out", tmp_path / "out"]):
        result = run(*words, pink(tmp_path / "a.tiff"), "--reader", "foo")
        assert result.exit_code == 2
        assert "'openslide'" in said(result)
    assert not (tmp_path / "out").exists()
