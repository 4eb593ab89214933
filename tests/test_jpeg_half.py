"""JPEG tiles at half scale: close to averages, of the right colours, and only where they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from modaltune.engine.decode_read import ReadShape, read_group
from modaltune.engine.errors import SlideError
from modaltune.engine.jpeg_half import HalfScaleJpeg, can_halve
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide

Rgb = npt.NDArray[np.uint8]
SVS = "data/slides/CMU-1-Small-Region.svs"
# Mean absolute difference on H&E that the module promises.
PROMISED = 1.5


def smooth(height: int, width: int) -> Rgb:
    """Coloured blobs, the three channels unlike."""
    noise = np.random.default_rng(3).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def averaged(rgb: Rgb) -> Rgb:
    half = rgb.shape[1] // 2, rgb.shape[0] // 2
    return np.asarray(cv2.resize(rgb, half, interpolation=cv2.INTER_AREA))


def mean_difference(a: Rgb, b: Rgb) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.shared
@pytest.mark.parametrize("tile_px", [256, 512])
def test_the_promise_holds_on_tissue(shared_dir: Path, tmp_path: Path, tile_px: int) -> None:
    with open_slide(shared_dir / SVS) as slide:
        rgb = slide.read_region((0, 0), (2048, 2048))
    path = write_pyramid(
        tmp_path / "a.tif", rgb, mpp=0.25, tile_px=tile_px, compression="jpeg", quality=80
    )
    with open_slide(path) as slide, HalfScaleJpeg(path, 0) as half:
        full = slide.read_region((0, 0), (2048, 2048))
        found = mean_difference(half.read(0, 0, (2048, 2048)), averaged(full))
    assert 0 < found < PROMISED


@pytest.mark.shared
def test_aperio_tiles_with_rgb_components(shared_dir: Path) -> None:
    """Its JPEG holds RGB without saying so in the stream: read as YCbCr it would turn green."""
    path = shared_dir / SVS
    with open_slide(path) as slide, HalfScaleJpeg(path, 0) as half:
        width, height = slide.file_tile_px(0) or (0, 0)
        full = slide.read_region((4 * width, 4 * height), (2 * width, 2 * height))
        found = half.read(4 * width, 4 * height, (2 * width, 2 * height))
    assert mean_difference(found, averaged(full)) < 3  # quality 30: more is lost than at 80


def test_colours_and_places(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(300, 401), mpp=0.25, tile_px=128, compression="jpeg"
    )
    assert can_halve(path, 0)
    with open_slide(path) as slide, HalfScaleJpeg(path, 0) as half:
        for box in ((0, 0, 256, 256), (128, 128, 128, 128), (256, 256, 145, 44)):
            x, y, width, height = box
            full = slide.read_region((x, y), (width, height))
            found = half.read(x, y, (width, height))
            assert found.shape == (-(-height // 2), -(-width // 2), 3)
            even = found[: height // 2, : width // 2]
            assert mean_difference(even, averaged(full[: height // 2 * 2, : width // 2 * 2])) < 1


def test_groups_use_it_where_edges_are_even_and_else_decode_in_full(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(512, 512), mpp=0.25, tile_px=128, compression="jpeg"
    )
    shape = ReadShape(0, 128, 64)
    with open_slide(path) as slide, HalfScaleJpeg(path, 0) as half:
        for offset, is_halved in ((0, True), (100, True), (101, False)):
            coords = np.array([[offset, offset], [offset + 128, offset]])
            full = np.zeros((2, 64, 64, 3), dtype=np.uint8)
            found = np.zeros_like(full)
            assert not read_group(slide, coords, shape, full).any()
            assert not read_group(slide, coords, shape, found, half).any()
            assert (mean_difference(found, full) > 0) == is_halved
            assert mean_difference(found, full) < 1


def test_a_damaged_tile_raises_and_a_group_reads_around_it(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[3]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(64))
    with open_slide(path) as slide, HalfScaleJpeg(path, 0) as half:
        with pytest.raises(SlideError, match=r"file tile 3 of .* must be a JPEG of 128 x 128 px"):
            half.read(128, 128, (128, 128))
        out = np.zeros((4, 64, 64, 3), dtype=np.uint8)
        coords = np.array([[0, 0], [128, 0], [0, 128], [128, 128]])
        bad = read_group(slide, coords, ReadShape(0, 128, 64), out, half)
    np.testing.assert_array_equal(bad, [False, False, False, True])


@pytest.mark.parametrize(
    ("compression", "tile"), [("adobe_deflate", (128, 128)), ("jpeg", None), (None, (128, 128))]
)
def test_other_files_are_not_halved(
    tmp_path: Path, compression: str | None, tile: tuple[int, int] | None
) -> None:
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, smooth(256, 256), compression=compression, tile=tile, **options)
    assert not can_halve(path, 0)
