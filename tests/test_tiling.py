"""Tile geometry: positions, shares and levels, against brute force and known answers."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modaltune.engine.errors import InputError, SlideError
from modaltune.engine.tiling import plan_read, tile_slide
from modaltune.engine.tissue import TissueMask
from modaltune.testing_slides import Sizes, all_tissue

Uint8 = npt.NDArray[np.uint8]


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    base=st.floats(0.05, 1.0),
    ratio=st.floats(1.0, 8.0),
    tile_px=st.integers(64, 512),
    overlap=st.floats(0.0, 0.9),
)
def test_positions_are_inside_sorted_and_without_drift(
    width: int, height: int, base: float, ratio: float, tile_px: int, overlap: float
) -> None:
    mpp, overlap_px = base * ratio, int(tile_px * overlap)
    slide = Sizes((width, height), base)
    grid = tile_slide(
        slide, all_tissue((width, height)), tile_px=tile_px, mpp=mpp, overlap_px=overlap_px
    )
    assert grid.coords.dtype == np.int64
    assert grid.coords.shape == (grid.shape[0] * grid.shape[1], 2)
    assert grid.tile_px_level0 == round(tile_px * mpp / base)
    np.testing.assert_array_equal(grid.coords, grid.candidates())
    if not len(grid):
        assert min(width, height) < grid.tile_px_level0
        assert grid.reason.startswith("the slide (")
        return
    x, y = grid.coords.T
    assert x.min() == y.min() == 0
    assert x.max() + grid.tile_px_level0 <= width
    assert y.max() + grid.tile_px_level0 <= height
    # Row by row, from left to right, none twice.
    order = y * (width + 1) + x
    assert (np.diff(order) > 0).all()
    # Exact rational positions: the error is a rounding, at any k.
    pitch = Fraction(tile_px - overlap_px) * Fraction(mpp) / Fraction(base)
    for axis, side in ((np.unique(x), width), (np.unique(y), height)):
        for k in {0, 1, len(axis) // 2, len(axis) - 1} & set(range(len(axis))):
            assert abs(int(axis[k]) - k * pitch) <= Fraction(1, 2) + Fraction(1, 10**6)
        # Nothing that would have fitted is missing.
        following = len(axis) * pitch
        assert following + grid.tile_px_level0 > side - 1
    np.testing.assert_array_equal(
        grid.cells,
        np.stack(
            [np.unique(x, return_inverse=True)[1], np.unique(y, return_inverse=True)[1]], axis=1
        ),
    )


@pytest.mark.parametrize("base", [0.2527, 0.499, 0.25, 0.1213])
def test_neighbours_do_not_overlap(base: float) -> None:
    """Footprints touch; where the pitch is fractional they share at most one level-0 pixel."""
    dimensions = (90_001, 70_003)
    grid = tile_slide(Sizes(dimensions, base), all_tissue(dimensions), min_foreground=0.0)
    for axis in (np.unique(grid.coords[:, 0]), np.unique(grid.coords[:, 1])):
        gaps = np.diff(axis) - grid.tile_px_level0
        assert gaps.min() >= -1
        assert gaps.max() <= 1
        assert abs(gaps.mean() - (grid.pitch_level0 - grid.tile_px_level0)) < 1e-2
    exact = (256 * 0.5 / base) == grid.tile_px_level0
    assert (gaps == 0).all() == exact


def test_position_of_a_far_tile_at_a_fractional_mpp() -> None:
    """Adding up a rounded step of 507 would put tile 150 at 76,050."""
    slide = Sizes((100_000, 2000), 0.2527)
    grid = tile_slide(slide, all_tissue(slide.dimensions))
    assert grid.tile_px_level0 == 507
    assert grid.coords[150].tolist() == [75_979, 0]  # 150 * 256 * 0.5 / 0.2527 = 75,979.42
    assert grid.cells[150].tolist() == [150, 0]


def test_border_strip_is_left_out() -> None:
    for side, count in ((511, 1), (512, 2), (513, 2), (767, 2), (768, 3)):
        slide = Sizes((side, 256), 0.5)
        assert len(tile_slide(slide, all_tissue((side, 256)))) == count


def test_overlap_keeps_the_footprint_and_shortens_the_pitch() -> None:
    slide = Sizes((1024, 512), 0.25)
    grid = tile_slide(slide, all_tissue(slide.dimensions), tile_px=128, overlap_px=32)
    assert grid.tile_px_level0 == 256
    assert grid.shape == (2, 5)
    assert grid.coords[:5, 0].tolist() == [0, 192, 384, 576, 768]


@pytest.mark.parametrize(
    ("base", "downsamples", "mpp", "expected"),
    [
        (0.499, (1.0,), 0.5, (0, 256)),  # within 1 %: read as it is
        (0.5039, (1.0, 4.0), 0.5, (0, 256)),
        (0.25, (1.0, 4.0, 16.0), 0.5, (0, 512)),  # no level at 0.5
        (0.25, (1.0, 2.0, 4.0), 0.5, (1, 256)),
        (0.2527, (1.0, 4.0003), 0.5, (0, 507)),
        (0.2527, (1.0, 1.98), 0.5, (1, 256)),  # 0.50035
        (0.25, (1.0, 4.0, 16.0), 1.0, (1, 256)),
        (0.25, (1.0, 4.0, 16.0), 2.0, (1, 512)),
        (0.25, (1.0, 4.0, 16.0), 4.1, (2, 262)),
        (0.52, (1.0,), 0.5, (0, 246)),  # 4 % too coarse: enlarged with a warning
    ],
)
def test_level_is_the_coarsest_that_is_fine_enough(
    base: float, downsamples: tuple[float, ...], mpp: float, expected: tuple[int, int]
) -> None:
    slide = Sizes((20_000, 20_000), base, downsamples)
    assert plan_read(slide, tile_px=256, mpp=mpp) == expected


def test_enlarging_is_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan_read(Sizes((999, 999), 0.52, name="coarse.svs"), tile_px=256, mpp=0.5)
    assert "coarse.svs: tiles are enlarged by 4.0 %" in caplog.text


def test_too_coarse_a_slide_is_an_error() -> None:
    slide = Sizes((4000, 4000), 0.5, name="coarse.svs")
    expected = (
        r"--mpp must not be finer than the slide, got 0\.25 for coarse\.svs with 0\.5 microns per "
        r"pixel; pass --mpp 0\.5 or coarser"
    )
    with pytest.raises(SlideError, match=expected):
        tile_slide(slide, all_tissue(slide.dimensions), mpp=0.25)


@pytest.mark.parametrize("base", [0.5, 0.2527])
def test_foreground_equals_the_mask_painted_at_level_0(base: float) -> None:
    """A mask of 13.7 px cells against the share counted on the mask blown up 20-fold."""
    rng = np.random.default_rng(1)
    dimensions = (1644, 1233)
    mask = cv2.resize(rng.random((6, 8)).astype(np.float32), (120, 90)) > 0.5
    tissue = TissueMask(mask, 13.7, np.zeros((90, 120, 3), np.uint8), "lab")
    grid = tile_slide(
        Sizes(dimensions, base), tissue, tile_px=100, mpp=base * 1.07, min_foreground=0.3
    )
    fine = 4  # samples per level-0 px
    columns = ((np.arange(dimensions[0] * fine) + 0.5) / fine / 13.7).astype(int)
    rows = ((np.arange(dimensions[1] * fine) + 0.5) / fine / 13.7).astype(int)
    painted = mask[rows][:, columns]
    side = grid.tile_px_level0 * fine
    expected = np.array([painted[y : y + side, x : x + side].mean() for x, y in grid.coords * fine])
    assert 0 < len(grid) < len(grid.candidates())
    assert grid.foreground.dtype == np.float32
    np.testing.assert_allclose(grid.foreground, expected, atol=4e-3)


def test_min_foreground_keeps_from_the_threshold_on() -> None:
    mask = np.zeros((20, 40), dtype=np.bool_)
    mask[:19, :20] = True  # left tile: exactly 0.95
    mask[:18, 20:] = True  # right tile: 0.90
    tissue = TissueMask(mask, 12.8, np.zeros((20, 40, 3), np.uint8), "lab")
    slide = Sizes((512, 256), 0.5)
    assert tile_slide(slide, tissue).coords.tolist() == [[0, 0]]
    both = tile_slide(slide, tissue, min_foreground=0.9)
    assert both.coords.tolist() == [[0, 0], [256, 0]]
    np.testing.assert_allclose(both.foreground, [0.95, 0.9], atol=1e-6)
    assert tile_slide(slide, tissue, min_foreground=0.96).status == "empty"


def test_mask_with_rounded_sides_still_spans_the_slide() -> None:
    """1001 / 300 rounds to 3 mask rows: the last pixel row covers the slide's last third."""
    mask = np.zeros((3, 3), dtype=np.bool_)
    mask[2, 2] = True
    tissue = TissueMask(mask, 300.0, np.zeros((3, 3, 3), np.uint8), "lab")
    grid = tile_slide(Sizes((1001, 1001), 0.5), tissue, tile_px=143, min_foreground=0.5)
    assert grid.coords.min() >= 1001 * 2 / 3 - 143 / 2
    assert grid.foreground.max() == 1.0


