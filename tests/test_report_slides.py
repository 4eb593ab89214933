"""Example slides: which ones, from what, and as pictures that a page can hold."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modaltune.engine.pyramid import write_pyramid
from modaltune.report_slides import MAX_SIDE_PX, Picture, example_pictures

SHARES = {"A": 0.1, "B": 0.9, "C": 0.4}


def truth() -> dict[str, Any]:
    def record(slide: str, share: float) -> dict[str, Any]:
        tiles = [
            {"x": 0, "y": 0, "discohesive": share - 0.1},
            {"x": 256, "y": 0, "discohesive": share},
            {"x": 512, "y": 0, "discohesive": share + 0.1},
        ]
        return {"case_id": slide, "slides": {slide: tiles}}

    cases = [record(slide, share) for slide, share in SHARES.items()]
    return {"cases": [*cases, {"case_id": "none", "slides": {}}]}


def decode(picture: Picture) -> Image.Image:
    head, data = picture.uri.split(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (picture.width, picture.height)
    return image


def draw_slide(folder: Path, slide: str) -> None:
    """Write three tiles side by side: red, green, blue."""
    rgb = np.zeros((256, 768, 3), np.uint8)
    for channel in range(3):
        rgb[:, 256 * channel : 256 * (channel + 1), channel] = 220
    (folder / "slides").mkdir(exist_ok=True, parents=True)
    write_pyramid(folder / "slides" / f"{slide}.tiff", rgb, mpp=0.5, levels=1, tile_px=256)


def test_extremes_and_the_middle_are_shown_by_share(tmp_path: Path) -> None:
    for slide in SHARES:
        Image.new("RGB", (1300, 1000), (180, 90, 140)).save(tmp_path / f"{slide}.png")
    pictures = example_pictures(truth(), tmp_path, tmp_path)
    assert [p.caption.split(":")[0] for p in pictures] == ["A", "C", "B"]
    assert "90 %" in pictures[-1].caption
    assert all(max(decode(p).size) == MAX_SIDE_PX for p in pictures)


def test_a_slide_without_an_overlay_is_shown_itself_with_its_typical_tile(tmp_path: Path) -> None:
    draw_slide(tmp_path, "B")
    overview, tile = example_pictures(truth(), tmp_path, None)
    assert overview.alt == "Slide B"
    assert overview.width > 2 * overview.height
    red, green, blue = np.asarray(decode(tile)).mean(axis=(0, 1))
    assert green > 200
    assert max(red, blue) < 20
    assert "128 µm wide: 90 % discohesive" in tile.caption


def test_what_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "A.tiff").write_text("not a slide")
    assert example_pictures(truth(), tmp_path, tmp_path / "absent") == []
    assert example_pictures({}, tmp_path, None) == []
