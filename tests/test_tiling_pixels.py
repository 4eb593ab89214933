"""Pixels of tiles: the same tissue at two resolutions, resampling, iterators, real files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from modaltune.engine.errors import InputError, SlideError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide
from modaltune.engine.tiling import TileGrid, read_tiles, tile_slide
from modaltune.engine.tissue import find_tissue
from modaltune.testing_slides import Level, Sizes, all_tissue

Uint8 = npt.NDArray[np.uint8]


class MemorySlide:
    """A pyramid in memory with the attributes of a SlideReader; white outside."""

    def __init__(
        self, image: Uint8, mpp: float, downsamples: tuple[float, ...] = (1.0,), name: str = "m.svs"
    ) -> None:
        height, width = image.shape[:2]
        self.mpp = mpp
        self.path = Path(name)
        self.dimensions = (width, height)
        sizes = [(round(width / d), round(height / d)) for d in downsamples]
        self.levels = tuple(Level(*s, d) for s, d in zip(sizes, downsamples, strict=True))
        self.images = [
            image if size == (width, height) else cv2.resize(image, size, interpolation=3)
            for size in sizes
        ]
        self.reads: list[tuple[tuple[int, int], int]] = []
        self.closed = 0
        self.lost = 0

    def read_regions(
        self, locations: npt.NDArray[np.int64], size: tuple[int, int], level: int
    ) -> Iterator[Uint8]:
        assert locations.dtype == np.int64
        self.reads.append((size, level))
        # Held here, so that nothing but close() ends it.
        self.regions = self._regions(locations, size, level)
        return self.regions

    def _regions(
        self, locations: npt.NDArray[np.int64], size: tuple[int, int], level: int
    ) -> Iterator[Uint8]:
        image, factor = self.images[level], self.levels[level].downsample
        try:
            for x, y in locations[: len(locations) - self.lost]:
                left, top = round(x / factor), round(y / factor)
                region = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
                part = image[top : top + size[1], left : left + size[0]]
                region[: part.shape[0], : part.shape[1]] = part
                yield region
        finally:
            self.closed += 1

    def thumbnail(self, max_side: int) -> tuple[Uint8, float]:
        factor = max(self.dimensions) / max_side
        size = tuple(max(1, round(side / factor)) for side in self.dimensions)
        return cv2.resize(self.images[0], size, interpolation=cv2.INTER_AREA), factor


def drawn_tissue(side: int = 2048, seed: int = 5) -> Uint8:
    """Smooth pink blobs with fine texture on glass, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    field = cv2.resize(rng.random((7, 7)).astype(np.float32), (side, side), interpolation=2)
    texture = cv2.GaussianBlur(rng.random((side, side)).astype(np.float32), (0, 0), 3)
    image = np.full((side, side, 3), 246, dtype=np.uint8)
    colour = np.array([200, 120, 170]) + 900 * (texture[..., None] - 0.5)
    inside = field > 0.45
    image[inside] = np.clip(colour, 40, 225).astype(np.uint8)[inside]
    return image


def tiles_of(slide: MemorySlide, **options: float) -> tuple[TileGrid, Uint8]:
    grid = tile_slide(slide, find_tissue(slide, max_side=512), min_foreground=0.6, **options)
    return grid, np.stack(list(read_tiles(slide, grid)))


def test_20x_and_40x_renditions_give_the_same_tiles() -> None:
    """The same tissue at 0.25 and at 0.5 mpp, with and without a level at the wanted mpp."""
    image = drawn_tissue()
    half = cv2.resize(image, (1024, 1024), interpolation=cv2.INTER_AREA)
    grid_20, tiles_20 = tiles_of(MemorySlide(half, 0.5))
    assert 3 < len(grid_20) < len(grid_20.candidates())
    for downsamples, plan in (((1.0,), (0, 512)), ((1.0, 2.0, 8.0), (1, 256))):
        slide = MemorySlide(image, 0.25, downsamples)
        grid_40, tiles_40 = tiles_of(slide)
        assert (grid_40.level, grid_40.read_px) == plan
        assert slide.reads == [((plan[1], plan[1]), plan[0])]
        assert grid_40.tile_px_level0 == 2 * grid_20.tile_px_level0 == 512
        np.testing.assert_array_equal(grid_40.coords, 2 * grid_20.coords)
        np.testing.assert_array_equal(grid_40.cells, grid_20.cells)
        np.testing.assert_allclose(grid_40.foreground, grid_20.foreground, atol=0.01)
        difference = np.abs(tiles_40.astype(int) - tiles_20.astype(int))
        assert difference.max() <= 1  # one rounding