def test_empty_has_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    slide = Sizes((2000, 1000), 0.5, name="bare.svs")
    bare = all_tissue(slide.dimensions)
    bare.mask[:] = False
    with caplog.at_level(logging.WARNING):
        grid = tile_slide(slide, bare)
    assert (grid.status, len(grid), grid.coords.shape) == ("empty", 0, (0, 2))
    assert grid.coords.dtype == np.int64
    assert grid.reason == "no tissue found (method lab, mask of 31 x 16 px)"
    assert "bare.svs: no tiles: no tissue found" in caplog.text

    sparse = all_tissue(slide.dimensions)
    sparse.mask[:, ::2] = False
    # A footprint is 3.968 mask px wide; at best it sees 1.968 columns of tissue: 49.597 %.
    assert tile_slide(slide, sparse).reason == (
        "no tile has >= 95 % tissue (the best of 21 has 49.5 %)"
    )
    small = tile_slide(Sizes((1000, 200), 0.5), all_tissue((1000, 200)))
    assert small.reason == (
        "the slide (1000 x 200 px) is smaller than one tile (256 x 256 px at level 0)"
    )


def test_small_share_of_tissue_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    slide = Sizes((12_800, 12_800), 0.5, name="speck.svs")
    tissue = all_tissue(slide.dimensions)
    tissue.mask[:] = False
    tissue.mask[:4, :4] = True
    with caplog.at_level(logging.WARNING):
        grid = tile_slide(slide, tissue)
    assert len(grid) == 1
    assert grid.status == "ok"
    assert grid.reason == ""
    assert "speck.svs: only 0.04 % of the slide is tissue" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_px": 0}, "tile_px must be at least 1, got 0"),
        ({"tile_px": 256.0}, "tile_px must be a whole number of px, got 256.0"),
        ({"overlap_px": 256}, r"overlap_px must be at least 0 and less than tile_px \(256\)"),
        ({"overlap_px": -1}, "overlap_px must be at least 0"),
        ({"mpp": 0.0}, "mpp must be a finite number > 0, got 0.0"),
        ({"mpp": math.nan}, "mpp must be a finite number > 0, got nan"),
        ({"mpp": math.inf}, "mpp must be a finite number > 0, got inf"),
        ({"min_foreground": 95}, r"min_foreground must be in 0\.\.1, got 95"),
        ({"min_foreground": math.nan}, r"min_foreground must be in 0\.\.1, got nan"),
        ({"tile_px": 1}, "tile_px must give at most 20,000,000 grid positions, got 1"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, float], message: str) -> None:
    slide = Sizes((50_000, 50_000), 0.5)
    with pytest.raises(InputError, match=message):
        tile_slide(slide, all_tissue(slide.dimensions), **options)


def test_mask_of_another_slide_is_refused() -> None:
    with pytest.raises(InputError, match=r"tissue must span sizes\.svs \(2000 x 1000 px\)"):
        tile_slide(Sizes((2000, 1000), 0.5), all_tissue((1000, 2000)))
