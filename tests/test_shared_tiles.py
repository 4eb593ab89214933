"""Memory for tiles: under a limit of a file's size, which counts for it although it is no file."""

from __future__ import annotations

import subprocess
import sys

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