def test_resampling_averages_areas_and_keeps_position() -> None:
    """Each channel a ramp along an axis, so a tile's mean tells where it came from."""
    y, x = np.mgrid[:2100, :2100]
    image = np.stack([x / 10, y / 10, np.full_like(x, 7)], axis=-1).astype(np.uint8)
    slide = MemorySlide(image, 0.2527)
    grid = tile_slide(slide, all_tissue(slide.dimensions))
    assert grid.read_px == 507
    assert len(grid) == 16
    for (left, top), tile in zip(grid.coords, read_tiles(slide, grid), strict=True):
        assert tile.shape == (256, 256, 3)
        assert tile.dtype == np.uint8
        expected = image[top : top + 507, left : left + 507].mean(axis=(0, 1))
        np.testing.assert_allclose(tile.mean(axis=(0, 1)), expected, atol=0.6)
        assert tile[0, 0, 0] == pytest.approx(left / 10, abs=1.1)
        assert tile[-1, -1, 0] == pytest.approx((left + 506) / 10, abs=1.1)


def test_slightly_coarse_slide_is_enlarged_to_the_tile_size() -> None:
    slide = MemorySlide(drawn_tissue(600), 0.52)
    grid = tile_slide(slide, all_tissue(slide.dimensions))
    assert grid.read_px == 246
    assert {tile.shape for tile in read_tiles(slide, grid)} == {(256, 256, 3)}


def test_leaving_early_closes_the_slides_iterator() -> None:
    slide = MemorySlide(drawn_tissue(1024), 0.5)
    grid = tile_slide(slide, all_tissue(slide.dimensions))
    tiles = read_tiles(slide, grid)
    next(tiles)
    assert slide.closed == 0
    tiles.close()
    assert slide.closed == 1
    assert len(list(read_tiles(slide, grid))) == 16
    assert slide.closed == 2


def test_lost_tiles_are_an_error() -> None:
    slide = MemorySlide(drawn_tissue(1024), 0.5, name="torn.svs")
    grid = tile_slide(slide, all_tissue(slide.dimensions))
    slide.lost = 3
    with pytest.raises(SlideError, match=r"the 16 tiles asked for, got 13 from torn\.svs"):
        list(read_tiles(slide, grid))


def test_grid_of_another_slide_is_refused_and_empty_reads_nothing() -> None:
    slide = MemorySlide(drawn_tissue(600), 0.5)
    other = tile_slide(Sizes((700, 600), 0.5), all_tissue((700, 600)))
    with pytest.raises(InputError, match=r"m\.svs is 600 x 600 px, got a grid for 700 x 600 px"):
        list(read_tiles(slide, other))
    none = tile_slide(slide, all_tissue(slide.dimensions), tile_px=601)
    assert none.status == "empty"
    assert list(read_tiles(slide, none)) == []
    assert slide.reads == []


def test_20x_and_40x_files(tmp_path: Path) -> None:
    """As above through files and a real reader, 40x without a level at 0.5 mpp."""
    image = drawn_tissue(2048)
    half = cv2.resize(image, (1024, 1024), interpolation=cv2.INTER_AREA)
    tiles, coords = [], []
    for name, pixels, mpp in (("20x.tif", half, 0.5), ("40x.tif", image, 0.25)):
        write_pyramid(tmp_path / name, pixels, mpp=mpp, levels=1, tile_px=256)
        with open_slide(tmp_path / name) as slide:
            tissue = find_tissue(slide, max_side=512)
            grid = tile_slide(slide, tissue, tile_px=128, min_foreground=0.5)
            tiles.append(np.stack(list(read_tiles(slide, grid))).astype(int))
            coords.append(grid.coords)
    assert 3 < len(coords[0]) < 64
    np.testing.assert_array_equal(coords[1], 2 * coords[0])
    assert np.abs(tiles[0] - tiles[1]).max() <= 1


@pytest.mark.shared
def test_shared_slide(shared_dir: Path) -> None:
    path = shared_dir / "data/slides/CMU-1-Small-Region.svs"
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
        grid = tile_slide(slide, tissue, min_foreground=0.5)
        strict = tile_slide(slide, tissue, min_foreground=0.95)
        assert (grid.level, grid.read_px, grid.tile_px_level0) == (0, 256, 257)
        assert grid.shape == (11, 8)
        assert 0 < len(strict) < len(grid) < 88
        kept = {tuple(c) for c in grid.coords.tolist()}
        assert {tuple(c) for c in strict.coords.tolist()} < kept
        tiles = list(read_tiles(slide, grid))
        for i in (0, len(tiles) // 2, len(tiles) - 1):
            location = (int(grid.coords[i, 0]), int(grid.coords[i, 1]))
            np.testing.assert_array_equal(tiles[i], slide.read_region(location, (256, 256), 0))
        with pytest.raises(SlideError, match=r"CMU-1-Small-Region\.svs with 0\.499"):
            tile_slide(slide, tissue, mpp=0.25)
    with open_slide(path, base_mpp=0.25) as finer:
        assert tile_slide(finer, find_tissue(finer)).tile_px_level0 == 512
