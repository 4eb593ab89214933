"""The Triton kernels of dilated attention in the interpreter, against the float64 reference.

Run with TRITON_INTERPRET=1 set before anything imports Triton (tests/test_interpreter.py does).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import dilated_attention
from modaltune.testing import (
    INTERPRET,
    allowed_error,
    at_default,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

pytestmark = pytest.mark.triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The published dilations, and segments that make several of them at a thousand rows.
PUBLISHED = {"segment_lengths": (64, 352, 2048, 11584, 65536), "dilation_ratios": (1, 2, 4, 8, 16)}
ALIGNED = {"segment_lengths": (16, 32, 64), "dilation_ratios": (1, 2, 4)}
# The backward pass reads back a rounded log-sum-exp of up to log2(5,793) + 1 < 14: half of 14 steps
# in each weight, as many again in the sums they take part in; and the step every kernel has.
BACKWARD_STEPS = 15


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Set block sizes of every kernel: small ones meet more edges, large ones interpret faster.

    A GPU, whose memory larger ones than shipped overflow, takes no more.
    """

    def set_blocks(m: int, n: int) -> None:
        from modaltune.kernels.dilated_attn import triton_kernels

        original = triton_kernels.config

        def config(op: str, kernel: str, device: torch.device) -> dict[str, Any]:
            shipped = original(op, kernel, device)
            found = {**shipped, "BLOCK_M": m, "BLOCK_N": n}
            return found if INTERPRET else {n: min(v, shipped[n]) for n, v in found.items()}

        monkeypatch.setattr(triton_kernels, "config", config)

    return set_blocks


def qkv(rows: int, heads: int, dim: int, seed: int = 0) -> dict[str, Tensor]:
    return {name: normal(seed + i, rows, heads, dim) for i, name in enumerate("qkv")}


def against_reference(
    lengths: list[int], heads: int, dim: int, dtype: torch.dtype, **options: Any
) -> None:
    with poisoned_memory():
        check_against_reference(
            dilated_attention,
            qkv(sum(lengths), heads, dim),
            impl="triton",
            dtype=dtype,
            gradient_steps=BACKWARD_STEPS,
            offsets=pack_offsets(lengths),
            **options,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_width_and_shipped_blocks(dtype: torch.dtype) -> None:
    """Heads of 48 columns, the blocks of sm_80; more than one unit."""
    lengths = [0, 1, 150] if dtype != torch.float32 else [0, 1, 50]
    against_reference(lengths, 2, 48, dtype, **ALIGNED)


@pytest.mark.parametrize(("dtype", "heads"), zip(DTYPES, [3, 4, 3], strict=True))
def test_ragged_lengths_and_small_blocks(
    blocks: Callable[[int, int], None], dtype: torch.dtype, heads: int
) -> None:
    """Lengths around blocks and segments; three heads leave the last group of 2 and 4 short."""
    blocks(64, 16)
    against_reference([1, 15, 0, 16, 17, 127], heads, 16, dtype, **ALIGNED)


def test_a_thousand_rows_under_the_published_dilations(
    blocks: Callable[[int, int], None],
) -> None:
    """16 residues and more groups than heads; branch 1 in 16 segments, branch 16 in one."""
    blocks(256, 256)
    against_reference([1000], 2, 16, torch.float16, **PUBLISHED)


def test_thousands_of_rows(blocks: Callable[[int, int], None]) -> None:
    """Segments of 1,024 places in both branches; the last ones are ragged."""
    blocks(1024, 1024)
    how = {"segment_lengths": (1024, 2048), "dilation_ratios": (1, 2)}
    against_reference([5793], 1, 16, torch.float32, **how)


@pytest.mark.parametrize(
    ("lengths", "branches"),
    [
        ([37, 7], {"segment_lengths": (7, 5000, 3000), "dilation_ratios": (1, 3, 4)}),
        ([61], {"segment_lengths": (10, 27, 13), "dilation_ratios": (1, 9, 13)}),
        ([40], {"segment_lengths": (5,), "dilation_ratios": (1,)}),
        ([33, 2], {"segment_lengths": (12, 16, 9, 16), "dilation_ratios": (2, 1, 1, 2)}),
    ],
    ids=["one-odd-segment", "more-residues-than-64", "one-branch", "repeated-and-unsorted"],
)
def test_odd_branches(
    blocks: Callable[[int, int], None], lengths: list[int], branches: dict[str, tuple[int, ...]]
) -> None:
    blocks(32, 32)
    against_reference(lengths, 3, 16, torch.float32, **branches)


@pytest.mark.parametrize("dim", [1, 40, 80, 100, 128])
def test_widths_padded_by_mask(blocks: Callable[[int, int], None], dim: int) -> None:
    """One part or two (80 = 64 + 16), padding inside either."""
    blocks(32, 32)
    against_reference([40], 2, dim, torch.float32, **ALIGNED)


@pytest.mark.parametrize("scale", [0.4, -0.3, 0.0])
def test_scales_of_any_sign(blocks: Callable[[int, int], None], scale: float) -> None:
    blocks(32, 32)
    against_reference([40, 9], 2, 16, torch.float32, scale=scale, **ALIGNED)


# Rows past the end, which no one stores, may overflow.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(
    blocks: Callable[[int, int], None], dtype: torch.dtype, sign: int
) -> None:
    """Near -300 a zero key, whose score is 0, outweighs all others; near 300 it has no part.

    Never a single zero key: beside it the reference rounds a log-sum-exp to 0.0.
    """
    blocks(32, 32)
    inputs = qkv(41, 2, 16)
    inputs["q"], inputs["k"] = 4 + inputs["q"] / 64, sign * (4 + inputs["k"] / 64)
    with poisoned_memory():
        check_against_reference(
            dilated_attention,
            inputs,
            impl="triton",
            dtype=dtype,
            gradient_steps=BACKWARD_STEPS,
            scale=300 / 256,
            segment_lengths=(16, 32, 32),
            dilation_ratios=(1, 2, 4),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 10])
