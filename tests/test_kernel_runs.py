"""The kernel benchmark: the gate, the race, the rows; at small shapes, without a GPU."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.benchmarks import kernel_runs
from modaltune.benchmarks.harness import append_row
from modaltune.benchmarks.kernel_gate import Gate, checkable_tiles, results_of
from modaltune.benchmarks.kernel_runs import (
    COMPILED,
    EAGER,
    OURS,
    Plan,
    compiled,
    contenders_of,
    roof_share,
    rows_of,
    run_case,
    time_limit,
)
from modaltune.benchmarks.kernel_spec import Call, NotHereError, OpSpec, Rival, Run, all_specs
from modaltune.benchmarks.kernel_timing import Roof
from modaltune.kernels.roofline import LAUNCHES

CPU = torch.device("cpu")
PLAN = Plan(CPU, torch.float32, budget_s=0.0, compile_s=0.0)
COLUMNS = [
    *("time", "commit", "device", "torch", "triton", "op", "variant", "mode", "tiles", "dtype"),
    *("impl", "p20_ms", "p50_ms", "p80_ms", "runs", "peak_mib", "eager_over_this", "gflop_per_s"),
    *("least_gb_per_s", "roof_share", "roof", "checked_tiles"),
]
SPECS = [spec.at_small_size() for spec in all_specs()]
POOL = next(spec for spec in SPECS if spec.op == "gated_pooling")
CASES = [pytest.param(s, m, id=f"{s.name}, {m}") for s in SPECS for m in s.modes]


def _scaled(by: float) -> Callable[[Call], Run]:
    """A rival that is the reference times a factor."""

    def build(call: Call) -> Run:
        def run(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
            return POOL.reference(tensors, options) * by

        return run

    return build


def test_every_op_has_a_spec() -> None:
    assert {spec.op for spec in SPECS} == set(LAUNCHES)
    assert len({spec.name for spec in SPECS}) == len(SPECS)


@pytest.mark.parametrize(("spec", "mode"), CASES)
def test_everyone_answers_right(spec: OpSpec, mode: str) -> None:
    call = spec.make(70, CPU, torch.float32)
    found, _ = contenders_of(spec, call, mode, PLAN)
    names = [one.impl for one in found]
    assert names[:3] == [OURS, EAGER, COMPILED]
    for one in found:
        assert not one.is_wrong, one.reason
        if one.impl != COMPILED:
            assert one.run is not None, one.reason


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_half_precision_answers_right(spec: OpSpec) -> None:
    plan = dataclasses.replace(PLAN, dtype=torch.bfloat16)
    call = spec.make(40, CPU, torch.bfloat16)
    found, _ = contenders_of(spec, call, "forward", plan, only=OURS)
    assert found[0].run is not None, found[0].reason


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_gate_refuses_a_wrong_op(mode: str) -> None:
    rivals = {"right": Rival(_scaled(1.0)), "wrong": Rival(_scaled(1.001))}
    spec = dataclasses.replace(POOL, rivals=rivals)
    case = run_case(spec, mode, 50, PLAN)
    by_name = {one.impl: one for one in case.outcomes}
    assert by_name["right"].timing is not None
    assert by_name["wrong"].timing is None
    assert by_name["wrong"].is_wrong
    assert by_name["wrong"].reason.startswith("wrong answer, not timed: ")
    assert [row["impl"] for row in rows_of(case, PLAN, None)] == [OURS, EAGER, "right"]


def test_gate_refuses_ours_too() -> None:
    spec = dataclasses.replace(POOL, ours=lambda call, impl: _scaled(1.001)(call))
    case = run_case(spec, "forward", 50, PLAN)
    assert case.outcomes[0].is_wrong
    assert case.seconds(OURS) is None
    assert case.seconds(EAGER) is not None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: torch.full_like(out, torch.nan), "out is off by nan"),
        (lambda out: out[..., :-1], r"out has shape \[1, 3, 47\], not \[1, 3, 48\]"),
    ],
)
def test_gate_says_what_is_wrong(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    call = POOL.make(20, CPU, torch.float32)
    gate = Gate(POOL, call, "forward", torch.float32)
    assert gate.fault(POOL.reference) == ""
    assert re.search(
        message, gate.fault(lambda tensors, options: spoil(POOL.reference(tensors, options)))
    )


def test_missing_gradients_are_wrong() -> None:
    call = POOL.make(20, CPU, torch.float32)
    gate = Gate(POOL, call, "backward", torch.float32)

    def frozen(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        held = {**tensors, "gate_weight": tensors["gate_weight"].detach()}
        return POOL.reference(held, options)

    assert gate.fault(frozen).startswith("grad gate_weight is off by ")


def test_large_references_are_checked_smaller_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("kernel_gate", "kernel_runs"):
        monkeypatch.setattr(f"modaltune.benchmarks.{module}.free_bytes", lambda device: 1e6)
    spec = dataclasses.replace(POOL, reference_bytes=lambda tiles, itemsize: tiles * 1e4)
    assert checkable_tiles(spec, 100, CPU) == 25
    case = run_case(spec, "forward", 100, PLAN)
    assert (case.tiles, case.checked_tiles) == (100, 25)
    assert case.seconds(OURS) is not None
    reasons = {one.impl: one.reason for one in case.outcomes}
    assert reasons[EAGER] == reasons[COMPILED] == "needs about 0.0 GiB of 0.0 free"


def test_rows_have_the_columns(tmp_path: Path) -> None:
    case = run_case(POOL, "forward", 60, PLAN)
    roof = Roof(1e12, 1e12, "invented")
    rows = rows_of(case, PLAN, roof)
    assert [row["impl"] for row in rows] == [OURS, EAGER]
    for row in rows:
        assert list(row) == COLUMNS
        append_row(tmp_path / "kernels.csv", row)
    with (tmp_path / "kernels.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    first = read[0]
    assert first["op"] == "gated_pooling"
    assert first["mode"] == "forward"
    assert first["tiles"] == first["checked_tiles"] == "60"
    assert int(first["runs"]) == 5
    assert float(first["p20_ms"]) <= float(first["p50_ms"]) <= float(first["p80_ms"])
    assert float(first["peak_mib"]) >= 0
    assert float(read[1]["eager_over_this"]) == 1.0
    flops = 60 * (4 * 48 * 16 + 2 * 3 * (16 + 48))
    assert case.flops == flops
    assert float(first["gflop_per_s"]) == pytest.approx(
        flops / (float(first["p50_ms"]) * 1e6), rel=0.1, abs=0.01
    )


def test_roof_share_is_least_time_over_time() -> None:
    case = dataclasses.replace(run_case(POOL, "forward", 9, PLAN), flops=2e9, least_bytes=1e9)
    assert roof_share(case, 0.004, Roof(1e12, 1e12, "")) == 0.5  # products: 2 ms
    assert roof_share(case, 0.01, Roof(1e13, 1e11, "")) == 1.0  # bytes: 10 ms
    assert roof_share(case, 0.01, None) == ""
    assert roof_share(dataclasses.replace(case, flops=None), 0.01, Roof(1, 1, "")) == ""


def test_compiling_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Run, **options: Any) -> Run:
        def run(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
            try:
                time.sleep(30)
            except TimeoutError as error:  # as a compiler that wraps what its passes raise
                raise RuntimeError("backend failed") from error
            return function(tensors, options)

        return run

    monkeypatch.setattr(torch, "compile", slow)
    started = time.perf_counter()
    call = POOL.make(9, CPU, torch.float32)
    with pytest.raises(NotHereError, match=r"compiling took more than 0\.2 s"):
        compiled(POOL, call, "forward", 0.2)
    assert time.perf_counter() - started < 20


_WITHOUT_COMPILER = """
import torch
from modaltune.benchmarks.kernel_runs import Plan, run_case
from modaltune.benchmarks.kernel_spec import all_specs

