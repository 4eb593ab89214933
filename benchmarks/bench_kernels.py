"""The kernel benchmarks through pytest-benchmark: `pytest benchmarks --benchmark-only`.

Same inputs, rivals and checks as `modaltune bench kernels`, whose rounds are interleaved; here each
contender has its rounds to itself, and pytest-benchmark compares them within a group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modaltune.benchmarks.harness import append_row
from modaltune.benchmarks.kernel_gate import preparation
from modaltune.benchmarks.kernel_runs import (
    COMPILED,
    CSV_NAME,
    EAGER,
    OURS,
    Case,
    Outcome,
    Plan,
    contenders_of,
    rows_of,
)
from modaltune.benchmarks.kernel_spec import OpSpec, all_specs
from modaltune.benchmarks.kernel_timing import peak_bytes, roof_of, summary
from modaltune.kernels.roofline import op_cost

MATRIX = [
    pytest.param(spec, mode, impl, id=f"{spec.name}-{mode}-{impl}".replace(" ", "_"))
    for spec in all_specs()
    for mode in spec.modes
    for impl in (OURS, EAGER, COMPILED, *(n for n, r in spec.rivals.items() if mode in r.modes))
]


def _plan(config: pytest.Config) -> Plan:
    has_gpu = torch.cuda.is_available()
    return Plan(
        torch.device("cuda" if has_gpu else "cpu"),
        torch.bfloat16 if has_gpu else torch.float32,
        compile_s=config.getoption("--compile-seconds"),
    )


@pytest.mark.parametrize(("spec", "mode", "impl"), MATRIX)
def test_kernel(benchmark: Any, spec: OpSpec, mode: str, impl: str, pytestconfig: Any) -> None:
    """Time one contender; a wrong answer of ours fails, a rival that can't run is skipped."""
    plan = _plan(pytestconfig)
    tiles = min(pytestconfig.getoption("--tiles"), spec.most_tiles)
    call = spec.make(tiles, plan.device, plan.dtype)
    (found,), checked = contenders_of(spec, call, mode, plan, only=impl)
    if found.run is None:
        if found.is_wrong and impl == OURS:
            pytest.fail(found.reason)
        pytest.skip(found.reason)
    prepare = preparation(spec, found.run, call, mode)
    memory = peak_bytes(prepare, plan.device)

    def timed(run: Any) -> None:
        run()
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)

    size = f", {tiles:,} tiles" if tiles else ""
    benchmark.group = f"{spec.name}, {mode}{size}"
    benchmark.extra_info.update(peak_bytes=memory, checked_tiles=checked)
    benchmark.pedantic(timed, setup=lambda: ((prepare(),), {}), rounds=10, warmup_rounds=1)
    folder = pytestconfig.getoption("--results")
    if folder is not None:
        outcome = Outcome(impl, summary(list(benchmark.stats.stats.data)), memory)
        cost = op_cost(spec.op, call.sizes, mode=mode, dtype=plan.dtype)
        work = (cost.flops, cost.least_bytes) if cost else (None, None)
        case = Case(spec, mode, tiles, checked, [outcome], *work)
        for row in rows_of(case, plan, roof_of(plan.device, plan.dtype)):
            append_row(Path(folder) / CSV_NAME, row)
