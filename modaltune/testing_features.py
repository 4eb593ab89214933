"""Small feature files for tests and benchmarks of what is done with such files, not of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modaltune.engine.cohort import SlideItem
from modaltune.engine.recipes import feature_recipe, slide_recipe
from modaltune.engine.store import TileFeatures, write_features

SMALL_RECIPE = feature_recipe(
    encoder="small", encoder_sha256="0" * 64, target_mpp=0.5, tile_px=16, min_foreground=0.5
)


def small_features(
    path: Path,
    item: SlideItem,
    recipe: dict[str, Any] = SMALL_RECIPE,
    *,
    tiles: int = 3,
    width: int = 4,
) -> Path:
    """Write a whole feature file whose numbers follow from the slide's name alone.

    Args:
        path: Where.
        item: The slide.
        recipe: What the file says that it was made by.
        tiles: Rows; none makes an empty file.
        width: Columns.

    Returns:
        The path.
    """
    rng = np.random.default_rng(list(item.slide_id.encode()))
    return write_features(
        path,
        TileFeatures(
            slide=item.slide_id,
            features=rng.normal(size=(tiles, width)).astype(np.float32),
            coords=np.stack([np.arange(tiles) * 16, np.zeros(tiles)], axis=1).astype(np.int64),
            tile_px=int(recipe["tile_px"]),
            level0_tile_px=int(recipe["tile_px"]),
            target_mpp=float(recipe["target_mpp"]),
            base_mpp=item.base_mpp or 0.5,
            encoder=str(recipe["encoder"]),
            encoder_sha256=str(recipe["encoder_sha256"]),
            level0_size=(1024, 1024),
            reader="test",
            recipe=slide_recipe(recipe, item.base_mpp),
            empty_reason=None if tiles else "no tissue",
        ),
    )
