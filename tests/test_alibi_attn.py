"""ALiBi attention: the reference against the formula, the CPU path against the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modaltune.kernels import alibi_attention
from modaltune.kernels.alibi_attn import cpu
from modaltune.kernels.alibi_attn.cost import alibi_cost

RAGGED = [0, 1, 15, 0, 16, 17, 127]


def make_inputs(
    lengths: list[int], heads: int = 3, dim: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return [q, k, v] with gradients, grid, slopes, offsets."""
    torch.manual_seed(sum(lengths) + heads)
    rows = sum(lengths)
    qkv = [torch.randn(rows, heads, dim).to(dtype).requires_grad_() for _ in range(3)]
    grid = torch.randint(-9, 30, (rows, 2))
    slopes = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return qkv, grid, slopes, offsets


def formula(
    qkv: list[Tensor], grid: Tensor, slopes: Tensor, bounds: list[int], prefix: int, scale: float
) -> np.ndarray:
    """The definition pair by pair, in plain Python floats."""
    q, k, v = (t.detach().double().numpy() for t in qkv)
    cells, slope = grid.tolist(), slopes.tolist()
    out = np.zeros_like(q)
    for start, stop in pairwise(bounds):
        for i in range(start, stop):
            for h in range(q.shape[1]):
                scores = []
                for j in range(start, stop):
                    both_tiles = i - start >= prefix and j - start >= prefix
                    away = math.dist(cells[i], cells[j]) if both_tiles else 0.0
                    scores.append(scale * float(q[i, h] @ k[j, h]) - slope[h] * away)
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for j, w in zip(range(start, stop), weights, strict=True):
                    out[i, h] += w / sum(weights) * v[j, h]
    return out


def run_with_grads(
    impl: str, inputs: tuple[list[Tensor], Tensor, Tensor, Tensor], seed: Tensor, **options: object
) -> list[Tensor]:
    qkv, grid, slopes, offsets = inputs
    out = alibi_attention(*qkv, grid, slopes, offsets=offsets, impl=impl, **options)
    return [out, *torch.autograd.grad(out, qkv, seed)]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(("prefix", "scale"), [(1, None), (0, 0.3), (3, None)])
def test_matches_formula(impl: str, prefix: int, scale: float | None) -> None:
    qkv, grid, slopes, offsets = make_inputs([0, 1, 2, 9, 5], heads=2, dim=4)
    out = alibi_attention(
        *qkv, grid, slopes, offsets=offsets, num_prefix=prefix, scale=scale, impl=impl
    )
    want = formula(qkv, grid, slopes, offsets.tolist(), prefix, scale or 0.5)
    np.testing.assert_allclose(out.detach().numpy(), want, rtol=0, atol=1e-13)


def test_hand_computed_pair() -> None:
    """Two tiles 5 cells apart, equal scores: the far weight is e^(-5/2) of the near one."""
    q = torch.zeros(2, 1, 1, dtype=torch.float64)
    v = torch.tensor([[[1.0]], [[0.0]]], dtype=torch.float64)
    grid = torch.tensor([[10, 20], [13, 24]])
    out = alibi_attention(q, q, v, grid, torch.tensor([0.5]), num_prefix=0)
    far = math.exp(-2.5)
    assert out.flatten().tolist() == pytest.approx([1 / (1 + far), far / (1 + far)], abs=1e-15)


