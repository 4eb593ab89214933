"""Where the tissue is: a boolean mask on a thumbnail of the slide.

Four rules, each one pass over uint8 pixels compiled by numba with no float image in memory:

* ``lab``: tissue where the CIE 1976 L*a*b* colour (sRGB, D65) lies further than `threshold` from
  the background colour, white unless given. The distance is Euclidean and divided by 100, the span
  of L*: black is 1.0 from white, and the published threshold 0.1 is a colour difference of 10.
* ``lab-mean``: tissue where a* exceeds (1 + threshold) x the mean a* of the image. This is the rule
  of the mask library behind the published tile sets. It is relative: a blank slide yields noise.
* ``hsv``: tissue where saturation > `threshold` and value > 0.2. Pure grey of any brightness, black
  scanner borders and dark pen are left out.
* ``otsu``: Otsu's threshold on the saturation after a 7 x 7 median, never below 0.05 so that a
  blank slide stays blank. It splits a slide that is all tissue in two.

Then, for every rule, a morphological closing with a square kernel (9 x 9 mask pixels). Holes are
kept as holes unless `fill_holes`.

Source: METHOD 4.11 (threshold 0.1, kernel 9, mask side > 1000 px); IEC 61966-2-1 (sRGB); CIE 15
(L*a*b*); Otsu 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, get_args

import cv2
import numba
import numpy as np
import numpy.typing as npt

from modaltune.engine.errors import InputError

if TYPE_CHECKING:
    from modaltune.engine.readers import SlideReader

P = ParamSpec("P")
R = TypeVar("R")
Bool = npt.NDArray[np.bool_]
Uint8 = npt.NDArray[np.uint8]
Method = Literal["lab", "lab-mean", "hsv", "otsu"]

METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_MAX_SIDE = 2048
_MAX_SIDES = (64, 16384)
_DEFAULT_THRESHOLDS: dict[Method, float] = {"lab": 0.1, "lab-mean": 0.1, "hsv": 0.05}
_WHITE = (255, 255, 255)
_HSV_MIN_VALUE = 0.2
_OTSU_MEDIAN_PX = 7
_OTSU_FLOOR = 13  # of 255, saturation 0.05: scanner noise on bare glass stays below it
_ROWS_PER_BAND = 128


@dataclass(frozen=True)
class TissueMask:
    """A tissue mask with the thumbnail it was found on.

    Attributes:
        mask: bool [h, w], True is tissue; it spans the whole slide.
        downsample: Level-0 pixels per mask pixel, > 0.
        thumbnail: uint8 [h, w, 3], RGB 0..255.
        method: Rule that made the mask.
    """

    mask: Bool
    downsample: float
    thumbnail: Uint8
    method: str

    @property
    def share(self) -> float:
        """Share of the slide's area that is tissue, 0..1."""
        return float(np.count_nonzero(self.mask) / self.mask.size) if self.mask.size else 0.0


def find_tissue(
    slide: SlideReader,
    method: Method = "lab",
    *,
    max_side: int = DEFAULT_MAX_SIDE,
    threshold: float | None = None,
    closing_px: int = 9,
    fill_holes: bool = False,
    background: tuple[int, int, int] = _WHITE,
) -> TissueMask:
    """Find the tissue of a slide on a thumbnail.

    The published recipe takes the coarsest level with a side over 1000 px, which is 1000 to 4000 px
    depending on the file's pyramid. A thumbnail of a fixed side gives the same mask whatever levels
    a file has. A slide smaller than `max_side` is used at level 0, never enlarged.

    Args:
        slide: An open slide.
        method: "lab", "lab-mean", "hsv" or "otsu" (see the module's text).
        max_side: Larger side of the thumbnail in px, 64..16384.
        threshold, closing_px, fill_holes, background: As for `tissue_mask`.

    Returns:
        The mask, with its scale to level 0.

    Raises:
        InputError: An option breaks its rule.
        SlideError: The slide can't be read.
    """
    low, high = _MAX_SIDES
    if not _is_int(max_side) or not low <= max_side <= high:
        raise InputError(
            f"max_side must be a whole number of px in {low}..{high}, got {max_side!r}; "
            f"the default is {DEFAULT_MAX_SIDE}"
        )
    _check_options(method, threshold, closing_px, background)
    thumbnail, downsample = slide.thumbnail(min(max_side, max(slide.dimensions)))
    mask = tissue_mask(
        thumbnail,
        method,
        threshold=threshold,
        closing_px=closing_px,
        fill_holes=fill_holes,
        background=background,
    )
    return TissueMask(mask=mask, downsample=downsample, thumbnail=thumbnail, method=method)


