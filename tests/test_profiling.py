"""Profiles: time charged to the right stage, backward nodes too, idle time, GPU events."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from modaltune.engine.device import DeviceFacts, device_facts
from modaltune.kernels.ranges import stage_range
from modaltune.profiling import Profile, profile_run, summarise

GPU = DeviceFacts("gpu", "cuda", "torch", 90, 132, None, None, None, None, None)


def seconds(found: Profile) -> dict[str, float]:
    return {row.stage: row.seconds for row in found.stages}


def test_stages_backward_nodes_and_idle_time(tmp_path: Path) -> None:
    weight = torch.randn(700, 700, requires_grad=True)

    def run() -> None:
        with stage_range("outer"):
            y = torch.relu(torch.ones(4, 700) @ weight)
            with stage_range("inner"):
                for _ in range(4):
                    y = y @ weight
        time.sleep(0.2)
        with stage_range("backward"):
            y.sum().backward()

    found = profile_run(run, trace=tmp_path / "trace.json")
    spent = seconds(found)
    assert {"outer", "inner", "outer (backward)", "inner (backward)", "other"} <= set(spent)
    assert spent["inner (backward)"] > spent["outer (backward)"] > 0
    assert sum(row.share for row in found.stages) == pytest.approx(1.0, abs=1e-6)
    assert {row.stage: row.calls for row in found.stages}["inner"] == 1
    assert spent["other"] >= 0.2
    assert 0.2 / found.seconds <= found.idle_share < 1
    assert found.operators[0].seconds >= found.operators[-1].seconds
    assert "aten::mm" in {row.operator for row in found.operators}
    assert found.device == device_facts("cpu")
    names = {e.get("name") for e in json.loads(found.trace.read_text())["traceEvents"]}  # type: ignore[union-attr]
    assert {"modaltune.outer", "modaltune.inner"} <= names
    json.dumps(found.to_dict(), allow_nan=False)


def test_warm_up_runs_are_not_looked_at() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        with stage_range(f"call{len(calls)}"):
            torch.ones(3).sum()

    found = profile_run(run, warmup=2)
    assert {row.stage for row in found.stages} == {"call3", "other"}


def event(name: str, start: float, end: float, **changes: Any) -> SimpleNamespace:
    """An event as torch.profiler gives it; times in microseconds."""
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    values = {
        "name": name,
        "time_range": span,
        "device_type": DeviceType.CPU,
        "is_user_annotation": name.startswith("modaltune."),
        "cpu_parent": None,
        "sequence_nr": -1,
        "cpu_time_total": end - start,
        "self_cpu_time_total": end - start,
        "device_time_total": 0.0,
    }
    return SimpleNamespace(**{**values, **changes})


def test_a_gpu_is_judged_by_its_kernels() -> None:
    run = event("modaltune.run", 0, 100, device_time_total=60)
    stage = event("modaltune.injector", 1, 3, cpu_parent=run, device_time_total=50)
    launch = event("aten::mm", 1, 2, cpu_parent=stage)
    mirrored = event("modaltune.injector", 10, 70, device_type=DeviceType.CUDA)
    kernels = [
        event("inject_fwd_kernel", 10, 40, device_type=DeviceType.CUDA),
        event("inject_fwd_kernel", 30, 60, device_type=DeviceType.CUDA),  # a second stream
        event("copy", 60, 70, device_type=DeviceType.CUDA),
    ]
    found = summarise([run, stage, launch, mirrored, *kernels], GPU)
    assert seconds(found) == {"injector": 50e-6, "other": 10e-6}
    assert found.idle_share == pytest.approx(0.4)  # 10 to 70 of 100 is covered, once
    assert [(row.operator, row.calls, row.seconds) for row in found.operators] == [
        ("inject_fwd_kernel", 2, 60e-6),
        ("copy", 1, 10e-6),
    ]


def test_recomputed_operators_do_not_rename_backward_nodes() -> None:
    """What runs inside a backward node has no say in which stage the node belongs to."""
    run = event("modaltune.run", 0, 100)
    stage = event("modaltune.ffn", 0, 10, cpu_parent=run)
    forward = event("aten::mm", 1, 9, cpu_parent=stage, sequence_nr=7)
    around = event("modaltune.backward", 20, 90, cpu_parent=run)
    node = event(
        "autograd::engine::evaluate_function: MmBackward0", 30, 80, cpu_parent=around, sequence_nr=7
    )
    again = event("aten::mm", 40, 50, cpu_parent=node, sequence_nr=7)
    found = summarise([run, stage, forward, around, node, again], GPU.__class__(
        "cpu", "cpu", "system", None, 2, None, None, None, None, None
    ))  # fmt: skip
    assert seconds(found) == pytest.approx(
        {"ffn (backward)": 50e-6, "backward": 20e-6, "other": 20e-6, "ffn": 10e-6}
    )
