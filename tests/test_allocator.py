"""Freed memory is kept by the process, within what the environment says."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from modaltune.kernels import _allocator as allocator
from modaltune.kernels._allocator import keep_freed_memory

CODE = """
import statistics
import torch
torch.set_num_threads(1)
from modaltune.kernels import frozen_linear
def faults():
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[7])
with torch.inference_mode():
    frozen_linear(torch.ones(80, 16), torch.ones(16, 16))
    def work():
        before = faults()
        blocks = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MiB each
        return faults() - before
    print(int(statistics.median(work() for _ in range(9))))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_blocks_are_not_faulted_in_again() -> None:
    pages = {}
    for kept in ("0", "256"):
        environment = {"MODALTUNE_KEEP_FREED_MIB": kept, "MODALTUNE_PRODUCTS": "torch"}
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**environment, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        pages[kept] = int(done.stdout)
    assert pages["0"] > 5 * 1024  # at least one block of 4 KiB pages, each time
    assert pages["256"] < 100


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
