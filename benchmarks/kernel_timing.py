"""How a call is timed: interleaved, on the CPU or with CUDA events and a cold L2; memory; roofs."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from modaltune.kernels.roofline import known_device

# Prepares a run outside the timing (a forward pass, say) and returns what is timed.
Prepare = Callable[[], Callable[[], Any]]
MIB = 2**20
_MIN_RUNS, _MAX_RUNS = 5, 100
_LONGEST_SPIN_S = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender."""

    p20_s: float
    p50_s: float
    p80_s: float
    runs: int


@dataclass(frozen=True)
class Roof:
    """What the machine can do, and where the figures come from."""

    flops: float
    bytes_per_s: float
    source: str

    def seconds(self, flops: float, least_bytes: float) -> float:
        """Return the least time of so much work."""
        return max(flops / self.flops, least_bytes / self.bytes_per_s)


def summary(seconds: list[float]) -> Timing:
    """Return percentiles 20, 50 and 80 of at least one run."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7], len(seconds))


class _CpuClock:
    def time(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class _CudaClock:
    """CUDA events around a call that finds the L2 cold, and the device busy until it is queued.

    So the time is the device's; a call that takes the host longer than `_LONGEST_SPIN_S` to queue
    has gaps in it.
    """

    def __init__(self, device: torch.device) -> None:
        facts = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(
            max(2 * facts.L2_cache_size, 64 * MIB), dtype=torch.int8, device=device
        )
        self._device = device
        self._cycles_per_s = 1e3 * getattr(facts, "clock_rate", 2_000_000)
        self._spin_s = 1e-3

    def time(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(self._spin_s * self._cycles_per_s))
        start.record()
        before = time.perf_counter()
        run()
        host_s = time.perf_counter() - before
        end.record()
        torch.cuda.synchronize(self._device)
        self._spin_s = min(max(self._spin_s, 1.5 * host_s), _LONGEST_SPIN_S)
        return start.elapsed_time(end) / 1e3


def interleaved(
    contenders: Mapping[str, Prepare], device: torch.device, budget_s: float
) -> dict[str, Timing]:
    """Time contenders in turn, round after round, until the budget or 100 rounds are used up.

    One untimed round comes first; at least five are timed, whatever the budget.

    Args:
        contenders: By name.
        device: Where they run.
        budget_s: Seconds for all rounds together.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for prepare in contenders.values():
        clock.time(prepare())
    started = time.perf_counter()
    for done in range(_MAX_RUNS):
        if done >= _MIN_RUNS and time.perf_counter() - started > budget_s:
            break
        for name, prepare in contenders.items():
            seconds[name].append(clock.time(prepare()))
    return {name: summary(found) for name, found in seconds.items()}


def peak_bytes(prepare: Prepare, device: torch.device) -> int:
    """Return the memory that a call needs beyond what was there before, at its peak.

    On the CPU this is resident memory (Linux), so pages that the allocator holds back are returned
    first. -1 where the system does not say.
    """
    run = prepare()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    if not _reset_resident_peak():
        return -1
    before = _resident("VmRSS")
    result = run()
    peak = _resident("VmHWM")
    del result
    return max(0, peak - before)


def _reset_resident_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def free_bytes(device: torch.device) -> float:
    """Return the memory that is free now; unlimited where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float("inf")


def roof_of(device: torch.device, dtype: torch.dtype) -> Roof | None:
    """Return a GPU's published peaks, or what this CPU does now; None for a GPU not in the table.

    On the CPU: the best of several products `[8192, 768] x [768, 768]` through `F.linear`, and of
    several copies of 256 MiB, read and write counted.
    """
    if device.type == "cuda":
        known = known_device(torch.cuda.get_device_name(device))
        if known is None:
            return None
        peak = known.half_flops if dtype.itemsize == 2 else known.tf32_flops
        return Roof(peak, known.bytes_per_s, f"published peaks of {known.name}")
    x, weight = torch.randn(8192, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype)
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    clock = _CpuClock()
    product = min(clock.time(lambda: F.linear(x, weight)) for _ in range(5))
    copy = min(clock.time(lambda: target.copy_(source)) for _ in range(5))
    return _measured_roof(2 * x.numel() * 768 / product, 2 * source.nbytes / copy)


def better(one: Roof | None, other: Roof | None) -> Roof | None:
    """Return the higher roof of two: a busy machine shows less than it can."""
    if one is None or other is None:
        return one or other
    if one.flops == other.flops:
        return one
    flops, rate = max(one.flops, other.flops), max(one.bytes_per_s, other.bytes_per_s)
    return _measured_roof(flops, rate)


def _measured_roof(flops: float, rate: float) -> Roof:
    said = f"measured: products {flops / 1e9:.0f} GFLOP/s, copy {rate / 1e9:.0f} GB/s"
    return Roof(flops, rate, said)


def graph_of(run: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call into a CUDA graph and return its replay.

    Raises:
        RuntimeError: The call can't be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