@pytest.mark.parametrize("block_bytes", [1, 40_000, 2**25], ids=["row", "split", "whole"])
@pytest.mark.parametrize("lengths", [RAGGED, [300], [1]], ids=["ragged", "long", "one"])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_cpu_equals_reference(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, lengths: list[int], prefix: int
) -> None:
    """Outputs and gradients, with blocks of one row and head, of some, and of everything."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(cpu, "MIN_BLOCK_ROWS", 4)
    inputs = make_inputs(lengths)
    seed = torch.randn(inputs[0][0].shape, dtype=torch.float64)
    want = run_with_grads("reference", inputs, seed, num_prefix=prefix)
    got = run_with_grads("cpu", inputs, seed, num_prefix=prefix)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=5),
    heads=st.integers(1, 5),
    prefix=st.integers(0, 3),
    block_rows=st.integers(1, 8),
)
def test_cpu_equals_reference_for_any_layout(
    lengths: list[int], heads: int, prefix: int, block_rows: int
) -> None:
    inputs = make_inputs(lengths, heads=heads, dim=3)
    seed = torch.randn(inputs[0][0].shape, dtype=torch.float64)
    want = run_with_grads("reference", inputs, seed, num_prefix=prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_BYTES", 8 * 20 * 2 * block_rows)
        patch.setattr(cpu, "MIN_BLOCK_ROWS", block_rows)
        got = run_with_grads("cpu", inputs, seed, num_prefix=prefix)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_lower_precision(impl: str, dtype: torch.dtype) -> None:
    """Against float64 on the rounded inputs; grid and slopes make biases of up to -40."""
    inputs = make_inputs(RAGGED, dtype=dtype)
    exact = ([t.detach().double().requires_grad_() for t in inputs[0]], *inputs[1:])
    seed = torch.randn(inputs[0][0].shape).to(dtype)
    want = run_with_grads("reference", exact, seed.double())
    got = run_with_grads(impl, inputs, seed)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        # The dense form rounds scores, weights and their gradients to the dtype of the inputs, as
        # both do in float32; the CPU path rounds halves at the output only, which its gradient
        # reads.
        steps = 2 if impl == "cpu" and dtype != torch.float32 else 8
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error <= steps * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    """A bias of -20 in bfloat16 is off by up to 0.06, its weight by 6 %."""
    qkv, grid, slopes, offsets = make_inputs(RAGGED, dtype=dtype)
    wide = ([t.detach().float().requires_grad_() for t in qkv], grid, slopes, offsets)
    out = alibi_attention(*qkv, grid, slopes, offsets=offsets, impl="cpu")
    want = alibi_attention(*wide[0], *wide[1:3], offsets=offsets, impl="cpu")
    assert torch.equal(out, want.to(dtype))


def test_gradcheck_of_both_paths() -> None:
    qkv, grid, slopes, offsets = make_inputs([3, 0, 4], heads=2, dim=2)
    for impl in ("reference", "cpu"):
        torch.autograd.gradcheck(
            lambda q, k, v, impl=impl: alibi_attention(
                q, k, v, grid, slopes, offsets=offsets, impl=impl
            ),
            tuple(qkv),
        )


def test_prefix_positions_are_ignored_and_origin_is_free() -> None:
    qkv, grid, slopes, offsets = make_inputs([6, 8], dtype=torch.float32)
    moved = grid + 40_000_000  # beyond what float32 holds exactly
    moved[offsets[:-1]] = torch.tensor([-7, 123])
    for impl in ("cpu", "reference"):
        here = alibi_attention(*qkv, grid, slopes, offsets=offsets, impl=impl)
        there = alibi_attention(*qkv, moved, slopes, offsets=offsets, impl=impl)
        torch.testing.assert_close(here, there, rtol=0, atol=1e-6)


def test_same_bits_twice_and_for_strided_inputs() -> None:
    qkv, grid, slopes, offsets = make_inputs(RAGGED, dtype=torch.float32)
    packed = torch.stack([t.detach() for t in qkv], dim=1)  # as a fused qkv projection gives it
    first = alibi_attention(*qkv, grid, slopes, offsets=offsets, impl="cpu")
    second = alibi_attention(*packed.unbind(1), grid, slopes, offsets=offsets, impl="cpu")
    assert torch.equal(first, second)


def test_only_some_inputs_need_gradients() -> None:
    qkv, grid, slopes, _ = make_inputs([12])
    want = torch.autograd.grad(
        alibi_attention(*qkv, grid, slopes, impl="reference").square().sum(), qkv[1]
    )
    q, k, v = qkv[0].detach(), qkv[1], qkv[2].detach()
    got = torch.autograd.grad(alibi_attention(q, k, v, grid, slopes, impl="cpu").square().sum(), k)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_autocast_does_not_round_the_cpu_path() -> None:
    qkv, grid, slopes, offsets = make_inputs(RAGGED, dtype=torch.float32)
    seed = torch.randn(qkv[0].shape)
    want = run_with_grads("cpu", (qkv, grid, slopes, offsets), seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_with_grads("cpu", (qkv, grid, slopes, offsets), seed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_rows_and_no_sequences() -> None:
    for lengths in ([], [0], [0, 0]):
        inputs = make_inputs(lengths)
        for impl in ("cpu", "reference"):
            out, *grads = run_with_grads(impl, inputs, torch.empty(0, 3, 8, dtype=torch.float64))
            assert out.shape == (0, 3, 8)
            assert all(g.shape == (0, 3, 8) for g in grads)


_PEAK = """
import sys, torch
from modaltune.kernels import alibi_attention
from modaltune.testing import peak_memory_mib
torch.set_num_threads(1)
def peak(n):
    q, k, v = (torch.randn(n, 4, 16, requires_grad=True) for _ in range(3))
    grid = torch.randint(0, 99, (n, 2))
    alibi_attention(q, k, v, grid, torch.rand(4), impl=sys.argv[1]).sum().backward()
    return peak_memory_mib()
