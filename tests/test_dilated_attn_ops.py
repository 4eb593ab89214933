"""Dilated attention: operators, bytes saved, the CPU path's corners, layouts, cost model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import dilated_attention
from modaltune.kernels.dilated_attn import cpu
from modaltune.kernels.dilated_attn.cost import dilated_attn_cost
from modaltune.kernels.dilated_attn.triton_kernels import compile_specs
from modaltune.testing import (
    check_against_reference,
    normal,
    pack_offsets,
    run_with_gradients,
)

SEGMENTS, RATIOS = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
ALIGNED = {"segment_lengths": (16, 32, 64), "dilation_ratios": (1, 2, 4)}
# As in test_dilated_attn.py: a log-sum-exp of up to log2(200) + 1 < 9 is read back, rounded once.
BACKWARD_STEPS = 10


def qkv(
    rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    return {n: normal(seed + i, rows, heads, dim, dtype=dtype) for i, n in enumerate("qkv")}


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad: bool) -> None:
    lengths = [20, 0, 5]
    inputs = qkv(sum(lengths), 4, 8, torch.float32)
    values = [t.requires_grad_(grad) for t in inputs.values()]
    branches = (pack_offsets(lengths), [8, 16], [1, 2])
    torch.library.opcheck(
        torch.ops.modaltune.dilated_attn_fwd.default, (*values, *branches, 0.3, "cpu")
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    lengths = [40, 0, 13]
    inputs, offsets = qkv(sum(lengths), 4, 8, torch.float32), pack_offsets(lengths)
    how = {**ALIGNED, "offsets": offsets}
    torch.compiler.reset()
    compiled = torch.compile(dilated_attention, fullgraph=True, backend=backend)
    got = run_with_gradients(compiled, inputs, **how)
    want = run_with_gradients(dilated_attention, inputs, impl="cpu", **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_compiled_code_still_refuses_misaligned_segments() -> None:
    torch.compiler.reset()
    compiled = torch.compile(dilated_attention, fullgraph=True, backend="aot_eager")
    inputs = qkv(40, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="segment 21 is no multiple of its dilation 2 at 40"):
        compiled(**inputs, segment_lengths=(16, 21), dilation_ratios=(1, 2))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_and_returns_gradients_in_their_dtype(
    impl: str, dtype: torch.dtype
) -> None:
    inputs = {n: t.requires_grad_() for n, t in qkv(40, 4, 8, torch.float32).items()}
    with torch.autocast("cpu", dtype):
        out = dilated_attention(**inputs, **ALIGNED, impl=impl)
        out.float().square().sum().backward()  # inside: the backward pass must not be autocast
    if impl == "cpu":
        assert out.dtype == dtype
    for name, t in inputs.items():
        assert t.grad is not None, name
        assert t.grad.dtype == torch.float32, name
        assert t.grad.isfinite().all(), name


def _saved(inputs: dict[str, Tensor], offsets: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        dilated_attention(**inputs, **ALIGNED, offsets=offsets, impl="cpu")
    known = {t.data_ptr() for t in (*inputs.values(), offsets)}
    return [t for t in kept if t.data_ptr() not in known]


def test_saves_its_inputs_and_one_number_per_row_and_head() -> None:
    """Neither the output nor anything of a branch; nothing at all where no gradient is needed."""
    inputs, offsets = qkv(50, 4, 8, torch.float32), pack_offsets([30, 20])
    assert _saved(inputs, offsets) == []
    inputs["k"].requires_grad_()
    assert sum(t.numel() * t.element_size() for t in _saved(inputs, offsets)) == 4 * 50 * 4


def test_gradients_of_some_inputs_are_the_same_bits() -> None:
    inputs, offsets = qkv(60, 4, 8, torch.float32), pack_offsets([25, 35])
    fixed = (offsets, list(ALIGNED["segment_lengths"]), list(ALIGNED["dilation_ratios"]), 0.3)
    out, lse = torch.ops.modaltune.dilated_attn_fwd(*inputs.values(), *fixed, "cpu")

    def backward(needs: list[bool]) -> list[Tensor]:
        known = (torch.ones_like(out), *inputs.values(), lse, *fixed)
        return torch.ops.modaltune.dilated_attn_bwd(*known, needs, "cpu")

    whole = backward([True] * 3)
    for wanted in ([0], [1], [2], [0, 1], []):
        found = backward([i in wanted for i in range(3)])
        assert len(found) == len(wanted)
        for i, grad in zip(wanted, found, strict=True):
            assert torch.equal(grad, whole[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu(dtype: torch.dtype) -> None:
    lengths = [0, 1, 17, 100]
    check_against_reference(
        dilated_attention,
        qkv(sum(lengths), 6, 8),
        impl="cpu",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        offsets=pack_offsets(lengths),
        **ALIGNED,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 6.0])
def test_scores_that_norms_do_not_bound(dtype: torch.dtype, scale: float) -> None:
    """At scale 6 the accumulators follow the largest score; zero keys are in some branches."""
    lengths = [1, 40, 130]
    check_against_reference(
        dilated_attention,
        qkv(sum(lengths), 4, 8),
        impl="cpu",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        offsets=pack_offsets(lengths),
        scale=scale,
        **ALIGNED,
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(sign: int) -> None:
    """Near -300 a zero key, whose score is 0, outweighs all others; near 300 it has no part."""
    inputs = qkv(41, 2, 16)
    inputs["q"], inputs["k"] = 4 + inputs["q"] / 64, sign * (4 + inputs["k"] / 64)
    check_against_reference(
        dilated_attention,
        inputs,
        impl="cpu",
        gradient_steps=BACKWARD_STEPS,
        scale=300 / 256,
        segment_lengths=(16, 32, 32),
        dilation_ratios=(1, 2, 4),
    )


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another product library gives the same numbers up to rounding."""
    inputs = qkv(200, 2, 8, torch.float32)
    how = {"segment_lengths": (200,), "dilation_ratios": (1,), "impl": "cpu"}
    assert cpu.PRODUCT is not None
    want = run_with_gradients(dilated_attention, inputs, **how)
    monkeypatch.setattr(cpu, "PRODUCT", None)
    got = run_with_gradients(dilated_attention, inputs, **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)


