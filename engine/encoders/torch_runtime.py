"""Run a tile encoder with PyTorch: normalise, batch, survive a full memory, check the output."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modaltune.engine.encoders.models import ImageFeatures
from modaltune.engine.encoders.spec import PRECISIONS, EncoderSpec
from modaltune.engine.encoders.weights import hash_tensors
from modaltune.engine.errors import InputError
from modaltune.kernels.tile_norm.api import normalize_tiles

logger = logging.getLogger(__name__)

DEFAULT_BATCH = {"cpu": 16, "cuda": 128}
_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FULL = ("out of memory", "can't allocate memory", "not enough memory")


def choose_precision(spec: EncoderSpec, device: torch.device, asked: str | None) -> str:
    """Return `fp32`, `fp16` or `bf16`.

    The CPU runs fp32 (its half-precision products are several times slower). A GPU runs what is
    asked for, or else the spec's precision, fp16 taking the place of bf16 on GPUs without it.

    Raises:
        InputError: `asked` is unknown, or is not fp32 on a CPU.
    """
    if asked is not None and asked not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {asked!r}")
    if device.type != "cuda":
        if asked not in (None, "fp32"):
            raise InputError(
                f"precision must be fp32 on {device.type}, got {asked!r}; leave it out"
            )
        return "fp32"
    chosen = asked or spec.precision
    if chosen == "bf16" and not torch.cuda.is_bf16_supported():
        logger.warning("%s: this GPU has no bf16, using fp16", spec.name)
        return "fp16"
    return chosen


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the memory of the device or the machine is full."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _FULL)


class TileEncoder:
    """A tile encoder with its weights, ready to encode.

    Args:
        spec: What the features mean; decides normalisation and width.
        features: The network, weights loaded.
        device: Where it runs.
        precision: `fp32`, `fp16` or `bf16`; default by device and spec.
        batch_size: Tiles at a time; default 16 on a CPU, 128 on a GPU. Halved, and kept so, when
            memory runs out.

    Attributes:
        spec: The spec.
        device: The device.
        precision: The arithmetic in use.
        batch_size: Tiles at a time from now on.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        features: ImageFeatures,
        *,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.precision = choose_precision(spec, self.device, precision)
        fallback = DEFAULT_BATCH.get(self.device.type, DEFAULT_BATCH["cpu"])
        self.batch_size = self._checked_batch(fallback if batch_size is None else batch_size)
        # Weights are final from here on; convolutions run channels last, as the tiles come.
        features.eval().requires_grad_(False)
        self._features = features.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __repr__(self) -> str:
        return (
            f"TileEncoder({self.spec.name!r}, width={self.spec.width}, "
            f"device={str(self.device)!r}, precision={self.precision!r})"
        )

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return self.spec.name

    @property
    def width(self) -> int:
        """Features per tile."""
        return self.spec.width

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of the loaded tensors, in key order.

        Independent of the file format; computed once, on first use.
        """
        return hash_tensors(self._features.published_state())

    def encode(self, tiles: NDArray[np.uint8] | Tensor, *, batch_size: int | None = None) -> Tensor:
        """Encode tiles of any one size.

        Args:
            tiles: `[n, h, w, 3]` uint8 RGB, numpy or torch, any device; n may be 0.
            batch_size: Tiles at a time for this call; default the encoder's.

        Returns:
            `[n, width]` float32 on the CPU, in the order of `tiles`.

        Raises:
            ValueError: `tiles` has another type or shape, or is too small for the crop.
            InputError: Memory is full with a single tile, or the output is not finite or has
                another width than the spec.
        """
        batch = _as_tensor(tiles)
        size = self.batch_size if batch_size is None else self._checked_batch(batch_size)
        out = torch.empty((batch.shape[0], self.spec.width), dtype=torch.float32)
        start = 0
        while start < batch.shape[0]:
            part = self._try(batch[start : start + size])
            if part is None:
                size = self._halve(min(size, batch.shape[0] - start))
                continue
            self._check_output(part, start)
            out[start : start + part.shape[0]] = part
            start += part.shape[0]
        return out

    def _checked_batch(self, value: int) -> int:
        if value < 1:
            raise InputError(f"batch_size must be at least 1, got {value}")
        return value

    def _try(self, tiles: Tensor) -> Tensor | None:
        """Return `[b, width]` on the CPU, or None where memory ran out."""
        try:
            return self._run(tiles)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.debug("%s: %s", self.spec.name, error)
            return None

    def _run(self, tiles: Tensor) -> Tensor:
        with torch.inference_mode(), self._autocast():
            x = normalize_tiles(
                tiles.to(self.device, non_blocking=True),
                mean=self.spec.mean,
                std=self.spec.std,
                resize_px=self.spec.resize_px,
                crop_px=self.spec.input_px,
                interpolation=self.spec.interpolation,
                dtype=_AUTOCAST.get(self.precision, torch.float32),
            )
            return self._features(x).to("cpu", torch.float32)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[self.precision])

    def _halve(self, tried: int) -> int:
        """Return the next batch size after `tried` tiles filled the memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if tried == 1:
            raise InputError(
                f"{self.spec.name} must fit into the memory of {self.device} with one tile, got "
                "out of memory; free memory, use another device or a smaller --tile-encoder"
            )
        size = tried // 2
        self.batch_size = min(self.batch_size, size)
        logger.warning(
            "%s: out of memory with %d tiles, going on with %d", self.spec.name, tried, size
        )
        return size

    def _check_output(self, part: Tensor, start: int) -> None:
        if part.dim() != 2 or part.shape[1] != self.spec.width:
            raise InputError(
                f"{self.spec.name} must give {self.spec.width} features per tile, got output of "
                f"shape {list(part.shape)}; the weights belong to another encoder"
            )
        bad = (~torch.isfinite(part).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            tiles = ", ".join(str(start + i) for i in bad[:5])
            raise InputError(
                f"{self.spec.name} must give finite features, got NaN or infinity for {len(bad)} "
                f"tiles of a batch (tiles {tiles}) in {self.precision}; try precision fp32, or "
                "check the weights"
            )


def _as_tensor(tiles: NDArray[np.uint8] | Tensor) -> Tensor:
    if isinstance(tiles, np.ndarray):
        dtype: Any = tiles.dtype
        # A view where possible; read-only arrays and negative strides need a copy.
        good = dtype == np.uint8
        batch = torch.from_numpy(np.require(tiles, requirements=["C", "W"])) if good else None
    else:
        dtype = tiles.dtype
        batch = tiles if dtype == torch.uint8 else None
    if batch is None or batch.dim() != 4 or batch.shape[3] != 3:
        raise ValueError(
            f"tiles must be uint8 [n, h, w, 3], got {dtype} {list(tiles.shape)}; give RGB pixels"
        )
    return batch
