"""Every op against its reference, that reference compiled, and libraries: checked, then timed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from modaltune.benchmarks.harness import UNKNOWN, commit_id, cpu_model, timestamp
from modaltune.benchmarks.kernel_spec import Call, NotHereError, OpSpec, Run
from modaltune.benchmarks.kernel_timing import (
    MIB,
    Prepare,
    Roof,
    Timing,
    free_bytes,
    graph_of,
    interleaved,
    peak_bytes,
)
from modaltune.kernels.roofline import op_cost
from modaltune.testing import allowed_error

logger = logging.getLogger(__name__)

CSV_NAME = "kernels.csv"
OURS, EAGER, COMPILED, GRAPHED = "ours", "eager", "torch.compile", "ours, CUDA graph"
_REFERENCE_SHARE = 0.4  # of free memory that a reference may take
# A race is not a proof: who sums in another order than the reference may lose twice what the tests
# of our kernels allow. Wrong answers are off by far more.
_SLACK = 2.0


@dataclass(frozen=True)
class Plan:
    """How to benchmark.

    Attributes:
        device: Where.
        dtype: Of the tensors.
        budget_s: Seconds of timing per op, mode and size.
        compile_s: Seconds that compiling a reference may take; 0 leaves it out.
    """

    device: torch.device
    dtype: torch.dtype
    budget_s: float = 10.0
    compile_s: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a contender: timed, or a reason why not.

    Attributes:
        impl: Its name.
        timing: None unless it was timed.
        peak_bytes: Memory beyond inputs, -1 if unknown.
        reason: Why it was not timed, or nothing.
        is_wrong: Whether it gave a wrong answer.
    """

    impl: str
    timing: Timing | None = None
    peak_bytes: int = -1
    reason: str = ""
    is_wrong: bool = False


@dataclass(frozen=True)
class Case:
    """One op, mode and size, with the contenders' outcomes in order."""

    spec: OpSpec
    mode: str
    tiles: int
    checked_tiles: int
    outcomes: Sequence[Outcome]
    flops: float | None = None
    least_bytes: float | None = None

    def seconds(self, impl: str) -> float | None:
        """Return the median of a contender, None if it was not timed."""
        found = [o.timing for o in self.outcomes if o.impl == impl]
        return found[0].p50_s if found and found[0] else None


