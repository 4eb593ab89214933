"""Tissue masks against independent colour formulas, and the edges of their options."""

from __future__ import annotations

import colorsys
import multiprocessing
import threading
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from modaltune.engine import tissue
from modaltune.engine.errors import InputError
from modaltune.engine.readers import open_slide
from modaltune.engine.tissue import METHODS, find_tissue, tissue_mask

WHITE = (255, 255, 255)


def lab64(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """L*a*b* [..., 3] from the CIE and IEC definitions, matrix by matrix, in float64.

    The matrix is derived here from the chromaticities of the primaries and of D65, not copied.
    """
    primaries = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]])
    white_xy = np.array([0.3127, 0.3290])

    def xyz(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.array([xy[0] / xy[1], 1.0, (1 - xy[0] - xy[1]) / xy[1]])

    columns = np.stack([xyz(p) for p in primaries], axis=1)
    matrix = columns * np.linalg.solve(columns, xyz(white_xy))
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    ratio = linear @ matrix.T / xyz(white_xy)
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack(
        [
            116 * f[..., 1] - 16,
            500 * (f[..., 0] - f[..., 1]),
            200 * (f[..., 1] - f[..., 2]),
        ],
        axis=-1,
    )


def colours(seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [300, 500, 3]: random colours, light ones, all greys."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (300, 500, 3), dtype=np.uint8)
    image[100:250] = rng.integers(200, 256, (150, 500, 3), dtype=np.uint8)
    image[250, :256] = np.arange(256, dtype=np.uint8)[:, None]
    return image


def he_field(side: int = 600) -> npt.NDArray[np.uint8]:
    """White glass with a pink disc that has a white hole, uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side]
    radius = np.hypot(x - side / 2, y - side / 2)
    image = np.full((side, side, 3), 245, dtype=np.uint8)
    image[(radius < side / 3) & (radius > side / 12)] = (205, 140, 190)
    return image


class ThumbnailSlide:
    """A slide as `find_tissue` sees one: an image held in memory."""

    def __init__(self, image: npt.NDArray[np.uint8]) -> None:
        self.image = image
        self.path = Path("memory.svs")
        self.dimensions = (image.shape[1], image.shape[0])
        self.asked: list[int] = []

    def thumbnail(self, max_side: int) -> tuple[npt.NDArray[np.uint8], float]:
        self.asked.append(max_side)
        scale = max(self.dimensions) / max_side
        size = tuple(max(1, round(side / scale)) for side in self.dimensions)
        return cv2.resize(self.image, size, interpolation=cv2.INTER_AREA), scale


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.35])
@pytest.mark.parametrize("background", [WHITE, (238, 240, 236)])
def test_lab_distance_equals_float64_definition(
    threshold: float, background: tuple[int, int, int]
) -> None:
    image = colours()
    reference = lab64(np.array(background, dtype=np.uint8))
    distance = np.linalg.norm(lab64(image) - reference, axis=-1) / 100
    mask = tissue_mask(image, threshold=threshold, closing_px=0, background=background)
    # Published sRGB matrices are rounded to 7 digits, which moves a distance by less than 1e-4.
    decided = np.abs(distance - threshold) > 1e-4
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(mask[decided], distance[decided] > threshold)
    assert mask.any()
    assert not mask.all()


def test_lab_agrees_with_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    image = colours(1)
    distance = np.linalg.norm(color.rgb2lab(image) - [100.0, 0.0, 0.0], axis=-1) / 100
    decided = np.abs(distance - 0.1) > 1e-3
    mask = tissue_mask(image, closing_px=0)
    np.testing.assert_array_equal(mask[decided], distance[decided] > 0.1)


def test_lab_lightness_threshold_on_greys() -> None:
    """On greys the distance is (100 - L*) / 100 alone: L* < 90 is tissue."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    mask = tissue_mask(greys, closing_px=0)[0]
    linear = ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
    lightness = 116 * np.cbrt(linear) - 16
    np.testing.assert_array_equal(mask[20:], lightness[20:] < 90)
    assert mask[:20].all()


def test_lab_mean_is_relative_to_the_mean() -> None:
    image = colours(2)
    a = lab64(image)[..., 1]
    limit = 1.1 * a.mean()
    mask = tissue_mask(image, "lab-mean", closing_px=0)
    decided = np.abs(a - limit) > 0.02
    np.testing.assert_array_equal(mask[decided], a[decided] > limit)


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_pure_grey_has_no_colour(grey: int) -> None:
    image = np.full((40, 60, 3), grey, dtype=np.uint8)
    for method in ("lab-mean", "hsv", "otsu"):
        assert not tissue_mask(image, method).any()


def test_hsv_equals_colorsys() -> None:
    image = colours(3)[::6, ::10]
    expected = np.array(
        [
            [s > 0.301 and v > 0.2 for _, s, v in (colorsys.rgb_to_hsv(*(p / 255)) for p in row)]
            for row in image
        ]
    )
    mask = tissue_mask(image, "hsv", threshold=0.301, closing_px=0)
    np.testing.assert_array_equal(mask, expected)
    assert 0.1 < mask.mean() < 0.9


def test_otsu_splits_saturation() -> None:
    image = he_field()
    mask = tissue_mask(image, "otsu", closing_px=0)
    expected = (image != 245).any(axis=-1)
    # The median filter rounds corners: only pixels on the boundary may differ.
    inner = ndimage.binary_erosion(expected, iterations=4)
    outer = ndimage.binary_dilation(expected, iterations=4)
    assert mask[inner].all()
    assert not mask[~outer].any()


def test_otsu_leaves_a_noisy_blank_slide_blank() -> None:
    noise = np.random.default_rng(0).integers(238, 248, (400, 400, 3), dtype=np.uint8)
    assert tissue_mask(noise, "otsu").mean() == 0.0
    assert tissue_mask(noise, "lab").mean() == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_disc_and_keeps_its_hole(method: tissue.Method) -> None:
    image = he_field()
    truth = (image != 245).any(axis=-1)
    mask = tissue_mask(image, method)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.98
    assert not mask[300, 300]
    filled = tissue_mask(image, method, fill_holes=True)
    np.testing.assert_array_equal(filled, ndimage.binary_fill_holes(filled))
    assert filled[300, 300]
    assert not filled[0, 0]


def test_holes_are_filled_before_closing() -> None:
    image = np.full((80, 80, 3), 255, dtype=np.uint8)
    image[20:60, 20:60] = (180, 60, 140)
    image[30:50, 30:50] = 255
    image[25, 0:20] = (180, 60, 140)
    raw = tissue_mask(image, closing_px=0)
    expected = ndimage.binary_fill_holes(raw)
    np.testing.assert_array_equal(tissue_mask(image, closing_px=0, fill_holes=True), expected)


@pytest.mark.parametrize("kernel", [3, 9, 15])
def test_closing_equals_brute_force(kernel: int) -> None:
    raw = np.random.default_rng(kernel).random((70, 90)) < 0.03
    image = np.where(raw[..., None], 90, 255).astype(np.uint8).repeat(3, axis=2)
    half = kernel // 2
    # Outside the image counts as background while growing and as tissue while shrinking.
    grown = np.zeros_like(raw)
    closed = np.ones_like(raw)
    padded = np.pad(raw, half)
    for dy in range(kernel):
        for dx in range(kernel):
            grown |= padded[dy : dy + 70, dx : dx + 90]
    padded = np.pad(grown, half, constant_values=True)
    for dy in range(kernel):
        for dx in range(kernel):
            closed &= padded[dy : dy + 70, dx : dx + 90]
    np.testing.assert_array_equal(tissue_mask(image, closing_px=kernel), closed)
    assert closed.sum() > raw.sum()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 20),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_layout_gives_the_same_mask(
    height: int, width: int, method: tissue.Method, seed: int
) -> None:
    """Bands, strides and read-only memory change nothing; the mask is bool [h, w]."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = tissue_mask(image, method, closing_px=0)
    assert mask.dtype == np.bool_
    assert mask.shape == (height, width)
    strided = np.repeat(image, 2, axis=1)[:, ::2]
    frozen = image.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(tissue_mask(strided, method, closing_px=0), mask)
    np.testing.assert_array_equal(tissue_mask(frozen, method, closing_px=0), mask)


def test_image_is_left_as_it_was() -> None:
    image = colours(4)
    before = image.copy()
    for method in METHODS:
        tissue_mask(image, method, fill_holes=True)
    np.testing.assert_array_equal(image, before)


def test_empty_image_gives_empty_mask() -> None:
    assert tissue_mask(np.zeros((0, 5, 3), dtype=np.uint8)).shape == (0, 5)


def _mask_in_child(queue: multiprocessing.SimpleQueue[int]) -> None:
    queue.put(int(tissue_mask(he_field()).sum()))


def test_safe_in_threads_and_after_fork() -> None:
    """Two threads at once, then a forked child: what numba's own thread pools die of."""
    expected = int(tissue_mask(he_field()).sum())
    sums: list[int] = []
    threads = [
        threading.Thread(target=lambda: sums.append(int(tissue_mask(he_field()).sum())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [expected] * 4
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_mask_in_child, args=(queue,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == expected


def test_compiles_where_no_cache_can_be_kept() -> None:
    """Code without a file has no place for numba's cache; compiling goes on without one."""
    scope: dict[str, object] = {}
    exec("def double(x):\n    return 2 * x\n", scope)
    double = tissue.compiled(scope["double"])  # type: ignore[arg-type]
    assert double(21) == 42  # type: ignore[call-arg]


def test_find_tissue_scales_and_never_enlarges() -> None:
    large = ThumbnailSlide(he_field(3000))
    found = find_tissue(large, max_side=1200)
    assert found.mask.shape == found.thumbnail.shape[:2] == (1200, 1200)
    assert found.downsample == 2.5
    assert found.method == "lab"
    truth = np.pi * (1 / 9 - 1 / 144)
    assert found.share == pytest.approx(truth, abs=0.01)

    small = ThumbnailSlide(he_field(300))
    found = find_tissue(small)
    assert small.asked == [300]
    assert found.downsample == 1.0
    np.testing.assert_array_equal(found.thumbnail, small.image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rgb"}, "method must be one of lab, lab-mean, hsv, otsu, got 'rgb'"),
        ({"threshold": 1.5}, r"threshold must be in 0\.\.1, got 1\.5; the default for lab is 0\.1"),
        ({"threshold": float("nan")}, r"threshold must be in 0\.\.1, got nan"),
        ({"method": "otsu", "threshold": 0.1}, "threshold must be None with method otsu"),
        ({"closing_px": 4}, "closing_px must be 0 or a positive odd number, got 4"),
        ({"closing_px": -3}, "closing_px must be 0 or a positive odd number, got -3"),
        ({"background": (255, 255)}, "background must be three whole numbers"),
        ({"background": (255, 255, 256)}, "background must be three whole numbers"),
        ({"max_side": 10}, r"max_side must be a whole number of px in 64\.\.16384, got 10"),
        ({"max_side": 1000.0}, "max_side must be a whole number"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], message: str) -> None:
    slide = ThumbnailSlide(he_field(100))
    with pytest.raises(InputError, match=message):
        find_tissue(slide, **options)
    assert slide.asked == []


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
)
def test_other_images_are_refused(image: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match=r"rgb must be uint8 \[h, w, 3\], got"):
        tissue_mask(image)


@pytest.mark.shared
def test_shared_slide(shared_dir: Path) -> None:
    with open_slide(shared_dir / "data/slides/CMU-1-Small-Region.svs") as slide:
        found = find_tissue(slide)
        assert max(found.mask.shape) == 2048
        assert found.downsample == pytest.approx(max(slide.dimensions) / 2048, rel=1e-6)
    assert 0.3 < found.share < 0.95
    # Where there is tissue it is darker and more coloured than the glass.
    lab = lab64(found.thumbnail)
    assert lab[found.mask][:, 0].mean() < 80 < 90 < lab[~found.mask][:, 0].mean()
