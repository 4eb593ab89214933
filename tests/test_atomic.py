"""A file under its final name is absent, old or complete; what a killed writer leaves is known."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from modaltune.engine import atomic
from modaltune.engine.atomic import (
    atomic_folder,
    atomic_path,
    is_temporary,
    remove_temporaries,
    temporary_stem,
    write_json_atomic,
)


def test_file_appears_complete_under_its_name(tmp_path: Path) -> None:
    final = tmp_path / "new" / "folder" / "a.h5"
    with atomic_path(final) as temp:
        assert temp.parent == final.parent
        assert temp.suffix == ".h5"
        assert is_temporary(temp)
        temp.write_bytes(b"all of it")
        assert not final.exists()
    assert final.read_bytes() == b"all of it"
    assert os.listdir(final.parent) == ["a.h5"]
    assert not is_temporary(final)


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt") as temp:
        temp.write_text("x")
    (tmp_path / "plain.txt").write_text("x")
    modes = {stat.S_IMODE(os.stat(tmp_path / n).st_mode) for n in ("a.txt", "plain.txt")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_keeps_the_old_file_and_no_temp(
    tmp_path: Path, error: type[BaseException]
) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")

    def write() -> None:
        with atomic_path(final) as temp:
            temp.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert final.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must write the path"), atomic_path(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_order_is_fsync_rename_fsync_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def seen_replace(a: Path, b: Path) -> None:
        calls.append("rename")
        replace(a, b)

    monkeypatch.setattr(atomic.os, "fsync", seen_fsync)
    monkeypatch.setattr(atomic.os, "replace", seen_replace)
    with atomic_path(tmp_path / "a") as temp:
        temp.write_text("x")
    assert calls == ["file", "rename", "folder"]


def test_killed_between_write_and_rename(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from modaltune.engine.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temp:\n"
        "    temp.write_bytes(b'whole')\n"
        "    os._exit(9)\n"
    )
    final = tmp_path / "a.bin"
    done = subprocess.run([sys.executable, "-c", code, str(final)], check=False)
    assert done.returncode == 9
    assert not final.exists()
    (left,) = tmp_path.iterdir()
    assert is_temporary(left)


def test_what_an_ended_process_left_of_one_file_is_removed(tmp_path: Path) -> None:
    """Not what others write of the same file, nor what it left of others of the same beginning."""
    code = (
        "import os, sys\n"
        "from modaltune.engine.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as one, atomic_path(sys.argv[2]) as other:\n"
        "    one.touch(), other.touch(), os._exit(0)\n"
    )
    final, longer = tmp_path / "a.png", tmp_path / "a-1.png"
    writer = subprocess.Popen([sys.executable, "-c", code, str(final), str(longer)])
    writer.wait()
    with atomic_path(final) as mine:
        mine.write_bytes(b"mine")
        remove_temporaries(tmp_path / "absent" / "a.png", writer.pid)
        remove_temporaries(final, writer.pid)
        left = sorted(temporary_stem(path) or "" for path in tmp_path.iterdir())
    assert left == ["a", "a-1"]
    assert final.read_bytes() == b"mine"


def test_long_names_fit_the_file_system(tmp_path: Path) -> None:
    final = tmp_path / ("é" * 120 + ".h5")
    with atomic_path(final) as temp:
        temp.write_text("x")
    assert final.exists()


def test_json_is_strict_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"b": 1, "a": ["é"]})
    assert path.read_text(encoding="utf-8").index('"a"') < path.read_text().index('"b"')
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": ["é"], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == 1


def test_folder_appears_whole_replaces_only_when_asked_and_keeps_the_old_one(
    tmp_path: Path,
) -> None:
    final = tmp_path / "new" / "folder"
    with atomic_folder(final) as temp:
        assert is_temporary(temp)
        assert temp.parent == final.parent
        (temp / "sub").mkdir()
        (temp / "sub" / "a.txt").write_text("first")
        assert not final.exists()
    with pytest.raises(FileExistsError), atomic_folder(final):
        pass
    with pytest.raises(UnicodeError), atomic_folder(final, replace=True) as temp:
        (temp / "b.txt").write_text("half \ud800", encoding="utf-8")
    assert (final / "sub" / "a.txt").read_text() == "first"
    with atomic_folder(final, replace=True) as temp:
        (temp / "b.txt").write_text("second")
    assert os.listdir(final) == ["b.txt"]
    assert os.listdir(final.parent) == ["folder"]


def test_folder_that_cannot_take_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "folder"
    with atomic_folder(final) as temp:
        (temp / "a.txt").write_text("old")
    rename = os.rename

    def refuse_the_new(source: Path, target: Path) -> None:
        if target == final and (source / "b.txt").exists():
            raise OSError("refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    with pytest.raises(OSError, match="refused"), atomic_folder(final, replace=True) as temp:
        (temp / "b.txt").write_text("new")
    assert os.listdir(final) == ["a.txt"]
    assert os.listdir(tmp_path) == ["folder"]