def test_scores_of_exactly_zero(
    blocks: Callable[[int, int], None], dtype: torch.dtype, length: int
) -> None:
    """Published: one key of score 0 is no attention; where no branch is left they weigh alike."""
    blocks(16, 16)
    inputs = qkv(length, 3, 16)
    inputs["q"][::2] = 0
    how = {"segment_lengths": (1, 4, 8), "dilation_ratios": (1, 2, 4)}
    with poisoned_memory():
        check_against_reference(dilated_attention, inputs, impl="triton", dtype=dtype, **how)


@pytest.mark.shared
@pytest.mark.parametrize("case", ["a", "b_headpad", "c_single", "d_16heads"])
def test_golden(shared_dir: Path, blocks: Callable[[int, int], None], case: str) -> None:
    """Output before the inner norm, and the gradient of the layer's input through everything."""
    blocks(512, 64)
    stem = shared_dir / "golden" / f"case5_dilated_{case}"
    meta = json.loads(stem.with_suffix(".json").read_text())
    stored = {n: at_default(t) for n, t in load_file(stem.with_suffix(".safetensors")).items()}
    w = {n.removeprefix("weights/"): t for n, t in stored.items() if n.startswith("weights/")}
    x = stored["in/x"][0].requires_grad_()
    q, k, v = (
        F.linear(x, w[f"{n}_proj.weight"], w[f"{n}_proj.bias"]).unflatten(1, (meta["heads"], -1))
        for n in "qkv"
    )
    branches = (tuple(meta["segment_length"]), tuple(meta["dilated_ratio"]))
    merged = dilated_attention(
        q, k, v, segment_lengths=branches[0], dilation_ratios=branches[1], impl="triton"
    ).flatten(1)
    normed = F.layer_norm(
        merged, merged.shape[1:], w["inner_attn_ln.weight"], w["inner_attn_ln.bias"]
    )
    y = F.linear(normed, w["out_proj.weight"], w["out_proj.bias"])
    y.backward(stored["in/grad_out"][0])
    # The golden README's pass mark for float32.
    for ours, name in ((y, "out/y"), (x.grad, "grad/x"), (merged, "mid/pre_subln")):
        error = torch.linalg.norm(ours - stored[name][0]) / torch.linalg.norm(stored[name][0])
        assert error < 1e-5, name


