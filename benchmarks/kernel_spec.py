"""What a kernel benchmark is told about an op: its inputs, its reference and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modaltune.testing import cast, normal

Tensors = Mapping[str, Tensor]
Run = Callable[[Tensors, Mapping[str, Any]], Tensor]
GIB = 2**30


class NotHereError(RuntimeError):
    """A rival can't run on this machine; the message says why."""


@dataclass(frozen=True)
class Call:
    """The inputs of one call.

    Attributes:
        tensors: By argument name.
        options: Other arguments, passed on as they are.
        sizes: What `modaltune.kernels.roofline.op_cost` is told of the call.
    """

    tensors: Tensors
    options: Mapping[str, Any]
    sizes: Mapping[str, Any]

    @property
    def tiles(self) -> int:
        """Tiles of the call, without a cls token; 0 for an op that has none."""
        for name in ("rows", "tiles", "n"):
            if name in self.sizes:
                return int(self.sizes[name])
        return int(sum(self.sizes["lengths"])) - 1 if "lengths" in self.sizes else 0

    def as_dtype(self, dtype: torch.dtype) -> Call:
        """Return the call with its floating point tensors, and its result, in another dtype."""
        options = dict(self.options)
        if "dtype" in options:
            options["dtype"] = dtype
        return Call(cast(self.tensors, dtype), options, self.sizes)


@dataclass(frozen=True)
class Rival:
    """Another way to the same result.

    Attributes:
        build: Returns the function to run, prepared outside the timing; raises `NotHereError`.
        modes: Modes it can run in.
        devices: Kinds of device it can run on.
    """

    build: Callable[[Call], Run]
    modes: tuple[str, ...] = ("forward", "backward")
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class OpSpec:
    """One op in one shape family.

    Attributes:
        op: Folder in `kernels/`.
        variant: What tells this spec from others of the op, or nothing.
        make: `(tiles, device, dtype)` to a call; smaller sizes by keyword.
        ours: Runs the public function with the named implementation.
        reference: Runs the eager definition.
        wanted: Tensors whose gradients the backward mode computes; none: no backward mode.
        reference_bytes: Peak memory of the reference in bytes, from tiles and bytes per element.
        rivals: By name, besides the reference and its compiled form.
        most_tiles: Larger sizes are cut to this.
        small: Sizes by keyword of `make`, for a look at the machinery instead of the speed.
    """

    op: str
    make: Callable[..., Call]
    ours: Callable[[Call, str], Run]
    reference: Run
    wanted: tuple[str, ...]
    reference_bytes: Callable[[int, int], float]
    variant: str = ""
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    most_tiles: int = 10**9
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Folder, and the variant where there is one."""
        return f"{self.op} {self.variant}".strip()

    def at_small_size(self) -> OpSpec:
        """Return the spec with its small widths in place of the published ones."""
        return replace(self, make=partial(self.make, **self.small))

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes the op has."""
        return ("forward", "backward") if self.wanted else ("forward",)


def values(
    seed: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """Return normal values times `scale` on a device, the same on every device and dtype."""
    return (normal(seed, *shape, dtype=torch.float32) * scale).to(device, dtype)


def by_keywords(function: Callable[..., Any]) -> Callable[[Call, str], Run]:
    """Return how a public function of `modaltune.kernels` is run, by implementation."""

    def build(call: Call, impl: str) -> Run:
        del call

        def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
            result = function(**tensors, **options, impl=impl)
            return result[0] if isinstance(result, tuple) else result

        return run

    return build


def all_specs() -> list[OpSpec]:
    """Return the specs of every op family, in the order of the tables."""
    from modaltune.benchmarks import (
        specs_adapter,
        specs_attention,
        specs_pathways,
        specs_pooling,
        specs_tiles,
    )

    families = (specs_attention, specs_adapter, specs_pathways, specs_pooling, specs_tiles)
    return [spec for family in families for spec in family.SPECS]
