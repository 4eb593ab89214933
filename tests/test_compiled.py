"""numba's cache: used again, and stale when a file that is compiled in has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modaltune.kernels._compiled import compiled

INNER = """
from numba.extending import register_jitable

@register_jitable
def step(x):
    return x + {step}
"""
OUTER = """
import inner
from modaltune.kernels._compiled import compiled

@compiled(reordered=False, sources=(inner.__file__,))
def three(x):
    '''Three steps.'''
    return inner.step(inner.step(inner.step(x)))

print(three(0), sum(three.stats.cache_hits.values()), three.__doc__)
"""


def run(folder: Path) -> str:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(folder)}
    if inherited := os.environ.get("PYTHONPATH"):
        env["PYTHONPATH"] += os.pathsep + inherited
    words = [sys.executable, str(folder / "outer.py")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_cache_follows_every_file_that_is_compiled_in(tmp_path: Path) -> None:
    """The function's own file stays as it is, so that numba alone would notice nothing."""
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(step=1))
    assert run(tmp_path) == "3 0 Three steps."
    assert run(tmp_path) == "3 1 Three steps."
    (tmp_path / "inner.py").write_text(INNER.format(step=2))
    assert run(tmp_path) == "6 0 Three steps."


def test_a_closure_is_refused() -> None:
    step = 2

    def add(x: int) -> int:
        return x + step

    with pytest.raises(TypeError, match="function must be a plain one without a closure"):
        compiled(reordered=False, sources=(__file__,))(add)
