"""The injector's attention: METHOD 3.6 literally, golden files, the CPU path, bad arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import inject
from modaltune.kernels.injection import cpu
from modaltune.testing import (
    RAGGED,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

# The fused attention's backward reads back the rounded output, log-sum-exp and row sums: a step
# each, beside the one every kernel has.
BACKWARD_STEPS = 4


def make_inputs(
    lengths: list[int],
    tokens: int = 5,
    width: int = 12,
    inner: int = 6,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    cases, rows = len(lengths), sum(lengths)
    shapes = {
        "x": (rows, width),
        "keys": (cases, tokens, inner),
        "values": (cases, tokens, inner),
        "gamma": (width,),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "query_weight": (inner, width),
        "query_bias": (inner,),
        "output_weight": (width, inner),
        "output_bias": (width,),
    }
    made = {name: normal(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    made["query_weight"] /= width**0.5
    made["output_weight"] /= inner**0.5
    return made


def literal(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    num_heads: int,
    lengths: list[int],
    num_prefix: int,
    eps: float = 1e-5,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`x + gamma * (x + attn(LN(x)))`, a tile and a head at a time."""
    out, row = [], 0
    head_dim = keys.shape[2] // num_heads
    for case, length in enumerate(lengths):
        shown = [g for g in range(keys.shape[1]) if key_mask is None or key_mask[case, g]]
        for place in range(length):
            tile = x[row]
            row += 1
            if place < num_prefix or not shown:
                out.append(tile)
                continue
            centred = tile - tile.mean()
            normed = centred / torch.sqrt((centred * centred).mean() + eps)
            query = query_weight @ (normed * norm_weight + norm_bias) + query_bias
            attended = []
            for head in range(num_heads):
                at = slice(head * head_dim, (head + 1) * head_dim)
                scores = [(query[at] * keys[case, g, at]).sum() / head_dim**0.5 for g in shown]
                total = sum(torch.exp(score) for score in scores)
                weights = [torch.exp(score) / total for score in scores]
                parts = [w * values[case, g, at] for w, g in zip(weights, shown, strict=True)]
                attended.append(sum(parts[1:], parts[0]))
            update = output_weight @ torch.cat(attended) + output_bias
            out.append(tile + gamma * (tile + update))
    return torch.stack(out)


