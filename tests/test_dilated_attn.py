"""Dilated attention: the reference against METHOD 3.3 literally, the CPU path against both."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import dilated_attention
from modaltune.kernels.dilated_attn.api import misalignment
from modaltune.testing import (
    RAGGED,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

PUBLISHED = {
    "segment_lengths": (1024, 5792, 32768, 185363, 1048576),
    "dilation_ratios": (1, 2, 4, 8, 16),
}
ALIGNED = {"segment_lengths": (16, 32, 64, 64), "dilation_ratios": (1, 2, 4, 8)}
MISALIGNED = {"segment_lengths": (10, 21, 45), "dilation_ratios": (1, 2, 4)}
# One segment of an odd length per sequence; 7 and 50 are no multiples of 3 and 4.
ODD = {"segment_lengths": (7, 5000, 3000), "dilation_ratios": (1, 3, 4)}
# The fused backward reads back a log-sum-exp of up to log(1000) + 1, rounded once, so that
# exp(score - lse) is off by half of 8 steps; the rounded output that it takes the row sums from,
# and those sums, are a step each; and the one every kernel has.
BACKWARD_STEPS = 7
GOLDEN = ("a", "b_headpad", "c_single", "d_16heads", "e_quirk_misaligned")


def qkv(
    rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    return {n: normal(seed + i, rows, heads, dim, dtype=dtype) for i, n in enumerate("qkv")}


def literal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: tuple[int, ...],
    dilation_ratios: tuple[int, ...],
    scale: float,
) -> Tensor:
    """METHOD 3.3 for one sequence, a position of a head of a branch at a time."""
    length, heads, dim = q.shape
    nothing = torch.zeros(dim, dtype=q.dtype)
    found: dict[tuple[int, int], list[tuple[Tensor, float]]] = {}
    for w, r in zip(segment_lengths, dilation_ratios, strict=True):
        w = min(w, length)
        m = math.ceil(w / r)
        for s in range(math.ceil(length / w)):
            for h in range(heads):
                lattice = [h // math.ceil(heads / r) + r * i for i in range(m)]
                real = [p < w and s * w + p < length for p in lattice]
                rows = [s * w + p for p in lattice]
                keys = [k[row, h] if ok else nothing for row, ok in zip(rows, real, strict=True)]
                values = [v[row, h] if ok else nothing for row, ok in zip(rows, real, strict=True)]
                for p, row, ok in zip(lattice, rows, real, strict=True):
                    query = q[row, h] if ok else nothing
                    scores = torch.stack([(query * key).sum() * scale for key in keys])
                    weights = torch.exp(scores) / torch.exp(scores).sum()
                    out = (weights.unsqueeze(1) * torch.stack(values)).sum(0)
                    lse = math.log(sum(math.exp(score) for score in scores.tolist()))
                    lse = -1e8 if lse == 0.0 else lse
                    # Segments are joined at their padded length, then cut.
                    found.setdefault((s * m * r + p, h), []).append((out, lse))
    branches = len(segment_lengths)
    positions = []
    for row in range(length):
        for h in range(heads):
            here = found[row, h]
            lses = [lse for _, lse in here] + [-1e8] * (branches - len(here))
            total = sum(math.exp(lse - max(lses)) for lse in lses)
            # Plain floats: no gradient flows through the weights of the branches.
            parts = [out * (math.exp(lse - max(lses)) / total) for out, lse in here]
            positions.append(torch.stack(parts).sum(0))
    return torch.stack(positions).reshape(length, heads, dim)


def literal_packed(q: Tensor, k: Tensor, v: Tensor, *, lengths: list[int], **how: object) -> Tensor:
    parts = [t.split(lengths) for t in (q, k, v)]
    outs = [literal(*one, **how) for one in zip(*parts, strict=True) if one[0].shape[0]]
    return torch.cat(outs)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("lengths", "heads", "branches"),
    [
        ([37, 0, 1, 2, 9], 4, {"segment_lengths": (8, 16, 32), "dilation_ratios": (1, 2, 4)}),
        ([23, 12], 3, {"segment_lengths": (4, 8, 8), "dilation_ratios": (1, 2, 4)}),
        ([19], 5, {"segment_lengths": (6, 100, 12), "dilation_ratios": (1, 7, 3)}),
        ([5, 3], 2, PUBLISHED),
        ([10], 1, {"segment_lengths": (3,), "dilation_ratios": (1,)}),
    ],
    ids=["golden-like", "head-padding", "odd", "more-groups-than-heads", "one-branch"],
)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_matches_method_literally(
    impl: str, lengths: list[int], heads: int, branches: dict[str, tuple[int, ...]], scale: float
) -> None:
    """Output and gradients; the literal form holds the merge weights constant, too."""
    inputs = qkv(sum(lengths), heads, 4)
    how = {**branches, "scale": scale}
    got = run_with_gradients(
        dilated_attention, inputs, impl=impl, offsets=pack_offsets(lengths), **how
    )
    how["scale"] = scale or 0.5
    want = run_with_gradients(literal_packed, inputs, lengths=lengths, **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-13, msg=name)


def test_merge_weights_carry_no_gradient() -> None:
    """A difference quotient sees the weights move; the published gradient does not."""
    inputs = qkv(24, 4, 4)
    pulled = normal(9, 24, 4, 4)

    def total(q: Tensor) -> Tensor:
        out = dilated_attention(q, inputs["k"], inputs["v"], **ALIGNED, impl="cpu")
        return (out * pulled).sum()

    q = inputs["q"].clone().requires_grad_()
    grad = torch.autograd.grad(total(q), q)[0]
    step = 1e-5 * normal(8, 24, 4, 4)
    with torch.no_grad():
        slope = total(q + step) - total(q - step)
    # Per branch the gradient is exact (gradcheck below): what is missing is the weights' part.
    assert abs(slope - 2 * (grad * step).sum()) > 0.01 * abs(slope)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck_with_one_branch(impl: str) -> None:
    """With one branch the merge weight is 1, and the gradient is that of the function."""
    lengths = [5, 0, 3]
    leaves = [t.requires_grad_() for t in qkv(8, 2, 3).values()]
    torch.autograd.gradcheck(
        lambda q, k, v: dilated_attention(
            q,
            k,
            v,
            segment_lengths=(4,),
            dilation_ratios=(1,),
            offsets=pack_offsets(lengths),
            impl=impl,
        ),
        leaves,
    )


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "impl"), [*((case, "reference") for case in GOLDEN), *((c, "cpu") for c in GOLDEN[:4])]
)
def test_golden(shared_dir: Path, case: str, impl: str) -> None:
    """Output before the inner norm, and the gradient of the layer's input through everything.

    The CPU path refuses the last case: `test_misaligned_segments`.
    """
    stem = shared_dir / "golden" / f"case5_dilated_{case}"
    meta = json.loads(stem.with_suffix(".json").read_text())
    stored = {n: t.double() for n, t in load_file(stem.with_suffix(".safetensors")).items()}
    w = {n.removeprefix("weights/"): t for n, t in stored.items() if n.startswith("weights/")}
    x = stored["in/x"][0].requires_grad_()
    q, k, v = (
        F.linear(x, w[f"{n}_proj.weight"], w[f"{n}_proj.bias"]).unflatten(1, (meta["heads"], -1))
        for n in "qkv"
    )
    merged = dilated_attention(
        q,
        k,
        v,
        segment_lengths=tuple(meta["segment_length"]),
        dilation_ratios=tuple(meta["dilated_ratio"]),
        impl=impl,
    ).flatten(1)
    normed = F.layer_norm(
        merged, merged.shape[1:], w["inner_attn_ln.weight"], w["inner_attn_ln.bias"]
    )
    y = F.linear(normed, w["out_proj.weight"], w["out_proj.bias"])
    y.backward(stored["in/grad_out"][0])
    # The files hold float32 results; ours are float64, so their own stated error is the limit.
    for ours, name, of in ((y, "out/y", "y"), (x.grad, "grad/x", "grad_x")):
        error = torch.linalg.norm(ours - stored[name][0]) / torch.linalg.norm(stored[name][0])
        assert error <= 1.5 * meta["ref_fp32_vs_fp64"][of]["rel_fro"], name
    torch.testing.assert_close(merged, stored["mid/pre_subln"][0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("heads", "branches"),
    [(6, ALIGNED), (4, PUBLISHED), (5, ODD)],
    ids=["aligned", "published", "odd"],
)
def test_cpu_loses_no_more_than_the_reference(
    dtype: torch.dtype, heads: int, branches: dict[str, tuple[int, ...]]
) -> None:
    lengths = [n for n in RAGGED if n != 1000 or branches is not ODD]
    check_against_reference(
        dilated_attention,
        qkv(sum(lengths), heads, 8),
        impl="cpu",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        offsets=pack_offsets(lengths),
        **branches,
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=4),
    heads=st.integers(1, 6),
    branches=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), max_size=3),
    first=st.integers(1, 50),
)
def test_cpu_equals_reference_for_any_branches(
    lengths: list[int], heads: int, branches: list[tuple[int, int]], first: int
) -> None:
    """Segments are multiples of their dilation, so that the in-place form holds."""
    branches = [(first, 1), *((count * ratio, ratio) for count, ratio in branches)]
    how = {
        "segment_lengths": tuple(w for w, _ in branches),
        "dilation_ratios": tuple(r for _, r in branches),
        "offsets": pack_offsets(lengths),
    }
    inputs = qkv(sum(lengths), heads, 3)
    want = run_with_gradients(dilated_attention, inputs, impl="reference", **how)
    got = run_with_gradients(dilated_attention, inputs, impl="cpu", **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 3])
def test_scores_of_exactly_zero(impl: str, dtype: torch.dtype, length: int) -> None:
    """Published: a log-sum-exp of exactly 0 (one key, score 0) counts as no attention.

    Where no branch is left, all of them weigh the same, those that skip the row included.
    """
    inputs = qkv(length, 4, 4, dtype)
    inputs["q"].zero_()
    how = {"segment_lengths": (1, 4, 8), "dilation_ratios": (1, 2, 4)}
    got = run_with_gradients(dilated_attention, inputs, impl=impl, **how)
    want = run_with_gradients(literal, inputs, **how, scale=0.5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6, msg=name)


def test_zero_padding_takes_part() -> None:
    """Three equal scores by hand: in branch 2, head 1 sees row 1 and one zero key."""
    q = torch.zeros(3, 2, 1, dtype=torch.float64)
    v = torch.tensor([3.0, 6.0, 12.0], dtype=torch.float64).reshape(3, 1, 1).expand(3, 2, 1)
    out = dilated_attention(q, q, v, segment_lengths=(4, 4), dilation_ratios=(1, 2))
    # Row 0, head 0: 3 keys (mean 7) and 2 keys (mean 7.5), merged 3 : 2.
    # Row 1, head 1: 3 keys (mean 7), and row 1 with one zero key (mean 3), merged 3 : 2.
    assert out[:, 0, 0].tolist() == pytest.approx([7.2, 7.0, 7.2], abs=1e-14)
    assert out[:, 1, 0].tolist() == pytest.approx([7.0, 5.4, 7.0], abs=1e-14)


def test_misaligned_segments() -> None:
    inputs = qkv(100, 4, 8)
    reason = "segment 21 is no multiple of its dilation 2 at 100 rows"
    with pytest.raises(RuntimeError, match=f"impl='cpu' can't run: {reason}"):
        dilated_attention(**inputs, **MISALIGNED, impl="cpu")
    published = dilated_attention(**inputs, **MISALIGNED, impl="reference")
    assert torch.equal(dilated_attention(**inputs, **MISALIGNED), published)
    torch.testing.assert_close(
        published, literal(**inputs, **MISALIGNED, scale=8**-0.5), rtol=0, atol=1e-13
    )
    # One segment per dilated branch: nothing to shift, and every path is exact.
    assert misalignment([10, 22], *MISALIGNED.values()) is not None
    assert misalignment([10, 20], *MISALIGNED.values()) is None
    assert misalignment([0, 25000], *PUBLISHED.values()) is None
    assert misalignment([200_000], *PUBLISHED.values()) is not None
    short = {name: t[:20] for name, t in inputs.items()}
    dilated_attention(**short, **MISALIGNED, impl="cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_sequence_sees_no_other(impl: str) -> None:
    """NaN in one sequence leaves its neighbours alone, forward and backward."""
    lengths = [33, 40, 17]
    clean = qkv(sum(lengths), 4, 8)
    how = {**ALIGNED, "offsets": pack_offsets(lengths), "impl": impl}
    want = run_with_gradients(dilated_attention, clean, **how)
    poisoned = {name: t.clone() for name, t in clean.items()}
    for t in poisoned.values():
        t[33:73] = math.nan
    got = run_with_gradients(dilated_attention, poisoned, **how)
    for name in want:
        assert torch.equal(got[name][:33], want[name][:33]), name
        assert torch.equal(got[name][73:], want[name][73:]), name
        assert got[name][33:73].isnan().any(), name


def test_same_bits_twice_for_strided_inputs_and_in_poisoned_memory() -> None:
    """Slices of one projection, as the slide encoder passes them."""
    fused = normal(3, 145, 3, 6, 8, dtype=torch.float32)
    how = {**ALIGNED, "offsets": pack_offsets([128, 17]), "impl": "cpu"}
    sliced = {name: fused[:, i] for i, name in enumerate("qkv")}
    first = run_with_gradients(
        dilated_attention, {name: t.contiguous() for name, t in sliced.items()}, **how
    )
    with poisoned_memory():
        second = run_with_gradients(dilated_attention, sliced, **how)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_only_some_inputs_need_gradients() -> None:
    inputs = qkv(40, 4, 8)
    want = run_with_gradients(dilated_attention, inputs, **ALIGNED, impl="reference")
    inputs["k"].requires_grad_()
    out = dilated_attention(**inputs, **ALIGNED, impl="cpu")
    got = torch.autograd.grad(out, inputs["k"], normal(0, *out.shape, dtype=torch.float32).double())
    torch.testing.assert_close(got[0], want["grad k"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_rows(impl: str, lengths: list[int]) -> None:
    offsets = pack_offsets(lengths)
    for name, t in run_with_gradients(
        dilated_attention, qkv(0, 2, 4), offsets=offsets, impl=impl, **ALIGNED
    ).items():
        assert t.shape == (0, 2, 4), name


_PEAK = """
import torch
from modaltune.kernels import dilated_attention
from modaltune.testing import peak_memory_mib
torch.set_num_threads(1)
segments, ratios = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
def extra(rows, impl):
    q, k, v = torch.randn(rows, 3, 16, 48).unbind(1)
    before = peak_memory_mib()
    with torch.no_grad():
        dilated_attention(q, k, v, segment_lengths=segments, dilation_ratios=ratios, impl=impl)
    return (peak_memory_mib() - before) / (4 * rows * 768 * 4 / 2**20)
