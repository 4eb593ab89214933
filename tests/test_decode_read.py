"""Groups read as planned have the pixels of `read_tiles`, bit for bit, whatever the plan."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modaltune.engine.decode_plan import group_tiles
from modaltune.engine.decode_read import ReadShape, read_group
from modaltune.engine.errors import SlideError
from modaltune.engine.file_tiles import FileTiles, open_file_tiles
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import SlideReader, open_slide
from modaltune.engine.tiling import TileGrid, plan_read, read_tiles

Rgb = npt.NDArray[np.uint8]
CODECS = ("deflate", "jpeg", "lzw", "jpeg2000", "none")
SIDE = 704


def picture(height: int, width: int, seed: int = 0) -> Rgb:
    """Noise with coarse and fine parts: a shift or a wrong average by one pixel shows."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.integers(0, 200, (9, 9, 3), dtype=np.uint8), (width, height))
    return coarse + rng.integers(0, 50, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One slide per codec with levels at 0.25, 0.5 and 1 mpp, and others without levels."""
    folder = tmp_path_factory.mktemp("slides")
    rgb = picture(SIDE, SIDE)
    paths = {
        codec: write_pyramid(
            folder / f"{codec}.tif", rgb, mpp=0.25, levels=3, tile_px=128,
            compression=codec,  # type: ignore[arg-type]
        )
        for codec in CODECS
    }  # fmt: skip
    for name, tile in (("flat", 128), ("flat-16", 16), ("flat-256", 256), ("strips", None)):
        paths[name] = write_pyramid(folder / f"{name}.tif", rgb, mpp=0.25, tile_px=tile)
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "resolutionunit": 3}
    resolution = (40_000, 40_000)
    for codec in ("webp", "zstd"):
        paths[codec] = folder / f"{codec}.tif"
        tifffile.imwrite(
            paths[codec], rgb, tile=(96, 112), compression=codec, resolution=resolution, **options
        )
    paths["png"] = folder / "a.png"
    PIL.Image.fromarray(rgb).save(paths["png"])
    return paths


def grid_at(
    slide: SlideReader, mpp: float, tile_px: int, offset: int, step: int | None = None
) -> TileGrid:
    """Tiles from an offset on, also those that the slide's edge cuts."""
    level, read_px = plan_read(slide, tile_px=tile_px, mpp=mpp)
    footprint = round(tile_px * mpp / slide.mpp)
    places = np.arange(offset, SIDE, step or footprint, dtype=np.int64)
    x, y = np.meshgrid(places, places)
    coords = np.stack([x.ravel(), y.ravel()], axis=1)
    return TileGrid(
        coords=coords,
        tile_px=tile_px,
        mpp=mpp,
        base_mpp=slide.mpp,
        level=level,
        read_px=read_px,
        tile_px_level0=footprint,
        foreground=np.ones(len(coords), dtype=np.float32),
        dimensions=slide.dimensions,
        shape=(len(places), len(places)),
    )


def read_in_groups(
    slide: SlideReader, grid: TileGrid, most: int = 16, tiles: FileTiles | None = None
) -> Rgb:
    """Read a grid group by group into poisoned memory."""
    out = np.full((len(grid), grid.tile_px, grid.tile_px, 3), 77, dtype=np.uint8)
    shape = ReadShape(grid.level, grid.read_px, grid.tile_px)
    for group in group_tiles(grid, most):
        block = np.full((len(group), *out.shape[1:]), 99, dtype=np.uint8)
        assert not read_group(slide, grid.coords[group], shape, block, tiles).any()
        out[group] = block
    return out


def assert_same(slide: SlideReader, grid: TileGrid, most: int = 16) -> None:
    reference = np.stack(list(read_tiles(slide, grid)))
    np.testing.assert_array_equal(read_in_groups(slide, grid, most), reference)
    with opened(slide, grid.level) as tiles:
        if tiles is not None:
            np.testing.assert_array_equal(read_in_groups(slide, grid, most, tiles), reference)


def opened(slide: SlideReader, level: int) -> contextlib.AbstractContextManager[FileTiles | None]:
    """The file tiles of a level, or none."""
    return open_file_tiles(slide, level) or contextlib.nullcontext()


@pytest.mark.parametrize("offset", [0, 100, 101])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_level_and_place(
    slides: dict[str, Path], codec: str, mpp: float, offset: int
) -> None:
    with open_slide(slides[codec]) as slide:
        assert slide.file_tile_px(0) == (128, 128)
        assert_same(slide, grid_at(slide, mpp, 64, offset))


@pytest.mark.parametrize("offset", [0, 100, 101])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("name", ["flat", "flat-16", "flat-256", "strips", "webp", "zstd", "png"])
def test_averages_without_a_level(
    slides: dict[str, Path], name: str, mpp: float, offset: int
) -> None:
    with open_slide(slides[name], base_mpp=0.25) as slide:
        assert_same(slide, grid_at(slide, mpp, 56, offset))


@pytest.mark.parametrize("reader", ["cucim", "openslide", "image"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.6])
def test_every_reader(slides: dict[str, Path], reader: str, mpp: float) -> None:
    with open_slide(slides["jpeg"], reader=reader) as slide:
        assert_same(slide, grid_at(slide, mpp, 64, 37))


def test_slightly_enlarged_tiles(slides: dict[str, Path]) -> None:
    with open_slide(slides["flat"], base_mpp=0.26) as slide:
        grid = grid_at(slide, 0.25, 64, 5)
        assert grid.read_px < grid.tile_px
        assert_same(slide, grid)


def test_overlapping_tiles(slides: dict[str, Path]) -> None:
    with open_slide(slides["jpeg"]) as slide:
        assert_same(slide, grid_at(slide, 0.5, 64, 3, step=50))


@pytest.mark.parametrize("reader", ["cucim", "openslide", "image"])
def test_odd_sides(tmp_path: Path, reader: str) -> None:
    """Levels that are not a whole fraction of level 0; OpenSlide shifts there, so it is not cut."""
    path = write_pyramid(tmp_path / "a.tif", picture(703, 701), mpp=0.25, levels=3, tile_px=128)
    with open_slide(path, reader=reader) as slide:
        assert (slide.file_tile_px(2) is None) == (reader == "openslide")
        for mpp in (0.25, 0.5, 1.0):
            assert_same(slide, grid_at(slide, mpp, 48, 7))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["flat", "flat-16", "flat-256", "jpeg", "zstd"]),
    tile_px=st.integers(1, 130),
    factor=st.sampled_from([1.0, 2.0, 3.0, 4.0, 1.3, 2.5]),
    places=st.lists(
        st.tuples(st.integers(-90, SIDE + 40), st.integers(-90, SIDE + 40)), min_size=1, max_size=6
    ),
)
def test_any_tiles_anywhere(
    slides: dict[str, Path],
    name: str,
    tile_px: int,
    factor: float,
    places: list[tuple[int, int]],
) -> None:
    with open_slide(slides[name], base_mpp=0.25) as slide:
        read_px = max(1, round(tile_px * factor))
        grid = grid_at(slide, 0.25, tile_px, 0)
        grid = dataclasses.replace(
            grid, level=0, read_px=read_px, coords=np.array(places, dtype=np.int64)
        )
        reference = np.stack(list(read_tiles(slide, grid)))
        with opened(slide, 0) as tiles:
            for source in {None, tiles}:
                out = np.full(reference.shape, 99, dtype=np.uint8)
                shape = ReadShape(0, read_px, tile_px)
                assert not read_group(slide, grid.coords, shape, out, source).any()
                np.testing.assert_array_equal(out, reference)


