"""Run a tile encoder with PyTorch: eager, or compiled with `torch.compile`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modaltune.engine.encoders.runtime import TileEncoder, choose_precision
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.encoders.weights import hash_tensors
from modaltune.kernels.tile_norm.api import normalize_tiles

if TYPE_CHECKING:  # brings timm, which takes seconds
    from modaltune.engine.encoders.models import ImageFeatures

DEFAULT_BATCH = {"cpu": 16, "cuda": 128}
HALF_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEncoder(TileEncoder):
    """A tile encoder in eager PyTorch: the reference that every other runtime is held against.

    Calls from several threads run side by side.

    Args:
        spec: What the features mean; decides normalisation and width.
        features: The network, weights loaded.
        device: Where it runs.
        precision: `fp32`, `fp16` or `bf16`; default by device and spec.
        batch_size: Tiles at a time; default 16 on a CPU, 128 on a GPU. Halved, and kept so, when
            memory runs out.
    """

    runtime = "torch"

    def __init__(
        self,
        spec: EncoderSpec,
        features: ImageFeatures,
        *,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        place = torch.device(device)
        fallback = DEFAULT_BATCH.get(place.type, DEFAULT_BATCH["cpu"])
        super().__init__(
            spec,
            device=place,
            precision=choose_precision(spec, place, precision),
            batch_size=fallback if batch_size is None else batch_size,
        )
        # Weights are final from here on; convolutions run channels last, as the tiles come.
        features.eval().requires_grad_(False)
        self.features = features.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of the loaded tensors, in key order.

        Independent of the file format; computed once, on first use.
        """
        return hash_tensors(self.features.published_state())

    @property
    def version(self) -> str:
        """Version of torch."""
        return str(torch.__version__)

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        with torch.inference_mode(), self._autocast():
            return self.features(self._pixels(tiles[:size])).to("cpu", torch.float32)

    def _pixels(self, tiles: Tensor) -> Tensor:
        """Return the network's input `[b, 3, p, p]` for `[b, h, w, 3]` bytes."""
        return normalize_tiles(
            tiles.to(self.device, non_blocking=True),
            mean=self.spec.mean,
            std=self.spec.std,
            resize_px=self.spec.resize_px,
            crop_px=self.spec.input_px,
            interpolation=self.spec.interpolation,
            dtype=HALF_TYPES.get(self.precision, torch.float32),
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, HALF_TYPES[self.precision])

    def release_memory(self) -> None:
        """Give the memory that torch caches on the GPU back."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class DeferredEncoder:
    """An encoder whose network is built only where it is needed; fp32 on the CPU.

    Args:
        spec: What the features mean.
        weights_sha256: The hash that the loaded encoder has.
        load: Loads it.
    """

    def __init__(
        self, spec: EncoderSpec, weights_sha256: str, load: Callable[[], TorchEncoder]
    ) -> None:
        self.spec, self.weights_sha256 = spec, weights_sha256
        self.name, self.device = spec.name, torch.device("cpu")
        self._load = load

    @cached_property
    def loaded(self) -> TorchEncoder:
        """The encoder itself."""
        return self._load()


class CompiledEncoder(TorchEncoder):
    """A tile encoder through `torch.compile`: one compilation for each batch size in use.

    A short batch is filled up with blank tiles, so that it needs no compilation of its own. Calls
    from several threads wait for each other, because the first of them compiles.

    Args:
        eager: The eager encoder; its network is shared.
    """

    runtime = "torch-compile"

    def __init__(self, eager: TorchEncoder) -> None:
        super().__init__(
            eager.spec,
            eager.features,
            device=eager.device,
            precision=eager.precision,
            batch_size=eager.batch_size,
        )
        self._lock = threading.Lock()
        # No CUDA graphs: their pools belong to the thread that captured them.
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(self.features, dynamic=False)
        self._eager = eager

    @property
    def weights_sha256(self) -> str:
        """The hash of the eager encoder."""
        return self._eager.weights_sha256

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        batch = tiles[:size]
        with self._lock, torch.no_grad(), self._autocast():
            pixels = self._pixels(batch)
            missing = size - pixels.shape[0]
            if missing:
                blank = pixels.new_zeros((missing, *pixels.shape[1:]))
                pixels = torch.cat([pixels, blank]).contiguous(memory_format=torch.channels_last)
            return self._compiled(pixels)[: batch.shape[0]].to("cpu", torch.float32)
