"""Plans of reads: every tile once, every pixel once, no file tile that nothing needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modaltune.engine.decode_plan import (
    BOX_PX,
    GROUP_PX,
    BoxPlan,
    group_limit,
    group_tiles,
    plan_boxes,
    plan_file_tiles,
    rectangles,
)
from modaltune.engine.errors import InputError
from modaltune.engine.tiling import TileGrid, tile_slide
from modaltune.testing_slides import Sizes, all_tissue

Int64 = npt.NDArray[np.int64]


def grid_of(columns: int, rows: int, *, tile_px: int = 256, overlap_px: int = 0) -> TileGrid:
    """A grid that is tissue all over."""
    step = tile_px - overlap_px
    size = columns * step + overlap_px, rows * step + overlap_px
    slide = Sizes(size, 0.5)
    return tile_slide(
        slide,  # type: ignore[arg-type]
        all_tissue(size, 16.0),
        tile_px=tile_px,
        overlap_px=overlap_px,
    )


def kept(grid: TileGrid, keep: npt.NDArray[np.bool_]) -> TileGrid:
    """The grid with some of its tiles."""
    return TileGrid(
        **{**vars(grid), "coords": grid.coords[keep], "foreground": grid.foreground[keep]}
    )


def painted(plan: BoxPlan, corners: Int64, side: int, size: tuple[int, int]) -> list[Int64]:
    """How often each pixel of each tile's square comes from a piece: n arrays [side, side]."""
    counts = np.zeros((len(corners), side, side), dtype=np.int64)
    for box, tile, x0, y0, x1, y1 in plan.pieces.tolist():
        left, top, right, bottom = plan.boxes[box].tolist()
        assert left <= x0 < x1 <= right
        assert top <= y0 < y1 <= bottom
        assert right <= size[0]
        assert bottom <= size[1]
        cx, cy = corners[tile].tolist()
        counts[tile, y0 - cy : y1 - cy, x0 - cx : x1 - cx] += 1
    return list(counts)


