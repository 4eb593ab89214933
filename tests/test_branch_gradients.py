"""The compiled loops of dilated attention's backward pass: block edges, strides, pads, routing."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from modaltune.kernels import dilated_attention
from modaltune.kernels.dilated_attn import _branch_gradients as loops
from modaltune.testing import normal

Array = NDArray[np.float32]
Exact = NDArray[np.float64]
SCALE = 0.3  # of scores to base 2
# Around groups of keys, chunks of keys and tiles of queries.
LENGTHS = (2, 3, 5, 8, 9, 47, 48, 49, 63, 64, 65, 97, 130, 257)
ONE_SEGMENT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_branch_gradients import LENGTHS, worst_error
from modaltune.kernels.dilated_attn import _vector_code
print(_vector_code.LANES, max(worst_error(n, dim, 2) for n in LENGTHS for dim in (4, 6, 20)))
"""


def exact(q: Exact, k: Exact, v: Exact, pulled: Exact, pads: int) -> tuple[Exact, list[Exact]]:
    """The log-sum-exp of one branch alone, to base 2, and the gradients, written out."""
    weights = np.exp2(SCALE * q @ k.T)
    total = weights.sum(1, keepdims=True) + pads
    share = weights / total
    pulled_back = share * (pulled @ v.T)
    # alpha, the branch's share of the whole, is 1: it is alone.
    slopes = pulled_back - share * pulled_back.sum(1, keepdims=True)
    per_score = SCALE * math.log(2)
    grads = [per_score * slopes @ k, per_score * slopes.T @ q, share.T @ pulled]
    return np.log2(total[:, 0]), grads


def run(
    given: list[Array], lse: Array, piece: tuple[int, ...], wanted: tuple[bool, bool, bool]
) -> list[Array]:
    """Gradients that held 1 before, without it."""
    shape = given[0].shape
    grads = [np.ones(shape if want else (0, *shape[1:]), np.float32) for want in wanted]
    loops.pull_back_pieces(*given, lse, *grads, np.array([piece]), np.float32(SCALE))
    return [grad - 1 for grad in grads]


def worst_error(
    length: int, dim: int, pads: int, wanted: tuple[bool, bool, bool] = (True, True, True)
) -> float:
    """Largest error of any gradient of the second of two heads, relative to its largest value."""
    packed = normal(0, length, 4, 2, dim, dtype=torch.float32)
    given = [packed[:, i].numpy() for i in range(4)]  # rows that do not follow each other
    log_sum, want = exact(*(t[:, 1].astype(np.float64) for t in given), pads)
    lse = np.full((length, 2), np.nan, np.float32)
    lse[:, 1] = log_sum
    got = run(given, lse, (0, 1, length, 1, 0, 1, 2, pads), wanted)
    assert not any(grad[:, 0].any() for grad in got)
    assert [len(grad) > 0 for grad in got] == list(wanted)
    pairs = [(g[:, 1], w) for g, w in zip(got, want, strict=True) if len(g)]
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in pairs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [4, 5, 16, 48, 64])
def test_one_segment_of_any_length(length: int, dim: int) -> None:
    """Widths around groups of coordinates, and past three vectors, too."""
    assert worst_error(length, dim, pads=3) < 4e-6


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    assert worst_error(70, 8, pads=0, wanted=wanted) < 4e-6


def test_segments_groups_and_ratios_touch_their_rows_only() -> None:
    """Three segments of 50 rows from row 5 on, every fourth row from the third, two heads."""
    packed = normal(0, 170, 4, 4, 8, dtype=torch.float32)
    given = [packed[:, i].numpy() for i in range(4)]
    visited = np.zeros((170, 4), dtype=bool)
    lse = np.full((170, 4), np.nan, np.float32)
    expected = [np.zeros((170, 4, 8)) for _ in range(3)]
    for segment in range(3):
        rows = slice(5 + 50 * segment + 2, 5 + 50 * (segment + 1), 4)
        for head in (1, 2):
            visited[rows, head] = True
            of_head = [t[rows, head].astype(np.float64) for t in given]
            lse[rows, head], grads = exact(*of_head, pads=0)
            for target, grad in zip(expected, grads, strict=True):
                target[rows, head] = grad
    got = run(given, lse, (5, 3, 50, 4, 2, 1, 3, 0), (True, True, True))
    for grad, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(grad, want, atol=4e-6 * np.abs(want).max())
        assert not grad[~visited].any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize(
    ("name", "features", "lanes"),
    [("haswell", "+sse4.2,+avx,+avx2,+fma", 8), ("x86-64", "+sse2", 4)],
)
def test_processors_with_shorter_vectors(
    tmp_path: Path, name: str, features: str, lanes: int
) -> None:
    """Compiled for another processor, which this one can pass for."""
    chosen = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    own = {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", ONE_SEGMENT, str(Path(__file__).parent)]
    done = subprocess.run(
        words, env={**os.environ, **chosen, **own}, capture_output=True, text=True, check=True
    )
    got_lanes, worst = done.stdout.split()
    assert int(got_lanes) == lanes
    assert float(worst) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loops_are_what_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that need no shift go through the loops, in half precision too; others do not."""
    seen = []
    real = loops.pull_back_pieces

    def spy(*args: object) -> None:
        seen.append(args)
        real(*args)

    monkeypatch.setattr(loops, "pull_back_pieces", spy)
    inputs = [normal(i, 40, 2, 8).to(dtype).requires_grad_() for i in range(3)]
    pulled = normal(3, 40, 2, 8).to(dtype)
    how = {"segment_lengths": (16, 64), "dilation_ratios": (1, 2)}
    got = torch.autograd.grad(dilated_attention(*inputs, impl="cpu", **how), inputs, pulled)
    assert seen
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    out = dilated_attention(*exact_inputs, impl="reference", **how)
    for grad, want in zip(
        got, torch.autograd.grad(out, exact_inputs, pulled.double()), strict=True
    ):
        bound = 8 * torch.finfo(dtype).eps * want.abs().max()
        assert (grad.double() - want).abs().max() <= bound
    seen.clear()
    large = [100 * inputs[0], 100 * inputs[1], inputs[2]]
    torch.autograd.grad(dilated_attention(*large, impl="cpu", **how), inputs, pulled)
    assert not seen


def test_a_gradient_that_is_no_number_stays_one() -> None:
    inputs = [normal(i, 30, 1, 8, dtype=torch.float32).requires_grad_() for i in range(3)]
    pulled = normal(3, 30, 1, 8, dtype=torch.float32)
    pulled[4] = math.nan
    out = dilated_attention(*inputs, segment_lengths=(30,), dilation_ratios=(1,), impl="cpu")
    dq, dk, dv = torch.autograd.grad(out, inputs, pulled)
    assert dq[4].isnan().all()
    assert not dq[[3, 5]].isnan().any()
    assert dk.isnan().all()
    assert dv.isnan().all()
