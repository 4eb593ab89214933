"""Memory of a tree of processes: every page once, whatever the rest of the machine does."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modaltune.benchmarks.process_tree import TreeMemory, tree_pids

MIB = 2**20
# Runs its argument, says so, and stays until its input ends.
_WAITS = "import mmap, os, subprocess, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"
_MAPS = """
file = open({path!r}, 'r+b')
kept = mmap.mmap(file.fileno(), 0)
touched = sum(kept[at] for at in range({start}, {end}, 4096))
"""


@contextmanager
def process(code: str) -> Iterator[int]:
    """A process that has run `code`, with everything it started."""
    words = [sys.executable, "-c", _WAITS.format(code=code)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        yield started.pid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (64 * MIB // 256))
    return path


def maps(path: Path, start: int = 0, end: int = 64 * MIB) -> str:
    return _MAPS.format(path=str(path), start=start, end=end)


def memory_mib(pid: int) -> float:
    return TreeMemory(pid).mib()


def test_a_process_knows_its_tree() -> None:
    assert tree_pids(os.getpid())[0] == os.getpid()
    assert memory_mib(os.getpid()) > 50
    assert memory_mib(2**22 + 1) == 0  # no such process


def test_a_page_counts_in_full_whoever_else_has_it(path: Path) -> None:
    """What another process maps, or gives back, changes nothing."""
    with process("") as empty:
        least = memory_mib(empty)
    with process(maps(path)) as pid:
        before = memory_mib(pid)
        assert before == pytest.approx(least + 64, abs=3)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) == 0
            assert memory_mib(pid) == pytest.approx(before, abs=1)
        assert memory_mib(pid) == pytest.approx(before, abs=1)


def test_a_second_look_sees_what_is_new(path: Path) -> None:
    memory = TreeMemory(os.getpid())
    before = memory.mib()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert memory.mib() == pytest.approx(before, abs=8)
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        assert memory.mib() == pytest.approx(before + 64, abs=8)
        # Of its own: what the C library hands out may be memory that was there before.
        with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
            own[:: mmap.PAGESIZE] = bytes(64 * MIB // mmap.PAGESIZE)
            assert memory.mib() == pytest.approx(before + 128, abs=8)
    assert memory.mib() == pytest.approx(before, abs=8)


def test_what_processes_of_the_tree_share_counts_once(path: Path) -> None:
    """Two children map 40 MiB each, 16 MiB of them the same."""
    spans = (0, 40 * MIB), (24 * MIB, 64 * MIB)
    children = [_WAITS.format(code=maps(path, *span)) for span in spans]
    start = (
        "kept = [subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE) for code in {codes!r}]\n"
        "for one in kept:\n    one.stdout.readline()"
    )
    with process(start.format(codes=[_WAITS.format(code="")] * 2)) as empty:
        least = memory_mib(empty)
    with process(start.format(codes=children)) as pid:
        assert len(tree_pids(pid)) == 3
        assert memory_mib(pid) == pytest.approx(least + 64, abs=3)


def test_what_a_fork_shares_counts_once() -> None:
    kept = "kept = bytearray(b'x') * (64 << 20)"
    fork = "if not os.fork():\n    sys.stdin.read(); os._exit(0)"
    with process(kept) as alone:
        least = memory_mib(alone)
    with process(f"{kept}\n{fork}") as pid:
        assert len(tree_pids(pid)) == 2
        assert 0 <= memory_mib(pid) - least < 16