def tissue_mask(
    rgb: Uint8,
    method: Method = "lab",
    *,
    threshold: float | None = None,
    closing_px: int = 9,
    fill_holes: bool = False,
    background: tuple[int, int, int] = _WHITE,
) -> Bool:
    """Mark the tissue pixels of an RGB image.

    Args:
        rgb: uint8 [h, w, 3], sRGB 0..255.
        method: "lab", "lab-mean", "hsv" or "otsu" (see the module's text).
        threshold: "lab": distance / 100, 0..1 (default 0.1). "lab-mean": excess over the mean,
            0..1 (0.1). "hsv": saturation, 0..1 (0.05). "otsu" finds its own: None only.
        closing_px: Side of the square closing kernel in mask px, odd; 0 or 1 for no closing.
        fill_holes: Also mark background that tissue encloses, before closing.
        background: sRGB colour of bare glass, for "lab" only.

    Returns:
        bool [h, w], True is tissue.

    Raises:
        InputError: An argument breaks its rule.
    """
    _check_options(method, threshold, closing_px, background)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise InputError(
            f"rgb must be uint8 [h, w, 3], got {rgb.dtype} {list(rgb.shape)}; "
            "convert it to 8-bit RGB"
        )
    if rgb.size == 0:
        return np.zeros(rgb.shape[:2], dtype=np.bool_)
    image = np.ascontiguousarray(rgb)
    limit = _DEFAULT_THRESHOLDS.get(method, 0.0) if threshold is None else float(threshold)
    mask = _apply_rule(image, method, limit, background)
    if fill_holes:
        mask = _filled(mask)
    if closing_px > 1:
        kernel = np.ones((closing_px, closing_px), dtype=np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel).astype(np.uint8, copy=False)
    return mask.view(np.bool_)


def _apply_rule(
    rgb: Uint8, method: Method, limit: float, background: tuple[int, int, int]
) -> Uint8:
    """Run one rule over the pixels; uint8 [h, w] of 0 and 1."""
    out = np.empty(rgb.shape[:2], dtype=np.uint8)
    if method == "lab":
        ref = _lab(background[0], background[1], background[2], _LINEAR)
        dark = _dark_limit(ref[0], 100.0 * limit)
        known = np.zeros(2**24, dtype=np.uint8)  # memory is taken page by page, where written
        _in_bands(_lab_rows, rgb, _LINEAR, ref, (100.0 * limit) ** 2, dark, known, out)
    elif method == "lab-mean":
        sums = np.empty(rgb.shape[0], dtype=np.float64)
        _in_bands(_a_sum_rows, rgb, _LINEAR, sums)
        # fsum: the mean does not depend on how the rows were shared out.
        mean = math.fsum(sums) / out.size
        # Rounding leaves about 1e-14 of a* in pure grey, which is no colour.
        _in_bands(_a_rows, rgb, _LINEAR, max((1.0 + limit) * mean, 1e-6), out)
    elif method == "hsv":
        _in_bands(_hsv_rows, rgb, limit, 255.0 * _HSV_MIN_VALUE, out)
    else:
        _in_bands(_saturation_rows, rgb, out)
        smooth = cv2.medianBlur(out, _OTSU_MEDIAN_PX)
        split, _ = cv2.threshold(smooth, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        out = (smooth > max(split, _OTSU_FLOOR)).view(np.uint8)
    return out


def _filled(mask: Uint8) -> Uint8:
    """Mark every background pixel that has no 4-connected way to the image border."""
    outside = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(outside, None, (0, 0), 2, flags=4)
    return np.ascontiguousarray(outside[1:-1, 1:-1] != 2).view(np.uint8)


def _in_bands(rows: Callable[..., None], rgb: Uint8, *args: Any) -> None:
    """Run a compiled row loop over the image, bands of rows side by side on threads.

    Plain threads around a loop that holds no GIL, not numba's parallel=True: numba's thread pools
    end the process when they meet a fork or a second calling thread, and workers do both.
    """
    height = rgb.shape[0]
    starts = range(0, height, _ROWS_PER_BAND)
    workers = min(cv2.getNumThreads(), len(starts))  # one setting for these loops and OpenCV's
    if workers <= 1:
        rows(rgb, *args, 0, height)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(rows, rgb, *args, start, min(start + _ROWS_PER_BAND, height))
            for start in starts
        ]
        for future in futures:
            future.result()


