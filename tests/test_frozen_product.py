"""The public product with a frozen weight: values, gradient, what it saves, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modaltune.kernels import (
    frozen_linear,
    frozen_qkv,
    packed_bytes,
    pin_products,
    product_libraries,
)
from modaltune.testing import allowed_error, normal, poisoned_memory

ACTIVATIONS = (None, "gelu")


@pytest.fixture(params=product_libraries())
def library(request: pytest.FixtureRequest) -> Any:
    """Each library in turn."""
    pin_products(request.param)
    yield request.param
    pin_products(None)


def layer(dtype: torch.dtype = torch.float32, k: int = 33, m: int = 18) -> tuple[Tensor, Tensor]:
    return normal(1, m, k, dtype=dtype), normal(2, m, dtype=dtype)


def forward_and_back(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, impl: str
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = frozen_linear(x, weight, bias, activation=activation, impl=impl)
    pulled = normal(9, *out.shape, dtype=torch.float32).to(out.dtype)
    (grad,) = torch.autograd.grad(out, x, pulled)
    return out.detach(), grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (64,), (65,), (2, 40), (2100,)])
def test_equals_the_reference(
    library: str, shape: tuple[int, ...], has_bias: bool, activation: str | None
) -> None:
    weight, bias = layer()
    x = normal(0, *shape, 33, dtype=torch.float32)
    given = bias if has_bias else None
    exact = forward_and_back(
        x.double(),
        weight.double(),
        None if given is None else given.double(),
        activation,
        "reference",
    )
    plain = forward_and_back(x, weight, given, activation, "reference")
    with poisoned_memory():
        ours = forward_and_back(x, weight, given, activation, "cpu")
        again = forward_and_back(x, weight, given, activation, "cpu")
    for got, twice, want, loose in zip(ours, again, exact, plain, strict=True):
        assert got.shape == want.shape
        assert torch.equal(got, twice)
        if want.numel():
            # Three steps: libraries sum K products in another order than torch does.
            assert float((got.double() - want).abs().max()) <= allowed_error(
                want, loose, torch.float32, 3
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_dtypes_are_those_of_torch(
    library: str, dtype: torch.dtype, activation: str | None
) -> None:
    weight, bias = layer(dtype)
    x = normal(0, 70, 33, dtype=dtype)
    ours = forward_and_back(x, weight, bias, activation, "cpu")
    theirs = forward_and_back(x, weight, bias, activation, "reference")
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want)


def saved_bytes(x: Tensor, activation: str | None) -> int:
    weight, bias = layer()
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t is not weight and t is not bias:
            kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_linear(x, weight, bias, activation=activation)
    return sum(kept)


def test_nothing_is_saved_without_an_activation_and_the_input_with_one() -> None:
    x = torch.randn(70, 33, requires_grad=True)
    assert saved_bytes(x, None) == 0
    assert saved_bytes(x, "gelu") == 70 * 33 * 4


@pytest.mark.parametrize("rows", [0, 1, 70, 2100])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
def test_qkv_equals_three_products(library: str, rows: int, used: tuple[int, ...]) -> None:
    weight, bias = layer()
    x = normal(0, rows, 33, dtype=torch.float32)
    found = []
    for x_, w, b in ((x, weight, bias), (x.double(), weight.double(), bias.double())):
        leaf = x_.detach().requires_grad_()
        exact = leaf.dtype == torch.float64
        out = frozen_qkv(leaf, w, b, impl="reference" if exact else "cpu")
        pulled = [normal(i, rows, 6, dtype=torch.float32).to(leaf.dtype) for i in used]
        (grad,) = torch.autograd.grad([out[i] for i in used], leaf, pulled)
        found.append([t.detach() for t in (*out, grad)])
    for got, want in zip(*found, strict=True):
        if rows:
            limit = allowed_error(want, want.float(), torch.float32, 3)
            assert float((got.double() - want).abs().max()) <= limit
    q, k, v = found[0][:3]
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == (3 if rows else 1)


def test_qkv_saves_nothing_and_traces() -> None:
    weight, bias = layer()
    x = torch.randn(70, 33, requires_grad=True)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_qkv(x, weight, bias)
    assert [t is weight for t in kept] == [True]
    torch.library.opcheck(torch.ops.modaltune.frozen_qkv_fwd.default, (x, weight, bias))
    grads = (torch.randn(70, 6), None, torch.randn(70, 6), weight)
    torch.library.opcheck(torch.ops.modaltune.frozen_qkv_bwd.default, grads)

    def run(x: Tensor) -> Tensor:
        q, _, v = frozen_qkv(x, weight, bias)
        return (q * v).sum()

    (want,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True)(x), x)
    torch.testing.assert_close(got, want)


def test_qkv_errors() -> None:
    with pytest.raises(ValueError, match="weight must have a multiple of 3 rows, got 4"):
        frozen_qkv(torch.ones(2, 5), torch.ones(4, 5))
    with pytest.raises(ValueError, match="weight must not need a gradient"):
        frozen_qkv(torch.ones(2, 5), torch.ones(6, 5, requires_grad=True))


def test_inference_modes() -> None:
    weight, bias = layer()
    x = torch.randn(70, 33)
    want = frozen_linear(x, weight, bias)
    parameter = nn.Parameter(weight)  # trained elsewhere, not here
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, parameter, bias), want)
    with torch.inference_mode():
        assert torch.equal(frozen_linear(x, parameter, bias), want)
    assert not want.requires_grad


def test_opcheck(library: str) -> None:
    weight, bias = layer()
    for rows in (3, 70):
        x = normal(0, rows, 33, dtype=torch.float32).requires_grad_()
        for args in ((x, weight, bias, "gelu"), (x, weight, None, "")):
            torch.library.opcheck(torch.ops.modaltune.frozen_linear_fwd.default, args)
    grad = normal(0, 70, 18, dtype=torch.float32)
    args = (grad, x.detach(), weight, bias, "gelu")
    torch.library.opcheck(torch.ops.modaltune.frozen_linear_bwd.default, args)


def test_compiled_with_gradient() -> None:
    weight, bias = layer()
    x = normal(0, 70, 33, dtype=torch.float32).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return frozen_linear(x, weight, bias, activation="gelu").sum()

    compiled = torch.compile(run, fullgraph=True)
    (want,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, want)


def test_autocast_computes_in_its_dtype() -> None:
    weight, bias = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_linear(torch.randn(70, 33), weight, bias).dtype == torch.bfloat16


def test_copies_of_weights_are_counted_and_go_with_them() -> None:
    if "onednn" not in product_libraries():
        pytest.skip("this torch is built without oneDNN")
    pin_products("onednn")
    try:
        before = packed_bytes()
        linear = nn.Linear(64, 96).requires_grad_(False)
        frozen_linear(torch.randn(70, 64), linear.weight, linear.bias)
        assert packed_bytes() == before + 64 * 96 * 4
        del linear
        assert packed_bytes() == before
    finally:
        pin_products(None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 33, dtype=torch.int64)}, TypeError, "x must be a floating point"),
        ({"x": torch.ones(2, 32)}, ValueError, r"weight must have shape \[\*, 32\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \[18\]"),
        ({"activation": "relu"}, ValueError, "activation must be None or gelu, got 'relu'"),
        ({"weight": torch.ones(18, 33).double()}, ValueError, "weight must have the dtype"),
        ({"weight": torch.ones(18, 33, requires_grad=True)}, ValueError, "weight must not need"),
        ({"bias": torch.ones(18, requires_grad=True)}, ValueError, "bias must not need a gradient"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, RuntimeError, "not available for this op"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    weight, bias = layer()
    arguments = {"x": torch.ones(2, 33), "weight": weight, "bias": bias, **changes}
    with pytest.raises(error, match=message):
        frozen_linear(**arguments)
