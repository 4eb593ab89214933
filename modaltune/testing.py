"""What the tests of kernels share: packed layouts, errors allowed, poisoned memory, peak memory.

The rule for every kernel: its error against the float64 reference is at most twice what the
reference itself loses when run in the kernel's dtype, plus one rounding step. Nothing here is
tuned to a kernel.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Whether Triton interprets kernels, on CPU tensors, in this process.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Lengths of the sequences in one packed batch: none, one, around a block of 16, odd, long.
RAGGED = (0, 1, 2, 15, 16, 17, 127, 1000)

Op = Callable[..., Tensor]


def pack_offsets(lengths: Sequence[int]) -> Tensor:
    """Return `[B + 1]` int64 offsets of packed sequences of the given lengths, on the CPU."""
    return torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal values of a shape on the default device.

    They are the same for the same seed, whatever the dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return at_default(made.to(dtype))


def at_default(tensor: Tensor) -> Tensor:
    """Return a tensor on torch's default device, where tests of kernels draw their inputs."""
    return tensor.to(torch.get_default_device())


def cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs with floating point tensors as `dtype` and the others as they are."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def run_with_gradients(
    op: Op, inputs: Mapping[str, Tensor], *, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Run an op and pull a fixed random gradient back to every floating point input.

    Args:
        op: Called as `op(**inputs, **options)`.
        inputs: Tensors by argument name; leaves are made of the floating point ones.
        seed: Of the gradient of the output.
        options: Arguments that are passed on as they are.

    Returns:
        `out`, and `grad <name>` for every floating point input (zeros where none arrives).
    """
    leaves = {
        name: t.detach().requires_grad_() if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    out = op(**leaves, **options)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if out.requires_grad:
        # Rounded through float32, so that every dtype from there up pulls the same gradient.
        pulled = normal(seed, *out.shape, dtype=torch.float32).to(out.dtype)
        found = torch.autograd.grad(out, list(wanted.values()), pulled, allow_unused=True)
    grads = {
        f"grad {name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(wanted.items(), found, strict=True)
    }
    return {"out": out.detach(), **grads}


def allowed_error(exact: Tensor, plain: Tensor, dtype: torch.dtype, steps: int = 1) -> float:
    """Return the largest error a kernel may make: twice the plain form's, plus rounding steps.

    Args:
        exact: Result of the float64 reference.
        plain: Result of the reference in `dtype`. For a kernel in float64 nothing finer than the
            reference exists: take its float32 form, whose loss is scaled by the rounding steps.
        dtype: What the kernel computes in.
        steps: Rounding steps of the largest value; more than one needs a reason.
    """
    if not exact.numel():
        return 0.0
    step = torch.finfo(dtype).eps
    lost = float((plain.double() - exact).abs().max()) * step / torch.finfo(plain.dtype).eps
    return 2 * lost + steps * step * float(exact.abs().max())


def check_against_reference(
    op: Op,
    inputs: Mapping[str, Tensor],
    *,
    impl: str,
    dtype: torch.dtype = torch.float32,
    gradient_steps: int = 1,
    **options: Any,
) -> dict[str, float]:
    """Compare an implementation with the float64 reference, output and every gradient.

    Args:
        op: A public kernel function that takes `impl`.
        inputs: Tensors by argument name; rounded to `dtype` first, for all three runs.
        impl: The implementation under test.
        dtype: What it computes in.
        gradient_steps: Rounding steps allowed to gradients; what a backward pass reads back from
            the forward pass was rounded there, which the plain form may not do.
        options: Further arguments of the op.

    Returns:
        Error over allowed error, by tensor.

    Raises:
        AssertionError: A tensor is off, or has another shape or dtype; all of them are named.
    """
    rounded = cast(inputs, dtype)
    exact = run_with_gradients(op, cast(rounded, torch.float64), impl="reference", **options)
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    plain = run_with_gradients(op, cast(rounded, plain_dtype), impl="reference", **options)
    ours = run_with_gradients(op, rounded, impl=impl, **options)
    shares, faults = {}, []
    for name, want in exact.items():
        got = ours[name]
        if got.shape != want.shape or got.dtype != dtype:
            faults.append(f"{name} is {got.dtype} {list(got.shape)}, not {dtype} {[*want.shape]}")
            continue
        limit = allowed_error(want, plain[name], dtype, 1 if name == "out" else gradient_steps)
        error = float((got.double() - want).abs().max()) if want.numel() else 0.0
        shares[name] = error / limit if limit else error
        # A NaN compares as false, and so as a fault.
        if not error <= limit:
            faults.append(f"{name} is off by {error:.3g}, allowed {limit:.3g}")
    if faults:
        raise AssertionError(f"{impl} against the float64 reference: " + "; ".join(faults))
    return shares


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch allocates without initialising it with NaN (or the largest integer).

    A result that is read before it is written shows up as NaN. Algorithms are deterministic
    inside; both settings are put back.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Warnings only: what a GPU has no deterministic form of does not matter here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(was_on)


def peak_memory_mib() -> float:
    """Return the peak resident memory of this process so far, in MiB.

    Read from VmHWM where Linux offers it: `ru_maxrss` of a child starts at the resident size of
    the parent it was started from, and so says nothing about a child of a large process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
