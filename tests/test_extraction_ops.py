"""The extractor's operators: registration, compilation, autocast, what is saved, the cost model."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modaltune.kernels import extract
from modaltune.kernels.extraction.cost import extraction_cost
from modaltune.testing import normal, pack_offsets, run_with_gradients

LENGTHS = [5, 0, 4, 1]


def make_inputs(dtype: torch.dtype = torch.float32, inner: int = 6) -> dict[str, Tensor]:
    shapes = {
        "queries": (len(LENGTHS), 3, inner),
        "x": (sum(LENGTHS), 8),
        "norm_weight": (8,),
        "norm_bias": (8,),
        "kv_weight": (2 * inner, 8),
        "kv_bias": (2 * inner,),
    }
    return {n: normal(i, *s, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad: bool) -> None:
    values = [t.requires_grad_(grad) for t in make_inputs().values()]
    torch.library.opcheck(
        torch.ops.modaltune.extract_fwd.default,
        (*values, pack_offsets(LENGTHS), 2, 1, 1e-5, "cpu"),
    )


@pytest.mark.parametrize("needs", [[True] * 6, [True, False, False, True, False, True]])
def test_opcheck_of_backward(needs: list[bool]) -> None:
    values = list(make_inputs().values())
    how = (pack_offsets(LENGTHS), 2, 1, 1e-5)
    _, out, lse = torch.ops.modaltune.extract_fwd(*values, *how, "cpu")
    arguments = (normal(9, 4, 3, 6, dtype=torch.float32), *values, out, lse)
    torch.library.opcheck(
        torch.ops.modaltune.extract_bwd.default,
        (*arguments, *how, needs, "cpu"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("given", [True, False], ids=["ragged", "one case"])
def test_compiles_as_one_graph(given: bool) -> None:
    inputs = make_inputs()
    how = {"num_heads": 2, "num_prefix": 1}
    if given:
        how |= {"offsets": pack_offsets(LENGTHS)}
    else:
        inputs["queries"] = inputs["queries"][:1]
    torch.compiler.reset()
    compiled = torch.compile(extract, fullgraph=True, backend="aot_eager")
    got = run_with_gradients(compiled, inputs, **how)
    want = run_with_gradients(extract, inputs, impl="cpu", **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_a_compiled_call_checks_its_offsets() -> None:
    inputs = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(extract, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of rows 10"):
        compiled(**inputs, num_heads=2, offsets=torch.tensor([0, 5, 5, 9, 99]))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_casts_inputs_and_returns_gradients_in_their_dtype(impl: str) -> None:
    inputs = make_inputs()
    inputs["x"] = inputs["x"].half()  # stored features beside float32 weights
    for t in inputs.values():
        t.requires_grad_()
    offsets = pack_offsets(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        out = extract(**inputs, num_heads=2, offsets=offsets, impl=impl)
        out.float().sum().backward()  # inside: the backward pass must not be autocast
    if impl == "cpu":
        assert out.dtype == torch.bfloat16
    for name, t in inputs.items():
        assert t.grad.dtype == t.dtype, name


def test_backward_inside_autocast_is_not_rounded() -> None:
    inputs = {n: t.requires_grad_() for n, t in make_inputs().items()}
    how = {"num_heads": 2, "offsets": pack_offsets(LENGTHS), "impl": "cpu"}
    found = []
    for inside in (False, True):
        out = extract(**inputs, **how)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(out.square().sum(), list(inputs.values())))
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_gradients_flow_under_a_dispatch_mode() -> None:
    """Profiling modes run the operators' bodies with autograd off."""
    inputs, how = make_inputs(), {"num_heads": 2, "offsets": pack_offsets(LENGTHS)}
    want = run_with_gradients(extract, inputs, impl="cpu", **how)
    with FlopCounterMode(display=False):
        got = run_with_gradients(extract, inputs, impl="cpu", **how)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def _saved(inputs: dict[str, Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        extract(**inputs, num_heads=2, offsets=pack_offsets(LENGTHS), impl="cpu")
    return kept


def test_saves_what_it_says_and_nothing_where_all_is_frozen() -> None:
    inputs = make_inputs()
    assert _saved(inputs) == []
    inputs["kv_bias"].requires_grad_()
    known = {t.data_ptr() for t in inputs.values()}
    others = [t for t in _saved(inputs) if t.data_ptr() not in known]
    # Result and log-sum-exp of 4 cases, 3 queries, 6 columns, 2 heads; and the offsets.
    assert sum(t.nbytes for t in others) == 4 * 4 * 3 * (6 + 2) + 8 * 5


def test_frozen_inputs_get_no_gradient() -> None:
    inputs, offsets = make_inputs(), pack_offsets(LENGTHS)
    every = run_with_gradients(extract, inputs, num_heads=2, offsets=offsets, impl="cpu")
    for wanted in (["queries"], ["x"], ["norm_bias", "kv_weight"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
        out = extract(**leaves, num_heads=2, offsets=offsets, impl="cpu")
        out.backward(normal(0, *out.shape, dtype=torch.float32))
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, every[f"grad {name}"])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"extract: impl='triton' takes float16, bfloat16 or float32, got torch\.float64"),
        (
            {"tokens": 81},
            r"at most 80 queries a case in torch\.float32, which stay on chip, got 81",
        ),
        ({"inner": 258}, "heads of at most 128 columns, got 129"),
        ({"inner": 256}, "needs CUDA tensors, or TRITON_INTERPRET=1"),
    ],
)
def test_triton_says_what_it_does_not_cover(
    change: dict[str, int], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    if "needs CUDA" in message and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    inputs = make_inputs(torch.float32 if change else torch.float64, change.get("inner", 6))
    inputs["queries"] = inputs["queries"][:, :1].repeat(1, change.get("tokens", 3), 1)
    how = {"num_heads": 2, "offsets": pack_offsets(LENGTHS)}
    with pytest.raises(RuntimeError, match=message):
        extract(**inputs, **how, impl="triton")
    with caplog.at_level(logging.INFO):
        extract(**inputs, **how)


def test_another_dtype_or_device_is_refused() -> None:
    inputs = make_inputs()
    inputs["kv_bias"] = inputs["kv_bias"].double()
    with pytest.raises(ValueError, match="kv_bias must have the dtype and device of x"):
        extract(**inputs, num_heads=2, offsets=pack_offsets(LENGTHS))


L2_MB = {"A100": 40, "H100": 50, "B200": 126, "RTX 4090": 72}


@pytest.mark.parametrize("device", L2_MB)
def test_moves_at_most_a_fifth_more_than_the_least(device: str) -> None:
    l2_bytes = L2_MB[device] * 2**20
    for queries in (65, 66):
        for rows in (1000, 10000, 25000):
            cost = extraction_cost(rows, queries, l2_bytes=l2_bytes)
            assert cost.least_bytes < cost.moved_bytes <= 1.2 * cost.least_bytes


def test_cost_by_hand() -> None:
    """Two blocks of 128 rows, one group of heads, by pencil."""
    cost = extraction_cost(200, 16, width=32, inner=64, heads=4, dtype=torch.float16)
    assert cost.flops == 2 * 200 * 32 * 128 + 2 * 200 * 16 * 64 * 2
    weights = 2 * (128 * 32 + 128 + 64)
    assert cost.least_bytes == 2 * 200 * 32 + weights + 2 * 2 * 16 * 64
    constants, partial = 128 * 8, 2 * 16 * 4 * (32 + 4)
    exact = 4 * 16 * (64 + 4)
    assert cost.moved_bytes == cost.least_bytes + constants + partial + exact
    # A cache of nothing: the weights again for both blocks, the partials again for the merge.
    tiny = extraction_cost(200, 16, width=32, inner=64, heads=4, dtype=torch.float16, l2_bytes=0)
    assert tiny.moved_bytes == cost.moved_bytes + 2 * weights + partial


def test_a_small_cache_reads_x_again_for_every_group() -> None:
    large, small = (extraction_cost(10000, 65, l2_bytes=n) for n in (50 * 2**20, 2**20))
    assert small.moved_bytes - large.moved_bytes >= 2 * 10000 * 768 * 2
    assert extraction_cost(10000, 65, backward=True).flops > 2.5 * large.flops


def test_traces_on_the_meta_device() -> None:
    inputs = {name: t.to("meta") for name, t in make_inputs().items()}
    how = {"num_heads": 2, "offsets": pack_offsets(LENGTHS)}
    assert extract(**inputs, **how).device.type == "meta"
