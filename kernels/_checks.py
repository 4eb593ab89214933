"""Argument checks shared by every op, and the guard against a second import of this package."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

if not __name__.startswith("modaltune."):
    # The folder is also reachable as a bare `kernels` from the repository root; operators must not
    # be registered twice under two module names.
    raise ImportError("import modaltune.kernels, not kernels: the folder is one room of modaltune")


def require(ok: bool, message: str) -> None:
    """Raise ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


def is_autocast_on(device: torch.device) -> bool:
    """Return whether autocast is on for a device; asking torch about others, as meta, raises."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def operator_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype an operator gets a floating tensor in; autocast leaves float64 alone."""
    is_cast = is_autocast_on(tensor.device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if is_cast else tensor.dtype


def check_float(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`; None stands for any size."""
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(
        w is None or w == g for g, w in zip(got, shape, strict=True)
    )
    if not fits:
        want = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{name} must have shape {want}, got {list(got)}")


def check_offsets(offsets: Tensor | None, rows: int) -> Tensor:
    """Return the offsets `[B + 1]` of packed sequences as int64 on the CPU, checked.

    Args:
        offsets: First row of each sequence and the total, or None for a single sequence.
        rows: Number of packed rows.

    Raises:
        ValueError: The offsets do not start at 0, end at `rows` and never fall.
    """
    if offsets is None:
        return torch.tensor([0, rows], dtype=torch.int64, device="cpu")
    if torch.compiler.is_compiling():
        return offsets  # values can't be looked at while tracing; the operator's body checks them
    require(
        offsets.dim() == 1 and offsets.numel() >= 1 and not offsets.is_floating_point(),
        f"offsets must be a 1-D integer tensor [B + 1], got {offsets.dtype} {list(offsets.shape)}",
    )
    # `tolist` on a CUDA tensor waits for the device; callers keep offsets on the CPU.
    listed = offsets.tolist()
    good = listed[0] == 0 and listed[-1] == rows and all(a <= b for a, b in pairwise(listed))
    require(good, f"offsets must rise from 0 to the number of rows {rows}, got {listed[:8]}")
    return offsets.to("cpu", torch.int64)
