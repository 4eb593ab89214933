"""One picture that shows what tiling did to a slide: tissue outline, grid, kept and dropped tiles.

Kept tiles stand in full colour under a light tint and an outline; everything else is veiled, with
the dropped tiles as a faint grid. The slide stands under a header with the numbers and over a
legend with a scale bar. Colours are chosen against haematoxylin (blue-violet) and eosin (pink):
green-blue stands out from both, also for most colour-blind readers, and the outline is dark so that
it never depends on hue.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from modaltune.engine.atomic import atomic_path
from modaltune.engine.errors import InputError

if TYPE_CHECKING:
    from modaltune.engine.readers import SlideReader
    from modaltune.engine.tiling import TileGrid
    from modaltune.engine.tissue import TissueMask

Uint8 = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

PAPER: Colour = (252, 252, 250)
INK: Colour = (28, 34, 48)
MUTED: Colour = (104, 112, 128)
RULE: Colour = (222, 224, 228)
KEPT: Colour = (0, 140, 126)
DROPPED: Colour = (110, 116, 128)
TISSUE: Colour = (24, 40, 92)
ALARM: Colour = (176, 42, 48)

_MAX_SIDES = (64, 8192)
_MIN_IMAGE_SIDE = 960
_MIN_CANVAS_WIDTH = 1080
MARGIN_PX = 36
HEADER_PX = 118
FOOTER_PX = 76
_VEIL_GLASS = 0.55
VEIL_TISSUE = 0.42
_KEPT_TINT = 0.05
_DROPPED_LINE = 0.38
_KEPT_LINE = 0.95
_FULL_LINES_PX = 28  # tiles of this drawn side and larger get full lines
_FAINTEST_LINES = 0.3
_LEAST_ISLAND_PX2, _LEAST_HOLE_PX2 = 25.0, 120.0  # smaller ones are clutter in the picture
_SUBPIXEL_BITS = 4
_PNG_LEVEL = 1  # a tenth larger than the library's 6, in a quarter of the time


@dataclass(frozen=True)
class _View:
    """The drawn slide: its size on the canvas and drawn px per level-0 px along each axis."""

    width: int
    height: int
    scale_x: float
    scale_y: float


def write_overlay(
    path: str | os.PathLike[str],
    slide: SlideReader,
    tissue: TissueMask,
    grid: TileGrid,
    max_side: int = 1600,
) -> Path:
    """Write a PNG of a slide with its tissue, its grid and the kept tiles.

    Args:
        path: PNG file to write, whole or not at all; an existing one is replaced.
        slide: The open slide.
        tissue: Its tissue mask.
        grid: Its tiles; an empty grid shows its reason.
        max_side: Larger side of the drawn slide in px, 64..8192. A slide smaller than 960 px is
            drawn enlarged to that.

    Returns:
        The path written.

    Raises:
        InputError: The path does not end in .png, or max_side breaks its rule.
        SlideError: The slide can't be read.
        OSError: The file can't be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InputError(f"path must end in .png, got {target.name}; overlays are PNG files")
    low, high = _MAX_SIDES
    if isinstance(max_side, bool) or not isinstance(max_side, int) or not low <= max_side <= high:
        raise InputError(
            f"max_side must be a whole number of px in {low}..{high}, got {max_side!r}; "
            "the default is 1600"
        )
    picture = _draw_slide(slide, tissue, grid, max_side)
    canvas = _compose(picture, slide, tissue, grid)
    with atomic_path(target) as temporary:
        canvas.save(temporary, format="PNG", compress_level=_PNG_LEVEL)
    return target


