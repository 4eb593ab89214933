"""Example slides for a report, as small pictures that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modaltune.engine.errors import InputError
from modaltune.engine.overlay import FOOTER_PX, HEADER_PX, MARGIN_PX
from modaltune.engine.readers import open_slide

MAX_SIDE_PX = 640
CLOSE_UP_PX = 256
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """A picture inside a page.

    Attributes:
        uri: JPEG as a data URI.
        width, height: In px.
        alt: What it shows, for who cannot see it.
        caption: What to know about it.
    """

    uri: str
    width: int
    height: int
    alt: str
    caption: str


def example_pictures(
    truth: Mapping[str, Any], cohort_root: Path, overlays_folder: Path | None
) -> list[Picture]:
    """Show a glandular, a mixed and a discohesive slide, and of each a tile.

    Args:
        truth: What was planted; its `cases` name slides and the shares in their tiles.
        cohort_root: Folder with `slides/<slide>.tiff`.
        overlays_folder: With `<slide>.png`; a slide without one is shown as it is.

    Returns:
        Up to six pictures; slides that are not there are left out.
    """
    slides = _slide_shares(truth)
    if not slides:
        return []
    ordered = sorted(slides, key=lambda s: (_mean(slides[s]), s))
    chosen = dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    pictures = (
        picture
        for s in chosen
        for picture in (
            _overview(s, _mean(slides[s]), cohort_root, overlays_folder),
            _close_up(s, slides[s], cohort_root),
        )
    )
    return [picture for picture in pictures if picture is not None]


def _slide_shares(truth: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {
        slide: tiles
        for record in truth.get("cases", [])
        for slide, tiles in record.get("slides", {}).items()
        if tiles
    }


def _mean(tiles: list[dict[str, Any]]) -> float:
    return float(np.mean([tile["discohesive"] for tile in tiles]))


def _overview(
    slide: str, share: float, cohort_root: Path, overlays_folder: Path | None
) -> Picture | None:
    overlay = None if overlays_folder is None else overlays_folder / f"{slide}.png"
    caption = f"{slide}: discohesive in {100 * share:.0f} % of its tissue"
    if overlay is not None and overlay.is_file():
        with Image.open(overlay) as opened:
            image = opened.convert("RGB")
        # Header and footer of the overlay cannot be read at this size.
        inner = (MARGIN_PX, HEADER_PX, image.width - MARGIN_PX, image.height - FOOTER_PX)
        image = image.crop(inner) if inner[2] > inner[0] and inner[3] > inner[1] else image
        return _encode(image, f"Overlay of slide {slide} with its tissue and kept tiles", caption)
    path = _slide_path(slide, cohort_root)
    if path is None:
        return None
    with open_slide(path) as reader:
        image = Image.fromarray(reader.thumbnail(MAX_SIDE_PX)[0])
    return _encode(image, f"Slide {slide}", caption)


def _close_up(slide: str, tiles: list[dict[str, Any]], cohort_root: Path) -> Picture | None:
    """Show the tile that is most like the slide as a whole."""
    path = _slide_path(slide, cohort_root)
    if path is None:
        return None
    mean = _mean(tiles)
    tile = min(tiles, key=lambda t: abs(t["discohesive"] - mean))
    with open_slide(path) as reader:
        pixels = reader.read_region((tile["x"], tile["y"]), (CLOSE_UP_PX, CLOSE_UP_PX), 0)
        side_um = CLOSE_UP_PX * reader.mpp
    caption = (
        f"A tile of {slide}, {side_um:.0f} µm wide: {100 * tile['discohesive']:.0f} % discohesive"
    )
    return _encode(Image.fromarray(pixels), f"Close-up of one tile of slide {slide}", caption)


def _slide_path(slide: str, cohort_root: Path) -> Path | None:
    """Return where a slide lies, None where it is gone or cannot be opened."""
    path = cohort_root / "slides" / f"{slide}.tiff"
    if not path.is_file():
        return None
    try:
        open_slide(path).close()
    except InputError:
        return None
    return path


def _encode(image: Image.Image, alt: str, caption: str) -> Picture:
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{data}", image.width, image.height, alt, caption)
