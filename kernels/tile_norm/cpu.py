"""CPU path of tile normalisation: the affine map of every channel in one pass.

(x / 255 - mean) / std = x · a + b with a = 1 / (255 std) and b = -mean / std, computed in float64
and applied in float32 by one fused multiply-add over the pixels that the crop keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels.tile_norm.reference import resize_and_crop, to_patches


def normalize_tiles_cpu(
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
    spread = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    offset = -torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1) / spread
    # `x` is this function's own copy: converting from uint8 always makes one.
    torch.addcmul(offset.to(working), x, (1 / (255 * spread)).to(working), out=x)
    return to_patches(x.to(dtype), patches)
