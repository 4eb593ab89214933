"""A deserialised TensorRT engine: an execution context and a CUDA graph for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modaltune.engine.encoders.cuda_transfers import Transfers
from modaltune.engine.encoders.export import FEATURES, PIXELS
from modaltune.engine.encoders.tensorrt_library import library_version
from modaltune.engine.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt
else:
    from modaltune.engine.encoders.tensorrt_library import library as trt


class PlanError(InputError):
    """A serialised engine can't be loaded, or is not of this encoder."""


class BatchRun:
    """The engine at one batch size: fixed buffers, and after the first run a CUDA graph.

    The buffers live as long as the context that holds their addresses.

    Args:
        context: Execution context of this profile alone.
        profile: Index of the profile.
        pixels: `[batch, 3, p, p]` input.
        features: `[batch, width]` float32 output.
        transfers: Streams and graphs.
    """

    def __init__(
        self,
        context: trt.IExecutionContext,
        profile: int,
        pixels: Tensor,
        features: Tensor,
        transfers: Transfers,
    ) -> None:
        self.pixels, self.features = pixels, features
        self._context, self._transfers = context, transfers
        self._graph: Any = None
        self._runs = 0
        handle = transfers.stream_handle()
        _demand(context.set_optimization_profile_async(profile, handle), "take the profile")
        transfers.synchronize()
        _demand(context.set_input_shape(PIXELS, tuple(pixels.shape)), "take the input's shape")
        for name, tensor in ((PIXELS, pixels), (FEATURES, features)):
            _demand(context.set_tensor_address(name, tensor.data_ptr()), f"take {name}'s address")
        if context.infer_shapes():
            raise PlanError("the plan must have all shapes set by its input, got more; delete it")

    def run(self) -> Tensor:
        """Queue the engine on the compute stream and return the output's buffer.

        The first run is eager, because TensorRT allocates then; the second is captured, and from
        then on the graph is replayed.
        """
        if self._graph is None and self._runs == 1:
            self._graph = self._transfers.capture(self._execute)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._execute()
            self._runs += 1
        return self.features

    def _execute(self) -> None:
        handle = self._transfers.stream_handle()
        _demand(self._context.execute_async_v3(handle), "run")


def _demand(good: bool, what: str) -> None:
    if not good:
        raise RuntimeError(f"{library_version()} could not {what}; its log says why")


class PlanRunner:
    """An engine ready to run at the batch sizes that it was built for.

    Args:
        plan: Serialised engine.
        batches: Batch size of each profile, growing.
        pixels: Shape `[3, p, p]` and type of the input.
        width: Features per tile.
        transfers: Streams, buffers and graphs.

    Raises:
        PlanError: The plan is damaged, of another GPU or version, or of another network.
        RuntimeError: Memory is full (`is_out_of_memory`), among others.
    """

    def __init__(
        self,
        plan: bytes,
        batches: Sequence[int],
        pixels: tuple[tuple[int, ...], torch.dtype],
        width: int,
        transfers: Transfers,
    ) -> None:
        self.batches = tuple(batches)
        self._shape, self._dtype = pixels
        self._width, self._transfers = width, transfers
        # The logger outlives the runtime, the runtime the engine, the engine its contexts.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise PlanError(
                f"the plan must be of this GPU and {library_version()}, got one that it can't "
                "read; it is made again"
            )
        self._check()
        self._runs: dict[int, BatchRun] = {}

    def _check(self) -> None:
        engine = self._engine
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        modes = {PIXELS: trt.TensorIOMode.INPUT, FEATURES: trt.TensorIOMode.OUTPUT}
        types = {
            torch.float32: trt.DataType.FLOAT,
            torch.float16: trt.DataType.HALF,
            torch.bfloat16: trt.DataType.BF16,
        }
        wanted = {PIXELS: types[self._dtype], FEATURES: trt.DataType.FLOAT}
        if names != set(modes):
            raise PlanError(f"the plan must have {PIXELS} and {FEATURES}, got {sorted(names)}")
        for name, mode in modes.items():
            got = engine.get_tensor_dtype(name)
            if engine.get_tensor_mode(name) != mode or got != wanted[name]:
                raise PlanError(f"the plan's {name} must be {wanted[name]}, got {got}")
        if engine.num_optimization_profiles != len(self.batches):
            raise PlanError(
                f"the plan must have {len(self.batches)} profiles, got "
                f"{engine.num_optimization_profiles}"
            )

    def fitting(self, tiles: int) -> int:
        """Return the smallest batch size that holds so many tiles, or the largest there is."""
        return next((batch for batch in self.batches if batch >= tiles), self.batches[-1])

    def at(self, batch: int) -> BatchRun:
        """Return the engine at a batch size, with buffers made on first use."""
        if batch not in self._runs:
            context = self._engine.create_execution_context()
            if context is None:
                raise RuntimeError("out of memory: TensorRT has no room for an execution context")
            self._runs[batch] = BatchRun(
                context,
                self.batches.index(batch),
                self._transfers.device_buffer((batch, *self._shape), self._dtype),
                self._transfers.device_buffer((batch, self._width), torch.float32),
                self._transfers,
            )
        return self._runs[batch]

    def release(self) -> None:
        """Give the contexts, graphs and buffers of all batch sizes back."""
        self._transfers.synchronize()
        self._runs.clear()
