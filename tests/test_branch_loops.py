"""The compiled loops of dilated attention on the CPU: block edges, strides, pads, routing."""

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
from modaltune.kernels.dilated_attn import _branch_loops as loops
from modaltune.kernels.dilated_attn import cpu
from modaltune.testing import normal

Array = NDArray[np.float32]
# Around groups of keys, chunks of keys and tiles of queries.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 257, 515)
ONE_SEGMENT = """
import numpy as np
from modaltune.kernels.dilated_attn import _branch_loops as loops
rng, worst = np.random.default_rng(0), 0.0
for rows in (1, 11, 13, 25, 37, 67, 130):
    for dim in (4, 6, 16):
        q, k, v, acc = (rng.standard_normal((rows, 1, dim)).astype(np.float32) for _ in range(4))
        before, total = acc.copy(), np.zeros((rows, 1), np.float32)
        piece = np.array([[0, 1, rows, 1, 0, 0, 1, 2]])
        loops.attend_pieces(q, k, v, acc, total, piece, np.float32(0.3))
        weights = np.exp2(0.3 * q[:, 0].astype(float) @ k[:, 0].astype(float).T)
        wanted = weights @ v[:, 0] + before[:, 0], weights.sum(1) + 2
        for got, want in zip((acc[:, 0], total[:, 0]), wanted):
            worst = max(worst, np.abs(got - want).max() / np.abs(want).max())
print(loops._vector_code.LANES, worst)
"""


def arrays(rows: int, heads: int, dim: int) -> list[Array]:
    """q, k, v as slices of a wider array: rows that do not follow each other in memory."""
    packed = normal(0, rows, 3, heads, dim, dtype=torch.float32)
    return [packed[:, i].numpy() for i in range(3)]


def run(given: list[Array], piece: tuple[int, ...]) -> tuple[Array, Array]:
    """Accumulators that held 1 before, without it; whatever was not visited stays 0."""
    rows, heads, dim = given[0].shape
    acc, total = np.ones((rows, heads, dim), np.float32), np.ones((rows, heads), np.float32)
    loops.attend_pieces(*given, acc, total, np.array([piece]), np.float32(0.3))
    return acc - 1, total - 1


def exact(given: list[Array], rows: slice, head: int, pads: int) -> tuple[Array, Array]:
    q, k, v = (t[rows, head].astype(np.float64) for t in given)
    weights = np.exp2(0.3 * q @ k.T)
    return weights @ v, weights.sum(-1) + pads


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [4, 5, 16, 48])
def test_one_segment_of_any_length(length: int, dim: int) -> None:
    """Widths around groups of coordinates, too."""
    given = arrays(length, 2, dim)
    acc, total = run(given, (0, 1, length, 1, 0, 1, 2, 3))
    want_acc, want_total = exact(given, slice(None), 1, pads=3)
    # One rounding step per term of the largest sum, and one of the 1 that was there before.
    step = 2.0**-23 * (1 + length / 8)
    assert np.abs(acc[:, 1] - want_acc).max() <= step * np.abs(want_acc).max() + 2.0**-22
    assert np.abs(total[:, 1] - want_total).max() <= step * want_total.max()
    assert not acc[:, 0].any()
    assert not total[:, 0].any()