@dataclass
class _Contender:
    impl: str
    run: Run | None
    reason: str = ""
    is_wrong: bool = field(default=False)


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
    """Return a fixed gradient of the output with values in [-1, 1], the same in every dtype."""
    wave = torch.arange(out.numel(), dtype=torch.float64, device=out.device).mul_(0.7).sin_()
    return wave.to(torch.float16).to(out.dtype).view(out.shape)


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
    limit = _REFERENCE_SHARE * free_bytes(device)
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


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], bool]]:
    """Interrupt what runs inside after so many seconds; yields whether it was interrupted.

    Works in the main thread; elsewhere there is no limit.
    """
    fired = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        fired.append(True)
        raise TimeoutError(f"took more than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield lambda: bool(fired)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(spec: OpSpec, call: Call, mode: str, limit_s: float) -> Run:
    """Return the reference through `torch.compile`, compiled for this call.

    Raises:
        NotHereError: There is no compiler, it fails, or it takes longer than the limit.
    """
    if limit_s <= 0:
        raise NotHereError("left out")
    torch.compiler.reset()
    run: Run = torch.compile(spec.reference, dynamic=False)
    with time_limit(limit_s) as is_over:
        try:
            results_of(spec, run, call, mode)
        # Compilers raise whatever their toolchain does; all of it means: no compiled form here.
        except Exception as error:
            if is_over():
                raise NotHereError(f"compiling took more than {limit_s:g} s") from error
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NotHereError(f"does not compile here: {first[:200]}") from error
    return run


def _contenders(spec: OpSpec, call: Call, mode: str, tiles: int, plan: Plan) -> list[_Contender]:
    """Build everything that runs, or say why it can't."""
    builders: dict[str, Callable[[], Run]] = {}
    ours = "triton" if plan.device.type == "cuda" else "auto"
    builders[OURS] = lambda: spec.ours(call, ours)
    need, free = spec.reference_bytes(tiles, plan.dtype.itemsize), free_bytes(plan.device)
    if need > _REFERENCE_SHARE * free:

        def too_large() -> Run:
            raise NotHereError(f"needs about {need / 2**30:.1f} GiB of {free / 2**30:.1f} free")

        builders[EAGER] = builders[COMPILED] = too_large
    else:
        builders[EAGER] = lambda: spec.reference
        builders[COMPILED] = lambda: compiled(spec, call, mode, plan.compile_s)
    for name, rival in spec.rivals.items():
        if plan.device.type in rival.devices and mode in rival.modes:
            builders[name] = partial(rival.build, call)
    found = []
    for name, build in builders.items():
        try:
            found.append(_Contender(name, build()))
        except NotHereError as error:
            found.append(_Contender(name, None, str(error)))
    return found


def _check(contenders: list[_Contender], spec: OpSpec, call: Call, mode: str, plan: Plan) -> int:
    """Take out of the race who answers wrongly; return the tiles that were checked."""
    tiles = spec_tiles = call_tiles(call)
    if spec_tiles:
        tiles = checkable_tiles(spec, spec_tiles, plan.device)
    checked = call if tiles == spec_tiles else spec.make(tiles, plan.device, plan.dtype)
    gate = Gate(spec, checked, mode, plan.dtype)
    for one in contenders:
        if one.run is None or one.impl == EAGER:
            continue
        run = one.run
        if checked is not call and one.impl not in (OURS, COMPILED):
            run = spec.rivals[one.impl].build(checked)
        try:
            fault = gate.fault(run)
        except RuntimeError as error:  # a library that refuses the shape or dtype
            one.run, one.reason = None, f"fails: {str(error).strip().splitlines()[0][:200]}"
            continue
        if fault:
            one.run, one.reason, one.is_wrong = None, f"wrong answer, not timed: {fault}", True
    return tiles


def call_tiles(call: Call) -> int:
    """Return the tiles of a call as its sizes have them; 0 for an op without tiles."""
    for name in ("rows", "tiles", "n"):
        if name in call.sizes:
            return int(call.sizes[name])
    return int(sum(call.sizes["lengths"])) - 1 if "lengths" in call.sizes else 0


def run_case(spec: OpSpec, mode: str, tiles: int, plan: Plan) -> Case:
    """Check and time one op in one mode and size.

    Args:
        spec: The op.
        mode: `forward` or `backward`.
        tiles: Of the slide; cut to the most the spec allows.
        plan: Device, dtype and budgets.
    """
    tiles = min(tiles, spec.most_tiles)
    call = spec.make(tiles, plan.device, plan.dtype)
    contenders = _contenders(spec, call, mode, tiles, plan)
    checked = _check(contenders, spec, call, mode, plan)
    _add_graph(contenders, call, mode, plan)
    ready = {c.impl: preparation(spec, c.run, call, mode) for c in contenders if c.run}
    memory = {name: peak_bytes(prepare, plan.device) for name, prepare in ready.items()}
    timings = interleaved(ready, plan.device, plan.budget_s)
    outcomes = [
        Outcome(c.impl, timings.get(c.impl), memory.get(c.impl, -1), c.reason, c.is_wrong)
        for c in contenders
    ]
    cost = op_cost(spec.op, call.sizes, mode=mode, dtype=plan.dtype)
    if cost is None:
        return Case(spec, mode, tiles, checked, outcomes)
    return Case(spec, mode, tiles, checked, outcomes, cost.flops, cost.least_bytes)


def _add_graph(contenders: list[_Contender], call: Call, mode: str, plan: Plan) -> None:
    """Add our forward pass as a CUDA graph."""
    ours = contenders[0].run
    if plan.device.type != "cuda" or mode != "forward" or ours is None:
        return
    try:
        with torch.no_grad():
            replay = graph_of(lambda: ours(call.tensors, call.options))
    except RuntimeError as error:
        reason = f"not captured: {str(error).strip().splitlines()[0][:200]}"
        contenders.append(_Contender(GRAPHED, None, reason))
        return
    contenders.append(_Contender(GRAPHED, lambda tensors, options: replay()))


def device_name(device: torch.device) -> str:
    """Return the device as rows name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return UNKNOWN
    return str(triton.__version__)


def rows_of(case: Case, plan: Plan, roof: Roof | None) -> list[dict[str, object]]:
    """Return one row per timed contender, with the columns of the CSV."""
    eager = case.seconds(EAGER)
    shared = {
        "time": timestamp(),
        "commit": commit_id(),
        "device": device_name(plan.device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "op": case.spec.op,
        "variant": case.spec.variant,
        "mode": case.mode,
        "tiles": case.tiles,
        "dtype": str(plan.dtype).removeprefix("torch."),
    }
    rows: list[dict[str, object]] = []
    for one in case.outcomes:
        if one.timing is None:
            continue
        seconds = one.timing.p50_s
        figures: dict[str, object] = {"impl": one.impl}
        for name in ("p20", "p50", "p80"):
            figures[f"{name}_ms"] = round(getattr(one.timing, f"{name}_s") * 1e3, 4)
        figures |= {
            "runs": one.timing.runs,
            "peak_mib": round(one.peak_bytes / MIB, 1) if one.peak_bytes >= 0 else "",
            "eager_over_this": round(eager / seconds, 3) if eager else "",
            "gflop_per_s": _rate(case.flops, seconds),
            "least_gb_per_s": _rate(case.least_bytes, seconds),
            "roof_share": roof_share(case, seconds, roof),
            "roof": roof.source if roof else "",
            "checked_tiles": case.checked_tiles,
        }
        rows.append({**shared, **figures})
    return rows


def _rate(amount: float | None, seconds: float) -> float | str:
    return "" if amount is None else round(amount / seconds / 1e9, 2)


def roof_share(case: Case, seconds: float, roof: Roof | None) -> float | str:
    """Return the least time of the work over the time taken; nothing without a cost or a roof."""
    if roof is None or case.flops is None or case.least_bytes is None:
        return ""
    return round(roof.seconds(case.flops, case.least_bytes) / seconds, 3)
