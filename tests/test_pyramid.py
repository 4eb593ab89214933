"""Pyramids are seen alike by tifffile, OpenSlide and cuCIM, and appear whole or not at all."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import PIL.Image
import pytest
import tifffile

from modaltune.engine import pyramid
from modaltune.engine.errors import InputError
from modaltune.engine.pyramid import write_pyramid

Rgb = npt.NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Rgb:
    """Smooth coloured noise over the full range, so that codecs and shifts show."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.asarray(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX), dtype=np.uint8)


def mean_of_fours(rgb: Rgb) -> npt.NDArray[np.float64]:
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    return rgb.reshape(height, 2, width, 2, 3).astype(np.float64).mean(axis=(1, 3))


@pytest.mark.parametrize("tile_px", [256, None])
@pytest.mark.parametrize("compression", ["deflate", "lzw", "none", "jpeg2000"])
def test_lossless_codecs_return_the_source(
    tmp_path: Path, compression: Any, tile_px: int | None
) -> None:
    rgb = picture(320, 448)
    path = write_pyramid(
        tmp_path / "a.tif", rgb, mpp=0.25, levels=3, tile_px=tile_px, compression=compression
    )
    with tifffile.TiffFile(path) as tif:
        levels = [page.asarray() for page in tif.pages]
        assert [page.is_tiled for page in tif.pages] == [tile_px is not None] * 3
    np.testing.assert_array_equal(levels[0], rgb)
    for larger, smaller in itertools.pairwise(levels):
        # Rounding a mean to whole numbers moves it by half at most.
        assert np.abs(smaller - mean_of_fours(larger)).max() <= 0.5


@pytest.mark.parametrize("quality", [40, 90])
def test_jpeg_loses_no_more_than_pillows(tmp_path: Path, quality: int) -> None:
    rgb = picture(256, 256)
    path = write_pyramid(tmp_path / "a.tif", rgb, mpp=0.5, compression="jpeg", quality=quality)
    buffer = io.BytesIO()
    PIL.Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    pillow = np.abs(np.asarray(PIL.Image.open(buffer)).astype(int) - rgb).mean()
    ours = np.abs(tifffile.imread(path).astype(int) - rgb).mean()
    assert ours <= 1.1 * pillow


def test_openslide_and_cucim_see_the_levels_and_the_resolution(tmp_path: Path) -> None:
    cucim = pytest.importorskip("cucim")
    rgb = picture(301, 503)
    path = write_pyramid(tmp_path / "a.tif", rgb, mpp=0.25, levels=3)
    sizes = ((503, 301), (251, 150), (125, 75))
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == sizes
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
    assert cucim.CuImage(str(path)).resolutions["level_dimensions"] == sizes


def test_resolution_tags_are_per_centimetre_and_level(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture(301, 400), mpp=0.5, levels=2)
    with tifffile.TiffFile(path) as tif:
        first, second = tif.pages[0], tif.pages[1]
        assert first.resolutionunit == 3
        assert first.resolution == pytest.approx((20_000, 20_000))
        assert second.resolution == pytest.approx((10_000, 20_000 * 150 / 301))
        assert (first.subfiletype, second.subfiletype) == (0, 1)


def test_without_mpp_no_unit_is_written(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture(64, 64), mpp=None)
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].resolutionunit == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mpp": 0.0}, r"mpp must be finite and > 0, got 0\.0; None writes"),
        ({"mpp": float("nan")}, "mpp must be finite"),
        ({"levels": 0}, r"levels must be 1\.\.7 for 80 x 64 px .* got 0; write fewer"),
        ({"levels": 8}, r"levels must be 1\.\.7"),
        ({"tile_px": 100}, "tile_px must be a multiple of 16 or None, got 100; try 256"),
        ({"compression": "zip"}, "compression must be one of none, deflate, .* got 'zip'; try"),
        ({"quality": 101}, r"quality must be 0\.\.100 for deflate, got 101"),
        ({"compression": "jpeg", "quality": 0}, r"quality must be 1\.\.100 .* got 0"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_pyramid(tmp_path / "a.tif", picture(64, 80), **{"mpp": 0.5, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (0, 8, 3)])
def test_only_rgb_is_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"rgb must be uint8 \[h, w, 3\] with pixels, got uint8"):
        write_pyramid(tmp_path / "a.tif", np.zeros(shape, np.uint8), mpp=0.5)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path must lie in an existing folder"):
        write_pyramid(tmp_path / "none" / "a.tif", picture(64, 64), mpp=0.5)


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture(64, 64), mpp=0.5)
    before = path.read_bytes()

    def fail(rgb: Rgb) -> Rgb:
        raise OSError("disk full")

    monkeypatch.setattr(pyramid, "_half", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pyramid(path, picture(64, 64, seed=1), mpp=0.5, levels=2)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
