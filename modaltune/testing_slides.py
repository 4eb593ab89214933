"""Stand-ins for slides in tests of geometry: sizes without pixels, masks without a thumbnail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from modaltune.engine.tissue import TissueMask


class Level(NamedTuple):
    """A level of a pyramid, as a SlideReader names it."""

    width: int
    height: int
    downsample: float


class Sizes:
    """A slide of which only the sizes are known: enough for the geometry."""

    def __init__(
        self,
        dimensions: tuple[int, int],
        mpp: float,
        downsamples: tuple[float, ...] = (1.0,),
        name: str = "sizes.svs",
    ) -> None:
        self.dimensions = dimensions
        self.mpp = mpp
        self.path = Path(name)
        self.levels = tuple(Level(0, 0, d) for d in downsamples)


def all_tissue(dimensions: tuple[int, int], factor: float = 64.0) -> TissueMask:
    """Return a mask of a slide `(width, height)` that is tissue all over."""
    shape = tuple(max(1, round(side / factor)) for side in dimensions[::-1])
    mask = np.ones(shape, dtype=np.bool_)
    return TissueMask(mask, factor, np.zeros((*shape, 3), np.uint8), "lab")
