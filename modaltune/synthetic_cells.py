"""Nuclei, cells and capillaries: small stamps painted onto the two concentration maps of a tissue.

A map is float32 [height, width], the concentration of haematoxylin or eosin; positions are level-0
pixels (x, y). What would leave the map is not painted.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

FloatMap = NDArray[np.float32]

STAMP_PX = 33
_VARIANTS = 8
_ANGLES = 16


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> FloatMap:
    """Gaussian noise [height, width] of unit variance, blurred by `sigma` px."""
    noise = cv2.GaussianBlur(rng.standard_normal(shape, np.float32), (0, 0), sigma)
    return np.asarray(noise / noise.std(), np.float32)


def nucleus_bank(
    rng: np.random.Generator, long_px: float, short_px: float, density: float, texture: float
) -> FloatMap:
    """Draw nuclei with membrane, chromatin and nucleolus.

    Args:
        rng: source of randomness.
        long_px: mean half length, px.
        short_px: mean half width, px.
        density: concentration of haematoxylin.
        texture: how far membrane, chromatin and nucleolus stand out, 0 for an even nucleus.

    Returns:
        float32 [angles, variants, STAMP_PX, STAMP_PX], haematoxylin; angle k has its long axis at
        pi * k / angles from x towards y.
    """
    half = STAMP_PX // 2
    grid = np.arange(-half, half + 1, dtype=np.float64)
    bank = np.zeros((_ANGLES, _VARIANTS, STAMP_PX, STAMP_PX), np.float32)
    for turn in range(_ANGLES):
        angle = np.pi * turn / _ANGLES
        u = grid[None, :] * np.cos(angle) + grid[:, None] * np.sin(angle)
        v = grid[:, None] * np.cos(angle) - grid[None, :] * np.sin(angle)
        for variant in range(_VARIANTS):
            a = long_px * rng.uniform(0.85, 1.18)
            b = short_px * rng.uniform(0.85, 1.18)
            wave = 0.06 * np.sin(3 * np.arctan2(v, u) + rng.uniform(0, 6.28))
            q = np.hypot(u / a, v / b) + wave
            # (q - 1) / q of the way from the centre is about the distance from the edge in px.
            outside = (q - 1) / np.maximum(q, 0.05) * np.hypot(u, v)
            cover = 1 / (1 + np.exp(np.maximum(outside, -20) * 1.7))
            rim = np.exp(-(((q - 0.86) / 0.17) ** 2))
            chromatin = smooth_noise(rng, (STAMP_PX, STAMP_PX), 1.3)
            spot = rng.uniform(-0.35, 0.35, 2) * (a, b)
            nucleolus = np.exp(-((u - spot[0]) ** 2 + (v - spot[1]) ** 2) / 2.2)
            body = 0.86 + texture * (0.30 * chromatin + 0.75 * rim - 0.35 + 0.9 * nucleolus)
            bank[turn, variant] = density * cover * np.clip(body, 0.3, 1.7)
    return bank


def disc_stamp(radius: float) -> FloatMap:
    """A soft disc, 0-1, float32 [STAMP_PX, STAMP_PX], of a radius in px."""
    half = STAMP_PX // 2
    grid = np.arange(-half, half + 1)
    distance = np.hypot(grid[None, :], grid[:, None])
    return np.asarray(1 / (1 + np.exp((distance - radius) * 1.2)), np.float32)


def _window(canvas: FloatMap, x: int, y: int) -> FloatMap | None:
    """The stamp-sized view around a pixel, or None where it would leave the canvas."""
    top, left = y - STAMP_PX // 2, x - STAMP_PX // 2
    if top < 0 or left < 0:
        return None
    view = canvas[top : top + STAMP_PX, left : left + STAMP_PX]
    return view if view.shape == (STAMP_PX, STAMP_PX) else None


def blend(canvas: FloatMap, stamp: FloatMap, x: int, y: int, value: float) -> None:
    """Blend a map towards a value where the stamp, centred on (x, y), is not 0."""
    view = _window(canvas, x, y)
    if view is not None:
        view += stamp * (value - view)


def stamp_nuclei(
    haematoxylin: FloatMap,
    eosin: FloatMap,
    bank: FloatMap,
    nuclei: NDArray[np.float64],
    rng: np.random.Generator,
) -> None:
    """Stamp nuclei; where they lie, eosin gives way to haematoxylin.

    Args:
        haematoxylin: float32 [height, width], changed in place.
        eosin: likewise.
        bank: of `nucleus_bank`.
        nuclei: float64 [n, 3], rows of (x px, y px, angle rad).
        rng: source of randomness, for the variant and strength of each nucleus.
    """
    turns = np.rint(nuclei[:, 2] / np.pi * _ANGLES).astype(int) % _ANGLES
    variants = rng.integers(0, bank.shape[1], len(nuclei))
    strength = rng.uniform(0.8, 1.2, len(nuclei)).astype(np.float32)
    for i, (x, y) in enumerate(nuclei[:, :2].astype(int)):
        stamp = bank[turns[i], variants[i]] * strength[i]
        view, pink = _window(haematoxylin, x, y), _window(eosin, x, y)
        if view is not None and pink is not None:
            np.maximum(view, stamp, out=view)
            pink *= 1 - 0.45 * np.minimum(stamp, 1)


def paint_capillary(
    eosin: FloatMap,
    haematoxylin: FloatMap,
    at: NDArray[np.float64],
    angle: float,
    rng: np.random.Generator,
) -> None:
    """Paint a small vessel: a pale lumen drawn out along the fibres, with red cells in it.

    Args:
        eosin: float32 [height, width], changed in place.
        haematoxylin: likewise.
        at: float64 [2], its middle (x, y), px.
        angle: of its long axis, rad.
        rng: source of randomness.
    """
    x, y = (int(v) for v in at)
    half = 40
    area = np.s_[max(y - half, 0) : y + half, max(x - half, 0) : x + half]
    length = rng.uniform(14, 26)
    lumen = np.zeros(eosin[area].shape, np.uint8)
    middle, axes = (x - area[1].start, y - area[0].start), (int(length), int(rng.uniform(6, 8)))
    cv2.ellipse(lumen, middle, axes, float(np.degrees(angle)), 0, 360, 255, -1, cv2.LINE_AA)
    cover = lumen.astype(np.float32) / 255
    for canvas, value in ((eosin, 0.15), (haematoxylin, 0.03)):
        canvas[area] += cover * (value - canvas[area])
    red_cell = disc_stamp(3.6)
    for along in np.arange(-length + 6, length - 5, 7.5):
        side = rng.uniform(-2.0, 2.0)
        cx = x + along * np.cos(angle) - side * np.sin(angle)
        cy = y + along * np.sin(angle) + side * np.cos(angle)
        blend(eosin, red_cell, int(cx), int(cy), 1.15)
