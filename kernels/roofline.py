"""What every op costs on a device, modelled: FLOPs, bytes, and the time its roof allows.

Each op's `cost.py` counts its work; an op that gains one is found without a change here. A re-read
is free only while what is re-read fits half the L2 of the device. Nothing here was measured.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from modaltune.kernels._tuning import nearest

ROOT = Path(__file__).parent
MODES = ("forward", "backward")
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """Published peaks of a GPU.

    Attributes:
        name: As people say it.
        capability: Compute capability, such as 90.
        half_flops: Dense bfloat16 and float16 products with float32 sums, FLOP/s.
        tf32_flops: Dense TF32 products, FLOP/s.
        special_ops: Exponentials, reciprocals and square roots a second: 16 per clock and
            multiprocessor (CUDA C++ Programming Guide, arithmetic throughput) at the clock that
            the peaks are quoted for.
        bytes_per_s: Memory bandwidth.
        l2_bytes: L2 cache.
        multiprocessors: Of the device.
        source: Where the figures stand.
    """

    name: str
    capability: int
    half_flops: float
    tf32_flops: float
    special_ops: float
    bytes_per_s: float
    l2_bytes: int
    multiprocessors: int
    source: str


def _device(
    name: str,
    capability: int,
    teraflops: tuple[float, float],
    terabytes: float,
    l2_mib: int,
    multiprocessors: int,
    gigahertz: float,
    source: str,
) -> Device:
    half, tf32 = (value * 1e12 for value in teraflops)
    special = 16 * multiprocessors * gigahertz * 1e9
    memory = terabytes * 1e12
    return Device(
        name, capability, half, tf32, special, memory, l2_mib * MIB, multiprocessors, source
    )


DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        _device("A100", 80, (312, 156), 2.039, 40, 108, 1.41,
                "NVIDIA A100 80GB SXM data sheet (2021); A100 architecture white paper, table 4"),
        _device("H100", 90, (989.4, 494.7), 3.35, 50, 132, 1.83,
                "NVIDIA H100 SXM5 data sheet; H100 architecture white paper, tables 2 and 3"),
        _device("B200", 100, (2250, 1125), 8.0, 126, 148, 1.85,
                "NVIDIA DGX B200 data sheet, an eighth of the system, sparse figures halved"),
        _device("RTX 4090", 89, (165.2, 82.6), 1.008, 72, 128, 2.52,
                "NVIDIA Ada GPU architecture white paper, appendix A (float32 sums)"),
    )
}  # fmt: skip

# Devices that are measured on, but not modelled: the chip of an H100 beside other memory.
_MEASURED = (
    *DEVICES.values(),
    _device("H200", 90, (989.4, 494.7), 4.8, 60, 132, 1.83, "NVIDIA H200 SXM data sheet (2023)"),
)
# Boards, and parts of one, that share a chip's name, but not its peaks.
_OTHER_BOARDS = ("PCIe", "NVL", "40GB", "RTX 4090 D", "Laptop", "MIG")


def known_device(name: str) -> Device | None:
    """Return the published peaks of a GPU by the name that its driver gives, None if not known."""
    if any(other in name for other in _OTHER_BOARDS):
        return None
    # Whole words: a GH200 is no H200, a GB200 no B200.
    return next((d for d in _MEASURED if re.search(rf"\b{d.name}\b", name)), None)


# Kernel launches of one call, forward and backward, on the Triton path in half precision: our
# kernels, without the sums over partial results and the library's products. Every gradient, but
# that of the expression in `grouped_mlp`, which nothing trains.
LAUNCHES: dict[str, tuple[int, int]] = {
    "alibi_attn": (2, 3),
    "dilated_attn": (1, 2),
    "extraction": (3, 5),
    "gated_pooling": (2, 3),
    "grouped_mlp": (1, 1),
    "injection": (2, 7),
    "position_embed": (1, 0),
    "tile_norm": (1, 0),
}
# Bars of bytes moved over least bytes.
MOVED_BARS = {
    "injection": 1.2,
    "extraction": 1.2,
    "dilated_attn": 1.3,
    "grouped_mlp": 1.3,
    "gated_pooling": 1.3,
}
# The published pathway table.
_PUBLISHED_GENES = {"pathways": 331, "memberships": 9731, "genes": 4987}


@dataclass(frozen=True)
class OpCost:
    """Work of one call, modelled.

    Attributes:
        flops: Multiplications and additions that the result needs.
        least_bytes: Every input read once, every output written once.
        moved_bytes: What our kernels move between memory and L2.
        special_ops: Exponentials and square roots, where they are counted.
    """

    flops: float
    least_bytes: float
    moved_bytes: float
    special_ops: float = 0.0


@dataclass(frozen=True)
class Modelled:
    """An op on a device: its cost and two times.

    Attributes:
        cost: The work.
        roof_s: The least time of any kernel: products, special functions and least bytes at peak.
        ours_s: The same for the bytes that our kernels move.
        bound: What the roof is: `products`, `exponentials` or `memory`.
    """

    cost: OpCost
    roof_s: float
    ours_s: float
    bound: str

    @property
    def moved_ratio(self) -> float:
        """Bytes that our kernels move over the least."""
        return self.cost.moved_bytes / self.cost.least_bytes


def published(op: str, tiles: int) -> dict[str, Any]:
    """Return the sizes of an op's call in the published configuration, one case, one task.

    Args:
        op: Folder of the op.
        tiles: Tiles of the case; for `tile_norm` the tiles of a batch, `grouped_mlp` ignores it.

    Raises:
        KeyError: The op is unknown.
    """
    adapter = {"rows": tiles, "cases": 1, "width": 768, "inner": 192, "heads": 12}
    genes = {"cases": 1, "width": 256, **_PUBLISHED_GENES}
    sizes: dict[str, dict[str, Any]] = {
        "alibi_attn": {"lengths": [tiles + 1], "heads": 12, "head_dim": 64},
        "dilated_attn": {"lengths": [tiles + 1], "heads": 16, "head_dim": 48},
        "extraction": {**adapter, "queries": 65, "tokens": 65},
        "gated_pooling": {"tiles": tiles, "width": 768, "hidden": 256, "heads": 1, "cases": 1},
        "grouped_mlp": genes,
        "injection": {**adapter, "tokens": 65},
        "position_embed": {"rows": tiles, "width": 768, "cases": 1},
        "tile_norm": {"n": tiles, "height": 256, "width": 256, "resize_px": 256, "crop_px": 224},
    }
    return sizes[op]


def costed_ops() -> list[str]:
    """Return the folders of all ops that have a `cost.py`, in order."""
    return sorted(path.parent.name for path in ROOT.glob("*/cost.py"))


@cache
def _cost_function(op: str, mode: str) -> Callable[..., Any] | None:
    """Return the function of an op's `cost.py` for a mode; None where the op has no backward."""
    module = importlib.import_module(f"modaltune.kernels.{op}.cost")
    found = _public_costs(module)
    special = [f for name, f in found.items() if "backward" in name]
    general = [f for name, f in found.items() if "backward" not in name]
    if mode == "backward" and special:
        return special[0]
    if not general:
        raise TypeError(f"{module.__name__} must define one public function named like `cost`")
    names = inspect.signature(general[0]).parameters
    if mode == "backward" and not {"backward", "mode"} & set(names):
        return None
    return general[0]


