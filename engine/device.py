"""Facts of the device that does the work: what a roofline and a plan need to know of it."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modaltune.engine.errors import InputError

logger = logging.getLogger(__name__)

# CUdevice_attribute names of PyCUDA, and the attribute of torch's device properties that holds the
# same number in the same unit (clocks in kHz, sizes in bytes, bus width in bits).
_ATTRIBUTES = {
    "multiprocessors": ("MULTIPROCESSOR_COUNT", "multi_processor_count"),
    "clock_khz": ("CLOCK_RATE", "clock_rate"),
    "memory_clock_khz": ("MEMORY_CLOCK_RATE", "memory_clock_rate"),
    "bus_width_bits": ("GLOBAL_MEMORY_BUS_WIDTH", "memory_bus_width"),
    "l2_bytes": ("L2_CACHE_SIZE", "L2_cache_size"),
}


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of one device; None where nothing says it.

    Attributes:
        name: As the driver or the system gives it.
        kind: `cuda` or `cpu`.
        source: Who said so: `pycuda`, `torch` or `system`.
        capability: Compute capability such as 90, or None on a CPU.
        multiprocessors: SMs, or cores that this process may use.
        clock_mhz: Highest clock of the multiprocessors.
        bus_width_bits: Width of the memory bus.
        memory_clock_mhz: Clock of the memory; two transfers a cycle.
        l2_bytes: L2 of a GPU; last-level cache of a CPU.
        memory_bytes: Memory of the device; of the machine for a CPU.
    """

    name: str
    kind: str
    source: str
    capability: int | None
    multiprocessors: int
    clock_mhz: float | None
    bus_width_bits: int | None
    memory_clock_mhz: float | None
    l2_bytes: int | None
    memory_bytes: int | None

    @property
    def memory_bytes_per_s(self) -> float | None:
        """Peak memory bandwidth: two transfers per memory clock over the whole bus."""
        if not self.memory_clock_mhz or not self.bus_width_bits:
            return None
        return 2 * self.memory_clock_mhz * 1e6 * self.bus_width_bits / 8

    def to_dict(self) -> dict[str, Any]:
        """Return every fact and the bandwidth as plain data."""
        return {**asdict(self), "memory_bytes_per_s": self.memory_bytes_per_s}


def cpu_or_cuda(device: str | torch.device) -> torch.device:
    """Return the device that is meant, whether it is there or not.

    Raises:
        InputError: It is neither a CPU nor a CUDA device.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be cpu, cuda or cuda:N, got {device!r}; give one") from error
    if wanted.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {device!r}; give one of them")
    return wanted


def device_facts(device: str | torch.device = "cpu") -> DeviceFacts:
    """Return the facts of a device; through PyCUDA on a GPU where it is installed, torch otherwise.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.

    Raises:
        InputError: See `check_device`.
    """
    wanted = check_device(device)
    return _cpu_facts() if wanted.type == "cpu" else _cuda_facts(wanted.index or 0)


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that is there: `cpu`, `cuda` or `cuda:1`.

    Raises:
        InputError: The device is neither, or it is a GPU that is not there.
    """
    wanted = cpu_or_cuda(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise InputError(
            f"device must be one of the {count} GPUs that torch sees, got {device!r}; use cpu, or "
            "see what `modaltune doctor` says of CUDA"
        )
    return wanted


def _cuda_facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    values: dict[str, int | None] | None = _by_pycuda(properties)
    source = "pycuda"
    if values is None:
        values = {name: getattr(properties, ours, None) for name, (_, ours) in _ATTRIBUTES.items()}
        source = "torch"
    clock, memory_clock = values["clock_khz"], values["memory_clock_khz"]
    return DeviceFacts(
        name=properties.name,
        kind="cuda",
        source=source,
        capability=10 * properties.major + properties.minor,
        multiprocessors=int(values["multiprocessors"] or 0),
        clock_mhz=clock / 1e3 if clock else None,
        bus_width_bits=values["bus_width_bits"],
        memory_clock_mhz=memory_clock / 1e3 if memory_clock else None,
        l2_bytes=values["l2_bytes"],
        memory_bytes=properties.total_memory,
    )


def _by_pycuda(properties: Any) -> dict[str, int | None] | None:
    """Return the attributes as the driver has them, or None where PyCUDA can't ask it."""
    if importlib.util.find_spec("pycuda") is None:
        return None
    try:
        import pycuda.driver as cuda
    except ImportError as error:  # built against another driver than the one that is here
        logger.info("PyCUDA can't be loaded (%s); torch gives the device's facts", error)
        return None
    cuda.init()
    # By bus address: CUDA_VISIBLE_DEVICES and another order must not mix two GPUs up.
    address = ":".join(
        f"{part:0{width}x}"
        for part, width in (
            (properties.pci_domain_id, 4),
            (properties.pci_bus_id, 2),
            (properties.pci_device_id, 2),
        )
    )
    device = cuda.Device(f"{address}.0")
    return {
        name: int(device.get_attribute(getattr(cuda.device_attribute, theirs)))
        for name, (theirs, _) in _ATTRIBUTES.items()
    }


def _cpu_facts() -> DeviceFacts:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", info, re.MULTILINE)]
    total = re.search(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    cores = getattr(os, "sched_getaffinity", None)
    return DeviceFacts(
        name=model[1].strip() if model else platform.processor() or platform.machine(),
        kind="cpu",
        source="system",
        capability=None,
        multiprocessors=len(cores(0)) if cores else os.cpu_count() or 1,
        clock_mhz=max(clocks) if clocks else None,
        bus_width_bits=None,
        memory_clock_mhz=None,
        l2_bytes=_last_level_cache(),
        memory_bytes=int(total[1]) * 1024 if total else None,
    )


def _last_level_cache() -> int | None:
    sizes = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = re.fullmatch(r"(\d+)K", _read(folder / "size").strip())
        level = _read(folder / "level").strip()
        if size and level.isdigit():
            sizes[int(level)] = int(size[1]) * 1024
    return sizes[max(sizes)] if sizes else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not Linux, or a container that hides it: the fact is unknown