def _is_int(value: object) -> bool:
    """Tell whether a value is a whole number (numpy's too, but no bool)."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_options(
    method: str,
    threshold: float | None,
    closing_px: int,
    background: tuple[int, int, int],
) -> None:
    """Refuse options outside their range."""
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}; use lab")
    if threshold is not None:
        if method == "otsu":
            raise InputError(
                f"threshold must be None with method otsu, got {threshold!r}; "
                "otsu finds its own, lab and hsv take one"
            )
        if not 0.0 <= threshold <= 1.0:  # false for NaN too
            raise InputError(
                f"threshold must be in 0..1, got {threshold!r}; "
                f"the default for {method} is {_DEFAULT_THRESHOLDS[method]}"
            )
    if not _is_int(closing_px) or closing_px < 0 or (closing_px > 0 and closing_px % 2 == 0):
        raise InputError(
            f"closing_px must be 0 or a positive odd number, got {closing_px!r}; the default is 9"
        )
    if len(background) != 3 or not all(_is_int(c) and 0 <= c <= 255 for c in background):
        raise InputError(
            f"background must be three whole numbers in 0..255 (sRGB), got {background!r}; "
            "white is (255, 255, 255)"
        )


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile with numba, cached on disk where any place for the cache can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # read-only install and no writable user cache
        return numba.njit(nogil=True)(function)


def _linear_table() -> npt.NDArray[np.float64]:
    """Linear light 0..1 of each 8-bit sRGB value, float64 [256] (IEC 61966-2-1)."""
    value = np.arange(256, dtype=np.float64) / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


_LINEAR = _linear_table()

# sRGB primaries to CIE XYZ (IEC 61966-2-1); the row sums are the D65 white of this matrix, so that
# white is exactly L* = 100, a* = b* = 0.
_X = (0.4124564, 0.3575761, 0.1804375)
_Y = (0.2126729, 0.7151522, 0.0721750)
_Z = (0.0193339, 0.1191920, 0.9503041)
_X_WHITE, _Y_WHITE, _Z_WHITE = sum(_X), sum(_Y), sum(_Z)
_DELTA = 6.0 / 29.0


@compiled
def _response(t: float) -> float:
    """CIE lightness response of a tristimulus ratio: a cube root with a linear foot."""
    if t > _DELTA * _DELTA * _DELTA:
        return np.cbrt(t)
    return t / (3.0 * _DELTA * _DELTA) + 4.0 / 29.0


@compiled
def _lab(
    red: int, green: int, blue: int, linear: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """L* 0..100, a*, b* of one 8-bit sRGB colour."""
    r, g, b = linear[red], linear[green], linear[blue]
    fx = _response((_X[0] * r + _X[1] * g + _X[2] * b) / _X_WHITE)
    fy = _response((_Y[0] * r + _Y[1] * g + _Y[2] * b) / _Y_WHITE)
    fz = _response((_Z[0] * r + _Z[1] * g + _Z[2] * b) / _Z_WHITE)
    return 116.0 * fy - 16.0, 500.0 * (fx - fy), 200.0 * (fy - fz)


@compiled
def _lab_rows(
    rgb: Uint8,
    linear: npt.NDArray[np.float64],
    ref: tuple[float, float, float],
    limit_squared: float,
    dark: float,
    known: Uint8,
    out: Uint8,
    start: int,
    stop: int,
) -> None:
    """Rows start..stop of `out` [h, w]: 1 where the squared Lab distance to `ref` > the limit.

    Colours with a luminance below `dark` are too far from `ref` by that alone. `known` holds what
    was found for the others, 0 (not yet), 1 (near) or 2 (far) by colour: glass is few colours.
    """
    for y in range(start, stop):
        for x in range(rgb.shape[1]):
            red, green, blue = rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2]
            luminance = _Y[0] * linear[red] + _Y[1] * linear[green] + _Y[2] * linear[blue]
            if luminance < dark:
                out[y, x] = 1
                continue
            colour = (np.int64(red) << 16) | (np.int64(green) << 8) | np.int64(blue)
            if known[colour] == 0:
                lightness, a, b = _lab(red, green, blue, linear)
                squared = (lightness - ref[0]) ** 2 + (a - ref[1]) ** 2 + (b - ref[2]) ** 2
                known[colour] = 2 if squared > limit_squared else 1
            out[y, x] = known[colour] - 1


def _dark_limit(lightness: float, limit: float) -> float:
    """Return a luminance below which L* alone is further than `limit` from a lightness."""
    f = (lightness - limit + 16.0) / 116.0
    ratio = f**3 if f > _DELTA else 3.0 * _DELTA**2 * (f - 4.0 / 29.0)
    return ratio * _Y_WHITE * (1.0 - 1e-9)  # rounding must not decide


@compiled
def _a_sum_rows(
    rgb: Uint8,
    linear: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Sum of a* over each of the rows start..stop, into `sums` [h]."""
    for y in range(start, stop):
        total = 0.0
        for x in range(rgb.shape[1]):
            total += _lab(rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2], linear)[1]
        sums[y] = total


