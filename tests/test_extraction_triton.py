"""The Triton kernels of the extractor in the interpreter: `TRITON_INTERPRET=1 pytest THIS_FILE`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import extract
from modaltune.kernels.extraction import triton_kernels
from modaltune.testing import (
    INTERPRET,
    allowed_error,
    at_default,
    check_against_reference,
    normal,
    pack_offsets,
    run_with_gradients,
)

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def large_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger blocks than shipped: the interpreter's time is per block."""
    if request.function is test_shipped_blocks or not INTERPRET:
        return
    shipped = triton_kernels.config

    def config(op: str, kernel: str, device: torch.device) -> dict[str, Any]:
        least = {"BLOCK_L": 64, "BLOCK_K": 128, "BLOCK_D": 256, "BLOCK_G": 16}
        found = shipped(op, kernel, device)
        return {n: max(v, least.get(n, v)) for n, v in found.items()}

    monkeypatch.setattr(triton_kernels, "config", config)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The backward pass reads back what was rounded: keys and values, the block results of which do . o
# is made, the log-sum-exp, and the gradients of keys and values. A step each.
BACKWARD_STEPS = 4
GUARD = 1 << 15  # elements before and after every buffer: more than a program can overrun
# Around the blocks of 64 (float32) and 128 rows, after one row of prefix.
LENGTHS = [1, 16, 0, 17, 2, 65, 128, 129, 130, 18]


