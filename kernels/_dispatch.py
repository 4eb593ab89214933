"""Which implementation of an op runs: asked for, or chosen by device and said once in the log."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch

from modaltune.kernels import _checks  # noqa: F401  (the import guard)

logger = logging.getLogger(__name__)

IMPLS = ("auto", "triton", "cpu", "reference")


class OutOfReachError(RuntimeError):
    """An implementation asked for by name does not cover these inputs; another one does."""


@cache
def _say_once(op: str, impl: str, why: str) -> None:
    logger.info("%s: using the %s path (%s)", op, impl, why)


def choose_impl(op: str, impl: str, device: torch.device, available: tuple[str, ...]) -> str:
    """Return the implementation to run, one of `available`.

    Args:
        op: Name of the op, for messages.
        impl: `auto`, `triton`, `cpu` or `reference`, as the caller asked.
        device: Where the inputs live.
        available: Implementations this op has; always contains `reference`.

    Raises:
        ValueError: `impl` is unknown.
        OutOfReachError: `impl` was asked for by name and this op does not offer it.
        RuntimeError: `impl` was asked for by name and can't run on this machine. There is no
            silent fallback.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        wanted = "triton" if device.type == "cuda" else "cpu"
        chosen = wanted if wanted in available else "reference"
        if not torch.compiler.is_compiling():
            _say_once(op, chosen, f"device {device.type}, {op} offers {', '.join(available)}")
        return chosen
    if impl == "cpu" and device.type != "cpu":
        raise RuntimeError(f"{op}: impl='cpu' needs CPU tensors, got {device}; use impl='auto'")
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{op}: impl='triton' needs Triton; install it with: pip install triton")
    if impl == "triton" and "triton" not in available:
        raise OutOfReachError(f"{op}: impl='triton' is not available for this op; use impl='auto'")
    if impl == "cpu" and "cpu" not in available:
        # The reference is this op's best CPU path.
        return "reference"
    return impl
