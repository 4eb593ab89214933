"""How a contender is run, and the gate it has to pass before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modaltune.benchmarks.kernel_spec import Call, OpSpec, Run
from modaltune.benchmarks.kernel_timing import Prepare, free_bytes
from modaltune.testing import allowed_error

REFERENCE_SHARE = 0.4  # of free memory that a reference may take
# A race is not a proof: who sums in another order than the reference may lose twice what the tests
# of our kernels allow. Wrong answers are off by far more.
_SLACK = 2.0


def results_of(spec: OpSpec, run: Run, call: Call, mode: str) -> dict[str, Tensor]:
    """Run a contender once and return its output, or its gradients in the backward mode."""
    if mode == "forward":
        with torch.no_grad():
            return {"out": run(call.tensors, call.options)}
    out, leaves = _forward(spec, run, call)
    grads = torch.autograd.grad(out, list(leaves.values()), pulled(out), allow_unused=True)
    return {
        f"grad {name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def pulled(out: Tensor) -> Tensor:
    """Return a fixed gradient of the output, in [-1, 1] and exact in every floating dtype."""
    wave = torch.arange(out.numel(), dtype=torch.float64, device=out.device).mul_(0.7).sin_()
    return wave.to(torch.bfloat16).to(out.dtype).view(out.shape)


def _forward(spec: OpSpec, run: Run, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: call.tensors[name].detach().requires_grad_() for name in spec.wanted}
    return run({**call.tensors, **leaves}, call.options), leaves


def preparation(spec: OpSpec, run: Run, call: Call, mode: str) -> Prepare:
    """Return what readies a timed run: nothing, or the forward pass of the backward mode."""

    def forward() -> Callable[[], Any]:
        def timed() -> Any:
            with torch.no_grad():
                return run(call.tensors, call.options)

        return timed

    def backward() -> Callable[[], Any]:
        out, leaves = _forward(spec, run, call)
        grad = pulled(out)
        return lambda: torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)

    return forward if mode == "forward" else backward


def checkable_tiles(spec: OpSpec, tiles: int, device: torch.device, itemsize: int = 8) -> int:
    """Return the largest size, halving from `tiles`, whose reference fits the memory."""
    limit = REFERENCE_SHARE * free_bytes(device)
    while tiles > 1 and spec.reference_bytes(tiles, itemsize) > limit:
        tiles //= 2
    return tiles


class Gate:
    """The right answer to a call, and how far from it a contender may be.

    Twice what the kernel tests allow, which is twice what the reference loses in the dtype, plus
    one rounding step.
    """

    def __init__(self, spec: OpSpec, call: Call, mode: str, dtype: torch.dtype) -> None:
        self._spec, self._call, self._mode, self._dtype = spec, call, mode, dtype
        self._exact = results_of(spec, spec.reference, call.as_dtype(torch.float64), mode)
        plain = results_of(spec, spec.reference, call, mode)
        self._limits = {
            name: _SLACK * allowed_error(exact, plain[name], dtype)
            for name, exact in self._exact.items()
        }

    def fault(self, run: Run) -> str:
        """Run a contender and say what is wrong with its answer, or nothing."""
        got = results_of(self._spec, run, self._call, self._mode)
        for name, exact in self._exact.items():
            if got[name].shape != exact.shape:
                return f"{name} has shape {[*got[name].shape]}, not {[*exact.shape]}"
            error = float((got[name].double() - exact).abs().max()) if exact.numel() else 0.0
            if not error <= self._limits[name]:
                return f"{name} is off by {error:.3g}, allowed {self._limits[name]:.3g}"
        return ""
