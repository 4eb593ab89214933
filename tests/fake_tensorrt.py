"""A recorded stand-in for TensorRT and a GPU's streams: it logs calls, and computes on the CPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """The log of all calls, and what is to go wrong."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network
        self.log: list[str] = []
        self.fault = ""
        self.fits = 10**9
        self.buffers: dict[int, weakref.ref[Tensor]] = {}
        self.plans = 0

    def tensor_at(self, address: int) -> Tensor:
        """The buffer at an address that the engine was given; it must still be alive."""
        found = self.buffers[address]()
        assert found is not None, f"the buffer at {address} is gone"
        return found


class FakeTransfers:
    """Transfers on the CPU. Copies happen at once, but nothing may be read before its event."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.pending: dict[int, str] = {}

    def _buffer(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.zeros(shape, dtype=dtype)
        self.recorder.log.append(f"{kind} {list(shape)}")
        self.recorder.buffers[made.data_ptr()] = weakref.ref(made)
        return made

    def pinned_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._buffer("pinned", shape, dtype)

    def device_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._buffer("device", shape, dtype)

    def stream_handle(self) -> int:
        return 77

    def upload(self, host: Tensor, device: Tensor) -> Any:
        assert self.recorder.buffers[host.data_ptr()]() is not None
        self.recorder.log.append(f"upload {len(host)}")
        device.copy_(host)
        return SimpleNamespace(name="uploaded")

    def wait(self, event: Any) -> None:
        self.recorder.log.append(f"wait {event.name}")

    def computed(self) -> Any:
        self.recorder.log.append("record done")
        return SimpleNamespace(
            name="done", synchronize=lambda: self.recorder.log.append("synchronize done")
        )

    def hold_upload(self, event: Any) -> None:
        self.recorder.log.append(f"hold upload for {event.name}")

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], None]) -> Any:
        self.recorder.log.append("capture")
        before = len(self.recorder.log)
        work()  # the kernels run when the graph is replayed
        recorded = self.recorder.log[before:]

        def replay() -> None:
            self.recorder.log.append("replay")
            kept = list(self.recorder.log)
            work()
            self.recorder.log[:] = kept

        assert recorded
        return SimpleNamespace(replay=replay)

    def synchronize(self) -> None:
        self.recorder.log.append("synchronize")


class FakeContext:
    """An execution context that runs the network on whatever lies at its addresses."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.profile: int | None = None
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == 77
        self.recorder.log.append(f"profile {profile_index}")
        self.profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "the profile comes before the shape"
        self.recorder.log.append(f"shape {name} {list(shape)}")
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.recorder.log.append(f"address {name}")
        self.addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert set(self.addresses) == {"pixels", "features"}
        self.recorder.log.append(f"execute {self.shape[0]}")
        if self.recorder.fault == "execute":
            return False
        if self.shape[0] > self.recorder.fits:
            raise RuntimeError("CUDA error: out of memory")
        pixels = self.recorder.tensor_at(self.addresses["pixels"])
        self.recorder.tensor_at(self.addresses["features"]).copy_(self.recorder.network(pixels))
        return True


class FakeEngine:
    """A deserialised engine with two tensors."""

    def __init__(self, recorder: Recorder, batches: int, library: Any) -> None:
        self.recorder, self.num_optimization_profiles = recorder, batches
        self.num_io_tensors = 2
        self.library = library

    def get_tensor_name(self, index: int) -> str:
        return ("pixels", "features")[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.library.TensorIOMode
        return modes.INPUT if name == "pixels" else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        is_wrong = self.recorder.fault == "dtype" and name == "pixels"
        return self.library.DataType.HALF if is_wrong else self.library.DataType.FLOAT

    def create_execution_context(self) -> FakeContext | None:
        self.recorder.log.append("context")
        return None if self.recorder.fault == "context" else FakeContext(self.recorder)


def fake_library(recorder: Recorder) -> Any:
    """Return a module with the names that the runtime calls, over a recorder."""
    log = recorder.log

    class Config:
        def __init__(self) -> None:
            self.profiles = 0

        def set_memory_pool_limit(self, pool: str, pool_size: int) -> None:
            log.append(f"{pool} {pool_size}")

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles += 1
            log.append(f"add profile {profile.shapes}")
            return self.profiles - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            log.append(f"timing cache of {len(serialized_timing_cache)} bytes")
            return SimpleNamespace(
                combine=lambda other, ignore_mismatch: log.append("combine timings"),
                serialize=lambda: b"timings",
                known=serialized_timing_cache,
            )

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return cache.known != b"of another GPU"

        def get_timing_cache(self) -> Any:
            return self.cache

    class Profile:
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            assert min == opt == max
            self.shapes = f"{input} {list(max)}"

    class Builder:
        def __init__(self, logger: Any) -> None:
            log.append("builder")

        def create_network(self, flags: int = 0) -> Any:
            log.append(f"network {flags}")
            return SimpleNamespace(
                get_input=lambda index: SimpleNamespace(name="pixels", shape=(-1, 3, 28, 28))
            )

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            recorder.plans += 1
            log.append("build")
            return None if recorder.fault == "build" else b"plan %d" % config.profiles

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self.num_errors = 9

        def parse_from_file(self, model: str) -> bool:
            log.append("parse")
            return recorder.fault != "parse"

        def get_error(self, index: int) -> str:
            return f"node {index} is unknown"

    class Runtime:
        def __init__(self, logger: Any) -> None:
            log.append("runtime")

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            log.append("deserialise")
            if recorder.fault == "deserialise" or not serialized_engine.startswith(b"plan "):
                return None
            return FakeEngine(recorder, int(serialized_engine[5:]), module)

    class Logger:
        WARNING = 2

        def __init__(self, min_severity: int) -> None:
            pass

    module = SimpleNamespace(
        __name__="tensorrt",
        __version__="11.fake",
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        Logger=Logger,
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        DataType=SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16"),
    )
    return module
