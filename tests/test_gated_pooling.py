"""Gated attention pooling: the paper's formula literally, the CPU path, operators, cost model."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import gated_pool
from modaltune.kernels.gated_pooling.cost import gated_pool_cost
from modaltune.kernels.gated_pooling.triton_kernels import compile_specs
from modaltune.testing import (
    RAGGED,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

# The backward pass reads back rounded scores and their log-sum-exp, up to log(1000) + 1 < 8: half
# of 8 steps in exp(score - lse), doubled by the subtraction g - delta of like sums; and one step.
BACKWARD_STEPS = 9


def make_inputs(
    rows: int, width: int = 10, hidden: int = 6, heads: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    shapes = {
        "x": (rows, width),
        "value_weight": (hidden, width),
        "value_bias": (hidden,),
        "gate_weight": (hidden, width),
        "gate_bias": (hidden,),
        "score_weight": (heads, hidden),
        "score_bias": (heads,),
    }
    made = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    for name in ("value_weight", "gate_weight"):
        made[name] /= width**0.5
    return {name: t.to(dtype) for name, t in made.items()}


def pooled_of(**inputs: Any) -> Tensor:
    return gated_pool(**inputs)[0]


def both_of(**inputs: Any) -> Tensor:
    pooled, scores = gated_pool(**inputs)
    return torch.cat([pooled.flatten(), scores.to(pooled.dtype).flatten()])


def literal(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    lengths: list[int],
) -> Tensor:
    """Return what `both_of` does, a tile, a head and an exponential at a time."""
    heads = score_weight.shape[0]
    scores = []
    for tile in x:
        value, gate = value_weight @ tile + value_bias, gate_weight @ tile + gate_bias
        tanh = (torch.exp(value) - torch.exp(-value)) / (torch.exp(value) + torch.exp(-value))
        hidden = tanh / (1 + torch.exp(-gate))
        scores.append([(score_weight[c] * hidden).sum() + score_bias[c] for c in range(heads)])
    pooled = []
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        for c in range(heads):
            weights = [torch.exp(scores[row][c]) for row in range(start, end)]
            parts = [w / sum(weights) * x[start + i] for i, w in enumerate(weights)]
            pooled.append(torch.stack(parts).sum(0) if parts else x.new_zeros(x.shape[1]))
    flat = [score.reshape(1) for row in scores for score in row]
    return torch.cat([*pooled, *flat])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_matches_the_paper_literally(impl: str) -> None:
    lengths = [3, 7, 0, 1, 2, 5]
    inputs = make_inputs(sum(lengths))
    got = run_with_gradients(both_of, inputs, offsets=pack_offsets(lengths), impl=impl)
    want = run_with_gradients(literal, inputs, lengths=lengths)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs(7, width=3, hidden=2, heads=2)
    offsets = pack_offsets([3, 0, 4])
    torch.autograd.gradcheck(
        lambda *values: gated_pool(*values, offsets=offsets, impl=impl),
        [t.requires_grad_() for t in inputs.values()],
    )


@pytest.mark.parametrize("op", [pooled_of, both_of])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_cpu_loses_no_more_than_the_reference(dtype: torch.dtype, op: Any) -> None:
    lengths = [*RAGGED, 1050]  # the last one takes two row blocks
    check_against_reference(
        op,
        make_inputs(sum(lengths), width=33, hidden=20),
        impl="cpu",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        offsets=pack_offsets(lengths),
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_case_reads_no_other_case(impl: str) -> None:
    lengths = [6, 5, 0, 4]
    inputs = make_inputs(sum(lengths))
    how = {"offsets": pack_offsets(lengths), "impl": impl}
    want = run_with_gradients(pooled_of, inputs, **how)
    inputs["x"][6:11] = math.nan
    got = run_with_gradients(pooled_of, inputs, **how)
    assert got["out"][1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(got["out"][others], want["out"][others])
    rows = [*range(6), *range(11, 15)]
    assert torch.equal(got["grad x"][rows], want["grad x"][rows])


def test_same_bits_twice_for_strided_inputs_and_in_poisoned_memory() -> None:
    lengths = [130, 0, 17]
    inputs = make_inputs(sum(lengths), dtype=torch.float32)
    wide = normal(20, sum(lengths), 20, dtype=torch.float32)
    how = {"offsets": pack_offsets(lengths), "impl": "cpu"}
    first = run_with_gradients(both_of, {**inputs, "x": wide[:, ::2].contiguous()}, **how)
    with poisoned_memory():
        second = run_with_gradients(both_of, {**inputs, "x": wide[:, ::2]}, **how)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tiles_give_zeros(impl: str, lengths: list[int]) -> None:
    inputs = make_inputs(0)
    for t in inputs.values():
        t.requires_grad_()
    pooled, scores = gated_pool(**inputs, offsets=pack_offsets(lengths), impl=impl)
    assert torch.equal(pooled, torch.zeros(len(lengths), 3, 10, dtype=torch.float64))
    assert scores.shape == (0, 3)
    (pooled.sum() + scores.sum()).backward()
    for name, t in inputs.items():
        assert t.grad is None or (t.grad == 0).all(), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_scores_are_the_attention_map_and_large_ones_are_safe(impl: str) -> None:
    inputs = make_inputs(9, dtype=torch.float32)
    offsets = pack_offsets([4, 5])
    pooled, scores = gated_pool(**inputs, offsets=offsets, impl=impl)
    weights = torch.softmax(scores[4:], 0)
    torch.testing.assert_close(pooled[1], weights.t() @ inputs["x"][4:])
    inputs["score_bias"] = inputs["score_bias"] + 4096  # float32 keeps 2^-12 of the scores
    shifted = pooled_of(**inputs, offsets=offsets, impl=impl)
    torch.testing.assert_close(shifted, pooled, rtol=0, atol=1e-2)


def _saved(inputs: dict[str, Tensor], offsets: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        pooled, scores = gated_pool(**inputs, offsets=offsets, impl="cpu")
    known = {t.data_ptr() for t in (*inputs.values(), offsets)}
    others = [t for t in kept if t.data_ptr() not in known]
    outputs = {pooled.data_ptr(), scores.data_ptr()}
    assert not kept or outputs <= {t.data_ptr() for t in others}
    return [t for t in others if t.data_ptr() not in outputs]


def test_saves_its_outputs_and_one_number_per_case_and_head() -> None:
    inputs = make_inputs(40, dtype=torch.float32)
    offsets = pack_offsets([30, 10])
    inputs["gate_weight"].requires_grad_()
    saved = _saved(inputs, offsets)
    assert sum(t.numel() * t.element_size() for t in saved) == 4 * 2 * 3
    inputs["gate_weight"].requires_grad_(False)
    assert _saved(inputs, offsets) == []


def test_frozen_inputs_get_no_gradient_and_the_others_do_not_change() -> None:
    lengths = [20, 11]
    inputs, offsets = make_inputs(sum(lengths)), pack_offsets(lengths)
    pooled, scores, lse = torch.ops.modaltune.gated_pool_fwd(*inputs.values(), offsets, "cpu")

    def backward(needs: list[bool]) -> list[Tensor]:
        grads = torch.ones_like(pooled), torch.ones_like(scores)
        known = (*grads, *inputs.values(), pooled, scores, lse, offsets)
        return torch.ops.modaltune.gated_pool_bwd(*known, needs, "cpu")

    whole = backward([True] * 7)
    for wanted in ([0], [5], [6], [1, 4], []):
        found = backward([i in wanted for i in range(7)])
        assert len(found) == len(wanted)
        for i, grad in zip(wanted, found, strict=True):
            assert torch.equal(grad, whole[i])


def test_score_bias_has_a_gradient_through_the_scores_alone() -> None:
    inputs = make_inputs(12)
    assert (run_with_gradients(pooled_of, inputs, impl="cpu")["grad score_bias"] == 0).all()
    inputs["score_bias"].requires_grad_()
    gated_pool(**inputs, impl="cpu")[1].sum().backward()
    assert torch.equal(inputs["score_bias"].grad, torch.full((3,), 12.0, dtype=torch.float64))


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad: bool) -> None:
    lengths = [5, 0, 4]
    inputs = make_inputs(sum(lengths), dtype=torch.float32)
    values = [t.requires_grad_(grad) for t in inputs.values()]
    torch.library.opcheck(
        torch.ops.modaltune.gated_pool_fwd.default, (*values, pack_offsets(lengths), "cpu")
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    lengths = [20, 0, 13]
    inputs, offsets = make_inputs(sum(lengths), dtype=torch.float32), pack_offsets(lengths)
    torch.compiler.reset()
    compiled = torch.compile(both_of, fullgraph=True, backend=backend)
    got = run_with_gradients(compiled, inputs, offsets=offsets)
    want = run_with_gradients(both_of, inputs, offsets=offsets, impl="cpu")
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_compiled_calls_look_at_offsets() -> None:
    torch.compiler.reset()
    compiled = torch.compile(pooled_of, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of rows 9"):
        compiled(**make_inputs(9), offsets=torch.tensor([0, 4, 8]))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_casts_inputs_and_returns_gradients_in_their_dtype(impl: str) -> None:
    inputs = make_inputs(30, dtype=torch.float32)
    inputs["x"] = inputs["x"].half()  # stored features beside float32 weights
    for t in inputs.values():
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pooled, scores = gated_pool(**inputs, impl=impl)
        pooled.float().sum().backward()  # inside: the backward pass must not be autocast
    assert scores.dtype == torch.float32
    if impl == "cpu":
        assert pooled.dtype == torch.bfloat16
    for name, t in inputs.items():
        assert t.grad is not None, name
        assert t.grad.dtype == t.dtype, name
        assert t.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 10).long()}, TypeError, "x must be a floating point tensor, got"),
        ({"x": torch.zeros(9)}, ValueError, r"x must have shape \[\*, \*\], got \[9\]"),
        ({"value_weight": torch.zeros(6, 9)}, ValueError, r"value_weight must have shape \[6, 10"),
        ({"gate_weight": torch.zeros(5, 10)}, ValueError, r"gate_weight must have shape \[6, 10"),
        ({"value_bias": torch.zeros(5)}, ValueError, r"value_bias must have shape \[6\], got \[5"),
        ({"gate_bias": torch.zeros(6, 1)}, ValueError, r"gate_bias must have shape \[6\]"),
        ({"score_weight": torch.zeros(6)}, ValueError, r"score_weight must have shape \[\*, \*\]"),
        ({"score_weight": torch.zeros(0, 6)}, ValueError, "must be at least 1, got 0, 6, 10"),
        ({"score_bias": torch.zeros(6)}, ValueError, r"score_bias must have shape \[3\], got \[6"),
        (
            {"gate_bias": torch.zeros(6)},
            ValueError,
            r"gate_bias must have the dtype .* got torch.float32, cpu; cast it, or run under",
        ),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "offsets must rise from 0 to the num"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        (
            {"impl": "triton"},
            RuntimeError,
            "gated_pool: impl='triton' takes float16, bfloat16 or float32, got torch.float64",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_pool(**{**make_inputs(9), "offsets": pack_offsets([4, 5]), **change})


def test_triton_says_why_it_can_not_run() -> None:
    many = make_inputs(4, heads=17, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="takes at most 16 heads C, got 17; use impl='auto'"):
        gated_pool(**many, impl="triton")
    assert pooled_of(**many).shape == (1, 17, 10)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        gated_pool(**make_inputs(4, dtype=torch.float32), impl="triton")


def test_every_kernel_is_compiled_in_every_dtype() -> None:
    for capability in (80, 90, 100, 120):
        specs = compile_specs(capability)
        dtypes = {"fp16", "bf16", "fp32"}
        assert Counter(s.kernel for s in specs) == dict.fromkeys({s.kernel for s in specs}, 3)
        assert len({s.kernel for s in specs}) == 5
        assert {(s.kernel, s.dtype) for s in specs} == {
            (s.kernel, dtype) for s in specs for dtype in dtypes
        }


def test_cost_by_hand() -> None:
    # x 1000 x 768 and [V; U] 512 x 768 in bf16, pooled 768, scores 1000; 8 or 9 blocks of 128.
    found = gated_pool_cost(1000)
    assert found["flops"] == 4 * 1000 * 768 * 256 + 2 * 1000 * (256 + 768)
    assert found["least_bytes"] == 2 * (1000 + 512 + 1) * 768 + 4 * 1000
    assert found["moved_bytes"] - found["least_bytes"] == 8 * 770 * 4


GPUS = {  # capability, L2 bytes, multiprocessors
    "A100": (80, 40e6, 108),
    "H100": (90, 50e6, 132),
    "B200": (100, 126e6, 148),
    "RTX 4090": (120, 72e6, 128),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("width", "heads"), [(768, 1), (768, 4), (1536, 1), (1536, 4)])
def test_moves_little_more_than_the_least(gpu: str, width: int, heads: int) -> None:
    capability, l2_bytes, multiprocessors = GPUS[gpu]
    device = {"capability": capability, "multiprocessors": multiprocessors}
    for tiles in (1_000, 10_000, 25_000):
        found = gated_pool_cost(tiles, width, 256, heads, l2_bytes=int(l2_bytes), **device)
        assert found["moved_bytes"] <= 1.2 * found["least_bytes"]