def break_file_tile(path: Path, index: int) -> None:
    """Overwrite the bytes of one file tile of level 0."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55" * count)


@pytest.mark.parametrize("is_past_the_reader", [False, True])
@pytest.mark.parametrize("codec", ["deflate", "jpeg", "lzw", "jpeg2000"])
@pytest.mark.parametrize(("mpp", "expected"), [(0.25, 4), (0.5, 4), (0.7, 4)])
def test_a_damaged_file_tile_costs_the_tiles_on_it(
    tmp_path: Path, codec: str, mpp: float, expected: int, is_past_the_reader: bool
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", picture(SIDE, SIDE), mpp=0.25, tile_px=128,
        compression=codec,  # type: ignore[arg-type]
    )  # fmt: skip
    with open_slide(path) as slide:
        tile_px = round(128 * 0.25 / mpp)
        grid = grid_at(slide, mpp, tile_px, 64, step=128)
        grid = dataclasses.replace(grid, coords=grid.coords[(grid.coords < 512).all(axis=1)])
        reference = np.stack(list(read_tiles(slide, grid)))
    break_file_tile(path, 2 * 6 + 3)  # of 6 per row: x 384..512, y 256..384
    with open_slide(path) as slide, contextlib.ExitStack() as stack:
        tiles = stack.enter_context(opened(slide, 0)) if is_past_the_reader else None
        assert (tiles is not None) == (is_past_the_reader and codec in ("deflate", "jpeg"))
        out = np.zeros_like(reference)
        bad = read_group(slide, grid.coords, ReadShape(0, grid.read_px, tile_px), out, tiles)
    corners = grid.coords[bad]
    assert len(corners) == expected
    assert set(map(tuple, corners.tolist())) == {(x, y) for x in (320, 448) for y in (192, 320)}
    assert (out[bad] == 255).all()
    np.testing.assert_array_equal(out[~bad], reference[~bad])


def test_a_group_of_damaged_tiles_is_all_white(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture(256, 256), mpp=0.25, tile_px=128)
    with open_slide(path) as slide:

        def unreadable(*_: object) -> Rgb:
            raise SlideError("no")

        monkeypatch.setattr(slide, "read_at", unreadable)
        out = np.zeros((4, 64, 64, 3), dtype=np.uint8)
        coords = np.array([[0, 0], [64, 64], [100, 0], [9, 9]])
        assert read_group(slide, coords, ReadShape(0, 64, 64), out).all()
    assert (out == 255).all()