def make_inputs(
    lengths: Sequence[int], tokens: int, width: int, inner: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    shapes = {
        "queries": (len(lengths), tokens, inner),
        "x": (sum(lengths), width),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "kv_weight": (2 * inner, width),
        "kv_bias": (2 * inner,),
    }
    made = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    made["kv_weight"] /= width**0.5
    return {name: t.to(dtype) for name, t in made.items()}


def check(
    lengths: Sequence[int],
    tokens: int,
    width: int,
    inner: int,
    heads: int,
    dtype: torch.dtype,
    num_prefix: int = 0,
) -> None:
    check_against_reference(
        extract,
        make_inputs(lengths, tokens, width, inner),
        impl="triton",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        num_heads=heads,
        offsets=pack_offsets(lengths),
        num_prefix=num_prefix,
    )


class GuardedMemory:
    """Allocates NaN inside and around every buffer; `check` sees writes beside one."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(tuple(shape))

    def check(self) -> None:
        for buffer, size in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[GUARD + size :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_batch_loses_no_more_than_the_reference(dtype: torch.dtype) -> None:
    """Three heads of 4 (padded to four of 16), a width that no block divides, a prefix row."""
    check(LENGTHS, tokens=7, width=40, inner=12, heads=3, dtype=dtype, num_prefix=1)


@pytest.mark.parametrize(
    ("tokens", "width", "inner", "heads", "dtype"),
    [
        (17, 64, 60, 5, torch.float16),
        (65, 33, 64, 4, torch.float16),
        (128, 16, 16, 1, torch.float16),
        (1, 130, 192, 2, torch.float32),
    ],
    ids=["two groups of heads", "64 + 16 queries", "64 + 64 queries", "heads of 96"],
)
def test_queries_and_heads_of_any_number(
    tokens: int, width: int, inner: int, heads: int, dtype: torch.dtype
) -> None:
    check([131, 5], tokens, width, inner, heads, dtype)


def test_many_blocks_of_one_case() -> None:
    check([2200, 257], tokens=3, width=16, inner=16, heads=1, dtype=torch.float16)


def test_shipped_blocks() -> None:
    """The blocks of float32 as they are shipped, several of them in rows and columns."""
    check([70], tokens=80, width=40, inner=32, heads=2, dtype=torch.float32, num_prefix=1)


def test_published_widths() -> None:
    check([70], tokens=65, width=768, inner=192, heads=12, dtype=torch.float16)


@pytest.mark.shared
@pytest.mark.parametrize("case", ["case5_extractor", "case5_nocffn_extractor"])
def test_golden(shared_dir: Path, case: str) -> None:
    """The published weights and inputs around the kernel, in float32, against float64."""
    stem = shared_dir / "golden" / case
    meta = json.loads(stem.with_suffix(".json").read_text())
    stored = load_file(stem.with_suffix(".safetensors"))
    stored = {n: at_default(t).double() for n, t in stored.items()}
    w = {n.removeprefix("weights/"): t for n, t in stored.items()}
    mha = {n.split("multihead_attn.")[1]: t for n, t in w.items() if n.startswith("attn.multi")}
    queries = F.layer_norm(
        stored["in/query"], stored["in/query"].shape[2:], w["attn.norm.weight"], w["attn.norm.bias"]
    )
    queries = queries + stored["in/pos"]
    if meta["with_cffn"]:
        wq, wk, wv = (mha[f"{n}_proj_weight"] for n in "qkv")
        queries = F.linear(queries, w["attn.q_proj.weight"], w["attn.q_proj.bias"])
    else:
        wq, wk, wv = mha["in_proj_weight"].chunk(3)
    bq, bk, bv = mha["in_proj_bias"].chunk(3)
    inputs = {
        "queries": F.linear(queries, wq, bq),
        "x": stored["in/feat"][0],
        "norm_weight": w["attn.norm_kq.weight"],
        "norm_bias": w["attn.norm_kq.bias"],
        "kv_weight": torch.cat([wk, wv]),
        "kv_bias": torch.cat([bk, bv]),
    }
    single = {name: t.float() for name, t in inputs.items()}
    attended = extract(**single, num_heads=meta["num_heads"], impl="triton").double()
    y = F.linear(attended, mha["out_proj.weight"], mha["out_proj.bias"])
    if meta["with_cffn"]:
        y = F.linear(y, w["attn.output_proj.weight"], w["attn.output_proj.bias"])
    y = 2 * stored["in/query"] + y
    if meta["with_cffn"]:
        hidden = F.layer_norm(y, y.shape[2:], w["ffn.norm.weight"], w["ffn.norm.bias"])
        hidden = F.relu(F.linear(hidden, w["ffn.linear1.weight"], w["ffn.linear1.bias"]))
        y = y + F.linear(hidden, w["ffn.linear2.weight"], w["ffn.linear2.bias"])
    error = torch.linalg.norm(y - stored["out/y"]) / torch.linalg.norm(y)
    assert error <= 1.5 * meta["ref_fp32_vs_fp64"]["y"]["rel_fro"]


def test_prefix_rows_and_other_cases_are_never_read() -> None:
    """NaN in the prefix rows shows nowhere; NaN in a case stays in it; both take no gradient."""
    lengths = [6, 5, 2, 4]
    clean = make_inputs(lengths, 4, 16, 16, torch.float32)
    offsets = pack_offsets(lengths)
    how = {"num_heads": 1, "offsets": offsets, "num_prefix": 2, "impl": "triton"}
    want = run_with_gradients(extract, clean, **how)
    prefix = torch.cat([offsets[:-1], offsets[:-1] + 1])
    poisoned = {name: t.clone() for name, t in clean.items()}
    poisoned["x"][prefix] = math.nan
    got = run_with_gradients(extract, poisoned, **how)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert (got["grad x"][prefix] == 0).all()
    assert (got["out"][2] == 0).all()
    assert (got["grad queries"][2] == 0).all()
    poisoned["x"][6:11] = math.nan
    got = run_with_gradients(extract, poisoned, **how)
    assert got["out"][1].isnan().all()
    for case in (0, 2, 3):
        assert torch.equal(got["out"][case], want["out"][case])
        assert torch.equal(got["grad queries"][case], want["grad queries"][case])


@pytest.mark.parametrize(("tokens", "heads"), [(3, 5), (65, 1)])
def test_writes_all_of_its_buffers_and_nothing_beside_them(
    tokens: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [131, 0, 3]
    inputs = make_inputs(lengths, tokens, 24, 6 * heads, torch.float16)
    how = {"num_heads": heads, "offsets": pack_offsets(lengths), "num_prefix": 1, "impl": "triton"}
    first = run_with_gradients(extract, inputs, **how)
    memory = GuardedMemory()
    monkeypatch.setattr(triton_kernels, "_allocate", memory)
    second = run_with_gradients(extract, inputs, **how)
    memory.check()
    assert len(memory.buffers) == 13
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_strided_inputs_give_the_same_result() -> None:
    """The same bits interpreted; a GPU compiles another program for another alignment."""
    lengths = [40, 17]
    inputs = make_inputs(lengths, 4, 24, 16, torch.float32)
    wide = normal(20, sum(lengths), 48, dtype=torch.float32)
    rows = normal(21, len(lengths), 8, 20, dtype=torch.float32)
    how = {"num_heads": 2, "offsets": pack_offsets(lengths), "impl": "triton"}
    for x, queries in ((wide[:, :24], rows[:, ::2, :16]), (wide[:, ::2], rows[:, 4:, 4:])):
        dense = {**inputs, "x": x.contiguous(), "queries": queries.contiguous()}
        first = run_with_gradients(extract, dense, **how)
        second = run_with_gradients(extract, {**inputs, "x": x, "queries": queries}, **how)
        for name in first:
            off = float((first[name] - second[name]).abs().max())
            steps = 0 if INTERPRET else 2 * BACKWARD_STEPS  # both are as far off as they may be
            assert off <= allowed_error(first[name], first[name], torch.float32, steps), name


@pytest.mark.parametrize(
    "wanted", [["queries"], ["x"], ["kv_bias", "norm_bias"], ["norm_weight"], ["queries", "x"]]
)
def test_gradients_are_the_same_whichever_are_asked_for(wanted: list[str]) -> None:
    lengths = [20, 9]
    inputs = make_inputs(lengths, 3, 16, 16, torch.float32)
    how = {"num_heads": 1, "offsets": pack_offsets(lengths), "num_prefix": 1, "impl": "triton"}
    every = run_with_gradients(extract, inputs, **how)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    out = extract(**leaves, **how)
    out.backward(normal(0, *out.shape, dtype=torch.float32))
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, every[f"grad {name}"]), name
        else:
            assert leaf.grad is None


def test_rows_far_from_zero_lose_no_more_than_the_reference() -> None:
    """The mean is 300 deviations off: sums of squares alone would leave no digit of a variance."""
    inputs = make_inputs([50], 3, 64, 16)
    inputs["x"] = inputs["x"] * 0.1 + 30
    check_against_reference(
        extract, inputs, impl="triton", gradient_steps=BACKWARD_STEPS, num_heads=1
    )


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tiles_give_zeros(lengths: list[int]) -> None:
    inputs = make_inputs(lengths, 4, 16, 16, torch.float16)
    how = {"num_heads": 2, "offsets": pack_offsets(lengths), "impl": "triton"}
    for name, got in run_with_gradients(extract, inputs, **how).items():
        assert (got == 0).all(), name


def test_saves_its_inputs_and_nothing_of_the_size_of_the_tiles() -> None:
    lengths = [30, 12]
    inputs = make_inputs(lengths, 5, 16, 32, torch.float16)
    offsets = pack_offsets(lengths)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    inputs["queries"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        extract(**inputs, num_heads=2, offsets=offsets, impl="triton")
    known = {t.data_ptr() for t in (*inputs.values(), offsets)}
    others = [t for t in kept if t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in others) == 4 * 2 * 5 * (32 + 2)
