"""Whether Triton interprets kernels on CPU tensors in this process (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import os

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def needs_upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must turn values into float32 right after each load.

    The interpreter computes bfloat16 on its raw bits, silently wrong; compiled code never needs it.
    """
    return INTERPRET and dtype == torch.bfloat16
