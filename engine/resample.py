"""How a square read from a slide becomes a tile: the one rule for every path that reads tiles."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt


def resample_tile(
    region: npt.NDArray[np.uint8], tile_px: int, out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Bring a square region to `tile_px`: area averages down, bilinear for the few per cent up.

    Args:
        region: uint8 [s, s, 3].
        tile_px: Side of the result.
        out: uint8 [tile_px, tile_px, 3] to write to, rows may be apart; None makes a new array.

    Returns:
        `out`, or where that is None a new array or `region` itself.
    """
    if region.shape[0] == tile_px:
        if out is None:
            return region
        out[:] = region
        return out
    how = cv2.INTER_AREA if region.shape[0] > tile_px else cv2.INTER_LINEAR
    resized = cv2.resize(region, (tile_px, tile_px), dst=out, interpolation=how)
    return resized.astype(np.uint8, copy=False) if out is None else out