def _public_costs(module: ModuleType) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and "cost" in name
    }


_SYNONYMS = (
    ("rows", "tiles", "n_rows"),
    ("heads", "num_heads"),
    ("inner", "embed_dim"),
    ("memberships", "nnz"),
    ("genes", "expression_width"),
    ("pathways", "groups"),
    ("width", "hidden_width"),
)


def _bind(
    function: Callable[..., Any], sizes: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Choose, by name, what a cost function takes from the sizes of a call and from facts."""
    known = {**facts, **sizes}
    for names in _SYNONYMS:
        values = [known[name] for name in names if name in known]
        for name in names if values else ():
            known.setdefault(name, values[0])
    chosen = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "dtype" and parameter.annotation in ("str", str):
            chosen[name] = {torch.float32: "fp32", torch.float16: "fp16"}.get(known[name], "bf16")
        elif name in known:
            chosen[name] = known[name]
        elif parameter.default is inspect.Parameter.empty:
            raise TypeError(
                f"{function.__module__}.{function.__name__} asks for {name}, which "
                f"modaltune.kernels.roofline does not know; it knows {', '.join(sorted(known))}"
            )
    return chosen


def op_cost(
    op: str,
    sizes: Mapping[str, Any],
    *,
    mode: str = "forward",
    device: Device = DEVICES["H100"],
    dtype: torch.dtype = torch.bfloat16,
) -> OpCost | None:
    """Return what a call of an op costs, or None where it has no such mode or no `cost.py`.

    Args:
        op: Folder of the op.
        sizes: Of the call, such as `published` returns them.
        mode: `forward`, or `backward` (every gradient).
        device: Whose L2, multiprocessors and configuration count.
        dtype: Of the tensors.

    Raises:
        ValueError: The mode is neither.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    function = _cost_function(op, mode) if op in costed_ops() else None
    if function is None:
        return None
    facts = {
        "mode": mode,
        "backward": mode == "backward",
        "dtype": dtype,
        "itemsize": dtype.itemsize,
        "l2_bytes": device.l2_bytes,
        "multiprocessors": device.multiprocessors,
        "capability": nearest(device.capability),
    }
    found = function(**_bind(function, sizes, facts))
    fields = found if isinstance(found, Mapping) else found._asdict()
    names = ("flops", "least_bytes", "moved_bytes", "special_ops")
    return OpCost(**{name: float(fields[name]) for name in names if name in fields})


def on_device(cost: OpCost, device: Device, dtype: torch.dtype = torch.bfloat16) -> Modelled:
    """Return the times of a cost on a device at its published peaks."""
    peak = device.half_flops if dtype.itemsize == 2 else device.tf32_flops
    limits = {
        "products": cost.flops / peak,
        "exponentials": cost.special_ops / device.special_ops,
        "memory": cost.least_bytes / device.bytes_per_s,
    }
    bound = max(limits, key=lambda name: limits[name])
    ours = max(*limits.values(), cost.moved_bytes / device.bytes_per_s)
    return Modelled(cost, limits[bound], ours, bound)
