"""Benchmark of gated attention pooling, `gated_pooling`. No library has a fused form of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modaltune.benchmarks.kernel_spec import Call, OpSpec, Tensors, by_keywords, values
from modaltune.kernels import gated_pool
from modaltune.kernels.gated_pooling.reference import gated_pool_reference


def make_pooling(
    tiles: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    width: int = 768,
    hidden: int = 256,
    heads: int = 1,
) -> Call:
    """Return one slide of `tiles` tiles."""
    shapes = {
        "x": (tiles, width),
        "value_weight": (hidden, width),
        "value_bias": (hidden,),
        "gate_weight": (hidden, width),
        "gate_bias": (hidden,),
        "score_weight": (heads, hidden),
        "score_bias": (heads,),
    }
    tensors = {
        name: values(i, shape, device, dtype, 1.0 if name == "x" else shape[-1] ** -0.5)
        for i, (name, shape) in enumerate(shapes.items())
    }
    sizes = {"tiles": tiles, "width": width, "hidden": hidden, "heads": heads, "cases": 1}
    return Call(tensors, {}, sizes)


def _reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    del options
    rows = tensors["x"].shape[0]
    return gated_pool_reference(**tensors, offsets=torch.tensor([0, rows]))[0]


def _bytes(tiles: int, itemsize: int) -> float:
    return float(itemsize) * tiles * (2 * 768 + 6 * 256)


SPECS = (
    OpSpec(
        op="gated_pooling",
        make=make_pooling,
        ours=by_keywords(gated_pool),
        reference=_reference,
        wanted=("x", "value_weight", "value_bias", "gate_weight", "gate_bias", "score_weight"),
        reference_bytes=_bytes,
        small={"width": 48, "hidden": 16, "heads": 3},
    ),
)