def masks(cases: int, tokens: int) -> Tensor:
    """Every other case whole, the third without any token, the others with some hidden."""
    mask = torch.ones(cases, tokens, dtype=torch.bool)
    mask[1::2, ::2] = False
    mask[2] = False
    return mask


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_matches_method_literally(impl: str, masked: bool, num_prefix: int) -> None:
    lengths = [3, 7, 4, 0, 2, 1, 5]
    inputs = make_inputs(lengths)
    how = {"num_heads": 3, "num_prefix": num_prefix, "key_mask": masks(7, 5) if masked else None}
    got = run_with_gradients(inject, inputs, offsets=pack_offsets(lengths), impl=impl, **how)
    want = run_with_gradients(literal, inputs, lengths=lengths, **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_epsilon_is_that_given(impl: str) -> None:
    inputs = make_inputs([4])
    how = {"num_heads": 2, "num_prefix": 1, "eps": 0.3}
    got = inject(**inputs, impl=impl, **how)
    want = literal(**inputs, lengths=[4], **how)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs([2, 0, 3], tokens=2, width=3, inner=2)
    names = list(inputs)
    how = {"num_heads": 1, "offsets": pack_offsets([2, 0, 3]), "num_prefix": 1, "impl": impl}
    torch.autograd.gradcheck(
        lambda *values: inject(**dict(zip(names, values, strict=True)), **how),
        [t.requires_grad_() for t in inputs.values()],
    )


@pytest.mark.shared
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["case5_injector", "case5_nocffn_injector"])
def test_golden(shared_dir: Path, case: str, impl: str) -> None:
    """The published module, its projections folded here by hand; gradients of its inputs."""
    stem = shared_dir / "golden" / case
    meta = json.loads(stem.with_suffix(".json").read_text())
    stored = {n: t.double() for n, t in load_file(stem.with_suffix(".safetensors")).items()}
    w = {n.removeprefix("weights/"): t for n, t in stored.items()}
    mha = {n.split("multihead_attn.")[1]: t for n, t in w.items() if n.startswith("attn.multi")}
    if meta["with_cffn"]:
        wq, wk, wv = (mha[f"{n}_proj_weight"] for n in "qkv")
    else:
        wq, wk, wv = mha["in_proj_weight"].chunk(3)
    bq, bk, bv = mha["in_proj_bias"].chunk(3)
    query, output = (wq, bq), (mha["out_proj.weight"], mha["out_proj.bias"])
    if meta["with_cffn"]:
        query = (wq @ w["attn.q_proj.weight"], wq @ w["attn.q_proj.bias"] + bq)
        expand, bias = w["attn.output_proj.weight"], w["attn.output_proj.bias"]
        output = (expand @ output[0], expand @ output[1] + bias)
    x, modal, positions = (stored[f"in/{n}"].requires_grad_() for n in ("query", "feat", "pos"))
    kv = F.layer_norm(modal, modal.shape[-1:], w["attn.norm_kq.weight"], w["attn.norm_kq.bias"])
    kv = kv + positions
    y = inject(
        x[0],
        F.linear(kv, wk, bk),
        F.linear(kv, wv, bv),
        w["gamma"],
        norm_weight=w["attn.norm.weight"],
        norm_bias=w["attn.norm.bias"],
        query_weight=query[0],
        query_bias=query[1],
        output_weight=output[0],
        output_bias=output[1],
        num_heads=meta["num_heads"],
        impl=impl,
    )
    y.backward(stored["in/grad_out"][0])
    error = torch.linalg.norm(y - stored["out/y"][0]) / torch.linalg.norm(y)
    assert error <= 1.5 * meta["ref_fp32_vs_fp64"]["y"]["rel_fro"]
    for leaf, name in ((x, "query"), (modal, "feat"), (positions, "pos")):
        want = stored[f"grad_in/{name}"]
        # The published run is float32; METHOD gives 1.1e-6 for its gradients.
        assert torch.linalg.norm(leaf.grad - want) <= 1.1e-6 * torch.linalg.norm(want), name