class Guarded:
    """Outputs inside larger memory, whose other rows must not change."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def rows(self, rows: int, *shape: int, dtype: torch.dtype, fill: bool = True) -> Tensor:
        whole = torch.full((rows + 2 * 300, *shape), 7.0, dtype=dtype)
        self.memory.append(whole)
        inner = whole[300 : 300 + rows]
        inner.fill_(float("nan"))
        return inner

    def check(self) -> None:
        for whole in self.memory:
            assert bool((whole[:300] == 7).all())
            assert bool((whole[-300:] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_rows_of_the_batch_are_read_and_written(dtype: torch.dtype) -> None:
    """Guard rows round every output stay; NaN in rows and columns beside the inputs stays out."""
    from modaltune.kernels.dilated_attn import triton_kernels

    lengths, branches = [5, 70, 0, 16], tuple(ALIGNED.values())
    rows = sum(lengths)
    guarded = Guarded()

    def between_nans(tensor: Tensor) -> Tensor:
        whole = torch.full((rows + 300, 3, 40), float("nan"), dtype=dtype)
        whole[100 : 100 + rows, :2, :24] = tensor.to(dtype)
        return whole[100 : 100 + rows, :2, :24]

    q, k, v = (between_nans(t) for t in qkv(rows, 2, 24).values())
    grad_out = between_nans(normal(9, rows, 2, 24))
    call = triton_kernels.Call(tuple(pack_offsets(lengths).tolist()), *branches, 0.2)
    out = guarded.rows(rows, 2, 24, dtype=dtype)
    # [H, N] and [branches, H, N]: rows of guard before and after all of it.
    lse = guarded.rows(2, rows, dtype=torch.float32)
    delta = guarded.rows(3, 2, rows, dtype=torch.float32)
    triton_kernels.launch_dilated_attn_fwd(q, k, v, call, out=out, lse=lse)
    grads = [guarded.rows(rows, 2, 24, dtype=dtype) for _ in range(3)]
    triton_kernels.launch_dilated_attn_bwd(
        grad_out, q, k, v, lse, call, [True] * 3, grads=grads, delta=delta
    )
    guarded.check()
    for written in (out, lse, *grads):
        assert not bool(written.isnan().any())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about the NaN
def test_a_sequence_sees_no_other(blocks: Callable[[int, int], None]) -> None:
    """NaN in one sequence leaves its neighbours alone, forward and backward."""
    blocks(64, 16)
    clean = {n: t.float() for n, t in qkv(90, 2, 16).items()}
    how = {**ALIGNED, "offsets": pack_offsets([33, 40, 17]), "impl": "triton"}
    want = run_with_gradients(dilated_attention, clean, **how)
    poisoned = {name: t.clone() for name, t in clean.items()}
    for t in poisoned.values():
        t[33:73] = float("nan")
    got = run_with_gradients(dilated_attention, poisoned, **how)
    for name in want:
        assert torch.equal(got[name][:33], want[name][:33]), name
        assert torch.equal(got[name][73:], want[name][73:]), name
        assert got[name][33:73].isnan().any(), name


def test_gradients_of_some_inputs_are_the_same_bits(blocks: Callable[[int, int], None]) -> None:
    """Leaving out a gradient changes no other one, and twice gives the same bits."""
    blocks(64, 32)
    leaves = {n: t.float() for n, t in qkv(40, 2, 16).items()}
    how = {**ALIGNED, "offsets": pack_offsets([30, 10]), "impl": "triton"}
    full = run_with_gradients(dilated_attention, leaves, **how)
    pulled = normal(0, *full["out"].shape, dtype=torch.float32)
    for needs in ("q", "v", "qk"):
        some = {n: t.clone().requires_grad_(n in needs) for n, t in leaves.items()}
        out = dilated_attention(**some, **how)
        grads = torch.autograd.grad(out, [some[n] for n in needs], pulled)
        assert torch.equal(out.detach(), full["out"])
        for name, grad in zip(needs, grads, strict=True):
            assert torch.equal(grad, full[f"grad {name}"])


def test_slices_of_a_fused_product_and_expanded_gradients(
    blocks: Callable[[int, int], None],
) -> None:
    """q, k, v as LongNet has them, with the gradient of a sum, whose strides are all 0."""
    blocks(32, 32)
    fused = torch.stack([t.float() for t in qkv(40, 2, 16).values()], 1).requires_grad_()
    (got,) = torch.autograd.grad(
        dilated_attention(*fused.unbind(1), impl="triton", **ALIGNED).sum(), fused
    )

    def reference(dtype: torch.dtype) -> Tensor:
        leaf = fused.detach().to(dtype).requires_grad_()
        out = dilated_attention(*leaf.unbind(1), impl="reference", **ALIGNED)
        return torch.autograd.grad(out.sum(), leaf)[0]

    want, plain = reference(torch.float64), reference(torch.float32)
    limit = allowed_error(want, plain, torch.float32, BACKWARD_STEPS)
    assert float((got.double() - want).abs().max()) <= limit


def test_few_heads_at_a_time_are_the_same_bits(
    blocks: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An L2 that holds two heads of five changes the order of programs, and nothing else."""
    from modaltune.kernels.dilated_attn import triton_kernels

    blocks(64, 32)
    leaves = {n: t.float() for n, t in qkv(40, 5, 16).items()}
    want = run_with_gradients(dilated_attention, leaves, impl="triton", **ALIGNED)
    monkeypatch.setattr(triton_kernels, "heads_in_l2", lambda *_: 2)
    got = run_with_gradients(dilated_attention, leaves, impl="triton", **ALIGNED)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_no_rows() -> None:
    for lengths in ([], [0, 0]):
        leaves = {n: t.float() for n, t in qkv(0, 2, 16).items()}
        got = run_with_gradients(
            dilated_attention, leaves, impl="triton", offsets=pack_offsets(lengths), **ALIGNED
        )
        assert all(t.shape == (0, 2, 16) for t in got.values())


