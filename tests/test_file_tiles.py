"""File tiles past the reader: its pixels, and half-scale JPEG close to averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from modaltune.engine.decode_read import ReadShape, read_group
from modaltune.engine.file_tiles import FileTiles, can_decode, open_file_tiles
from modaltune.engine.pyramid import Compression, write_pyramid
from modaltune.engine.readers import SlideReader, open_slide

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


@contextmanager
def opened(path: Path, level: int = 0) -> Iterator[tuple[SlideReader, FileTiles]]:
    """A slide, and the file tiles of a level of it."""
    with open_slide(path, base_mpp=0.25) as slide:
        tiles = open_file_tiles(slide, level)
        assert tiles is not None
        with tiles:
            yield slide, tiles


def stitched(tiles: FileTiles, x: int, y: int, size: tuple[int, int], factor: int = 1) -> Rgb:
    """A box of whole file tiles, each read by itself."""
    width, height = tiles.tile_px
    read = tiles.read_half if factor == 2 else tiles.read
    rows = [
        np.concatenate([read(left, top).copy() for left in range(x, x + size[0], width)], axis=1)
        for top in range(y, y + size[1], height)
    ]
    return np.concatenate(rows)[: -(-size[1] // factor), : -(-size[0] // factor)]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_the_pixels_are_the_readers(tmp_path: Path, codec: Compression, level: int) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(700, 901), mpp=0.25, levels=2, tile_px=128, compression=codec
    )
    with opened(path, level) as (slide, tiles):
        size = slide.levels[level].width, slide.levels[level].height
        expected = slide.read_at(0, 0, size, level)
        np.testing.assert_array_equal(stitched(tiles, 0, 0, size), expected)
        assert tiles.corner(len(tiles) - 1) == tuple((side - 1) // 128 * 128 for side in size)


@pytest.mark.shared
def test_an_aperio_slide(shared_dir: Path) -> None:
    """Its JPEG holds RGB without saying so in the stream, and its tables once for all tiles."""
    with opened(shared_dir / SVS) as (slide, tiles):
        width, height = tiles.tile_px
        size = 3 * width, 3 * height
        expected = slide.read_at(3 * width, 3 * height, size, 0)
        np.testing.assert_array_equal(stitched(tiles, 3 * width, 3 * height, size), expected)


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_memory_that_is_given_is_used_where_it_fits(tmp_path: Path, codec: Compression) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression=codec
    )
    with opened(path) as (slide, tiles):
        block = np.zeros((3, 128, 128, 3), dtype=np.uint8)
        assert tiles.read(128, 0, block[1]).base is block
        np.testing.assert_array_equal(block[1], slide.read_at(128, 0, (128, 128), 0))
        assert not block[[0, 2]].any()
        other = np.zeros((64, 128, 3), dtype=np.uint8)
        assert tiles.read(0, 0, other) is not other
        assert not other.any()


def test_other_pixels_than_the_readers_are_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with open_slide(path) as slide:
        page = slide.pages[0]
        others = {"offsets": page.offsets[::-1], "byte_counts": page.byte_counts[::-1]}
        monkeypatch.setattr(slide.backend, "pages", (dataclasses.replace(page, **others),))
        assert can_decode(slide.pages[0])
        assert open_file_tiles(slide, 0) is None


@pytest.mark.shared
@pytest.mark.parametrize("tile_px", [256, 512])
def test_half_scale_keeps_its_promise_on_tissue(
    shared_dir: Path, tmp_path: Path, tile_px: int
) -> None:
    with open_slide(shared_dir / SVS) as slide:
        rgb = slide.read_region((0, 0), (2048, 2048))
    path = write_pyramid(
        tmp_path / "a.tif", rgb, mpp=0.25, tile_px=tile_px, compression="jpeg", quality=80
    )
    with opened(path) as (slide, tiles):
        full = slide.read_region((0, 0), (2048, 2048))
        found = mean_difference(stitched(tiles, 0, 0, (2048, 2048), 2), averaged(full))
    assert 0 < found < PROMISED


@pytest.mark.shared
def test_half_scale_of_an_aperio_slide(shared_dir: Path) -> None:
    with opened(shared_dir / SVS) as (slide, tiles):
        width, height = tiles.tile_px
        full = slide.read_region((4 * width, 4 * height), (2 * width, 2 * height))
        found = stitched(tiles, 4 * width, 4 * height, (2 * width, 2 * height), 2)
    assert mean_difference(found, averaged(full)) < 3  # quality 30: more is lost than at 80


def test_colours_and_places_at_half_scale(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(300, 401), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with opened(path) as (slide, tiles):
        assert tiles.can_halve
        for box in ((0, 0, 256, 256), (128, 128, 128, 128), (256, 256, 145, 44)):
            x, y, width, height = box
            full = slide.read_region((x, y), (width, height))
            found = stitched(tiles, x, y, (width, height), 2)
            assert found.shape == (-(-height // 2), -(-width // 2), 3)
            even = found[: height // 2, : width // 2]
            assert mean_difference(even, averaged(full[: height // 2 * 2, : width // 2 * 2])) < 1


def test_groups_use_it_where_edges_are_even_and_else_decode_in_full(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(512, 512), mpp=0.25, tile_px=128, compression="jpeg"
    )
    shape = ReadShape(0, 128, 64)
    with opened(path) as (slide, tiles):
        for offset, is_halved in ((0, True), (100, True), (101, False)):
            coords = np.array([[offset, offset], [offset + 128, offset]])
            full = np.zeros((2, 64, 64, 3), dtype=np.uint8)
            found = np.zeros_like(full)
            assert not read_group(slide, coords, shape, full).any()
            assert not read_group(slide, coords, shape, found, tiles, is_half_scale=True).any()
            assert (mean_difference(found, full) > 0) == is_halved
            assert mean_difference(found, full) < 1


@pytest.mark.parametrize(
    ("compression", "tile_px", "is_ours"),
    [("jpeg", 128, True), ("deflate", 128, True), ("lzw", 128, False), ("jpeg", 32, False)],
)
def test_which_files_are_read_so(
    tmp_path: Path, compression: Compression, tile_px: int, is_ours: bool
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.5, tile_px=tile_px, compression=compression
    )
    with open_slide(path) as slide:
        assert slide.name == "cucim"
        found = open_file_tiles(slide, 0)
    assert (found is not None) == is_ours
    if found is not None:
        assert found.can_halve == (compression == "jpeg")
        found.close()


@pytest.mark.parametrize("reader", ["openslide", "image"])
def test_other_readers_keep_their_slides(tmp_path: Path, reader: str) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", smooth(256, 256), mpp=0.25, tile_px=128, compression="jpeg"
    )
    with open_slide(path, reader=reader) as slide:
        assert open_file_tiles(slide, 0) is None
