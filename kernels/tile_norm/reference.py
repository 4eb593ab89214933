"""Eager definition of tile normalisation: resize, centre crop, scale to [0, 1], standardise.

    y[n, c, i, j] = (r(x)[n, i + top, j + left, c] / 255 - mean_c) / std_c

r is the antialiased resize of the shorter edge (the identity where no resize is asked for): widths,
then heights, each clamped to [0, 255] as 8-bit image libraries do, but not rounded to whole grey
levels; top and left place the centre crop. Accumulation is float32, or float64 where float64 is
asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_size(height: int, width: int, resize_px: int | None) -> tuple[int, int]:
    """Return `(height, width)` px after the shorter edge was brought to `resize_px`.

    The longer edge keeps the aspect ratio, its fraction dropped as torchvision does.
    """
    if resize_px is None:
        return height, width
    if height <= width:
        return resize_px, int(resize_px * width / height)
    return int(resize_px * height / width), resize_px


def crop_origin(size: tuple[int, int], crop_px: int) -> tuple[int, int]:
    """Return `(top, left)` px of the centre crop; half pixels go to the even side."""
    return round((size[0] - crop_px) / 2), round((size[1] - crop_px) / 2)


def resize_and_crop(
    tiles: Tensor,
    resize_px: int | None,
    crop_px: int | None,
    interpolation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return `[n, 3, p, p]` grey levels in [0, 255] of `dtype`, channels last in memory.

    Args:
        tiles: `[n, h, w, 3]` uint8.
        resize_px: Target of the shorter edge in px, or None.
        crop_px: Side of the centre crop in px, or None.
        interpolation: `bilinear` or `bicubic`.
        dtype: float32 or float64.
    """
    x = tiles.permute(0, 3, 1, 2)
    rows, columns = resized_size(x.shape[2], x.shape[3], resize_px)
    # Along the rows, then along the columns, each clamped: the order in which 8-bit image
    # libraries work. One clamp at the end differs by tens of grey levels at hard edges.
    for size in ((x.shape[2], columns), (rows, columns)):
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x.to(dtype), size=size, mode=interpolation, antialias=True)
            x = x.clamp_(0, 255)
    if crop_px is not None:
        top, left = crop_origin((rows, columns), crop_px)
        x = x[:, :, top : top + crop_px, left : left + crop_px]
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def to_patches(x: Tensor, patches: tuple[int, int] | None) -> Tensor:
    """Return `[n, tokens, 3 · ph · pw]` from `[n, 3, p, p]`, or `x` itself where patches is None.

    Tokens go row by row over the tile; inside a token channels are outermost, then rows, as the
    weight `[D, 3, ph, pw]` of a patch embedding has them when it is flattened.
    """
    if patches is None:
        return x
    x = x.unflatten(3, (-1, patches[1])).unflatten(2, (-1, patches[0]))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).contiguous()


def normalize_tiles_reference(
    tiles: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    resize_px: int | None,
    crop_px: int | None,
    interpolation: str,
    patches: tuple[int, int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the tiles in the layout asked for; arguments as `normalize_tiles`, checked, n > 0."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    x = resize_and_crop(tiles, resize_px, crop_px, interpolation, working)
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, dtype=working, device=x.device).view(shape)
    spread = torch.tensor(std, dtype=working, device=x.device).view(shape)
    return to_patches(((x / 255 - centre) / spread).to(dtype), patches)