@pytest.mark.parametrize("block_rows", [1, 100, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_cpu_loses_no_more_than_the_reference(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, dtype: torch.dtype, masked: bool
) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ROWS", block_rows)
    lengths = [n for n in RAGGED if n < 1000 or block_rows > 1]
    inputs = make_inputs(lengths, tokens=9, width=48, inner=12)
    check_against_reference(
        inject,
        inputs,
        impl="cpu",
        dtype=dtype,
        gradient_steps=BACKWARD_STEPS,
        num_heads=3,
        offsets=pack_offsets(lengths),
        num_prefix=1,
        key_mask=masks(len(lengths), 9) if masked else None,
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_hidden_tokens_and_prefix_rows_are_never_read(impl: str) -> None:
    """NaN in them shows nowhere but in the prefix rows themselves, and takes no gradient."""
    lengths = [6, 5, 4, 3]
    clean, mask = make_inputs(lengths), masks(4, 5)
    offsets = pack_offsets(lengths)
    how = {"num_heads": 2, "offsets": offsets, "num_prefix": 2, "key_mask": mask, "impl": impl}
    want = run_with_gradients(inject, clean, **how)
    poisoned = {name: t.clone() for name, t in clean.items()}
    prefix = torch.cat([offsets[:-1], offsets[:-1] + 1])
    poisoned["x"][prefix] = math.nan
    poisoned["keys"][~mask] = poisoned["values"][~mask] = math.nan
    got = run_with_gradients(inject, poisoned, **how)
    assert got["out"][prefix].isnan().all()
    got["out"][prefix] = want["out"][prefix]
    for name in want:
        assert torch.equal(got[name], want[name]), name
    for name in ("grad keys", "grad values"):
        assert (got[name][~mask] == 0).all()
    # Case 2 has no token: its rows pass through.
    assert torch.equal(want["out"][11:15], clean["x"][11:15])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_closed_gate_leaves_the_stream_untouched(impl: str) -> None:
    inputs = make_inputs([9])
    inputs["gamma"].zero_()
    assert torch.equal(inject(**inputs, num_heads=2, impl=impl), inputs["x"])


def test_same_bits_twice_for_strided_inputs_and_in_poisoned_memory() -> None:
    """Keys and values as halves of one projection, as a fused caller has them."""
    lengths = [130, 0, 17]
    inputs = make_inputs(lengths, dtype=torch.float32)
    fused = torch.cat([inputs["keys"], inputs["values"]], dim=2)
    wide = normal(20, 147, 24, dtype=torch.float32)
    inputs["x"] = wide[:, ::2].contiguous()
    how = {"num_heads": 3, "offsets": pack_offsets(lengths), "num_prefix": 1, "impl": "cpu"}
    first = run_with_gradients(inject, inputs, **how)
    strided = {**inputs, "x": wide[:, ::2], "keys": fused[..., :6], "values": fused[..., 6:]}
    with poisoned_memory():
        second = run_with_gradients(inject, strided, **how)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tiles(impl: str, lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    found = run_with_gradients(
        inject, inputs, num_heads=2, offsets=pack_offsets(lengths), impl=impl
    )
    assert found["out"].shape == (0, 12)
    assert all(found[f"grad {n}"].shape == t.shape for n, t in inputs.items())


def _valid() -> dict[str, object]:
    return {**make_inputs([4, 5]), "num_heads": 2, "offsets": pack_offsets([4, 5])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 12).long()}, TypeError, "x must be a floating point tensor, got"),
        ({"x": torch.zeros(9, 3, 4)}, ValueError, r"x must have shape \[\*, \*\], got \[9, 3, 4\]"),
        ({"keys": torch.zeros(5, 6)}, ValueError, r"keys must have shape \[\*, \*, \*\]"),
        ({"values": torch.zeros(2, 4, 6)}, ValueError, r"values must have shape \[2, 5, 6\]"),
        ({"gamma": torch.zeros(1)}, ValueError, r"gamma must have shape \[12\], got \[1\]"),
        ({"norm_weight": torch.zeros(6)}, ValueError, r"norm_weight must have shape \[12\]"),
        ({"norm_bias": torch.zeros(6)}, ValueError, r"norm_bias must have shape \[12\]"),
        ({"query_weight": torch.zeros(12, 6)}, ValueError, r"query_weight must have shape \[6, 12"),
        ({"query_bias": torch.zeros(12)}, ValueError, r"query_bias must have shape \[6\]"),
        ({"output_weight": torch.zeros(6, 12)}, ValueError, r"output_weight must have shape \[12,"),
        ({"output_bias": torch.zeros(6)}, ValueError, r"output_bias must have shape \[12\]"),
        ({"key_mask": torch.ones(5).bool()}, ValueError, r"key_mask must have shape \[2, 5\]"),
        ({"key_mask": torch.ones(2, 5).long()}, ValueError, "key_mask must be bool, got torch.int"),
        ({"num_heads": 4}, ValueError, "num_heads must divide 6, got 4"),
        ({"num_heads": 0}, ValueError, "num_heads must divide 6, got 0"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be at least 0, got -1"),
        ({"offsets": torch.tensor([0, 9])}, ValueError, r"one row range per case \(2\), got 1"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "offsets must rise from 0 to the num"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, RuntimeError, "inject: impl='triton'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inject(**{**_valid(), **change})
