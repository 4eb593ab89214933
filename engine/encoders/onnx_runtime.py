"""Run a tile encoder with ONNX Runtime on the CPU, preprocessing inside the graph.

The graph is exported once a machine and kept in the cache folder. Two layouts use the cores: every
thread encodes tiles of its own with one shared session (no thread waits for another, and what it
works on stays in its cache), or all threads work on one batch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modaltune.engine.encoders.export import (
    OPSETS,
    TILES,
    export_encoder,
    exporter_versions,
    spec_facts,
)
from modaltune.engine.encoders.model_cache import build_once, digest, writable_cache
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.encoders.torch_runtime import DeferredEncoder, TorchEncoder
from modaltune.engine.errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 2  # tiles that one session run takes: more of them leave the caches
_MAX_SESSIONS = 2  # sizes of tiles whose sessions are kept; each holds the weights


@dataclass(frozen=True)
class OnnxLayout:
    """How ONNX Runtime uses the cores.

    Attributes:
        workers: Runs of the session at a time.
        threads: Threads of each run.
        arena: Whether the session keeps the memory of its activations between runs.
    """

    workers: int
    threads: int
    arena: bool = True

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


def layouts(threads: int) -> tuple[OnnxLayout, ...]:
    """Return the layouts worth a measurement on so many threads, the likely best first."""
    apart, together = OnnxLayout(threads, 1), OnnxLayout(1, threads)
    return (apart,) if threads == 1 else (apart, together)


class OnnxEncoder(TileEncoder):
    """A tile encoder in ONNX Runtime on the CPU, float32.

    Calls from several threads run side by side and share the workers. The eager encoder stays: it
    is what tiles of another size are exported from.

    Args:
        eager: The encoder whose weights are taken; on the CPU. Deferred, it is loaded when tiles of
            a size come that has no graph yet.
        tile_px: Side, or height and width, of the tiles to come; default the spec's. Tiles of
            another size cost an export when they first come.
        layout: How the cores are used; default one tile batch per thread of torch.
        batch_size: Tiles that one run of the session takes. Halved, and kept so, when memory runs
            out.

    Raises:
        InputError: The encoder is on a GPU, or its network can't be exported.
        GateError: ONNX Runtime gives other features than eager PyTorch (when first exported).
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        eager: TorchEncoder | DeferredEncoder,
        *,
        tile_px: int | tuple[int, int] | None = None,
        layout: OnnxLayout | None = None,
        batch_size: int | None = None,
    ) -> None:
        if eager.device.type != "cpu":
            raise InputError(
                f"--runtime onnxruntime must have device cpu, got {str(eager.device)!r}; use "
                "tensorrt, torch-compile or torch on a GPU"
            )
        super().__init__(
            eager.spec,
            device=eager.device,
            precision="fp32",
            batch_size=DEFAULT_BATCH if batch_size is None else batch_size,
        )
        self.layout = layout or OnnxLayout(torch.get_num_threads(), 1)
        self._eager = eager
        self._sessions: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()
        # Threads of our own also for one worker: there numbers next to zero count as zero, whatever
        # was loaded before, and the caller's arithmetic stays as it is.
        self._pool = ThreadPoolExecutor(
            self.layout.workers, "modaltune-onnx", torch.set_flush_denormal, (True,)
        )
        side = eager.spec.tile_px if tile_px is None else tile_px
        self._session((side, side) if isinstance(side, int) else side)

    @property
    def weights_sha256(self) -> str:
        """The hash of the eager encoder."""
        return self._eager.weights_sha256

    @property
    def version(self) -> str:
        """Version of ONNX Runtime."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        pixels: NDArray[np.uint8] = tiles.cpu().contiguous().numpy()
        session = self._session((pixels.shape[1], pixels.shape[2]))
        pieces = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        # All pieces at once: a worker never waits for the end of a batch.
        jobs = [self._pool.submit(_run_session, session, piece) for piece in pieces]
        try:
            return _joined([job.result() for job in jobs])
        finally:
            for job in jobs:
                job.cancel()

    def _session(self, size: tuple[int, int]) -> Any:
        with self._lock:
            found = self._sessions.pop(size, None)
            if found is None:
                found = open_session(self._eager, size, self.layout, self._pool)
                while len(self._sessions) >= _MAX_SESSIONS:
                    self._sessions.pop(next(iter(self._sessions)))
            self._sessions[size] = found  # last used, last
            return found

    def release_memory(self) -> None:
        """Close the sessions; the next call opens them again."""
        with self._lock:
            self._sessions.clear()  # an arena gives nothing back while its session lives


def _run_session(session: Any, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return `[n, width]`; every failure of ONNX Runtime becomes a RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        return session.run(None, {TILES: tiles})[0]
    except (state.Fail, state.RuntimeException, state.EPFail, state.EngineError) as error:
        raise RuntimeError(str(error)) from error


def _joined(parts: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def graph_name(encoder: TorchEncoder | DeferredEncoder, size: tuple[int, int]) -> str:
    """Return the file name of an encoder's graph in the cache; it stands for all it depends on."""
    facts = {
        "weights": encoder.weights_sha256,
        "spec": spec_facts(encoder.spec),
        "precision": "fp32",
        "tile_px": list(size),
        "opset": OPSETS["fp32"],
        "versions": exporter_versions(),
    }
    return f"{encoder.spec.slug}-{size[0]}x{size[1]}-{digest(facts)}.onnx"


def open_session(
    encoder: TorchEncoder | DeferredEncoder,
    size: tuple[int, int],
    layout: OnnxLayout,
    workers: ThreadPoolExecutor,
) -> Any:
    """Open the session of an encoder for tiles of one size, exporting the graph if need be.

    A cached file that ONNX Runtime can't read is made again. The session's own threads are started
    by one of the workers and compute as that one does.

    Raises:
        InputError: The network can't be exported.
        GateError: The new graph gives other features than eager PyTorch.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    with writable_cache() as folder:
        path = folder / graph_name(encoder, size)

        def export(final: Path) -> None:
            logger.info("%s: exporting to %s", encoder.name, final)
            eager = encoder.loaded if isinstance(encoder, DeferredEncoder) else encoder
            export_encoder(eager, final, tile_px=size)

        build_once(path, export)
        try:
            return workers.submit(_open, path, layout).result()
        except (state.InvalidProtobuf, state.InvalidGraph, state.Fail, state.NoSuchFile) as error:
            logger.warning("%s can't be read (%s); it is made again", path, error)
            path.unlink(missing_ok=True)
            build_once(path, export)
            return workers.submit(_open, path, layout).result()


def _open(path: Path, layout: OnnxLayout) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = layout.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = layout.arena
    options.log_severity_level = 3  # its warnings are notes about the graph
    # Threads that wait in a loop take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The first session of a process sets this in the thread that opens it: a worker.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
