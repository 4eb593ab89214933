"""Memory for tiles: under a limit of a file's size, which counts for it although it is no file."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from modaltune.engine import shared_tiles
from modaltune.engine.shared_tiles import SharedTiles

PROGRAM = """
import resource, sys
from modaltune.engine.shared_tiles import SharedTiles
soft, hard = (int(word) for word in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
shared = SharedTiles((2, 3, 64))
shared.array[:] = 7
print(shared.array.shape, int(shared.array.sum()), resource.getrlimit(resource.RLIMIT_FSIZE))
shared.close()
shared.close()
"""


def run(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_soft_limit_is_lifted_for_a_moment() -> None:
    done = run(1000, 100_000)
    assert done.stdout == f"(2, 3, 64, 64, 3) {7 * 2 * 3 * 64 * 64 * 3} (1000, 100000)\n"


def test_a_hard_limit_is_named() -> None:
    done = run(1000, 50_000)
    assert done.returncode == 1
    assert "must allow 73728 bytes of shared tiles, got 50000" in done.stderr
    assert "fewer --workers" in done.stderr


def test_a_slab_is_made_before_it_is_written() -> None:
    """Pages of the slab asked for are there, not those of its neighbours."""
    shared = SharedTiles((3, 5, 40))  # 24,000 bytes, no whole number of pages
    shared.populate(1)
    size = os.fstat(shared.descriptor).st_blocks * 512
    assert 24_000 <= size <= 24_000 + 2 * mmap.PAGESIZE
    assert not shared.array.any()
    shared.populate(2)
    shared.close()


def test_a_kernel_that_cannot_make_pages_ahead_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_tiles, "_MADV_POPULATE_WRITE", 12345)
    shared = SharedTiles((1, 1, 64))
    shared.populate(0)
    assert os.fstat(shared.descriptor).st_blocks == 0
    shared.close()
