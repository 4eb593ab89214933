"""Public entry of tile normalisation: uint8 tiles in, standardised network input out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modaltune.kernels._checks import check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels.tile_norm._resampling import Axis, dense_weights
from modaltune.kernels.tile_norm.ops import empty_output, output_side
from modaltune.kernels.tile_norm.reference import (
    crop_origin,
    normalize_tiles_reference,
    resized_size,
)

INTERPOLATIONS = ("bilinear", "bicubic")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        good = len(values) == 3 and all(-math.inf < v < math.inf for v in values)
        require(good, f"{name} must be three finite numbers, one per channel, got {tuple(values)}")
    require(all(v > 0 for v in std), f"std must be > 0 in every channel, got {tuple(std)}")


def _check_geometry(height: int, width: int, resize_px: int | None, crop_px: int | None) -> None:
    require(height > 0 and width > 0, f"tiles must have pixels, got {height} x {width}")
    for name, value in (("resize_px", resize_px), ("crop_px", crop_px)):
        require(value is None or value > 0, f"{name} must be a positive number of px, got {value}")
    rows, columns = resized_size(height, width, resize_px)
    if crop_px is None:
        require(
            rows == columns,
            f"tiles must be square where crop_px is None, got {rows} x {columns}; give crop_px",
        )
    else:
        require(
            crop_px <= min(rows, columns),
            f"crop_px must be at most the tile's {rows} x {columns} px after resize, got "
            f"{crop_px}; give resize_px or larger tiles",
        )


def _check_patches(patches: Sequence[int] | None, side: int) -> tuple[int, int] | None:
    if patches is None:
        return None
    good = len(patches) == 2 and all(size > 0 and side % size == 0 for size in patches)
    require(
        good,
        f"patches must be a height and a width in px that divide the output's {side} px, got "
        f"{tuple(patches)}; give another crop_px",
    )
    return patches[0], patches[1]


def _choose(tiles: Tensor, dtype: torch.dtype, impl: str) -> str:
    """Return the implementation to run, with the reason where the kernels can't be it."""
    if impl == "triton" and dtype == torch.float64:
        raise RuntimeError(
            "normalize_tiles: impl='triton' works in float32 and has no float64 form; use "
            "impl='auto' or another dtype"
        )
    if impl == "triton" and tiles.device.type == "cpu" and not INTERPRET:
        raise RuntimeError(
            "normalize_tiles: impl='triton' takes CPU tensors only where Triton interprets "
            "kernels; set TRITON_INTERPRET=1 before the first import, or use impl='auto'"
        )
    kernels = ("cpu",) if dtype == torch.float64 else ("triton", "cpu")
    return choose_impl("normalize_tiles", impl, tiles.device, (*kernels, "reference"))