spec = next(s for s in all_specs() if s.op == "gated_pooling")
plan = Plan(torch.device("cpu"), torch.float32, budget_s=0.0, compile_s=100.0)
for one in run_case(spec, "forward", 11, plan).outcomes:
    print(one.impl, one.timing is not None, one.is_wrong, one.reason, sep="|")
"""


def test_absent_compilers_are_said(tmp_path: Path) -> None:
    # In a process of its own: the compiler that was not found stays not found.
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_COMPILER],
        env={**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    by_name = {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}
    is_timed, is_wrong, reason = by_name[COMPILED]
    assert (is_timed, is_wrong) == ("False", "False")
    assert reason.startswith("does not compile here: ")
    assert by_name[OURS] == by_name[EAGER] == ["True", "False", ""]


@pytest.mark.slow
def test_compiled_reference_takes_part() -> None:
    plan = dataclasses.replace(PLAN, compile_s=300.0)
    case = run_case(POOL, "forward", 12, plan)
    by_name = {one.impl: one for one in case.outcomes}
    assert by_name[COMPILED].timing is not None, by_name[COMPILED].reason


def test_time_limit_leaves_no_alarm_behind() -> None:
    with time_limit(0.05) as is_over:
        pass
    time.sleep(0.1)
    assert not is_over()
    ran = []

    def elsewhere() -> None:
        with time_limit(0.01) as is_late:
            time.sleep(0.05)
            ran.append(is_late())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [False]


def test_only_names_who_can_not_run_here() -> None:
    call = POOL.make(9, CPU, torch.float32)
    found, _ = contenders_of(POOL, call, "forward", PLAN, only="CUDA C++")
    assert [(one.impl, one.run, one.reason) for one in found] == [
        ("CUDA C++", None, "does not run on cpu")
    ]


def test_backward_results_are_gradients() -> None:
    call = POOL.make(9, CPU, torch.float64)
    found = results_of(POOL, POOL.reference, call, "backward")
    assert set(found) == {f"grad {name}" for name in POOL.wanted}
    assert kernel_runs.CSV_NAME == "kernels.csv"
    assert all(bool(grad.abs().max() > 0) for grad in found.values())
