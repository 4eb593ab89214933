"""The Triton kernels of gated pooling in the interpreter: `TRITON_INTERPRET=1 pytest THIS_FILE`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import gated_pool
from modaltune.kernels.gated_pooling.triton_kernels import (
    launch_gated_pool_bwd,
    launch_gated_pool_fwd,
)
from modaltune.testing import (
    allowed_error,
    cast,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

pytestmark = pytest.mark.triton

# As for the CPU path: rounded scores and log-sum-exp are read back. See test_gated_pooling.py.
BACKWARD_STEPS = 9
LENGTHS = [1, 15, 0, 16, 17, 127, 1000]
EDGES = [63, 64, 65, 128, 129]  # around the 64 rows of a forward and 128 of a backward block
WEIGHTS = ("value_weight", "value_bias", "gate_weight", "gate_bias", "score_weight", "score_bias")
GUARD = 1 << 16  # elements before and after every buffer: more than a block can overrun


def make_inputs(
    rows: int, width: int, hidden: int, heads: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    shapes = ((hidden, width), (hidden,), (hidden, width), (hidden,), (heads, hidden), (heads,))
    made = {"x": normal(9, rows, width)}
    for i, (name, shape) in enumerate(zip(WEIGHTS, shapes, strict=True)):
        made[name] = normal(i, *shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
    return {name: t.to(dtype) for name, t in made.items()}


def pooled_of(**inputs: Any) -> Tensor:
    return gated_pool(**inputs)[0]


def both_of(**inputs: Any) -> Tensor:
    pooled, scores = gated_pool(**inputs)
    return torch.cat([pooled.flatten(), scores.to(pooled.dtype).flatten()])


class GuardedMemory:
    """Allocates like `torch.empty`: NaN inside and around; `check` sees writes beside a buffer."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __call__(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(tuple(shape))

    def check(self) -> None:
        for buffer, size in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[GUARD + size :].isnan().all()