def touched(corners: Int64, side: int, size: tuple[int, int], tile: tuple[int, int]) -> int:
    """Area in px of the file tiles under the squares, by walking over all of them."""
    total = 0
    for top in range(0, size[1], tile[1]):
        for left in range(0, size[0], tile[0]):
            right, bottom = min(left + tile[0], size[0]), min(top + tile[1], size[1])
            for x, y in corners.tolist():
                if max(x, left) < min(x + side, right) and max(y, top) < min(y + side, bottom):
                    total += (right - left) * (bottom - top)
                    break
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-30, 300), st.integers(-30, 260)), min_size=1, max_size=12),
    st.integers(1, 70),
    st.tuples(st.integers(60, 300), st.integers(60, 260)),
    st.sampled_from([(16, 16), (32, 16), (64, 64), (48, 80), None]),
    st.booleans(),
)
def test_each_pixel_comes_once_and_no_file_tile_in_vain(
    places: list[tuple[int, int]],
    side: int,
    size: tuple[int, int],
    file_tile: tuple[int, int] | None,
    is_single: bool,
) -> None:
    corners = np.array(places, dtype=np.int64)
    if is_single and file_tile is not None:
        plan = plan_file_tiles(corners, side, size, file_tile)
        assert (plan.boxes[:, 2:] - plan.boxes[:, :2] <= file_tile).all()
    else:
        plan = plan_boxes(corners, side, size, file_tile)
    assert (np.diff(plan.pieces[:, 0]) >= 0).all()
    for (x, y), counts in zip(places, painted(plan, corners, side, size), strict=True):
        inside = np.zeros((side, side), dtype=np.int64)
        inside[max(0, -y) : max(0, size[1] - y), max(0, -x) : max(0, size[0] - x)] = 1
        np.testing.assert_array_equal(counts, inside)
    for index, (x, y) in enumerate(places):
        is_whole = 0 <= x <= size[0] - side and 0 <= y <= size[1] - side
        assert bool(plan.is_whole[index]) == is_whole
    if file_tile is not None:
        assert plan.read_px == touched(corners, side, size, file_tile)
        assert not (plan.boxes[:, :2] % file_tile).any()
        assert (plan.boxes[:, 2:] - plan.boxes[:, :2] <= np.maximum(BOX_PX, file_tile)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_each_tile_is_in_one_group(columns: int, rows: int, most: int, seed: int) -> None:
    whole = grid_of(columns, rows, tile_px=16)
    rng = np.random.default_rng(seed)
    grid = kept(whole, rng.random(len(whole)) < rng.random())
    groups = group_tiles(grid, most)
    assert all(1 <= len(group) <= most for group in groups)
    found = np.concatenate(groups) if groups else np.empty(0, np.int64)
    np.testing.assert_array_equal(np.sort(found), np.arange(len(grid)))


def test_full_tissue_comes_in_squares_on_the_grid() -> None:
    grid = grid_of(24, 16)
    groups = group_tiles(grid, 64)
    assert [len(group) for group in groups] == [64] * 6
    for group in groups:
        cells = grid.cells[group]
        assert (np.ptp(cells, axis=0) == 7).all()
        plan = plan_boxes(grid.coords[group], 256, grid.dimensions, (256, 256))
        assert plan.read_px == 64 * 256**2
        assert len(plan.boxes) == 4
        assert len(plan.pieces) == 64


def test_off_the_grid_each_group_reads_one_more_row_and_column() -> None:
    coords = grid_of(8, 8).coords + 100
    plan = plan_boxes(coords, 256, (4096, 4096), (256, 256))
    assert plan.read_px == 81 * 256**2


def test_sparse_tissue_reads_only_what_it_needs() -> None:
    """A diagonal of tiles: blocks around it would be mostly glass."""
    grid = grid_of(64, 64)
    diagonal = kept(grid, grid.cells[:, 0] == grid.cells[:, 1])
    groups = group_tiles(diagonal, 64)
    assert len(groups) == 1
    plan = plan_boxes(diagonal.coords[groups[0]], 256, grid.dimensions, (256, 256))
    assert plan.read_px == 64 * 256**2


def test_without_file_tiles_each_square_is_read_by_itself() -> None:
    coords = np.array([[0, 0], [90, 10], [200, 200]], dtype=np.int64)
    plan = plan_boxes(coords, 50, (100, 100), None)
    np.testing.assert_array_equal(plan.boxes, [[0, 0, 50, 50], [90, 10, 100, 60]])
    np.testing.assert_array_equal(plan.pieces[:, 1], [0, 1])
    np.testing.assert_array_equal(plan.is_whole, [True, False, False])


def test_tiles_beyond_the_level_need_no_read() -> None:
    plan = plan_boxes(np.array([[500, 500]]), 50, (100, 100), (16, 16))
    assert len(plan.boxes) == len(plan.pieces) == 0


def test_large_squares_make_small_groups() -> None:
    assert group_limit(256, 64) == 64
    assert group_limit(4096, 64) == GROUP_PX // 4096**2 == 4
    assert group_limit(100_000, 64) == 1


def test_overlapping_tiles_share_reads() -> None:
    grid = grid_of(8, 8, overlap_px=128)
    plan = plan_boxes(grid.coords, 256, grid.dimensions, (256, 256))
    assert plan.read_px == grid.dimensions[0] * grid.dimensions[1]


def test_tiles_that_coincide_still_fit_their_groups() -> None:
    grid = grid_of(2, 2)
    doubled = TileGrid(
        **{
            **vars(grid),
            "coords": np.tile(grid.coords, (20, 1)),
            "foreground": np.tile(grid.foreground, 20),
        }
    )
    groups = group_tiles(doubled, 9)
    assert max(len(group) for group in groups) <= 9
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(80))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**16 - 1))
def test_rectangles_cover_a_mask_once(bits: int) -> None:
    mask = np.array([bits >> i & 1 for i in range(16)], dtype=np.bool_).reshape(4, 4)
    counts = np.zeros((4, 4), dtype=np.int64)
    for left, top, right, bottom in rectangles(mask):
        counts[top:bottom, left:right] += 1
    np.testing.assert_array_equal(counts, mask)


def test_rectangles_join_rows() -> None:
    mask = np.array([[1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=np.bool_)
    assert rectangles(mask) == [(0, 0, 2, 2), (3, 0, 4, 1), (1, 2, 2, 3)]


def test_a_group_of_no_tiles_is_refused() -> None:
    with pytest.raises(InputError, match="most must be at least 1 tile, got 0"):
        group_tiles(grid_of(1, 1), 0)