def _draw_slide(slide: SlideReader, tissue: TissueMask, grid: TileGrid, max_side: int) -> Uint8:
    """Draw thumbnail, veil, tiles and outline: uint8 [h, w, 3]."""
    width, height = slide.dimensions
    thumbnail, _ = slide.thumbnail(min(max_side, max(width, height)))
    enlarge = max(1.0, min(max_side, _MIN_IMAGE_SIDE) / max(thumbnail.shape[:2]))
    size = (round(thumbnail.shape[1] * enlarge), round(thumbnail.shape[0] * enlarge))
    size = (max(1, size[0]), max(1, size[1]))
    how = cv2.INTER_CUBIC if enlarge > 1 else cv2.INTER_AREA
    image = cv2.resize(thumbnail, size, interpolation=how).astype(np.float32)
    view = _View(*size, size[0] / width, size[1] / height)

    everything, kept = _corners(grid.candidates(), grid, view), _corners(grid.coords, grid, view)
    inside = _tiles_layer(kept, view, thickness=-1)
    solid = cv2.resize(tissue.mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    _blend(image, PAPER, (1 - inside) * (_VEIL_GLASS + (VEIL_TISSUE - _VEIL_GLASS) * solid))
    _blend(image, KEPT, _KEPT_TINT * inside)
    # Lines of small tiles lie dense: fainter, they leave the tissue visible under them.
    side = grid.tile_px_level0 * view.scale_x
    strength = min(1.0, max(_FAINTEST_LINES, side / _FULL_LINES_PX))
    _blend(image, DROPPED, strength * _DROPPED_LINE * _tiles_layer(everything, view, thickness=1))
    line = 2 if side >= _FULL_LINES_PX else 1
    _blend(image, KEPT, strength * _KEPT_LINE * _tiles_layer(kept, view, thickness=line))
    border = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((2, 2), dtype=np.uint8))
    _blend(image, KEPT, _KEPT_LINE * border.astype(np.float32, copy=False))
    _blend(image, TISSUE, _contour_layer(tissue, view))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _blend(image: npt.NDArray[np.float32], colour: Colour, alpha: npt.NDArray[np.float32]) -> None:
    """Mix a colour into an image [h, w, 3] in place; alpha [h, w], 0..1."""
    where = np.nonzero(alpha)  # lines are few pixels of a picture
    old, share = image[where], alpha[where][:, None].astype(np.float32)
    image[where] = old + (np.array(colour, dtype=np.float32) - old) * share


def _corners(coords: npt.NDArray[np.int64], grid: TileGrid, view: _View) -> npt.NDArray[np.int64]:
    """Corners (left, top, right, bottom) on the canvas of footprints: int64 [n, 4]."""
    scale = np.array([view.scale_x, view.scale_y])
    start = np.rint(coords * scale)
    stop = np.rint((coords + grid.tile_px_level0) * scale)
    return np.concatenate([start, stop], axis=1).astype(np.int64)


def _tiles_layer(
    corners: npt.NDArray[np.int64], view: _View, thickness: int
) -> npt.NDArray[np.float32]:
    """Alpha [h, w] of tile outlines, or of their areas with thickness -1; nothing adds up."""
    layer = np.zeros((view.height, view.width), dtype=np.uint8)
    for left, top, right, bottom in corners.tolist():
        cv2.rectangle(layer, (left, top), (right, bottom), 255, thickness)
    return layer.astype(np.float32) / 255.0


def _contour_layer(tissue: TissueMask, view: _View) -> npt.NDArray[np.float32]:
    """Alpha [h, w] of the tissue's outline, anti-aliased, holes thinner."""
    layer = np.zeros((view.height, view.width), dtype=np.uint8)
    mask = np.ascontiguousarray(tissue.mask).view(np.uint8)
    scale = np.array([view.width / mask.shape[1], view.height / mask.shape[0]])
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for index, contour in enumerate(contours):
        is_hole = hierarchy[0, index, 3] >= 0  # it has a parent
        # Contours run through pixel centres, hence the half.
        points = (contour[:, 0] + 0.5) * scale - 0.5
        least = _LEAST_HOLE_PX2 if is_hole else _LEAST_ISLAND_PX2
        if cv2.contourArea(points.astype(np.float32)) < least:
            continue
        fixed = np.rint(points * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.polylines(layer, [fixed], True, 255, 1 if is_hole else 2, cv2.LINE_AA, _SUBPIXEL_BITS)
    return layer.astype(np.float32) / 255.0


def _compose(picture: Uint8, slide: SlideReader, tissue: TissueMask, grid: TileGrid) -> Image.Image:
    """Set the drawn slide between header and legend."""
    height, width = picture.shape[:2]
    canvas_width = max(width + 2 * MARGIN_PX, _MIN_CANVAS_WIDTH)
    canvas = Image.new("RGB", (canvas_width, height + HEADER_PX + FOOTER_PX), PAPER)
    left = (canvas_width - width) // 2
    canvas.paste(Image.fromarray(picture), (left, HEADER_PX))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left - 1, HEADER_PX - 1, left + width, HEADER_PX + height), outline=RULE)
    _draw_header(draw, canvas_width, slide, grid)
    _draw_legend(draw, canvas_width, HEADER_PX + height, tissue)
    px_per_mm = width / (slide.dimensions[0] * grid.base_mpp / 1000.0)
    _draw_scale_bar(draw, canvas_width - MARGIN_PX, HEADER_PX + height, width, px_per_mm)
    return canvas