@compiled
def _a_rows(
    rgb: Uint8,
    linear: npt.NDArray[np.float64],
    limit: float,
    out: Uint8,
    start: int,
    stop: int,
) -> None:
    """Rows start..stop of `out` [h, w]: 1 where a* > limit."""
    for y in range(start, stop):
        for x in range(rgb.shape[1]):
            a = _lab(rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2], linear)[1]
            out[y, x] = 1 if a > limit else 0


@compiled
def _hsv_rows(
    rgb: Uint8, min_saturation: float, min_value: float, out: Uint8, start: int, stop: int
) -> None:
    """Rows start..stop of `out` [h, w]: 1 where saturation and value 0..255 exceed both limits."""
    for y in range(start, stop):
        for x in range(rgb.shape[1]):
            high = max(rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2])
            low = min(rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2])
            is_tissue = high > min_value and float(high) - low > min_saturation * high
            out[y, x] = 1 if is_tissue else 0


@compiled
def _saturation_rows(rgb: Uint8, out: Uint8, start: int, stop: int) -> None:
    """Rows start..stop of `out` [h, w]: HSV saturation scaled to 0..255, rounded."""
    for y in range(start, stop):
        for x in range(rgb.shape[1]):
            high = max(rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2])
            low = min(rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2])
            out[y, x] = np.uint8(255.0 * (float(high) - low) / high + 0.5) if high > 0 else 0
