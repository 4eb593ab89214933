"""The extractor's attention: METHOD 3.6 literally, golden files, the CPU path, bad arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import extract
from modaltune.kernels.extraction import cpu
from modaltune.testing import (
    RAGGED,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

# The fused attention's backward reads back the rounded output, row sums and a log-sum-exp of up to
# log(1000) + 1, whose rounding alone moves exp(score - lse) by half of 8 steps; and one step for
# every kernel.
BACKWARD_STEPS = 7


def make_inputs(
    lengths: list[int],
    tokens: int = 4,
    width: int = 12,
    inner: int = 6,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    shapes = {
        "queries": (len(lengths), tokens, inner),
        "x": (sum(lengths), width),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "kv_weight": (2 * inner, width),
        "kv_bias": (2 * inner,),
    }
    made = {name: normal(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    made["kv_weight"] /= width**0.5
    return made


def literal(
    queries: Tensor,
    x: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    num_heads: int,
    lengths: list[int],
    num_prefix: int,
    eps: float = 1e-5,
) -> Tensor:
    """A modal token and a head at a time, over the tiles of its case."""
    cases, tokens, inner = queries.shape
    head_dim = inner // num_heads
    out, start = [], 0
    for case in range(cases):
        keys, values = [], []
        for row in range(start + num_prefix, start + lengths[case]):
            centred = x[row] - x[row].mean()
            normed = centred / torch.sqrt((centred * centred).mean() + eps)
            placed = normed * norm_weight + norm_bias
            keys.append(kv_weight[:inner] @ placed + kv_bias[:inner])
            values.append(kv_weight[inner:] @ placed + kv_bias[inner:])
        start += lengths[case]
        for token in range(tokens):
            for head in range(num_heads):
                at = slice(head * head_dim, (head + 1) * head_dim)
                query = queries[case, token, at]
                weights = [torch.exp((query * key[at]).sum() / head_dim**0.5) for key in keys]
                summed = torch.zeros(head_dim, dtype=x.dtype)
                for weight, value in zip(weights, values, strict=True):
                    summed = summed + weight / sum(weights) * value[at]
                out.append(summed)
    return torch.stack(out).reshape(cases, tokens, inner)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_matches_method_literally(impl: str, num_prefix: int) -> None:
    lengths = [3, 7, 0, 1, 2, 5]
    inputs = make_inputs(lengths)
    how = {"num_heads": 3, "num_prefix": num_prefix}
    got = run_with_gradients(extract, inputs, offsets=pack_offsets(lengths), impl=impl, **how)
    want = run_with_gradients(literal, inputs, lengths=lengths, **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_epsilon_is_that_given(impl: str) -> None:
    inputs = make_inputs([4])
    how = {"num_heads": 2, "num_prefix": 1, "eps": 0.3}
    got = extract(**inputs, impl=impl, **how)
    want = literal(**inputs, lengths=[4], **how)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs([3, 0, 4], tokens=2, width=3, inner=2)
    names = list(inputs)
    how = {"num_heads": 1, "offsets": pack_offsets([3, 0, 4]), "num_prefix": 1, "impl": impl}
    torch.autograd.gradcheck(
        lambda *values: extract(**dict(zip(names, values, strict=True)), **how),
        [t.requires_grad_() for t in inputs.values()],
    )


@pytest.mark.shared
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["case5_extractor", "case5_nocffn_extractor"])
def test_golden(shared_dir: Path, case: str, impl: str) -> None:
    """The published module around the kernel: `2 c + attention`, then its FFN."""
    stem = shared_dir / "golden" / case
    meta = json.loads(stem.with_suffix(".json").read_text())
    stored = {n: t.double() for n, t in load_file(stem.with_suffix(".safetensors")).items()}
    w = {n.removeprefix("weights/"): t for n, t in stored.items()}
    mha = {n.split("multihead_attn.")[1]: t for n, t in w.items() if n.startswith("attn.multi")}
    modal, x, positions = (stored[f"in/{n}"].requires_grad_() for n in ("query", "feat", "pos"))
    width = modal.shape[2:]
    queries = F.layer_norm(modal, width, w["attn.norm.weight"], w["attn.norm.bias"]) + positions
    if meta["with_cffn"]:
        wq, wk, wv = (mha[f"{n}_proj_weight"] for n in "qkv")
        queries = F.linear(queries, w["attn.q_proj.weight"], w["attn.q_proj.bias"])
    else:
        wq, wk, wv = mha["in_proj_weight"].chunk(3)
    bq, bk, bv = mha["in_proj_bias"].chunk(3)
    attended = extract(
        F.linear(queries, wq, bq),
        x[0],
        norm_weight=w["attn.norm_kq.weight"],
        norm_bias=w["attn.norm_kq.bias"],
        kv_weight=torch.cat([wk, wv]),
        kv_bias=torch.cat([bk, bv]),
        num_heads=meta["num_heads"],
        impl=impl,
    )
    y = F.linear(attended, mha["out_proj.weight"], mha["out_proj.bias"])
    if meta["with_cffn"]:
        y = F.linear(y, w["attn.output_proj.weight"], w["attn.output_proj.bias"])
    y = 2 * modal + y
    if meta["with_cffn"]:
        hidden = F.layer_norm(y, width, w["ffn.norm.weight"], w["ffn.norm.bias"])
        hidden = F.relu(F.linear(hidden, w["ffn.linear1.weight"], w["ffn.linear1.bias"]))
        y = y + F.linear(hidden, w["ffn.linear2.weight"], w["ffn.linear2.bias"])
    y.backward(stored["in/grad_out"])
    error = torch.linalg.norm(y - stored["out/y"]) / torch.linalg.norm(y)
    assert error <= 1.5 * meta["ref_fp32_vs_fp64"]["y"]["rel_fro"]
    for leaf, name in ((modal, "query"), (x, "feat"), (positions, "pos")):
        want = stored[f"grad_in/{name}"]
        # The published run is float32; METHOD gives 1.1e-6 for its gradients.
        assert torch.linalg.norm(leaf.grad - want) <= 1.1e-6 * torch.linalg.norm(want), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("num_prefix", "tokens", "block_rows"), [(0, 1, 2048), (1, 1, 100), (1, 65, 2048), (0, 65, 100)]
)
def test_cpu_loses_no_more_than_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_prefix: int,
    tokens: int,
    block_rows: int,
) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ROWS", block_rows)
    inputs = make_inputs(list(RAGGED), tokens=tokens, width=48, inner=12)
    check_against_reference(
        extract,
        inputs,
        impl="cpu",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        num_heads=3,
        offsets=pack_offsets(RAGGED),
        num_prefix=num_prefix,
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_prefix_rows_and_other_cases_are_never_read(impl: str) -> None:
    """NaN in the prefix rows shows nowhere; NaN in a case stays in it; both take no gradient."""
    lengths = [6, 5, 2, 4]
    clean = make_inputs(lengths)
    offsets = pack_offsets(lengths)
    how = {"num_heads": 2, "offsets": offsets, "num_prefix": 2, "impl": impl}
    want = run_with_gradients(extract, clean, **how)
    prefix = torch.cat([offsets[:-1], offsets[:-1] + 1])
    poisoned = {name: t.clone() for name, t in clean.items()}
    poisoned["x"][prefix] = math.nan
    got = run_with_gradients(extract, poisoned, **how)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert (got["grad x"][prefix] == 0).all()
    # Case 2 holds prefix rows only: nothing to extract.
    assert (got["out"][2] == 0).all()
    assert (got["grad queries"][2] == 0).all()
    poisoned["x"][6:11] = math.nan
    got = run_with_gradients(extract, poisoned, **how)
    assert got["out"][1].isnan().all()
    for case in (0, 2, 3):
        assert torch.equal(got["out"][case], want["out"][case])
        assert torch.equal(got["grad queries"][case], want["grad queries"][case])


def test_same_bits_twice_for_strided_inputs_and_in_poisoned_memory() -> None:
    lengths = [130, 0, 17]
    inputs = make_inputs(lengths, dtype=torch.float32)
    wide = normal(20, 147, 24, dtype=torch.float32)
    packed = normal(21, 3, 8, 6, dtype=torch.float32)
    inputs |= {"x": wide[:, ::2].contiguous(), "queries": packed[:, ::2].contiguous()}
    how = {"num_heads": 3, "offsets": pack_offsets(lengths), "num_prefix": 1, "impl": "cpu"}
    first = run_with_gradients(extract, inputs, **how)
    with poisoned_memory():
        strided = {**inputs, "x": wide[:, ::2], "queries": packed[:, ::2]}
        second = run_with_gradients(extract, strided, **how)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tiles_give_zeros(impl: str, lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    out = extract(**inputs, num_heads=2, offsets=pack_offsets(lengths), impl=impl)
    assert torch.equal(out, torch.zeros(len(lengths), 4, 6, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_queries(impl: str) -> None:
    inputs = make_inputs([4, 5])
    inputs["queries"] = inputs["queries"][:, :0]
    found = run_with_gradients(
        extract, inputs, num_heads=2, offsets=pack_offsets([4, 5]), impl=impl
    )
    assert found["out"].shape == (2, 0, 6)
    assert all((found[f"grad {name}"] == 0).all() for name in inputs)


def _valid() -> dict[str, object]:
    return {**make_inputs([4, 5]), "num_heads": 2, "offsets": pack_offsets([4, 5])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 12).long()}, TypeError, "x must be a floating point tensor, got"),
        ({"x": torch.zeros(9, 3, 4)}, ValueError, r"x must have shape \[\*, \*\], got \[9, 3, 4\]"),
        (
            {"queries": torch.zeros(4, 6)},
            ValueError,
            r"queries must have shape \[\*, \*, \*\]",
        ),
        ({"kv_weight": torch.zeros(6, 12)}, ValueError, r"kv_weight must have shape \[12, 12\]"),
        ({"kv_bias": torch.zeros(6)}, ValueError, r"kv_bias must have shape \[12\], got \[6\]"),
        ({"norm_weight": torch.zeros(1)}, ValueError, r"norm_weight must have shape \[12\]"),
        ({"norm_bias": torch.zeros(6)}, ValueError, r"norm_bias must have shape \[12\]"),
        ({"num_heads": 4}, ValueError, "num_heads must divide 6, got 4"),
        ({"num_heads": 0}, ValueError, "num_heads must divide 6, got 0"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be at least 0, got -1"),
        ({"offsets": torch.tensor([0, 9])}, ValueError, r"one row range per case \(2\), got 1"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "offsets must rise from 0 to the num"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, RuntimeError, "extract: impl='triton'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extract(**{**_valid(), **change})
