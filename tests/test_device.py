"""Facts of devices: this machine's CPU for real, GPUs through recorded properties."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

from modaltune.engine.device import DeviceFacts, device_facts
from modaltune.engine.errors import InputError

# An H100 SXM as torch reports it.
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
    L2_cache_size=50 * 2**20,
    total_memory=85_520_809_984,
    pci_domain_id=0,
    pci_bus_id=0x1B,
    pci_device_id=0,
)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100)


def without_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)


def with_pycuda(monkeypatch: pytest.MonkeyPatch, driver: types.ModuleType) -> None:
    package = types.ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())


def fake_driver(asked: list[str]) -> types.ModuleType:
    """A driver that answers by attribute name, for the device at one bus address only."""
    answers = {
        "MULTIPROCESSOR_COUNT": 114,
        "CLOCK_RATE": 1_755_000,
        "MEMORY_CLOCK_RATE": 1_593_000,
        "GLOBAL_MEMORY_BUS_WIDTH": 4096,
        "L2_CACHE_SIZE": 40 * 2**20,
    }

    class Device:
        def __init__(self, address: str) -> None:
            asked.append(address)

        def get_attribute(self, name: str) -> int:
            return answers[name]

    driver = types.ModuleType("pycuda.driver")
    driver.init = lambda: asked.append("init")  # type: ignore[attr-defined]
    driver.Device = Device  # type: ignore[attr-defined]
    driver.device_attribute = types.SimpleNamespace(  # type: ignore[attr-defined]
        **{name: name for name in answers}
    )
    return driver


def test_the_cpu_of_this_machine() -> None:
    facts = device_facts("cpu")
    assert facts.kind == "cpu"
    assert facts.name
    assert facts.multiprocessors == len(os.sched_getaffinity(0))
    assert facts.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert facts.memory_bytes_per_s is None


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pycuda(monkeypatch)
    facts = device_facts("cuda")
    assert (facts.source, facts.capability, facts.multiprocessors) == ("torch", 90, 132)
    assert (facts.clock_mhz, facts.l2_bytes) == (1980.0, 52_428_800)
    # 2 transfers x 2,619 MHz x 640 bytes: the data sheet's 3.35 TB/s.
    assert facts.memory_bytes_per_s == pytest.approx(3.352e12, rel=1e-3)


@pytest.mark.usefixtures("one_gpu")
def test_pycuda_is_asked_first_and_by_bus_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    with_pycuda(monkeypatch, fake_driver(asked))
    facts = device_facts("cuda:0")
    assert asked == ["init", "0000:1b:00.0"]
    assert (facts.source, facts.multiprocessors, facts.bus_width_bits) == ("pycuda", 114, 4096)
    assert facts.to_dict()["memory_bytes_per_s"] == 2 * 1593e6 * 512


@pytest.mark.usefixtures("one_gpu")
def test_a_pycuda_that_does_not_load_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pycuda(monkeypatch, types.ModuleType("pycuda.driver"))
    monkeypatch.delattr(sys.modules["pycuda"], "driver")
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)  # what a failed import looks like
    assert device_facts("cuda").source == "torch"


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("a GPU is here")
    with pytest.raises(InputError, match=r"GPUs that torch sees, got 'cuda.*use cpu"):
        device_facts(device)


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(InputError, match=f"device must be cpu.*got '{device}'"):
        device_facts(device)


def test_unknown_clocks_give_no_bandwidth() -> None:
    facts = DeviceFacts("x", "cuda", "torch", 90, 1, None, 5120, None, None, None)
    assert facts.memory_bytes_per_s is None