def test_autocast_rounds_q_k_v(blocks: Callable[[int, int], None]) -> None:
    blocks(32, 32)
    leaves = {n: t.float() for n, t in qkv(50, 2, 16).items()}
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = run_with_gradients(dilated_attention, leaves, impl="triton", **ALIGNED)
    rounded = {n: t.to(torch.bfloat16) for n, t in leaves.items()}
    same = run_with_gradients(dilated_attention, rounded, impl="triton", **ALIGNED)
    for name in got:
        assert got[name].dtype == (torch.bfloat16 if name == "out" else torch.float32)
        assert torch.equal(got[name], same[name].to(got[name].dtype)), name


@pytest.mark.parametrize(
    ("dtype", "dim", "segments", "reason"),
    [
        (torch.float64, 16, (16, 32), "takes? float16, bfloat16 or float32, got torch.float64"),
        (torch.float32, 129, (16, 32), "heads of at most 128 columns, got 129"),
        (torch.float32, 16, (16, 21), "segment 21 is no multiple of its dilation 2 at 40 rows"),
    ],
)
def test_what_the_kernels_do_not_take(
    dtype: torch.dtype, dim: int, segments: tuple[int, ...], reason: str
) -> None:
    leaves = {n: t.to(dtype) for n, t in qkv(40, 2, dim).items()}
    how = {"segment_lengths": segments, "dilation_ratios": (1, 2)}
    with pytest.raises(
        RuntimeError, match=f"dilated_attention: impl='triton' can't run: .*{reason}"
    ):
        dilated_attention(**leaves, impl="triton", **how)
