"""Every op against its reference, that reference compiled, and libraries: checked, then timed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType

import torch

from modaltune.benchmarks.harness import UNKNOWN, commit_id, cpu_model, timestamp
from modaltune.benchmarks.kernel_gate import (
    REFERENCE_SHARE,
    Gate,
    checkable_tiles,
    preparation,
    results_of,
)
from modaltune.benchmarks.kernel_spec import GIB, Call, NotHereError, OpSpec, Run
from modaltune.benchmarks.kernel_timing import (
    MIB,
    Roof,
    Timing,
    free_bytes,
    graph_of,
    interleaved,
    peak_bytes,
)
from modaltune.kernels.roofline import op_cost

logger = logging.getLogger(__name__)

CSV_NAME = "kernels.csv"
OURS, EAGER, COMPILED, GRAPHED = "ours", "eager", "torch.compile", "ours, CUDA graph"


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
class Contender:
    """Who takes part: a function to run, or the reason why there is none.

    Attributes:
        impl: Its name.
        run: None where it can't run, or must not.
        reason: Why.
        is_wrong: Whether its answer was wrong.
    """

    impl: str
    run: Run | None
    reason: str = ""
    is_wrong: bool = False


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
            raise NotHereError(f"does not compile here: {_first_line(error)}") from error
    return run


def _builders(spec: OpSpec, call: Call, mode: str, plan: Plan) -> dict[str, Callable[[], Run]]:
    """Return how everything that can run here is built, by name."""
    ours = "triton" if plan.device.type == "cuda" else "auto"
    need = spec.reference_bytes(call.tiles, plan.dtype.itemsize)
    free = free_bytes(plan.device)

    def reference() -> Run:
        if need > REFERENCE_SHARE * free:
            raise NotHereError(f"needs about {need / GIB:.1f} GiB of {free / GIB:.1f} free")
        return spec.reference

    def compiled_reference() -> Run:
        reference()
        return compiled(spec, call, mode, plan.compile_s)

    builders: dict[str, Callable[[], Run]] = {
        OURS: lambda: spec.ours(call, ours),
        EAGER: reference,
        COMPILED: compiled_reference,
    }
    for name, rival in spec.rivals.items():
        if plan.device.type in rival.devices and mode in rival.modes:
            builders[name] = partial(rival.build, call)
    return builders


def contenders_of(
    spec: OpSpec, call: Call, mode: str, plan: Plan, only: str | None = None
) -> tuple[list[Contender], int]:
    """Build and check everything that runs.

    Args:
        spec: The op.
        call: Its inputs.
        mode: `forward` or `backward`.
        plan: Device, dtype and budgets.
        only: Name of a single contender.

    Returns:
        The contenders, those without a function to run with the reason; and the tiles at which
        answers were checked, fewer than the call's where its reference does not fit the memory.
    """
    found = []
    builders = _builders(spec, call, mode, plan)
    if only is not None:
        absent = f"does not run on {plan.device.type}"
        builders = {only: builders.get(only, partial(_refuse, absent))}
    for name, build in builders.items():
        try:
            found.append(Contender(name, build()))
        except NotHereError as error:
            found.append(Contender(name, None, str(error)))
    return found, _check(found, spec, call, mode, plan)


def _refuse(reason: str) -> Run:
    raise NotHereError(reason)


def _check(contenders: list[Contender], spec: OpSpec, call: Call, mode: str, plan: Plan) -> int:
    """Take out of the race who answers wrongly; return the tiles that were checked."""
    tiles = checkable_tiles(spec, call.tiles, plan.device)
    checked = call if tiles == call.tiles else spec.make(tiles, plan.device, plan.dtype)
    gate = Gate(spec, checked, mode, plan.dtype)
    for one in contenders:
        if one.run is None or one.impl == EAGER:
            continue
        run = one.run
        try:
            if checked is not call and one.impl in spec.rivals:
                run = spec.rivals[one.impl].build(checked)  # prepared for the other size
            fault = gate.fault(run)
        except RuntimeError as error:  # a library that refuses the shape or dtype
            one.run, one.reason = None, f"fails: {_first_line(error)}"
            continue
        if fault:
            one.run, one.reason, one.is_wrong = None, f"wrong answer, not timed: {fault}", True
    return tiles


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


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
    contenders, checked = contenders_of(spec, call, mode, plan)
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


def _add_graph(contenders: list[Contender], call: Call, mode: str, plan: Plan) -> None:
    """Add our forward pass as a CUDA graph."""
    ours = contenders[0].run
    if plan.device.type != "cuda" or mode != "forward" or ours is None:
        return
    try:
        with torch.no_grad():
            replay = graph_of(lambda: ours(call.tensors, call.options))
            is_same = torch.equal(replay(), ours(call.tensors, call.options))
    except RuntimeError as error:
        reason = f"not captured: {_first_line(error)}"
        contenders.append(Contender(GRAPHED, None, reason))
        return
    if is_same:
        contenders.append(Contender(GRAPHED, lambda tensors, options: replay()))
    else:
        contenders.append(Contender(GRAPHED, None, "other bits than without the graph", True))


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
