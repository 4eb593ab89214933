"""Launch configurations per GPU, tuned once and shipped as JSON; no search at run time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
COMPUTE_CAPABILITIES = (80, 90, 100, 120)
# GPUs with less shared memory than the generation they count with (at most 99 KiB a block, CUDA
# C++ Programming Guide, compute capabilities): they take what was tuned for sm_120, which has as
# much.
_SMALL_SHARED_MEMORY = (75, 86, 89)


@cache
def shipped(op: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return the configurations of an op's kernels: kernel name, then capability as text.

    Args:
        op: Folder of the op, such as `injection`.
    """
    configs: dict[str, dict[str, dict[str, int]]] = json.loads(
        (CONFIGS / f"{op}.json").read_text(encoding="utf-8")
    )
    return configs


def nearest(capability: int) -> int:
    """Return the shipped capability to use on a device: the largest not above it that fits."""
    if capability in _SMALL_SHARED_MEMORY:
        return 120
    return max(
        (c for c in COMPUTE_CAPABILITIES if c <= capability), default=min(COMPUTE_CAPABILITIES)
    )


def config(op: str, kernel: str, device: torch.device) -> dict[str, Any]:
    """Return block sizes, `num_warps` and `num_stages` of a kernel on a device.

    In the interpreter (CPU tensors) the sm_80 configuration is used.

    Raises:
        KeyError: The kernel has no shipped configuration, which is a fault of this package.
    """
    capability = COMPUTE_CAPABILITIES[0]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = nearest(10 * major + minor)
    return dict(shipped(op)[kernel][str(capability)])
