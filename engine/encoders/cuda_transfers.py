"""Streams, pinned buffers and CUDA graphs of a GPU encoder; PyCUDA's pool where it is here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Transfers(Protocol):
    """What running an engine needs of a device; one compute stream, one upload stream."""

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a page-locked buffer on the host."""

    def device_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a buffer on the device."""

    def stream_handle(self) -> int:
        """Return the address of the stream that work is queued on now (while capturing: that)."""

    def upload(self, host: Tensor, device: Tensor) -> Any:
        """Queue a copy to the device on the upload stream and return the event of its end."""

    def wait(self, event: Any) -> None:
        """Let the compute stream wait for an event."""

    def computed(self) -> Any:
        """Return the event of the end of all that is queued on the compute stream."""

    def hold_upload(self, event: Any) -> None:
        """Let the upload stream wait for an event."""

    def computing(self) -> Any:
        """Return the context manager in which torch queues on the compute stream."""

    def capture(self, work: Callable[[], None]) -> Any:
        """Capture work on the compute stream into a graph with `replay()`."""

    def synchronize(self) -> None:
        """Wait for the compute stream."""


class TorchTransfers:
    """Transfers by torch's streams and events, with pinned buffers from PyCUDA where it is here.

    PyCUDA and torch share the device's primary context, so addresses and streams are common.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compute = torch.cuda.Stream(device)
        self._upload = torch.cuda.Stream(device)
        self._pinned = pinned_pool(device)

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a page-locked buffer: of PyCUDA's pool, or of torch's allocator."""
        if self._pinned is None:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        pool, _ = self._pinned
        return torch.from_numpy(pool.allocate(shape, np.dtype(str(dtype).removeprefix("torch."))))

    def device_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous buffer on the device, cleared, that both streams may use at once.

        Memory that torch hands out again may still be in use by work queued on its stream, which
        the upload stream would not wait for.
        """
        with torch.cuda.stream(self._compute):
            made = torch.zeros(shape, dtype=dtype, device=self.device)
        self._compute.synchronize()
        return made

    def stream_handle(self) -> int:
        """Return the handle of torch's current stream where it is set, else the compute stream."""
        current = torch.cuda.current_stream(self.device)
        default = torch.cuda.default_stream(self.device)
        return int((self._compute if current == default else current).cuda_stream)

    def upload(self, host: Tensor, device: Tensor) -> torch.cuda.Event:
        """Queue `device.copy_(host)` on the upload stream."""
        with torch.cuda.stream(self._upload):
            device.copy_(host, non_blocking=True)
            return self._upload.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the compute stream wait."""
        self._compute.wait_event(event)

    def computed(self) -> torch.cuda.Event:
        """Record an event on the compute stream."""
        return self._compute.record_event()

    def hold_upload(self, event: torch.cuda.Event) -> None:
        """Let the upload stream wait."""
        self._upload.wait_event(event)

    def computing(self) -> Any:
        """Return `torch.cuda.stream` of the compute stream."""
        return torch.cuda.stream(self._compute)

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture `work` on the compute stream."""
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: only this thread's calls are checked.
        with torch.cuda.graph(graph, stream=self._compute, capture_error_mode="thread_local"):
            work()
        return graph

    def synchronize(self) -> None:
        """Wait for the compute stream."""
        self._compute.synchronize()


def pinned_pool(device: torch.device) -> tuple[Any, Any] | None:
    """Return PyCUDA's pool of page-locked memory and its context, or None without PyCUDA.

    The context is the primary one, which torch uses; it has to live as long as the pool.
    """
    if importlib.util.find_spec("pycuda") is None:
        return None
    try:
        import pycuda.driver as cuda
        from pycuda.tools import PageLockedMemoryPool
    except ImportError as error:  # built against another driver than the one that is here
        logger.info("PyCUDA can't be loaded (%s); torch pins the buffers", error)
        return None
    torch.cuda.init()
    cuda.init()
    index = device.index if device.index is not None else torch.cuda.current_device()
    context = cuda.Device(index).retain_primary_context()
    context.push()
    try:
        return PageLockedMemoryPool(), context
    finally:
        # torch made the same context current: the stack is left as it was found.
        cuda.Context.pop()