@pytest.mark.parametrize(
    ("op", "lengths", "width", "hidden", "heads"),
    [
        (both_of, LENGTHS, 48, 40, 3),
        (pooled_of, EDGES, 33, 17, 1),
        (pooled_of, [150], 80, 300, 2),
    ],
    ids=["ragged", "block edges", "several passes over K and D"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_loses_no_more_than_the_reference(
    op: Any, lengths: list[int], width: int, hidden: int, heads: int, dtype: torch.dtype
) -> None:
    check_against_reference(
        op,
        make_inputs(sum(lengths), width, hidden, heads),
        impl="triton",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        offsets=pack_offsets(lengths),
    )


def test_published_widths() -> None:
    lengths = [70, 58]
    check_against_reference(
        both_of,
        make_inputs(sum(lengths), 768, 256, 2),
        impl="triton",
        dtype=torch.float16,
        gradient_steps=BACKWARD_STEPS,
        offsets=pack_offsets(lengths),
    )


def _backward(inputs: dict[str, Tensor], offsets: Tensor, **how: Any) -> tuple[Tensor, ...]:
    outputs = launch_gated_pool_fwd(
        **inputs, offsets=offsets, **{k: v for k, v in how.items() if k == "empty"}
    )
    grads = (normal(30 + i, *t.shape, dtype=t.dtype) for i, t in enumerate(outputs[:2]))
    names = ("pooled", "scores", "lse")
    known = {**inputs, **dict(zip(names, outputs, strict=True)), "offsets": offsets}
    how = {"needs": [True] * 7, **how}
    return *outputs, *launch_gated_pool_bwd(*grads, **known, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_writes_every_output_and_nothing_beside_it(dtype: torch.dtype) -> None:
    lengths = [65, 0, 1, 130]
    inputs, offsets = make_inputs(sum(lengths), 33, 17, 2, dtype), pack_offsets(lengths)
    memory = GuardedMemory()
    found = _backward(inputs, offsets, empty=memory)
    memory.check()
    # pooled, scores, lse, 3 of partial sums; dv and du, dx, sums over tiles, splits of dV and dU.
    assert len(memory.buffers) == 10
    for name, t in zip(["pooled", "scores", "lse", "x", *WEIGHTS], found, strict=True):
        assert not t.isnan().any(), name
    with poisoned_memory():
        again = _backward(inputs, offsets)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)  # the same bits twice


def test_chunks_of_rows_add_up() -> None:
    lengths = [200, 0, 77, 300]
    inputs = make_inputs(sum(lengths), 48, 20, 2, torch.float32)
    offsets = pack_offsets(lengths)
    whole, chunks = (_backward(inputs, offsets, l2_bytes=size) for size in (2**30, 1))
    for name, one, many in zip(["x", *WEIGHTS], whole[3:], chunks[3:], strict=True):
        # Each form is a float32 sum over at most 577 rows; the order of the chunks differs.
        limit = allowed_error(one.double(), one, torch.float32, steps=8)
        assert (one - many).abs().max() <= limit, name
    assert torch.equal(whole[3], chunks[3])  # dx of a row does not depend on its chunk


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on NaN, which is the point
def test_a_case_reads_no_other_case_and_no_column_beside_its_own() -> None:
    lengths = [20, 64, 0, 33]
    inputs = make_inputs(sum(lengths), 40, 24, 2, torch.float32)
    how = {"offsets": pack_offsets(lengths), "impl": "triton"}
    want = run_with_gradients(pooled_of, inputs, **how)
    wide = torch.full((sum(lengths), 56), math.nan)
    wide[:, 8:48] = inputs["x"]
    wide[20:84] = math.nan
    got = run_with_gradients(pooled_of, {**inputs, "x": wide[:, 8:48]}, **how)
    assert got["out"][1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(got["out"][others], want["out"][others])
    rows = [*range(20), *range(84, 117)]
    assert torch.equal(got["grad x"][rows], want["grad x"][rows])
    columns = inputs["x"].t().contiguous().t()  # columns, not rows, lie together
    again = run_with_gradients(pooled_of, {**inputs, "x": columns}, **how)
    assert torch.equal(again["out"], want["out"])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tiles_give_zeros(lengths: list[int]) -> None:
    inputs = make_inputs(0, 33, 17, 2, torch.float32)
    with poisoned_memory():
        found = _backward(inputs, pack_offsets(lengths))
    assert torch.equal(found[0], torch.zeros(len(lengths), 2, 33))
    assert (found[2] == -math.inf).all()
    for grad in found[3:]:
        assert (grad == 0).all()


def test_large_scores_are_safe() -> None:
    lengths = [40, 90]
    inputs = make_inputs(sum(lengths), 32, 16, 2, torch.float32)
    inputs["score_weight"] *= 200  # scores of some hundreds: exp overflows without its maximum
    exact = cast(inputs, torch.float64)
    offsets = pack_offsets(lengths)
    got = pooled_of(**inputs, offsets=offsets, impl="triton")
    plain = pooled_of(**inputs, offsets=offsets, impl="reference")
    want, scores = gated_pool(**exact, offsets=offsets, impl="reference")
    largest = int(scores.abs().max())
    assert largest > 100
    # A score is rounded to half a step of its size, and the weight it gives moves by as much.
    assert (got - want).abs().max() <= allowed_error(want, plain, torch.float32, steps=largest)


def test_frozen_inputs_cost_nothing() -> None:
    lengths = [70, 30]
    inputs, offsets = make_inputs(100, 40, 24, 2, torch.float32), pack_offsets(lengths)
    whole = _backward(inputs, offsets)[3:]
    for wanted in ([0], [5], [2, 3], [6], []):
        memory = GuardedMemory()
        needs = [i in wanted for i in range(7)]
        found = _backward(inputs, offsets, needs=needs, empty=memory)[3:]
        assert len(found) == len(wanted)
        for i, grad in zip(wanted, found, strict=True):
            assert torch.equal(grad, whole[i])
        _, of_x, sums, splits = (size for _, size in memory.buffers[6:])
        assert (of_x > 0) == (0 in wanted)
        assert (sums > 0) == bool({1, 2, 3, 4, 5} & set(wanted))
        assert (splits > 0) == bool({1, 3} & set(wanted))


def test_operators_and_autocast_take_the_kernels() -> None:
    inputs = make_inputs(30, 16, 16, 1, torch.float32)
    want = pooled_of(**cast(inputs, torch.bfloat16), impl="triton")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(pooled_of(**inputs, impl="triton"), want)
