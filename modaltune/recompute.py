"""Computing the inside of a module again in the backward pass, instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

LEVELS = ("none", "layer", "interaction")


def again(wanted: bool, run: Callable[..., Any], *tensors: Any) -> Any:
    """Return `run(*tensors)`; if wanted, keep only the tensors and run it again in backward.

    The random state of the CPU and of the device of `tensors` is put back first, so dropout draws
    the same masks. Tensors are arguments, never hidden in another object: their device is looked
    up among the arguments. Without gradients this is a plain call.
    """
    if not wanted or not torch.is_grad_enabled():
        return run(*tensors)
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=True)
