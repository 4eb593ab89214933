"""Registration of tile normalisation with torch.library: `modaltune::tile_norm_fwd`.

There is no backward operator: the input is bytes. Autocast changes nothing, since the caller names
the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modaltune.kernels._library import define
from modaltune.kernels.tile_norm._resampling import Axis, column_tables, row_tables
from modaltune.kernels.tile_norm.cpu import normalize_tiles_cpu
from modaltune.kernels.tile_norm.reference import crop_origin, resized_size

Patches = tuple[int, int] | None


def output_side(height: int, width: int, resize_px: int | None, crop_px: int | None) -> int:
    """Return the side p of the result in px."""
    return crop_px if crop_px is not None else resized_size(height, width, resize_px)[0]


def empty_output(
    n: int, side: int, patches: Patches, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Allocate the result: `[n, 3, p, p]` channels last, or `[n, tokens, 3 · ph · pw]`."""
    if patches is None:
        return torch.empty((n, side, side, 3), dtype=dtype, device=device).permute(0, 3, 1, 2)
    height, width = patches
    tokens = (side // height) * (side // width)
    return torch.empty((n, tokens, 3 * height * width), dtype=dtype, device=device)


def run_triton(
    tiles: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    resize_px: int | None,
    crop_px: int | None,
    interpolation: str,
    patches: Patches,
    out: Tensor,
) -> None:
    """Run the kernels into `out`, which `empty_output` describes; n > 0.

    Args:
        tiles: `[n, h, w, 3]` uint8 on a CUDA device, or on the CPU in the interpreter.
        mean: Three channel means on the scale 0..1.
        std: Three channel standard deviations on the scale 0..1.
        resize_px: Shorter edge after the resize in px, or None.
        crop_px: Side of the centre crop in px, or None.
        interpolation: `bilinear` or `bicubic`.
        patches: Height and width of a patch in px, or None.
        out: float16, bfloat16 or float32; written whole.

    Raises:
        ValueError: There are more rows than the kernels count.
    """
    from modaltune.kernels.tile_norm import triton_kernels

    if tiles.stride(3) != 1 or tiles.stride(2) != 3:
        tiles = tiles.contiguous()
    height, width = tiles.shape[1:3]
    rows, columns = resized_size(height, width, resize_px)
    side = output_side(height, width, resize_px, crop_px)
    top, left = crop_origin((rows, columns), side)
    if tiles.shape[0] * side >= 2**31:
        raise ValueError(
            f"tiles must have fewer than 2**31 rows in all after the crop, got {tiles.shape[0]} "
            f"tiles of {side}; give them in batches"
        )
    with torch.cuda.device_of(tiles):
        if (rows, columns) == (height, width):
            window = tiles[:, top : top + side, left : left + side]
            triton_kernels.launch_tile_norm_fwd_crop(window, mean, std, patches, out)
            return
        block = triton_kernels.resize_block(tiles.device)
        triton_kernels.launch_tile_norm_fwd_resize(
            tiles,
            column_tables(Axis(width, columns, left, side), interpolation, tiles.device),
            row_tables(Axis(height, rows, top, side), interpolation, block, tiles.device),
            mean,
            std,
            patches,
            out,
        )


def _forward(
    tiles: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    resize_px: int | None,
    crop_px: int | None,
    interpolation: str,
    patches: Sequence[int] | None,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    n, height, width = tiles.shape[:3]
    cut = None if patches is None else (patches[0], patches[1])
    side = output_side(height, width, resize_px, crop_px)
    if n == 0 or impl == "triton":
        out = empty_output(n, side, cut, dtype, tiles.device)
        if n:
            run_triton(tiles, mean, std, resize_px, crop_px, interpolation, cut, out)
        return out
    return normalize_tiles_cpu(
        tiles, tuple(mean), tuple(std), resize_px, crop_px, interpolation, cut, dtype
    )


def _fake(
    tiles: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    resize_px: int | None,
    crop_px: int | None,
    interpolation: str,
    patches: Sequence[int] | None,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    cut = None if patches is None else (patches[0], patches[1])
    side = output_side(tiles.shape[1], tiles.shape[2], resize_px, crop_px)
    return empty_output(tiles.shape[0], side, cut, dtype, tiles.device)


define(
    "tile_norm_fwd(Tensor tiles, float[] mean, float[] std, int? resize_px, int? crop_px, "
    "str interpolation, int[]? patches, ScalarType dtype, str impl) -> Tensor",
    _forward,
    _fake,
)
