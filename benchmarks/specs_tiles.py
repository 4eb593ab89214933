"""Benchmarks of what happens to tiles first: `tile_norm` (pixels) and `position_embed` (rows).

Rivals: torchvision's crop and normalise; the published table of positions, one row per grid cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modaltune.benchmarks.kernel_spec import Call, OpSpec, Rival, Run, Tensors, by_keywords, values
from modaltune.kernels import embed_positions, normalize_tiles
from modaltune.kernels.position_embed.reference import (
    embed_positions_reference,
    position_rows_reference,
)
from modaltune.kernels.tile_norm.reference import normalize_tiles_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 512  # tiles of an encoder's batch at most


def make_tiles(
    tiles: int, device: torch.device, dtype: torch.dtype, *, side: int = 256, crop_px: int = 224
) -> Call:
    """Return a batch of uint8 tiles, and the published preprocessing of Prov-GigaPath."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (tiles, side, side, 3), generator=generator, dtype=torch.uint8
    ).to(device)
    geometry = {"resize_px": side, "crop_px": crop_px}
    options = {"mean": MEAN, "std": STD, **geometry, "dtype": dtype}
    return Call({"tiles": pixels}, options, {"n": tiles, "height": side, "width": side, **geometry})


def _tiles_reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    return normalize_tiles_reference(
        tensors["tiles"], **options, interpolation="bicubic", patches=None
    )


def _torchvision(call: Call) -> Run:
    from torchvision.transforms.v2 import functional

    del call

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        # The resize of the published preprocessing leaves tiles of its own size alone.
        x = functional.center_crop(tensors["tiles"].permute(0, 3, 1, 2), options["crop_px"])
        working = torch.float64 if options["dtype"] == torch.float64 else torch.float32
        scaled = functional.to_dtype(x, working, scale=True)
        x = functional.normalize(scaled, list(MEAN), list(STD))
        return x.to(options["dtype"])

    return run


def make_positions(
    tiles: int, device: torch.device, dtype: torch.dtype, *, width: int = 768
) -> Call:
    """Return one slide of `tiles` tiles on a square grid."""
    side = int(tiles**0.5) + 1
    cell = torch.arange(tiles)
    tensors = {
        "x": values(0, (tiles, width), device, dtype),
        "cells": torch.stack([cell // side, cell % side], dim=1).to(device),
        "cls_token": values(1, (width,), device, dtype),
    }
    return Call(tensors, {}, {"rows": tiles, "width": width, "cases": 1})


def _positions_reference(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
    del options
    rows = tensors["x"].shape[0]
    return embed_positions_reference(**tensors, offsets=torch.tensor([0, rows]))


def _table(call: Call) -> Run:
    cells, x = call.tensors["cells"], call.tensors["x"]
    side = int(cells.max()) + 1
    grid = torch.arange(side * side, device=x.device)
    every = torch.stack([grid // side, grid % side], dim=1)
    exact = position_rows_reference(every, x.shape[1])
    table = exact.to(x.dtype)

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        del options
        cells, x = tensors["cells"], tensors["x"]
        rows = table.to(x.dtype)[cells[:, 0] * side + cells[:, 1]]
        return torch.cat([tensors["cls_token"].unsqueeze(0), x + rows])

    return run


SPECS = (
    OpSpec(
        op="tile_norm",
        make=make_tiles,
        ours=by_keywords(normalize_tiles),
        reference=_tiles_reference,
        wanted=(),
        reference_bytes=lambda tiles, itemsize: tiles * 3.0 * 224 * 224 * 4 * max(4, itemsize),
        rivals={"torchvision": Rival(_torchvision)},
        most_tiles=_BATCH,
        small={"side": 40, "crop_px": 32},
    ),
    OpSpec(
        op="position_embed",
        make=make_positions,
        ours=by_keywords(embed_positions),
        reference=_positions_reference,
        wanted=(),
        reference_bytes=lambda tiles, itemsize: tiles * 768.0 * (4 * 8 + 3 * itemsize),
        rivals={"table": Rival(_table)},
        small={"width": 48},
    ),
)
