"""Freed memory is kept by the process, within what the environment says."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from modaltune.kernels import _allocator as allocator
from modaltune.kernels._allocator import keep_freed_memory

CODE = """
import torch
from modaltune.kernels import frozen_linear
def resident_mib():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith("VmRSS")) / 1024
with torch.inference_mode():
    frozen_linear(torch.ones(80, 16), torch.ones(16, 16))
    before = resident_mib()
    blocks = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MiB each
    del blocks
    print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
@pytest.mark.parametrize(("kept", "least", "most"), [("0", -10, 10), ("256", 70, 90)])
def test_freed_blocks_stay_with_the_process(kept: str, least: float, most: float) -> None:
    environment = {"MODALTUNE_KEEP_FREED_MIB": kept, "MODALTUNE_PRODUCTS": "torch"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**environment, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert least < float(done.stdout) < most


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODALTUNE_KEEP_FREED_MIB", "0"),
        ("MALLOC_TRIM_THRESHOLD_", "1000"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000"),
    ],
)
def test_who_has_chosen_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert keep_freed_memory.__wrapped__() == 0


def test_other_libraries_and_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1"))
    assert keep_freed_memory.__wrapped__() == 0
    monkeypatch.setenv(allocator.VARIABLE, "some")
    with pytest.raises(ValueError, match="MODALTUNE_KEEP_FREED_MIB must be a whole number"):
        keep_freed_memory.__wrapped__()
