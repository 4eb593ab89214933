"""The frozen feed-forward branch: values, gradient, what it saves, blocks, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import frozen_ffn
from modaltune.kernels.frozen_feedforward import cpu
from modaltune.testing import allowed_error, cast, normal, poisoned_memory

D, W = 24, 40


def weights(dtype: torch.dtype = torch.float32, inner: bool = True) -> dict[str, Any]:
    named = {
        "norm_weight": 1 + 0.2 * normal(1, D),
        "norm_bias": 0.2 * normal(2, D),
        "weight1": normal(3, W, D) / D**0.5,
        "bias1": 0.2 * normal(4, W),
        "inner_weight": 1 + 0.2 * normal(5, W),
        "inner_bias": 0.2 * normal(6, W),
        "weight2": normal(7, D, W) / W**0.5,
        "bias2": 0.2 * normal(8, D),
    }
    if not inner:
        del named["inner_weight"], named["inner_bias"]
    return dict(cast(named, dtype))


def forward_and_back(x: Tensor, named: dict[str, Any], impl: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = frozen_ffn(x, **named, impl=impl)
    pulled = normal(9, *out.shape, dtype=torch.float32).to(out.dtype)
    (grad,) = torch.autograd.grad(out, x, pulled)
    return out.detach(), grad


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 65, 1023, 1024, 1025])
def test_equals_the_reference(rows: int, dtype: torch.dtype, inner: bool) -> None:
    named = weights(dtype, inner)
    x = normal(0, rows, D, dtype=dtype)
    exact = forward_and_back(x.double(), dict(cast(named, torch.float64)), "reference")
    plain = forward_and_back(x, named, "reference")
    with poisoned_memory():
        ours = forward_and_back(x, named, "cpu")
        again = forward_and_back(x, named, "cpu")
    for got, twice, want, loose in zip(ours, again, exact, plain, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, twice)
        if rows:
            # Three steps: libraries sum K products in another order than torch does.
            limit = allowed_error(want, loose, dtype, 3)
            assert float((got.double() - want).abs().max()) <= limit


@pytest.mark.parametrize("inner", [True, False])
def test_gradcheck(inner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ROWS", 2)
    named = weights(torch.float64, inner)
    x = normal(0, 5, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_ffn(x, **named, impl="cpu"), x)


def test_rows_of_other_strides() -> None:
    named = weights()
    x = normal(0, 70, 2 * D, dtype=torch.float32)[:, D:]
    got, grad = forward_and_back(x, named, "cpu")
    want, want_grad = forward_and_back(x.contiguous(), named, "cpu")
    assert torch.equal(got, want)
    assert torch.equal(grad, want_grad)


def test_only_the_input_is_saved() -> None:
    named = weights()
    own = {id(t) for t in named.values()}
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if id(t) not in own:
            kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        frozen_ffn(torch.randn(70, D, requires_grad=True), **named)
    assert kept == [70 * D * 4]


def test_opcheck() -> None:
    named = weights()
    order = ["norm_weight", "norm_bias", "weight1", "bias1", "inner_weight", "inner_bias"]
    x = normal(0, 70, D, dtype=torch.float32).requires_grad_()
    tensors = [named[name] for name in order]
    forward = torch.ops.modaltune.frozen_ffn_fwd.default
    torch.library.opcheck(forward, (x, *tensors, named["weight2"], named["bias2"], 1e-5))
    bare = (x, *tensors[:4], None, None, named["weight2"], named["bias2"], 1e-5)
    torch.library.opcheck(forward, bare)
    grad = normal(1, 70, D, dtype=torch.float32)
    backward = torch.ops.modaltune.frozen_ffn_bwd.default
    torch.library.opcheck(backward, (grad, x.detach(), *tensors, named["weight2"], 1e-5))


def test_compiled_with_gradient() -> None:
    named = weights()
    x = normal(0, 70, D, dtype=torch.float32).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return frozen_ffn(x, **named).square().sum()

    (want,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True)(x), x)
    torch.testing.assert_close(got, want)


def test_autocast_and_inference() -> None:
    named = weights()
    x = normal(0, 70, D, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_ffn(x, **named).dtype == torch.bfloat16
    with torch.inference_mode():
        inferred = frozen_ffn(x, **named)
    assert torch.equal(inferred, frozen_ffn(x, **named))


def test_the_reference_trains_its_weights() -> None:
    named = {name: t.requires_grad_() for name, t in weights().items()}
    frozen_ffn(torch.randn(5, D), **named, impl="reference").sum().backward()
    assert all(t.grad is not None for t in named.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, D, dtype=torch.int64)}, TypeError, "x must be a floating point"),
        ({"x": torch.ones(2, 3, D)}, ValueError, r"x must have shape \[\*, \*\]"),
        ({"weight1": torch.ones(W, D + 1)}, ValueError, r"weight1 must have shape \[\*, 24\]"),
        ({"weight2": torch.ones(D, W + 1)}, ValueError, r"weight2 must have shape \[24, 40\]"),
        ({"inner_bias": None}, ValueError, "must be given together"),
        ({"bias2": torch.ones(D).double()}, ValueError, "bias2 must have the dtype and device"),
        ({"bias1": torch.ones(W, requires_grad=True)}, ValueError, "bias1 must not need a grad"),
        ({"impl": "triton"}, RuntimeError, "not available for this op"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        frozen_ffn(**{"x": torch.ones(2, D), **weights(), **changes})
