"""Where a forward pass or a training step spends its time: by stage, by operator, and idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from modaltune.engine.device import DeviceFacts, device_facts
from modaltune.kernels.ranges import PREFIX, stage_range

RUN = "run"  # the label around what is profiled; its own time is what no stage claims
OTHER = "other"
_BACKWARD_NODE = "autograd::engine::evaluate_function: "  # what the autograd engine runs


@dataclass(frozen=True)
class StageTime:
    """Time of one stage, without the stages inside it.

    Attributes:
        stage: Its label; ` (backward)` is added to what autograd ran for it.
        calls: How often it ran.
        seconds: Time of the CPU, or of the GPU's kernels on a GPU.
        share: Of the profiled time.
    """

    stage: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class OperatorTime:
    """Time of one operator (CPU) or kernel (GPU), without what it called."""

    operator: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What one profiled run showed.

    Attributes:
        seconds: Wall-clock time of the run.
        idle_share: Share of it in which no operator (CPU) or no kernel (GPU) ran.
        stages: By time, longest first.
        operators: By time, longest first.
        device: Facts of the device.
        trace: The Chrome trace, where one was written.
    """

    seconds: float
    idle_share: float
    stages: tuple[StageTime, ...]
    operators: tuple[OperatorTime, ...]
    device: DeviceFacts
    trace: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        found = asdict(self)
        found["device"] = self.device.to_dict()
        found["trace"] = None if self.trace is None else str(self.trace)
        return found


def profile_run(
    run: Callable[[], object],
    *,
    device: str | torch.device = "cpu",
    warmup: int = 1,
    trace: Path | None = None,
) -> Profile:
    """Run something under torch.profiler and say where its time went.

    Args:
        run: Called `warmup` times first, then once under the profiler.
        device: Where its tensors live.
        warmup: Runs that are not looked at: compilation, caches, memory pools.
        trace: File for the Chrome trace (chrome://tracing, Perfetto); none unless given.
    """
    facts = device_facts(device)
    on_gpu = facts.kind == "cuda"
    for _ in range(warmup):
        run()
    if on_gpu:
        torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Stack and shape records would cost more than small operators do.
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    with profiler, stage_range(RUN):
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return summarise(list(profiler.events()), facts, trace)


def summarise(events: Sequence[Any], facts: DeviceFacts, trace: Path | None = None) -> Profile:
    """Turn the events of a profile into tables.

    Args:
        events: `torch.profiler.profile.events()` of a run inside the label `RUN`.
        facts: The device.
        trace: Where the trace lies.
    """
    whole = next(event for event in events if event.name == PREFIX + RUN)
    wall_us = whole.time_range.elapsed_us()
    on_gpu = facts.kind == "cuda"
    work = [e for e in events if _is_work(e, on_gpu)]
    busy_us = _covered(
        [(e.time_range.start, e.time_range.end) for e in work],
        (whole.time_range.start, whole.time_range.end),
    )
    return Profile(
        seconds=wall_us / 1e6,
        idle_share=1 - busy_us / wall_us if wall_us else 0.0,
        stages=_stages(events, wall_us, on_gpu),
        operators=_operators(work, wall_us, on_gpu),
        device=facts,
        trace=trace,
    )


def _is_work(event: Any, on_gpu: bool) -> bool:
    """Whether an event is an operator (CPU) or a kernel (GPU), not a label around some."""
    if event.is_user_annotation or event.name.startswith(PREFIX):
        return False
    is_kernel = event.device_type == DeviceType.CUDA
    return is_kernel if on_gpu else not is_kernel


def _covered(spans: Iterable[tuple[float, float]], within: tuple[float, float]) -> float:
    """Return how much of an interval the union of some others covers."""
    total, at = 0.0, within[0]
    for start, end in sorted(spans):
        start, end = max(start, at), min(end, within[1])
        if end > start:
            total += end - start
            at = end
    return total


def _label(event: Any) -> str | None:
    """Return the stage of a label event."""
    name: str = event.name
    is_cpu = event.device_type == DeviceType.CPU
    return name[len(PREFIX) :] if is_cpu and name.startswith(PREFIX) else None


def _around(event: Any) -> Iterator[Any]:
    """Yield the events around an event, innermost first."""
    while (event := event.cpu_parent) is not None:
        yield event


def _enclosing(event: Any) -> str:
    """Return the innermost stage around an event."""
    return next((stage for e in _around(event) if (stage := _label(e)) is not None), OTHER)


def _is_node(event: Any) -> bool:
    is_backward: bool = event.name.startswith(_BACKWARD_NODE)
    return is_backward


def _forward_stage(event: Any) -> str | None:
    """Return the innermost stage around a forward operator; None inside of a backward node."""
    for outer in _around(event):
        if _is_node(outer):
            return None
        if (stage := _label(outer)) is not None:
            return stage if stage != RUN else None
    return None


def _stages(events: Sequence[Any], wall_us: float, on_gpu: bool) -> tuple[StageTime, ...]:
    """Charge every stage and every backward node to its stage, each without those inside it."""
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    forward_stage = _stage_by_sequence(events)
    for event in events:
        stage = _label(event)
        if stage is None:
            node = _backward_stage(event, forward_stage)
            if node is None:
                continue
            stage, outer = node, _enclosing(event)
        else:
            calls[stage] += 1
            outer = _enclosing(event)
        time = event.device_time_total if on_gpu else event.cpu_time_total
        spent[stage] += time
        spent[outer] -= time  # whoever is around it claims it no longer
    whole = spent.pop(RUN, 0.0)
    spent.pop(OTHER, None)
    rows = [
        StageTime(stage, calls.get(stage, 0), us / 1e6, us / wall_us) for stage, us in spent.items()
    ]
    rows.append(StageTime(OTHER, 1, max(whole, 0.0) / 1e6, max(whole, 0.0) / wall_us))
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _stage_by_sequence(events: Sequence[Any]) -> Mapping[int, str]:
    """Return the stage in which each differentiable operator ran, by its sequence number.

    Several events share a number (an operator and what it calls); the one that started last, right
    before its autograd node was made, names the stage.
    """
    found: dict[int, str] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not _is_node(event):
            stage = _forward_stage(event)
            if stage is not None:
                found[event.sequence_nr] = stage
    return found


def _backward_stage(event: Any, forward_stage: Mapping[int, str]) -> str | None:
    """Return the stage of an outermost backward node, or None for any other event."""
    if not _is_node(event) or event.sequence_nr not in forward_stage:
        return None
    for outer in _around(event):
        if _is_node(outer) and outer.sequence_nr in forward_stage:
            return None  # part of a node that is charged already
    return f"{forward_stage[event.sequence_nr]} (backward)"


def _operators(work: Sequence[Any], wall_us: float, on_gpu: bool) -> tuple[OperatorTime, ...]:
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in work:
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        spent[event.name] += own
        calls[event.name] += 1
    rows = [
        OperatorTime(name, calls[name], us / 1e6, us / wall_us)
        for name, us in spent.items()
        if us > 0
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))
