"""The overlay picture: what is where in it, its numbers, and that it is written whole or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from modaltune.engine import overlay
from modaltune.engine.errors import InputError
from modaltune.engine.overlay import write_overlay
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import SlideReader, open_slide
from modaltune.engine.tiling import tile_slide
from modaltune.engine.tissue import find_tissue

PINK = (205, 130, 180)
GLASS = (245, 245, 245)


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    """2048 x 1024 px at 0.5 mpp: tissue in x 200..1300, glass elsewhere."""
    image = np.full((1024, 2048, 3), GLASS, dtype=np.uint8)
    image[:, 200:1300] = PINK
    folder = tmp_path / "slides"
    folder.mkdir()
    return write_pyramid(folder / "half.tif", image, mpp=0.5, levels=2)


def draw(
    slide: SlideReader, path: Path, max_side: int = 1600, **options: float
) -> npt.NDArray[np.int64]:
    tissue = find_tissue(slide)
    write_overlay(path, slide, tissue, tile_slide(slide, tissue, **options), max_side)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image).astype(np.int64)


def near(pixels: npt.NDArray[np.int64], colour: tuple[int, int, int], by: int = 6) -> object:
    return np.abs(pixels - np.array(colour)).max(axis=-1) <= by


def test_kept_dropped_and_glass_look_different(slide_path: Path, tmp_path: Path) -> None:
    """Columns of tiles start every 256 px; 1..4 lie in the tissue, 0 and 5 half, 6 and 7 not."""
    with open_slide(slide_path) as slide:
        picture = draw(slide, tmp_path / "a.png", max_side=1024)
    assert picture.shape[1] == 1096  # 1024 and a margin of 36 on each side
    top, left = overlay.HEADER_PX, overlay.MARGIN_PX

    def middle_of(column: int) -> npt.NDArray[np.int64]:
        # Half a px per level-0 px; the middle of a tile of the second row, off its lines.
        return picture[top + 192, left + column * 128 + 70]

    pink, paper = np.array(PINK), np.array(overlay.PAPER)
    for column in (1, 2, 3, 4):
        assert np.abs(middle_of(column) - pink).max() <= 12
    veiled = pink + (paper - pink) * overlay.VEIL_TISSUE
    assert np.abs(picture[top + 192, left + 115] - veiled).max() <= 3  # tissue from 100 on
    assert picture[top + 192, left + 85].min() >= 245
    for column in (6, 7):
        assert middle_of(column).min() >= 245
    # Outlines: a kept tile's left edge is green-blue, a dropped tile's grey, the tissue's dark.
    assert near(picture[top + 192, left + 256], overlay.KEPT, 16)
    assert near(picture[top + 192, left + 256 - 4], PINK, 16)
    grey = picture[top + 192, left + 7 * 128]
    assert grey.max() - grey.min() < 12
    assert grey.max() < 215
    edge = picture[top + 192, left + 98 : left + 103]
    assert near(edge, overlay.TISSUE, 24).any()


def test_scale_bar_is_as_long_as_it_says(slide_path: Path, tmp_path: Path) -> None:
    with open_slide(slide_path) as slide:
        picture = draw(slide, tmp_path / "a.png", max_side=1024)
    footer = picture[-overlay.FOOTER_PX :, -400:]
    run = int(near(footer, overlay.INK, 1).sum(axis=1).max())
    # 2048 px * 0.5 um over 1024 px: 1000 px per mm. At most 256 px, so 0.2 mm: 200 px.
    assert run == pytest.approx(200, abs=2)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0.09, 0.05), (0.2, 0.2), (0.19, 0.1), (7.0, 5.0), (1.0, 1.0), (49.9, 20.0), (1e-4, 1e-4)],
)
def test_round_lengths(limit: float, expected: float) -> None:
    assert math.isclose(overlay.round_length(limit), expected)


def test_empty_grid_says_so_in_the_alarm_colour(slide_path: Path, tmp_path: Path) -> None:
    with open_slide(slide_path) as slide:
        good = draw(slide, tmp_path / "good.png")
        bad = draw(slide, tmp_path / "bad.png", tile_px=1100)
    header = slice(0, overlay.HEADER_PX - 2)
    assert not near(good[header], overlay.ALARM).any()
    assert near(bad[header], overlay.ALARM).sum() > 50


def test_any_proportions_and_names(tmp_path: Path) -> None:
    """Slivers, single pixels and endless names neither fail nor run out of the picture."""
    for width, height in ((3000, 20), (20, 3000), (1, 1)):
        image = np.full((height, width, 3), PINK, dtype=np.uint8)
        path = tmp_path / f"{'very_long_slide_name_' * 8}{width}.png"
        Image.fromarray(image).save(path)
        with open_slide(path, base_mpp=0.5) as slide:
            picture = draw(slide, tmp_path / "out.png", max_side=500, tile_px=16)
        assert (picture[:, : overlay.MARGIN_PX // 2] == overlay.PAPER).all()
        assert (picture[: overlay.HEADER_PX - 2, -overlay.MARGIN_PX + 2 :] == overlay.PAPER).all()


def test_a_failed_write_leaves_nothing_and_keeps_the_old(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    with open_slide(slide_path) as slide:
        draw(slide, folder / "a.png")
        before = (folder / "a.png").read_bytes()

        def torn(self: Image.Image, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Image.Image, "save", torn)
        for name in ("a.png", "b.png"):
            with pytest.raises(OSError, match="disk full"):
                draw(slide, folder / name)
    assert [p.name for p in folder.iterdir()] == ["a.png"]
    assert (folder / "a.png").read_bytes() == before


def test_bad_arguments_are_refused(slide_path: Path, tmp_path: Path) -> None:
    with open_slide(slide_path) as slide:
        tissue = find_tissue(slide)
        grid = tile_slide(slide, tissue)
        with pytest.raises(InputError, match=r"path must end in \.png, got a\.jpg"):
            write_overlay(tmp_path / "a.jpg", slide, tissue, grid)
        for value in (10, 10**6, 800.0):
            with pytest.raises(InputError, match="max_side must be a whole number of px"):
                write_overlay(tmp_path / "a.png", slide, tissue, grid, value)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.shared
def test_shared_slide(shared_dir: Path, tmp_path: Path) -> None:
    with open_slide(shared_dir / "data/slides/CMU-1-Small-Region.svs") as slide:
        picture = draw(slide, tmp_path / "cmu.png", max_side=800)
        width, height = slide.dimensions
    drawn_height = picture.shape[0] - overlay.HEADER_PX - overlay.FOOTER_PX
    assert drawn_height == 800
    assert 800 * width // height <= picture.shape[1] - 2 * overlay.MARGIN_PX + 300
    assert near(picture, overlay.KEPT, 16).sum() > 1000
    assert near(picture, overlay.TISSUE, 16).sum() > 1000