print(peak(int(sys.argv[2])), peak(2 * int(sys.argv[2])))
"""


def test_memory_is_linear_on_the_cpu() -> None:
    """Forward and backward: doubling 3,000 rows would add 412 MiB of dense bias alone."""
    growth = {}
    for impl, rows in (("cpu", 3000), ("reference", 1000)):
        command = [sys.executable, "-c", _PEAK, impl, str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        small, large = (float(word) for word in done.stdout.split())
        growth[impl] = large - small
    # 12 tensors of 3,000 x 64 float32 more are 9 MiB; the rest is the allocator's.
    assert growth["cpu"] < 60
    # The measurement sees a dense bias: 3 M pairs more of 4 heads are 92 MiB in float64.
    assert growth["reference"] > 90


def op_arguments(needs: str = "qkv") -> tuple[object, ...]:
    """Arguments of `modaltune::alibi_attn_fwd`, of which those in `needs` want a gradient."""
    qkv, grid, slopes, offsets = make_inputs([5, 0, 9], dtype=torch.float32)
    leaves = [t.detach().requires_grad_(n in needs) for n, t in zip("qkv", qkv, strict=True)]
    return (*leaves, grid, slopes, offsets, 1, 0.3, "cpu")


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.modaltune.alibi_attn_fwd.default, op_arguments())
    for needs in ([True, True, True], [False, False, True]):
        q, k, v, *rest, impl = op_arguments("")
        out, lse = torch.ops.modaltune.alibi_attn_fwd(q, k, v, *rest, impl)
        grid, slopes, *last = rest
        kept = (v, grid, slopes, out) if needs[0] else (None, grid, slopes, None)
        arguments = (torch.randn_like(q), q, k, *kept, lse, *last, needs, impl)
        torch.library.opcheck(torch.ops.modaltune.alibi_attn_bwd.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_as_one_graph(dtype: torch.dtype) -> None:
    """Forward and backward, through both operators, offsets looked at only when it runs."""
    inputs = make_inputs([7, 0, 12], dtype=dtype)
    seed = torch.randn(inputs[0][0].shape, dtype=dtype)

    def run(*qkv: Tensor) -> Tensor:
        return alibi_attention(*qkv, *inputs[1:3], offsets=inputs[3], impl="auto") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs[0])
    grads = torch.autograd.grad(out, inputs[0], seed)
    want = run_with_grads("cpu", inputs, 2 * seed)
    assert torch.equal(out, 2 * want[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, want[1:], strict=True))
    inputs[3][1] = 99
    with pytest.raises(ValueError, match="offsets must rise"):
        compiled(*inputs[0])


@pytest.mark.parametrize(("needs", "tensors"), [("qkv", 4), ("q", 4), ("k", 4), ("v", 2), ("", 0)])
def test_saved_for_backward_as_the_docstring_says(needs: str, tensors: int) -> None:
    """`tensors` of the size of q, and lse, grid, slopes, offsets; never a score."""
    q, k, v, grid, slopes, offsets, *_ = op_arguments(needs)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        alibi_attention(q, k, v, grid, slopes, offsets=offsets, impl="cpu")
    rows, heads, dim = q.shape
    beside = 4 * rows * heads + 16 * rows + 8 * heads + 8 * len(offsets)
    want = tensors * 4 * rows * heads * dim + beside if needs else 0
    assert sum(t.nbytes for t in saved) == want


@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "qv", "kv"])
def test_a_gradient_left_out_changes_no_other(needs: str) -> None:
    inputs = make_inputs(RAGGED)
    seed = torch.randn(inputs[0][0].shape, dtype=torch.float64)
    full = dict(zip("qkv", run_with_grads("cpu", inputs, seed)[1:], strict=True))
    some = {n: t.detach().requires_grad_(n in needs) for n, t in zip("qkv", inputs[0], strict=True)}
    out = alibi_attention(**some, grid=inputs[1], slopes=inputs[2], offsets=inputs[3], impl="cpu")
    grads = torch.autograd.grad(out, [some[n] for n in needs], seed)
    assert all(torch.equal(full[n], g) for n, g in zip(needs, grads, strict=True))


def test_cost_of_titan() -> None:
    """Products by counting pairs; bytes at the point where k and v no longer fit half the L2."""
    one = alibi_cost([1001], mode="forward", l2_bytes=50_000_000)
    assert one.flops == 2 * 2 * 64 * 12 * 1001**2
    assert one.least_bytes == 1001 * (4 * 768 * 2 + 12 * 4 + 16)
    assert one.moved_bytes < 1.05 * one.least_bytes
    # A pair of heads: 1001 rows of k and v are 512 bytes and a cell of 8 each.
    small = alibi_cost([1001], mode="forward", l2_bytes=2 * 1001 * 520 - 2)
    assert small.moved_bytes - one.moved_bytes == 6 * 1001 * 520 * (8 - 1)
    two = alibi_cost([1001, 1001], mode="backward", l2_bytes=50_000_000)
    assert two.flops == 7 * 2 * 64 * 12 * 1001**2 * 2
    with pytest.raises(ValueError, match="mode must be"):
        alibi_cost([1], mode="both", l2_bytes=1)


def _valid() -> dict[str, object]:
    (q, k, v), grid, slopes, offsets = make_inputs([4, 5])
    return {"q": q, "k": k, "v": v, "grid": grid, "slopes": slopes, "offsets": offsets}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(9, 3, 8, dtype=torch.int64)}, TypeError, "q must be a floating"),
        ({"q": torch.zeros(9, 24)}, ValueError, r"q must have shape \[\*, \*, \*\], got \[9, 24\]"),
        ({"k": torch.zeros(9, 3, 4).double()}, ValueError, r"k must have shape \[9, 3, 8\]"),
        ({"v": torch.zeros(9, 3, 8)}, ValueError, "v must have the dtype and device of q"),
        ({"grid": torch.zeros(9, 2)}, ValueError, "grid must hold integer cells"),
        ({"grid": torch.zeros(8, 2).long()}, ValueError, r"grid must have shape \[9, 2\]"),
        ({"slopes": torch.ones(3).long()}, TypeError, "slopes must be a floating"),
        ({"slopes": torch.ones(2)}, ValueError, r"slopes must have shape \[3\]"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "number of rows 9"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be at least 0, got -1"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' can't run: .* not torch.float64"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {**_valid(), **change}
    positional = [arguments.pop(name) for name in ("q", "k", "v", "grid", "slopes")]
    with pytest.raises(error, match=message):
        alibi_attention(*positional, **arguments)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes them")
def test_triton_needs_a_gpu_or_the_interpreter() -> None:
    qkv, grid, slopes, _ = make_inputs([3], dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"cpu tensors run only .* TRITON_INTERPRET=1"):
        alibi_attention(*qkv, grid, slopes, impl="triton")
