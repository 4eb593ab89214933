"""What features were made by, as data: collect it, and name the settings in which two differ."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modaltune.engine.errors import FeatureFileError
from modaltune.engine.tile_features import TileFeatures

FORMAT_VERSION = 1
_ABSENT = object()


def feature_recipe(
    *,
    encoder: str,
    encoder_sha256: str,
    target_mpp: float,
    tile_px: int,
    overlap_px: int = 0,
    dtype: Literal["float32", "float16"] = "float32",
    **settings: Any,
) -> dict[str, Any]:
    """Collect all that features depend on, in the form `write_features` keeps and resume compares.

    Args:
        encoder: Name of the tile encoder.
        encoder_sha256: Hash of its weights.
        target_mpp: Microns per pixel of the tiles.
        tile_px: Side of a tile, px at `target_mpp`.
        overlap_px: Overlap of neighbouring tiles, px at `target_mpp`.
        dtype: Type the features are stored as.
        settings: Everything else (min_foreground, tissue_method, ...), JSON values.

    Returns:
        The recipe, with the format version in it.
    """
    return plain_json(
        {
            **settings,
            "encoder": encoder,
            "encoder_sha256": encoder_sha256,
            "target_mpp": target_mpp,
            "tile_px": tile_px,
            "overlap_px": overlap_px,
            "dtype": dtype,
            "format_version": FORMAT_VERSION,
        },
        "recipe",
    )


def slide_recipe(recipe: Mapping[str, Any], base_mpp: float | None) -> dict[str, Any]:
    """Return the recipe of one slide: the run's, and the base mpp that was given for it."""
    return dict(recipe) if base_mpp is None else {**recipe, "base_mpp_given": base_mpp}


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """Hash a recipe; equal recipes have equal hashes, whatever the order of their settings."""
    text = json.dumps(plain_json(recipe, "recipe"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_facts(feats: TileFeatures, dtype: str) -> dict[str, Any]:
    """List what features state outside their recipe, under the names that recipes use."""
    return {
        "encoder": feats.encoder,
        "encoder_sha256": feats.encoder_sha256,
        "target_mpp": feats.target_mpp,
        "base_mpp": feats.base_mpp,
        "tile_px": feats.tile_px,
        "overlap_px": feats.overlap_px,
        "reader": feats.reader,
        "dtype": dtype,
        "format_version": FORMAT_VERSION,
    }


def differences(
    wanted: Mapping[str, Any], stored: Mapping[str, Any], keys: set[str]
) -> dict[str, tuple[Any, Any]]:
    """Compare two recipes over some settings.

    Args:
        wanted: One recipe.
        stored: The other.
        keys: The settings to look at; one that only one recipe has differs.

    Returns:
        Setting to (wanted, stored) for each that differs, by name; "(not set)" where absent.
    """
    return {
        key: (wanted.get(key, "(not set)"), stored.get(key, "(not set)"))
        for key in sorted(keys)
        if not _same(wanted.get(key, _ABSENT), stored.get(key, _ABSENT))
    }


def _same(a: Any, b: Any) -> bool:
    """Compare two settings; floats up to the noise of arithmetic."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def plain_json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Pass a dict through JSON, numpy scalars included, so that stored and asked compare equal.

    Raises:
        FeatureFileError: It holds something that JSON has no form for, NaN included.
    """

    def convert(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"a {type(item).__name__}")

    try:
        return json.loads(json.dumps(dict(value), default=convert, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise FeatureFileError(f"{name} must hold JSON values only, got {error}") from error
