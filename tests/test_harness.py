"""Rows of benchmarks: appended whole, with the machine's facts and an honest commit."""

from __future__ import annotations

import csv
import datetime
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modaltune.benchmarks import harness
from modaltune.benchmarks.harness import append_row, commit_id, cpu_model, results_folder, timestamp
from modaltune.engine.errors import InputError


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    append_row(path, {"what": "build", "device": "AMD, 2 threads", "seconds": 1.5})
    append_row(path, {"what": "for\nward", "device": 'a "b"', "seconds": 2})
    assert read(path) == [
        {"what": "build", "device": "AMD, 2 threads", "seconds": "1.5"},
        {"what": "for\nward", "device": 'a "b"', "seconds": "2"},
    ]
    assert path.read_text().startswith('what,device,seconds\nbuild,"AMD, 2 threads",1.5\n')


def test_other_columns_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    append_row(path, {"a": 1, "b": 2})
    before = path.read_bytes()
    for row in ({"a": 1}, {"b": 2, "a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(InputError, match=r"a\.csv must have the columns .*, got a, b; move"):
            append_row(path, row)
    assert path.read_bytes() == before


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,")
    with pytest.raises(InputError, match="must end with a whole row, got a cut one"):
        append_row(path, {"a": 1, "b": 2})
    assert path.read_text() == "a,b\n1,"


def test_rows_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_row(path, {"i": i, "text": "x" * 5000}), range(40)))
    rows = read(path)
    assert sorted(int(row["i"]) for row in rows) == list(range(40))
    assert {row["text"] for row in rows} == {"x" * 5000}


def test_results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert results_folder(None) is None
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert results_folder(None) == Path("benchmarks/results")
    assert results_folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match=r"--results must be an existing folder, got .*nowhere;"):
        results_folder(tmp_path / "nowhere")


def test_facts() -> None:
    assert cpu_model()
    then = datetime.datetime.fromisoformat(timestamp())
    now = datetime.datetime.now(datetime.timezone.utc)
    assert abs((now - then).total_seconds()) < 10


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with the harness in it, committed; git reads no other settings."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    source = Path(harness.__file__).resolve()
    for name in ("__init__.py", "harness.py"):
        shutil.copy(source.with_name(name), folder)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setattr(harness, "__file__", str(folder / "harness.py"))
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit(copied: Path) -> None:
    assert commit_id() == "unknown"
    git(copied, "init", "-q")
    # As in an installed copy inside somebody's repository: not tracked, so not its commit.
    assert commit_id() == "unknown"
    git(copied, "add", ".")
    git(copied, "commit", "-qm", "x")
    commit = git(copied, "rev-parse", "HEAD")[:12]
    assert commit_id() == commit
    (copied / "benchmarks" / "harness.py").write_text("changed")
    assert commit_id() == f"{commit}-dirty"


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_id() == "unknown"


def test_the_harness_costs_no_torch() -> None:
    """The process that starts measurements stays small, and so do the peaks of its children."""
    code = "import sys, modaltune.benchmarks.model_memory\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