extra(64, "cpu"), extra(4000, "cpu")  # loads, or compiles, the loops
print(extra(4000, "cpu"), extra(1500, "reference"))
"""


def test_memory_of_the_cpu_forward() -> None:
    """Extra peak at 4,000 rows of the published shape, over the size of q, k, v and the output."""
    command = [sys.executable, "-c", _PEAK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cpu, reference = (float(word) for word in done.stdout.split())
    assert cpu < 0.75  # the output is 0.25; the bar is 1.5 beyond it
    assert reference > 6  # the measurement sees scores that are written out


def _valid() -> dict[str, object]:
    return {**qkv(9, 3, 8), **ALIGNED, "offsets": pack_offsets([4, 5])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(9, 3, 8).long()}, TypeError, "q must be a floating point tensor, got"),
        ({"q": torch.zeros(9, 24)}, ValueError, r"q must have shape \[\*, \*, \*\], got \[9, 24\]"),
        ({"q": torch.zeros(9, 0, 8)}, ValueError, "q must have at least one head and one column"),
        ({"k": torch.zeros(8, 3, 8)}, ValueError, r"k must have shape \[9, 3, 8\], got \[8, 3, 8"),
        ({"v": torch.zeros(9, 3, 4)}, ValueError, r"v must have shape \[9, 3, 8\]"),
        ({"v": torch.zeros(9, 3, 8)}, ValueError, "v must have the dtype and device of q"),
        ({"segment_lengths": ()}, ValueError, "must be non-empty, of equal length and positive"),
        ({"segment_lengths": (16, 32)}, ValueError, "of equal length and positive, got"),
        ({"segment_lengths": (16, 0, 64, 64)}, ValueError, "of equal length and positive, got"),
        ({"dilation_ratios": (2, 4, 8, 16)}, ValueError, "dilation_ratios must be positive and co"),
        ({"dilation_ratios": (1, 0, 2, 4)}, ValueError, "dilation_ratios must be positive and con"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "offsets must rise from 0 to the num"),
        ({"offsets": torch.tensor([0, 6, 4, 9])}, ValueError, "offsets must rise from 0 to the nu"),
        ({"offsets": torch.tensor([0.0, 9.0])}, ValueError, "offsets must be a 1-D integer tensor"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, triton, cpu, reference, got"),
        ({"impl": "triton"}, RuntimeError, "dilated_attention: impl='triton'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dilated_attention(**{**_valid(), **change})
