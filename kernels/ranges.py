"""Names in profiles: one label for torch.profiler and NVTX around each stage of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modaltune.kernels import _checks  # noqa: F401  (the import guard)

PREFIX = "modaltune."


@contextmanager
def stage_range(name: str) -> Iterator[None]:
    """Label what runs inside: `modaltune.<name>` in torch.profiler, `<name>` in Nsight (NVTX).

    Costs a few microseconds without a profiler. While torch.compile traces, it does nothing.

    Args:
        name: Stage, with its part after a dot, such as `injector` or `longnet.attention`.
    """
    if torch.compiler.is_compiling():
        yield
        return
    # Only where CUDA is in use already: a label must not be what initialises it.
    nvtx = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.profiler.record_function(PREFIX + name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()