def normalize_tiles(
    tiles: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    resize_px: int | None = None,
    crop_px: int | None = None,
    interpolation: str = "bicubic",
    patches: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Turn uint8 tiles into the standardised input of an image network.

    The shorter edge is resized to `resize_px` (antialiased; widths, then heights, each clamped to
    [0, 255] and not rounded), the centre `crop_px` square is kept, and `(x / 255 - mean) / std` is
    written channels first. An edge that is already as long as wanted is not touched. There is no
    gradient, and nothing is saved for one: the input is bytes.

    Args:
        tiles: `[n, h, w, 3]` uint8 RGB, values 0..255; n may be 0. A view is read in place where
            the pixels of a row lie side by side (a crop, tiles of a mosaic), copied otherwise.
        mean: Three channel means on the scale 0..1.
        std: Three channel standard deviations on the scale 0..1, > 0.
        resize_px: Shorter edge after the resize in px, or None to keep the tile's size.
        crop_px: Side of the centre crop in px, or None to keep everything (square tiles only).
        interpolation: `bilinear` or `bicubic`.
        patches: `(ph, pw)` in px to cut the result into the tokens of a patch embedding; None for
            images. `(p, p)` gives planar images: `.view(n, 3, p, p)` of it is contiguous.
        dtype: float16, bfloat16, float32 or float64. The work is done in float32 (float64 for
            float64) and rounded once at the end.
        impl: `auto`, `triton` (not for float64), `cpu` or `reference`.

    Returns:
        `[n, 3, p, p]` of `dtype` on the device of `tiles`, channels last in memory, with p the
        crop or the resized side. With `patches` `[n, (p / ph) (p / pw), 3 · ph · pw]`: tokens row
        by row, each channels first, contiguous.

    Raises:
        TypeError: `tiles` is not uint8 or `dtype` is none of the four.
        ValueError: Shapes, statistics, geometry, interpolation or impl break the rules above.
        RuntimeError: `impl` was asked for by name and can't run here.

    Source:
        The evaluation transforms of torchvision and timm (Resize, CenterCrop, ToTensor, Normalize).
    """
    if tiles.dtype != torch.uint8:
        raise TypeError(f"tiles must be uint8 RGB, got {tiles.dtype}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be a floating point type of 16 to 64 bits, got {dtype}")
    check_shape("tiles", tiles, (None, None, None, 3))
    _check_statistics(mean, std)
    _check_geometry(tiles.shape[1], tiles.shape[2], resize_px, crop_px)
    require(
        interpolation in INTERPOLATIONS,
        f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}",
    )
    side = output_side(tiles.shape[1], tiles.shape[2], resize_px, crop_px)
    cut = _check_patches(patches, side)
    chosen = _choose(tiles, dtype, impl)
    if chosen == "reference":
        if tiles.shape[0] == 0:
            # The resize has no kernel for an empty batch.
            return empty_output(0, side, cut, dtype, tiles.device)
        return normalize_tiles_reference(
            tiles, tuple(mean), tuple(std), resize_px, crop_px, interpolation, cut, dtype
        )
    out: Tensor = torch.ops.modaltune.tile_norm_fwd(
        tiles, mean, std, resize_px, crop_px, interpolation, cut, dtype, chosen
    )
    return out


def crop_window(
    height: int, width: int, resize_px: int | None, crop_px: int
) -> tuple[int, int, int, int]:
    """Return `(top, left, rows, columns)` px: where the crop starts in the resized tile, its size.

    Args:
        height: Height of the tile in px.
        width: Width of the tile in px.
        resize_px: Shorter edge after the resize in px, or None to keep the tile's size.
        crop_px: Side of the centre crop in px.

    Raises:
        ValueError: The crop does not fit into the resized tile.
    """
    _check_geometry(height, width, resize_px, crop_px)
    rows, columns = resized_size(height, width, resize_px)
    return *crop_origin((rows, columns), crop_px), rows, columns


def resize_matrices(
    height: int, width: int, *, resize_px: int | None, crop_px: int, interpolation: str
) -> tuple[Tensor, Tensor]:
    """Return the resize and centre crop of `normalize_tiles` as one matrix for each axis.

    With R and C the results, a channel `x [h, w]` becomes `clamp(R clamp(x C^T))`, clamped to
    [0, 255]: the form for runtimes that have no such resize of their own.

    Args:
        height: Height of the tile in px.
        width: Width of the tile in px.
        resize_px: Shorter edge after the resize in px, or None to keep the tile's size.
        crop_px: Side of the centre crop in px.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        R `[crop_px, height]` and C `[crop_px, width]`, float32.

    Raises:
        ValueError: The geometry or the interpolation break the rules of `normalize_tiles`.
    """
    require(
        interpolation in INTERPOLATIONS,
        f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}",
    )
    top, left, rows, columns = crop_window(height, width, resize_px, crop_px)
    return (
        dense_weights(Axis(height, rows, top, crop_px), interpolation),
        dense_weights(Axis(width, columns, left, crop_px), interpolation),
    )
