"""The injector as an operator: opcheck, compilation, autocast, what it saves, what it refuses."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import OutOfReachError, inject
from modaltune.kernels.injection.cost import injection_cost, injection_cost_backward
from modaltune.testing import normal, pack_offsets, run_with_gradients


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


def masks(cases: int, tokens: int) -> Tensor:
    """Every other case whole, the third without any token, the others with some hidden."""
    mask = torch.ones(cases, tokens, dtype=torch.bool)
    mask[1::2, ::2] = False
    mask[2] = False
    return mask


def _arguments(inputs: dict[str, Tensor], lengths: list[int], impl: str = "cpu") -> tuple[Any, ...]:
    mask = masks(len(lengths), inputs["keys"].shape[1])
    return (*inputs.values(), mask, pack_offsets(lengths), 3, 1, 1e-5, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    lengths = [3, 0, 4, 2]
    inputs = {n: t.requires_grad_() for n, t in make_inputs(lengths, dtype=dtype).items()}
    arguments = _arguments(inputs, lengths)
    torch.library.opcheck(torch.ops.modaltune.inject_fwd.default, arguments)
    given = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    for needs in ([True] * 10, [True, *[False] * 9]):
        torch.library.opcheck(
            torch.ops.modaltune.inject_bwd.default,
            (torch.ones_like(given[0]), *given[:-1], needs, "cpu"),
        )


def test_compiles_as_one_graph_with_its_gradients() -> None:
    lengths = [5, 3, 2]
    inputs = make_inputs(lengths, dtype=torch.float32)
    how = {"num_heads": 2, "offsets": pack_offsets(lengths), "num_prefix": 1, "impl": "cpu"}
    how["key_mask"] = masks(3, 5)
    torch.compiler.reset()
    compiled = torch.compile(inject, fullgraph=True, backend="aot_eager")
    want = run_with_gradients(inject, inputs, **how)
    got = run_with_gradients(compiled, inputs, **how)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_compiled_calls_look_at_offsets() -> None:
    how = {"num_heads": 2, "offsets": torch.tensor([0, 5, 9])}  # the tenth row belongs to no case
    torch.compiler.reset()
    compiled = torch.compile(inject, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of rows 10"):
        compiled(**make_inputs([5, 5]), **how)


def test_saves_nothing_but_its_inputs() -> None:
    inputs = {n: t.requires_grad_() for n, t in make_inputs([40], dtype=torch.float32).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        inject(**inputs, num_heads=3, impl="cpu")
    known = {t.data_ptr() for t in inputs.values()}
    beside = [t for t in saved if t.data_ptr() not in known]
    # Only the two offsets of one case.
    assert [t.dtype for t in beside] == [torch.int64]
    assert sum(t.nbytes for t in beside) == 16
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        inject(**{n: t.detach() for n, t in inputs.items()}, num_heads=3, impl="cpu")
    assert not saved


@pytest.mark.parametrize("wanted", [["x"], ["gamma", "keys"], ["query_weight", "norm_bias"]])
def test_frozen_inputs_get_no_gradient(wanted: list[str]) -> None:
    inputs = make_inputs([9, 4])
    how = {"num_heads": 3, "offsets": pack_offsets([9, 4]), "num_prefix": 1, "impl": "cpu"}
    every = run_with_gradients(inject, inputs, **how)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    inject(**leaves, **how).backward(normal(0, 13, 12, dtype=torch.float32).double())
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, every[f"grad {name}"]), name
        else:
            assert leaf.grad is None


def test_gradients_share_no_memory_with_what_they_are_made_of() -> None:
    """All rows are prefix rows: the gradient passes, as a copy."""
    x = normal(0, 3, 12).requires_grad_()
    inputs = {**make_inputs([3]), "x": x}
    pulled = normal(1, 3, 12)
    out = inject(**inputs, num_heads=3, num_prefix=3, impl="cpu")
    (found,) = torch.autograd.grad(out, [x], pulled)
    assert torch.equal(found, pulled)
    assert found.data_ptr() != pulled.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_dtype(dtype: torch.dtype) -> None:
    inputs = make_inputs([20], dtype=torch.float32)
    half = {n: t.to(dtype) for n, t in inputs.items()}
    want = run_with_gradients(inject, half, num_heads=3, impl="cpu")
    with torch.autocast("cpu", dtype=dtype):
        got = run_with_gradients(inject, inputs, num_heads=3, impl="cpu")
    assert got["out"].dtype == dtype
    assert torch.equal(got["out"], want["out"])
    for name in inputs:
        assert got[f"grad {name}"].dtype == torch.float32
        torch.testing.assert_close(got[f"grad {name}"], want[f"grad {name}"].float(), msg=name)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs the kernels on the CPU"
)
def test_triton_says_what_it_needs() -> None:
    inputs = make_inputs([4], dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors, or TRITON_INTERPRET=1"):
        inject(**inputs, num_heads=3, impl="triton")


@pytest.mark.parametrize(
    ("shape", "heads", "dtype", "message"),
    [
        ({}, 3, torch.float64, "takes float16, bfloat16 or float32, got torch.float64"),
        ({"tokens": 129}, 3, torch.float32, "holds at most 128 keys on chip, got 129"),
        (
            {"inner": 264},
            12,
            torch.float32,
            "holds at most 256 columns on chip, got 12 heads of 22, padded to 32",
        ),
    ],
)
def test_what_triton_does_not_cover(
    shape: dict[str, int], heads: int, dtype: torch.dtype, message: str
) -> None:
    inputs = make_inputs([4], **shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        inject(**inputs, num_heads=heads, impl="triton")
    assert inject(**inputs, num_heads=heads).isfinite().all()


def test_triton_is_not_asked_for_float64_under_autocast() -> None:
    """Autocast leaves float64 as it is, which the kernels do not take."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(OutOfReachError, match="float64"):
        inject(**make_inputs([3, 2]), num_heads=2, offsets=pack_offsets([3, 2]), impl="triton")


def test_mixed_dtypes_are_refused() -> None:
    inputs = make_inputs([4], dtype=torch.float32)
    inputs["gamma"] = inputs["gamma"].half()
    with pytest.raises(ValueError, match="gamma must have the dtype and device of x"):
        inject(**inputs, num_heads=3)


def test_modelled_cost_meets_the_bar() -> None:
    """Bytes counted by hand at 25,000 tiles; at most 1.2 times the least at every size."""
    found = injection_cost(25_000)
    weights = 2 * 192 * 768 + 4 * 768 + 192 + 2 * 65 * 192
    assert found.least_bytes == 2 * (2 * 25_000 * 768 + weights)
    assert found.flops == 25_000 * (2 * 2 * 192 * 768 + 2 * 2 * 192 * 65)
    # Half of 1 MB holds no block of all programs: x is read twice.
    small = injection_cost(25_000, l2_bytes=2**20)
    assert small.moved_bytes - found.moved_bytes > 0.9 * 25_000 * 768 * 2
    for rows in (1_000, 10_000, 25_000):
        for l2, processors in ((40, 108), (50, 132), (126, 148), (72, 128)):
            device = injection_cost(rows, l2_bytes=l2 * 2**20, multiprocessors=processors)
            assert device.least_bytes < device.moved_bytes <= 1.2 * device.least_bytes
    backward = injection_cost_backward(25_000)
    assert (
        backward.moved_bytes > injection_cost_backward(25_000, trainable_weights=False).moved_bytes
    )
