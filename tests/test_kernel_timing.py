"""Timing: rounds are interleaved, percentiles, memory, roofs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modaltune.benchmarks.kernel_timing import (
    MIB,
    Prepare,
    Roof,
    better,
    free_bytes,
    interleaved,
    peak_bytes,
    roof_of,
    summary,
)

CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_preparation_is_not_timed() -> None:
    order: list[str] = []

    def contender(name: str) -> Prepare:
        def prepare() -> Callable[[], Any]:
            order.append(f"prepare {name}")
            return lambda: order.append(name)

        return prepare

    found = interleaved({"a": contender("a"), "b": contender("b")}, CPU, budget_s=0.0)
    assert order == ["prepare a", "a", "prepare b", "b"] * 6  # one round to warm up, five timed
    assert {name: timing.runs for name, timing in found.items()} == {"a": 5, "b": 5}


def test_budget_allows_more_rounds() -> None:
    found = interleaved({"a": lambda: lambda: None}, CPU, budget_s=60.0)
    assert found["a"].runs == 100


def test_percentiles() -> None:
    found = summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (found.p20_s, found.p50_s, found.p80_s, found.runs) == (2.0, 3.5, 5.0, 6)
    assert summary([7.0]).p80_s == 7.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_what_a_call_needs_for_itself() -> None:
    held = torch.ones(16 * MIB // 4)

    def prepare() -> Callable[[], Any]:
        def run() -> Any:
            inside = torch.ones(64 * MIB // 4)
            return (inside + 1).sum() + held.sum()

        return run

    for _ in range(2):  # what the first call left in the allocator must not hide the second
        assert 120 * MIB < peak_bytes(prepare, CPU) < 150 * MIB
    assert peak_bytes(lambda: lambda: None, CPU) < 8 * MIB
    assert free_bytes(CPU) > 100 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_the_allocator_kept_is_counted_again() -> None:
    pinned = []  # small blocks above the large ones keep the heap from shrinking by itself

    def run() -> Any:
        blocks = [torch.ones(MIB // 8) for _ in range(256)]
        pinned.append(torch.ones(1000))
        return float(sum(block[0] for block in blocks))

    for _ in range(4):
        assert peak_bytes(lambda: run, CPU) > 110 * MIB


def test_roof_of_a_cpu_is_measured() -> None:
    roof = roof_of(CPU, torch.float32)
    assert roof is not None
    assert roof.source.startswith("measured: products ")
    assert roof.flops > 1e8
    assert roof.bytes_per_s > 1e7


def test_roof_takes_the_narrower_limit() -> None:
    roof = Roof(1e9, 1e6, "")
    assert roof.seconds(2e9, 1e6) == 2.0
    assert roof.seconds(1e9, 3e6) == 3.0


def test_better_roof_takes_the_higher_of_each() -> None:
    found = better(Roof(2e9, 1e9, "x"), Roof(1e9, 3e9, "y"))
    assert found is not None
    assert (found.flops, found.bytes_per_s) == (2e9, 3e9)
    assert found.source == "measured: products 2 GFLOP/s, copy 3 GB/s"
    assert better(None, None) is None
    published = Roof(1.0, 2.0, "published peaks of H100")
    assert better(published, published) is published