def _draw_header(draw: ImageDraw.ImageDraw, width: int, slide: SlideReader, grid: TileGrid) -> None:
    """Name, size and resolution on the left; tiles kept of all on the right."""
    total = grid.shape[0] * grid.shape[1]
    count, caption = f"{len(grid):,} of {total:,}", "tiles kept"
    if total:
        caption += f" ({100 * len(grid) / total:.0f} %)"
    big, small = _font(30, bold=True), _font(16)
    right = width - MARGIN_PX
    draw.text((right, 54), count, INK if len(grid) else ALARM, big, anchor="rs")
    draw.text((right, 80), caption, MUTED, small, anchor="rs")
    room = width - 3 * MARGIN_PX - max(draw.textlength(count, big), draw.textlength(caption, small))

    w, h = slide.dimensions
    mm = grid.base_mpp / 1000.0
    lines = (
        (54, _font(26, bold=True), INK, slide.path.name),
        (80, small, MUTED, f"{w:,} × {h:,} px · {w * mm:.3g} × {h * mm:.3g} mm · "
            f"{grid.base_mpp:.4g} µm per px"),
        (102, small, ALARM if grid.reason else MUTED, f"no tiles: {grid.reason}" if grid.reason
            else _tile_line(grid)),
    )  # fmt: skip
    for baseline, font, colour, text in lines:
        draw.text((MARGIN_PX, baseline), _fitted(draw, text, font, room), colour, font, anchor="ls")


def _tile_line(grid: TileGrid) -> str:
    """Tile size, resolution, overlap and the rule for keeping one."""
    side = f"{grid.tile_px} px tiles at {grid.mpp:.4g} µm per px ({grid.tile_px * grid.mpp:.4g} µm)"
    overlap = f" · {grid.overlap_px} px overlap" if grid.overlap_px else ""
    return f"{side}{overlap} · kept with at least {100 * grid.min_foreground:g} % tissue"


def _draw_legend(draw: ImageDraw.ImageDraw, width: int, top: int, tissue: TissueMask) -> None:
    """Swatches for outline, kept and dropped tiles, side by side."""
    font = _font(16)
    y = top + FOOTER_PX // 2
    x = float(MARGIN_PX)
    tint = tuple(round(p + (k - p) * 0.12) for p, k in zip(PAPER, KEPT, strict=True))
    faint = tuple(round(p + (k - p) * 0.6) for p, k in zip(PAPER, DROPPED, strict=True))
    entries = (
        (f"tissue, {100 * tissue.share:.3g} % of the area ({tissue.method})", None, TISSUE, 3),
        ("kept tile", tint, KEPT, 2),
        ("dropped tile", None, faint, 1),
    )
    for text, fill, outline, line in entries:
        if line == 3:
            draw.line((x, y, x + 24, y), fill=outline, width=line)
        else:
            draw.rectangle((x + 2, y - 9, x + 20, y + 9), fill, outline, line)
        draw.text((x + 34, y), text, INK, font, anchor="lm")
        x += 34 + draw.textlength(text, font) + 36


def _draw_scale_bar(
    draw: ImageDraw.ImageDraw, right: int, top: int, image_width: int, px_per_mm: float
) -> None:
    """A bar of a round length in mm, at most a quarter of the drawn slide (or 260 px) long."""
    length_mm = round_length(min(image_width / 4, 260.0) / px_per_mm)
    length = max(2, round(length_mm * px_per_mm))
    y = top + FOOTER_PX // 2 + 10
    draw.line((right - length, y, right, y), fill=INK, width=3)
    for x in (right - length, right):
        draw.line((x, y - 6, x, y + 1), fill=INK, width=2)
    draw.text((right, y - 12), f"{length_mm:g} mm", INK, _font(16), anchor="rs")


def round_length(limit: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is at most `limit`."""
    power = 10.0 ** math.floor(math.log10(limit))
    return next(step * power for step in (5, 2, 1) if step * power <= limit * (1 + 1e-9))


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Shorten a text in its middle until it fits."""
    if draw.textlength(text, font) <= room:
        return text
    for keep in range(len(text) - 1, 1, -1):
        short = f"{text[: (keep + 1) // 2]}…{text[-(keep // 2) :]}"
        if draw.textlength(short, font) <= room:
            return short
    return "…"


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same letters, µ and × on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
