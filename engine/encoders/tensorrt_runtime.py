"""Run a tile encoder with TensorRT: plan cache, double-buffered uploads, CUDA graphs.

    tiles -> pinned[slot] -> device[slot] -> normalize_tiles -> pixels -> engine -> pinned -> out
                    upload stream         |                 compute stream

While the engine runs on one slot, the next slot's tiles are copied and uploaded. A slot's host
buffer is written again only after its upload, and its output is read only after its engine run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modaltune.engine.atomic import atomic_path
from modaltune.engine.encoders.cuda_transfers import TorchTransfers, Transfers
from modaltune.engine.encoders.export import (
    OPSETS,
    export_encoder,
    exporter_versions,
    spec_facts,
)
from modaltune.engine.encoders.model_cache import build_once, writable_cache
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.encoders.tensorrt_builder import build_plan, plan_name, timing_cache_name
from modaltune.engine.encoders.tensorrt_library import library, library_version
from modaltune.engine.encoders.tensorrt_runner import PlanError, PlanRunner
from modaltune.engine.encoders.torch_runtime import HALF_TYPES, TorchEncoder
from modaltune.engine.errors import InputError
from modaltune.kernels.tile_norm.api import normalize_tiles

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 128
SLOTS = 2  # one computes while the other is filled


@dataclass
class _Slot:
    """Buffers of one batch in flight, and the events that say when they are free."""

    host: Tensor
    device: Tensor
    result: Tensor
    uploaded: Any = None
    done: Any = None


def profile_batches(batch_size: int) -> tuple[int, ...]:
    """Return the batch sizes an engine is built for: the largest, and its quarters down to one.

    A short last batch runs in the smallest that holds it.
    """
    sizes = {batch_size}
    while batch_size > 1:
        batch_size = max(1, batch_size // 4)
        sizes.add(batch_size)
    return tuple(sorted(sizes))


class TensorrtEncoder(TileEncoder):
    """A tile encoder in TensorRT on one GPU.

    Calls from several threads wait for each other: there is one set of buffers.

    Args:
        eager: The encoder whose weights are taken, on a CUDA device; its precision decides the
            engine's.
        batch_size: Tiles at a time.
        engine_batch: The engine is built for so many tiles and for its quarters; default
            `batch_size`.
        transfers: Streams and buffers; default torch's, with PyCUDA's pinned pool where it is here.

    Raises:
        InputError: There is no GPU or no TensorRT, or the network can't be exported.
        BuildError: TensorRT can't make an engine of the network.
        PlanError: The new plan can't be loaded.
    """

    runtime = "tensorrt"

    def __init__(
        self,
        eager: TorchEncoder,
        *,
        batch_size: int | None = None,
        engine_batch: int | None = None,
        transfers: Transfers | None = None,
    ) -> None:
        if eager.device.type != "cuda" and transfers is None:
            raise InputError(
                f"--runtime tensorrt must have a device cuda, got {str(eager.device)!r}; use "
                "--device cuda, or --runtime onnxruntime on a CPU"
            )
        super().__init__(
            eager.spec,
            device=eager.device,
            precision=eager.precision,
            batch_size=DEFAULT_BATCH if batch_size is None else batch_size,
        )
        library.module  # noqa: B018 (says that TensorRT is missing before anything is exported)
        self._eager = eager
        self._lock = threading.Lock()
        self._transfers = transfers or TorchTransfers(eager.device)
        self._dtype = HALF_TYPES.get(self.precision, torch.float32)
        self._slots: dict[tuple[int, ...], list[_Slot]] = {}
        self._runner = self._load(profile_batches(engine_batch or self.batch_size))

    @property
    def weights_sha256(self) -> str:
        """The hash of the eager encoder."""
        return self._eager.weights_sha256

    @property
    def version(self) -> str:
        """Name and version of the TensorRT in use."""
        return library_version()

    def _load(self, batches: Sequence[int]) -> PlanRunner:
        """Open the plan, building it if need be; a plan that can't be read is made again, once."""
        gpu = _gpu_name(self.device)
        facts = plan_facts(self._eager, gpu, batches)
        with writable_cache() as folder:
            path = folder / plan_name(self.spec.slug, facts)
            timings = folder / timing_cache_name(gpu, facts["tensorrt"])

            def build(final: Path) -> None:
                logger.info("%s: building %s (minutes for a large encoder)", self.name, final)
                plan = plan_of(self._eager, folder, batches, timings)
                with atomic_path(final) as temporary:
                    temporary.write_bytes(plan)

            build_once(path, build)
            try:
                return self._runner_of(path, batches)
            except PlanError as error:
                logger.warning("%s: %s", path, error)
                path.unlink(missing_ok=True)
                build_once(path, build)
                return self._runner_of(path, batches)

    def _runner_of(self, path: Path, batches: Sequence[int]) -> PlanRunner:
        side = self.spec.input_px
        pixels = ((3, side, side), self._dtype)
        return PlanRunner(path.read_bytes(), batches, pixels, self.spec.width, self._transfers)

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        with self._lock, torch.inference_mode():
            # A size that the engine has: a smaller batch must not run in a larger one's memory.
            size = max(batch for batch in self._runner.batches if batch <= size)
            out = torch.empty((len(tiles), self.spec.width), dtype=torch.float32)
            try:
                self._pipeline(tiles, size, out)
            except BaseException:
                self._transfers.synchronize()  # nothing may be in flight when buffers go
                raise
        return out.clone()  # made out here, it is no inference tensor

    def _pipeline(self, tiles: Tensor, size: int, out: Tensor) -> None:
        waiting: list[tuple[_Slot, int, int]] = []
        for turn, start in enumerate(range(0, len(tiles), size)):
            part = tiles[start : start + size]
            if len(waiting) == SLOTS:
                self._collect(*waiting.pop(0), out)
            slot = self._slot(size, part, turn)
            self._send(slot, part)
            waiting.append((slot, start, len(part)))
        for sent in waiting:
            self._collect(*sent, out)

    def _slot(self, size: int, part: Tensor, turn: int) -> _Slot:
        shape = (size, *part.shape[1:])
        if shape not in self._slots:
            self._slots.clear()  # tiles of one size at a time
            make = self._transfers
            self._slots[shape] = [
                _Slot(
                    host=make.pinned_buffer(shape, torch.uint8),
                    device=make.device_buffer(shape, torch.uint8),
                    result=make.pinned_buffer((size, self.spec.width), torch.float32),
                )
                for _ in range(SLOTS)
            ]
        return self._slots[shape][turn % SLOTS]

    def _send(self, slot: _Slot, part: Tensor) -> None:
        """Queue upload, normalisation, engine and the way back of one batch."""
        count = len(part)
        slot.host[:count].copy_(part)
        if slot.done is not None:
            self._transfers.hold_upload(slot.done)  # the engine may still read the last tiles
        slot.uploaded = self._transfers.upload(slot.host[:count], slot.device[:count])
        self._transfers.wait(slot.uploaded)
        run = self._runner.at(self._runner.fitting(count))
        with self._transfers.computing():
            # The rows behind a short batch hold an earlier one: computed and not read.
            run.pixels[:count].copy_(self._normalised(slot.device[:count]))
            slot.result[:count].copy_(run.run()[:count], non_blocking=True)
        slot.done = self._transfers.computed()

    def _normalised(self, tiles: Tensor) -> Tensor:
        return normalize_tiles(
            tiles,
            mean=self.spec.mean,
            std=self.spec.std,
            resize_px=self.spec.resize_px,
            crop_px=self.spec.input_px,
            interpolation=self.spec.interpolation,
            dtype=self._dtype,
        )

    def _collect(self, slot: _Slot, start: int, count: int, out: Tensor) -> None:
        slot.done.synchronize()
        out[start : start + count] = slot.result[:count]

    def release_memory(self) -> None:
        """Give contexts, graphs and buffers back; the next call makes them again."""
        with self._lock:
            self._runner.release()
            self._slots.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _gpu_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm_{properties.major}{properties.minor}"


def plan_facts(eager: TorchEncoder, gpu: str, batches: Sequence[int]) -> dict[str, Any]:
    """Return all that decides a plan, as JSON values."""
    return {
        "weights": eager.weights_sha256,
        "spec": spec_facts(eager.spec),
        "gpu": gpu,
        "tensorrt": library_version(),
        "precision": eager.precision,
        "batches": list(batches),
        "opset": OPSETS[eager.precision],
        "versions": exporter_versions(),
    }


def plan_of(eager: TorchEncoder, folder: Path, batches: Sequence[int], timings: Path) -> bytes:
    """Export an encoder, preprocessing outside, and build its plan; the graph is not kept."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(dir=folder) as work:
        graph = Path(work) / "encoder.onnx"
        export_encoder(eager, graph, precision=eager.precision, preprocessing="outside")
        return build_plan(graph, batches, timing_cache=timings)
