"""The offline resource report: occupancy, stored tables, a real compilation and its cache."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modaltune.kernels import resources
from modaltune.kernels.resources import (
    STORED,
    Resources,
    all_specs,
    main,
    occupancy,
    ops_with_kernels,
    regressions,
    store,
    stored_table,
)

ROW = Resources(
    label="op.kernel[fp16 sm_90 ]",
    op="op",
    kernel="kernel",
    capability=90,
    dtype="fp16",
    registers=128,
    spilled_bytes=0,
    shared_bytes=65536,
    warps=8,
    occupancy=0.25,
    tensor_core="wgmma.mma_async",
    widest_load_bytes=16,
)


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "expected"),
    [
        (90, 32, 0, 4, 1.0),  # 16 blocks of 4 warps: all 64
        (90, 255, 1024, 8, 0.125),  # 256 registers a thread: one block of 8 warps
        (80, 128, 0, 8, 0.25),  # 2 blocks by registers
        (90, 32, 100 * 1024, 4, 0.125),  # 2 blocks by shared memory
        (120, 32, 99 * 1024, 4, 4 / 48),  # 99 KiB and the system's one: one block
        (120, 32, 0, 1, 0.5),  # at most 24 blocks of one warp
        (120, 32, 120 * 1024, 4, 0.0),  # does not fit
    ],
)
def test_occupancy_by_hand(
    capability: int, registers: int, shared: int, warps: int, expected: float
) -> None:
    assert occupancy(capability, registers, shared, warps) == pytest.approx(expected)


def test_regressions_name_what_got_worse() -> None:
    stored = {ROW.label: dataclasses.asdict(ROW)}
    assert regressions([ROW], stored) == []
    better = dataclasses.replace(ROW, occupancy=0.5, registers=64)
    assert regressions([better], stored) == []
    slower = dataclasses.replace(ROW, occupancy=0.125)
    assert regressions([slower], stored) == [f"{ROW.label}: occupancy 0.12, was 0.25"]
    narrow = dataclasses.replace(ROW, widest_load_bytes=8)
    assert regressions([narrow], stored) == [f"{ROW.label}: widest load 8 bytes, was 16"]
    assert "not in the stored table" in regressions([ROW], {})[0]
    assert "no longer compiled" in regressions([], stored)[0]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of stored tables."""
    monkeypatch.setattr(resources, "STORED", tmp_path / "resources")
    return tmp_path / "resources"


def test_tables_are_stored_per_op(table: Path) -> None:
    other = dataclasses.replace(ROW, op="other", label="other.kernel[fp16 sm_90 ]")
    store([ROW, other])
    assert sorted(path.name for path in table.iterdir()) == ["op.json", "other.json"]
    assert set(stored_table()) == {ROW.label, other.label}
    assert set(stored_table(["other"])) == {other.label}
    renamed = dataclasses.replace(ROW, label="op.newer[fp16 sm_90 ]")
    store([renamed])
    assert set(stored_table(["op"])) == {renamed.label}
    assert set(stored_table(["other"])) == {other.label}


def _check(monkeypatch: pytest.MonkeyPatch, rows: list[Resources], *arguments: str) -> int:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(resources, "measure", lambda ops: rows)
    return main(["--check", *arguments])


def test_check_fails_on_problems_and_regressions(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check(monkeypatch, [ROW]) == 1  # nothing stored yet
    assert _check(monkeypatch, [ROW], "--store") == 0
    assert _check(monkeypatch, [ROW]) == 0
    assert capsys.readouterr().out.endswith("1 compilations, no problem\n")
    assert _check(monkeypatch, [dataclasses.replace(ROW, occupancy=0.1)], "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"][0]["occupancy"] == 0.1
    assert found["failures"] == [f"{ROW.label}: occupancy 0.10, was 0.25"]
    spilled = dataclasses.replace(ROW, problems=["8 bytes spilled"])
    assert _check(monkeypatch, [spilled]) == 1
    assert f"{ROW.label}: 8 bytes spilled" in capsys.readouterr().out


def test_an_op_without_kernels_is_refused(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a misspelt op, of which nothing is compiled, would pass the check."""
    assert _check(monkeypatch, [], "--op", "tile_norm") == 0
    with pytest.raises(SystemExit, match="2"):
        _check(monkeypatch, [], "--op", "tile_norms")
    assert "invalid choice: 'tile_norms'" in capsys.readouterr().err


def test_stored_labels_are_those_of_shipped_kernels() -> None:
    stored = stored_table()
    kernels = {(row["op"], row["kernel"]) for row in stored.values()}
    assert kernels <= {(spec.op, spec.kernel) for spec in all_specs()}
    assert all(row["spilled_bytes"] == 0 and not row["problems"] for row in stored.values())


def test_every_shipped_configuration_is_compiled() -> None:
    """For its GPU, or for another one that has the same."""
    missing, specs = [], all_specs()
    for op in ops_with_kernels():
        shipped = json.loads((STORED.parent / f"{op}.json").read_text())
        for name, configurations in shipped.items():
            kernel = re.split(r"\W", name)[0]
            of_kernel = [
                ({**spec.constexprs, **spec.options}, spec.capability)
                for spec in specs
                if (spec.op, spec.kernel) == (op, kernel)
                and (spec.dtype == "fp32" or "fp32" not in name)
            ]
            for capability, chosen in configurations.items():
                alike = [int(other) for other, have in configurations.items() if have == chosen]
                if not any(
                    target in alike and all(known.get(k, v) == v for k, v in chosen.items())
                    for known, target in of_kernel
                ):
                    missing.append(f"{op} {name} sm_{capability}")
    assert missing == []


_COMPILE = """
import dataclasses, json
from modaltune.kernels.resources import all_specs, compile_spec

specs = [s for s in all_specs(["tile_norm"]) if s.capability == 80 and "crop" in s.kernel]
found = compile_spec(specs[0])
import triton
lines = triton.knobs.compilation.disable_line_info
print(json.dumps({**dataclasses.asdict(found), "lines": lines}))
"""


def test_a_kernel_compiles_here_and_is_cached(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "t"),
    }
    environment.pop("TRITON_INTERPRET", None)

    def compiled() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    first = compiled()
    assert first["registers"] > 0
    assert first["widest_load_bytes"] == 16
    assert first["problems"] == []
    assert first["lines"] is False  # the setting is put back
    assert not (tmp_path / "t").exists()  # Triton's own cache holds nothing of it
    (kept,) = (tmp_path / "modaltune" / "resources").iterdir()
    kept.write_text(kept.read_text().replace('"spilled_bytes": 0', '"spilled_bytes": 77'))
    assert compiled()["spilled_bytes"] == 77  # taken from the cache


def test_an_empty_cache_variable_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else results would lie in the folder that the command was called from."""
    spec = resources.all_specs(["position_embed"])[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert resources.cache_path(spec).is_relative_to(tmp_path / ".cache")
