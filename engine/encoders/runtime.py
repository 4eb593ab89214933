"""What every runtime of a tile encoder has in common: batches, full memory, output checks."""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modaltune.engine.encoders.spec import PRECISIONS, EncoderSpec
from modaltune.engine.errors import DeviceMemoryError, InputError

logger = logging.getLogger(__name__)

_FULL = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "failed to allocate memory",
    "bad_alloc",
)


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


@dataclass(frozen=True)
class RuntimeChoice:
    """How a runtime came to be used.

    Attributes:
        runtime: Its name.
        why: `asked`, `environment`, `measured`, `cached` or `fallback`.
        rates: Tiles/s on the probe batch by runtime, each at its best setting; empty where nothing
            was measured.
        settings: Batch size, workers and threads that were fastest.
    """

    runtime: str
    why: str
    rates: dict[str, float] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return one line for a log or a report."""
        rates = sorted(self.rates.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {rate:.4g}" for name, rate in rates)
        gain = ""
        if self.runtime in self.rates and self.rates.get("torch") and self.runtime != "torch":
            gain = f", {self.rates[self.runtime] / self.rates['torch']:.1f} x torch"
        return f"{self.runtime} ({self.why}{gain}{f'; tiles/s: {shown}' if shown else ''})"


class TileEncoder(ABC):
    """A tile encoder with its weights, ready to encode; one subclass for each runtime.

    `encode` may be called from any thread, not only from the one that made the encoder, and from
    several at once: a runtime that can't compute two batches side by side lets them wait. The tiles
    of one call may come from any number of slides, and a tile's features don't depend on its
    neighbours beyond rounding. Reading `batch_size` is safe everywhere; set it while no call runs.

    Args:
        spec: What the features mean; decides normalisation and width.
        device: Where it runs.
        precision: `fp32`, `fp16` or `bf16`.
        batch_size: Tiles at a time. Halved, and kept so, when memory runs out.

    Attributes:
        runtime: Name of the runtime, as `--runtime` takes it.
        spec: The spec.
        device: The device.
        precision: The arithmetic in use.
        batch_size: Tiles at a time from now on.
        choice: How this runtime was chosen, None where it was simply asked for.
    """

    choice: RuntimeChoice | None = None
    runtime: ClassVar[str]

    def __init__(
        self, spec: EncoderSpec, *, device: torch.device, precision: str, batch_size: int
    ) -> None:
        self.spec = spec
        self.device = device
        self.precision = precision
        self.batch_size = _checked_batch(batch_size)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.spec.name!r}, width={self.spec.width}, "
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

    @property
    @abstractmethod
    def weights_sha256(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of the loaded tensors, in key order."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the library that computes."""

    def provenance(self) -> dict[str, str]:
        """Return what computed the features: for `extra` of a feature file.

        Features of two runtimes are equal within tolerance, so none of this is in the recipe. The
        same on every run, so that a resumed run writes the bytes that an unbroken one does.
        """
        return {
            "runtime": self.runtime,
            "runtime_version": self.version,
            "precision": self.precision,
            "device": self.device.type,
        }

    def settings(self) -> dict[str, Any]:
        """Return provenance, batch size and how the runtime was chosen, as JSON values."""
        said: dict[str, Any] = {**self.provenance(), "batch_size": self.batch_size}
        if self.choice is not None:
            said |= {
                "chosen": self.choice.why,
                "tiles_per_s": dict(self.choice.rates),
                "layout": dict(self.choice.settings),
            }
        return said

    def encode(self, tiles: NDArray[np.uint8] | Tensor, *, batch_size: int | None = None) -> Tensor:
        """Encode tiles of any one size.

        Args:
            tiles: `[n, h, w, 3]` uint8 RGB, numpy or torch, any device; n may be 0.
            batch_size: Tiles at a time for this call; default the encoder's.

        Returns:
            `[n, width]` float32 on the CPU, in the order of `tiles`.

        Raises:
            ValueError: `tiles` has another type or shape, or is too small for the crop.
            DeviceMemoryError: Memory is full with a single tile.
            InputError: The output is not finite or has another width than the spec.
        """
        batch = _as_tensor(tiles)
        size = self.batch_size if batch_size is None else _checked_batch(batch_size)
        out = torch.empty((batch.shape[0], self.spec.width), dtype=torch.float32)
        start = 0
        while start < batch.shape[0]:
            part = self._try(batch[start:], size)
            if part is None:
                size = self._halve(min(size, batch.shape[0] - start))
                continue
            self._check_output(part, start)
            out[start : start + part.shape[0]] = part
            start += part.shape[0]
        return out

    @abstractmethod
    def _run(self, tiles: Tensor, size: int) -> Tensor:
        """Return the features of the first tiles, on the CPU.

        Args:
            tiles: `[n, h, w, 3]` uint8, n > 0.
            size: Tiles at a time.

        Returns:
            `[b, width]` float32 of the first b tiles, b at least `min(n, size)`.

        Raises:
            RuntimeError: Among others, memory is full (`is_out_of_memory`).
        """

    def release_memory(self) -> None:
        """Give cached memory back, as before a smaller batch is tried; no call may be running."""
        gc.collect()

    def _try(self, tiles: Tensor, size: int) -> Tensor | None:
        """Return `[b, width]` on the CPU, or None where memory ran out."""
        try:
            return self._run(tiles, size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.debug("%s: %s", self.spec.name, error)
            return None

    def _halve(self, tried: int) -> int:
        """Return the next batch size after `tried` tiles filled the memory."""
        self.release_memory()
        if tried == 1:
            raise DeviceMemoryError(
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


def _checked_batch(value: int) -> int:
    if value < 1:
        raise InputError(f"batch_size must be at least 1, got {value}")
    return value


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