def test_segments_groups_and_ratios_touch_their_rows_only() -> None:
    """Three segments of 50 rows from row 5 on, every fourth row from the third, two heads."""
    given = arrays(170, 4, 8)
    acc, total = run(given, (5, 3, 50, 4, 2, 1, 3, 0))
    visited = np.zeros((170, 4), dtype=bool)
    for segment in range(3):
        rows = slice(5 + 50 * segment + 2, 5 + 50 * (segment + 1), 4)
        for head in (1, 2):
            visited[rows, head] = True
            want_acc, want_total = exact(given, rows, head, pads=0)
            np.testing.assert_allclose(acc[rows, head], want_acc, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(total[rows, head], want_total, rtol=1e-5)
    assert (total[visited] != 0).all()
    assert not total[~visited].any()
    assert not acc[~visited].any()


@pytest.mark.parametrize("score", [-64.0, -63.5, -1.0, -0.5, 0.0, 0.5, 63.5, 64.0])
def test_powers_of_two_over_the_whole_range(score: float) -> None:
    """One key: the weight is 2^score, and out its product with the value."""
    q = np.full((1, 1, 4), score / 4, np.float32)
    k, v = np.ones_like(q), np.full_like(q, 3.0)
    acc, total = np.zeros_like(q), np.zeros((1, 1), np.float32)
    loops.attend_pieces(q, k, v, acc, total, np.array([[0, 1, 1, 1, 0, 0, 1, 0]]), np.float32(1))
    np.testing.assert_allclose(total[0, 0], 2.0**score, rtol=3e-7)
    np.testing.assert_allclose(acc[0, 0], 3 * 2.0**score, rtol=3e-7)


@pytest.mark.parametrize("length", [9, 13, 71, 128])
def test_keys_that_all_weigh_little(length: int) -> None:
    """Zeros behind the last keys, of weight 1 each, would drown keys that weigh 2^-43."""
    q, k, v = (normal(i, length, 1, 16, dtype=torch.float32) for i in range(3))
    q, k = 0.01 * q - 2.0, 0.01 * k + 3.75  # q . k / 4 is about -30
    how = {"segment_lengths": (length,), "dilation_ratios": (1,)}
    want = dilated_attention(q.double(), k.double(), v.double(), impl="reference", **how)
    lost = (dilated_attention(q, k, v, impl="reference", **how) - want).abs().max()
    got = dilated_attention(q, k, v, impl="cpu", **how)
    assert (got - want).abs().max() <= 2 * lost + 2.0**-23 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loops_are_what_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that need no shift go through the loops, in half precision too; others do not."""
    seen = []
    real = loops.attend_pieces

    def spy(*args: object) -> None:
        seen.append(args)
        real(*args)

    monkeypatch.setattr(loops, "attend_pieces", spy)
    q, k, v = (normal(i, 40, 2, 8).to(dtype) for i in range(3))
    how = {"segment_lengths": (16, 64), "dilation_ratios": (1, 2), "impl": "cpu"}
    got = dilated_attention(q, k, v, **how)
    assert seen
    exact_inputs = (t.double() for t in (q, k, v))
    want = dilated_attention(*exact_inputs, **{**how, "impl": "reference"})
    assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    seen.clear()
    dilated_attention(100 * q, 100 * k, v, **how)
    assert not seen


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
    words = [sys.executable, "-c", ONE_SEGMENT]
    done = subprocess.run(
        words, env={**os.environ, **chosen, **own}, capture_output=True, text=True, check=True
    )
    got_lanes, worst = done.stdout.split()
    assert int(got_lanes) == lanes
    assert float(worst) < 1e-6


def test_a_value_that_is_no_number_stays_one() -> None:
    q, k, v = (normal(i, 30, 1, 8, dtype=torch.float32) for i in range(3))
    v[4] = math.nan
    out = dilated_attention(q, k, v, segment_lengths=(30,), dilation_ratios=(1,), impl="cpu")
    assert out.isnan().all()
    k[4] = math.nan
    out = dilated_attention(
        q, k, v.nan_to_num(), segment_lengths=(30,), dilation_ratios=(1,), impl="cpu"
    )
    assert out.isnan().all()


def test_bits_do_not_depend_on_threads() -> None:
    q, k, v = (normal(i, 700, 4, 48, dtype=torch.float32) for i in range(3))
    how = {"segment_lengths": (256, 700), "dilation_ratios": (1, 2), "impl": "cpu"}
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(dilated_attention(q, k, v, **how))
    torch.set_num_threads(before)
    assert all(torch.equal(outs[0], other) for other in outs)
    assert cpu.accumulation_dtype(torch.float32) == torch.float32
