"""The tests' own tools: they must see an op that is wrong, and let one pass that rounds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from modaltune.testing import (
    allowed_error,
    cast,
    check_against_reference,
    normal,
    pack_offsets,
    peak_memory_mib,
    poisoned_memory,
    run_with_gradients,
)


class _Sloppy(torch.autograd.Function):
    """Doubles its input; the gradient is off by `error`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, error: float) -> Tensor:
        ctx.error = error
        return 2 * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad + ctx.error, None


def doubled(
    x: Tensor, *, impl: str, out_error: float = 0.0, grad_error: float = 0.0, spoil: float = 1.0
) -> Tensor:
    if impl == "reference":
        return x + x
    return (_Sloppy.apply(x, grad_error) + out_error) * spoil


X = {"x": normal(0, 50)}


def test_a_right_op_passes() -> None:
    shares = check_against_reference(doubled, X, impl="ours")
    assert shares == {"out": 0.0, "grad x": 0.0}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"out_error": 1e-5}, "ours against the float64 reference: out is off by 1e-05, allowed"),
        ({"grad_error": 1e-5}, "grad x is off by"),
        ({"spoil": float("nan")}, "out is off by nan"),
    ],
)
def test_a_wrong_op_is_named(how: dict[str, float], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_against_reference(doubled, X, impl="ours", **how)


def test_wrong_dtype_and_shape_are_named() -> None:
    def narrow(x: Tensor, *, impl: str) -> Tensor:
        return x if impl == "reference" else x.half()

    def flat(x: Tensor, *, impl: str) -> Tensor:
        return x if impl == "reference" else x[None]

    with pytest.raises(AssertionError, match=r"out is torch.float16 \[50\], not torch.float32"):
        check_against_reference(narrow, X, impl="ours")
    with pytest.raises(AssertionError, match=r"out is torch.float32 \[1, 50\], not torch.float32"):
        check_against_reference(flat, X, impl="ours")


def test_allowed_error_is_twice_the_loss_and_a_step() -> None:
    exact = torch.tensor([4.0, 1.0], dtype=torch.float64)
    plain = torch.tensor([4.0, 1.25])
    step = 4 * 2.0**-23
    assert allowed_error(exact, plain, torch.float32) == 0.5 + step
    assert allowed_error(exact, plain, torch.float32, steps=3) == 0.5 + 3 * step
    # For a float64 kernel the float32 loss shrinks by the ratio of the rounding steps.
    assert allowed_error(exact, plain, torch.float64) == (0.5 + step) * 2.0**-29
    assert allowed_error(exact[:0], plain[:0], torch.float32) == 0


def test_gradients_are_those_of_a_fixed_random_direction() -> None:
    index = torch.tensor([1, 1, 0])
    found = run_with_gradients(
        lambda x, index, unused: x[index] * 3,
        {"x": torch.ones(4), "index": index, "unused": X["x"]},
    )
    pulled = normal(0, 3, dtype=torch.float32)
    want = torch.stack([3 * pulled[2], 3 * pulled[0] + 3 * pulled[1], *torch.zeros(2)])
    torch.testing.assert_close(found["grad x"], want)
    assert (found["grad unused"] == 0).all()
    assert set(found) == {"out", "grad x", "grad unused"}


def test_small_things() -> None:
    assert pack_offsets([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert pack_offsets([]).tolist() == [0]
    assert torch.equal(normal(4, 3).float(), normal(4, 3, dtype=torch.float32))
    assert not torch.equal(normal(4, 3), normal(5, 3))
    mixed = cast({"x": torch.ones(1), "i": torch.ones(1).long()}, torch.float64)
    assert [t.dtype for t in mixed.values()] == [torch.float64, torch.int64]


def test_poisoned_memory_and_its_end() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(4).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_peak_memory_is_that_of_this_process_alone() -> None:
    """A child of a process that holds 300 MiB does not start from there."""
    held = bytearray(300 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    assert peak_memory_mib() > 300
    code = (
        "from modaltune.testing import peak_memory_mib as peak\n"
        "before = peak()\n"
        "held = b'x' * (100 * 2**20)\n"
        "print(before, peak())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (float(word) for word in done.stdout.split())
    assert 80 < after - before < 110