_THREADS = """
import torch
from modaltune.kernels import dilated_attention
torch.manual_seed(0)
leaves = [t.requires_grad_() for t in torch.randn(3, 300, 4, 8)]
found = []
for threads in (1, 2, 3, 2):
    torch.set_num_threads(threads)
    out = dilated_attention(*leaves, segment_lengths=(64, 300), dilation_ratios=(1, 2))
    found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert torch.get_num_threads() == threads
    assert out.grad_fn is not None
print(all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)))
"""


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Also: torch's own number of threads is left as it was."""
    command = [sys.executable, "-c", _THREADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["True"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU")
def test_triton_says_why_it_can_not_run() -> None:
    inputs = qkv(9, 2, 8, torch.float32)
    with pytest.raises(RuntimeError, match="CPU tensors need TRITON_INTERPRET=1 before Python"):
        dilated_attention(**inputs, **ALIGNED, impl="triton")
    with pytest.raises(RuntimeError, match="float16, bfloat16 or float32, got torch"):
        dilated_attention(**qkv(9, 2, 8), **ALIGNED, impl="triton")


def test_few_compilations_that_cover_every_shipped_configuration() -> None:
    specs = [s for capability in (80, 90, 100, 120) for s in compile_specs(capability)]
    assert len(specs) == 36
    assert set(Counter(s.label for s in specs).values()) == {1}
    kernels = {s.kernel for s in specs}
    assert len(kernels) == 3
    for capability in (80, 90, 100, 120):
        here = [s for s in specs if s.capability == capability]
        half = {(s.kernel, s.constexprs["HEAD_DIM"]) for s in here if s.dtype == "bf16"}
        assert half == {(kernel, width) for kernel in kernels for width in (48, 128)}
    assert {s.kernel for s in specs if s.dtype == "fp32"} == kernels


def test_cost_by_hand() -> None:
    # 100 rows, 2 heads of 16: branch 1 in segments of 64 and 36 rows; in branch 2 head 0 has the
    # even rows and head 1 the odd ones, 50 each. bf16 rows of 32 bytes are one sector.
    found = dilated_attn_cost(
        [100], heads=2, head_dim=16, segment_lengths=(64, 100), dilation_ratios=(1, 2)
    )
    pairs = 2 * (64**2 + 36**2) + 2 * 50**2
    assert found.flops == 4 * 16 * pairs
    assert found.least_bytes == 4 * 100 * 2 * 16 * 2
    assert found.moved_bytes == found.least_bytes + 4 * 100 * 2  # and the log-sum-exp


L2_BYTES = {"A100": 40e6, "H100": 50e6, "B200": 126e6, "RTX 4090": 72e6}


@pytest.mark.parametrize("gpu", L2_BYTES)
@pytest.mark.parametrize("backward", [False, True])
def test_moves_little_more_than_the_least(gpu: str, backward: bool) -> None:
    for tiles in (1_000, 10_000, 25_000):
        found = dilated_attn_cost([tiles], l2_bytes=int(L2_BYTES[gpu]), backward=backward)
        assert found.moved_bytes <= 1.3 * found.least_bytes


def test_cost_sees_keys_that_leave_the_l2() -> None:
    found = dilated_attn_cost([25_000], l2_bytes=2**20)
    assert found.moved_bytes > 3 * found.least_bytes


def test_longest_possible_segments_are_no_special_case() -> None:
    """Segments beyond 32 bits are as good as one segment."""
    inputs: dict[str, Any] = qkv(30, 2, 8)
    how = {"dilation_ratios": (1, 2), "impl": "cpu"}
    want = dilated_attention(**inputs, segment_lengths=(16, 30), **how)
    assert torch.equal(dilated_attention(**inputs, segment_lengths=(16, 2**40), **how), want)
