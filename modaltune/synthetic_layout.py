"""Where the cells of a drawn tissue lie: glands and their rings of nuclei, files of single cells.

Positions are float64 pixels (x, y); nuclei are rows of (x px, y px, angle rad of the long axis).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
BoolMap = NDArray[np.bool_]

CONTOUR_POINTS = 72
_DISC_TRIES = 1800
_CELL_PX = 15.0  # room a discohesive cell takes


def scatter(allowed: BoolMap, count: int, rng: np.random.Generator) -> Points:
    """Draw uniform points among the allowed pixels.

    Args:
        allowed: bool [height, width].
        count: points wanted.
        rng: source of randomness.

    Returns:
        float64 [count, 2], or none where nothing is allowed.
    """
    free = np.flatnonzero(allowed)
    if free.size == 0 or count < 1:
        return np.empty((0, 2))
    chosen = free[rng.integers(0, free.size, count)]
    rows, cols = np.divmod(chosen, allowed.shape[1])
    return np.stack([cols, rows], axis=1).astype(np.float64)


def keep_allowed(points: Points, allowed: BoolMap) -> Points:
    """Those points, rows of (x, y, ...), that lie on allowed pixels of bool [height, width]."""
    cols, rows = points[:, 0].astype(int), points[:, 1].astype(int)
    on = (cols >= 0) & (rows >= 0) & (cols < allowed.shape[1]) & (rows < allowed.shape[0])
    on[on] = allowed[rows[on], cols[on]]
    return points[on]


def scatter_discs(allowed: BoolMap, rng: np.random.Generator) -> Points:
    """Throw discs that do not touch until the allowed area is about full.

    Args:
        allowed: bool [height, width], where centres may lie.
        rng: source of randomness.

    Returns:
        float64 [n, 3], rows of (x, y, radius), px.
    """
    tries = scatter(allowed, _DISC_TRIES, rng)
    if len(tries) == 0:
        return np.empty((0, 3))
    radii = np.sort(rng.uniform(23.0, 52.0, len(tries)))[::-1]
    discs = np.empty((len(tries), 3))
    count = 0
    for (x, y), radius in zip(tries, radii, strict=True):
        placed = discs[:count]
        gap = np.hypot(placed[:, 0] - x, placed[:, 1] - y) - placed[:, 2] - radius
        if count == 0 or gap.min() > 5.0:
            discs[count] = x, y, radius
            count += 1
    return discs[:count]


def gland_contour(rng: np.random.Generator) -> Points:
    """An irregular, drawn-out closed outline that stays within about the unit disc.

    Args:
        rng: source of randomness.

    Returns:
        float64 [CONTOUR_POINTS, 2], to be scaled by a radius.
    """
    t = np.linspace(0, 2 * np.pi, CONTOUR_POINTS, endpoint=False)
    squeeze, turn = rng.uniform(0.72, 1.0), rng.uniform(0, np.pi)
    radius = np.ones_like(t)
    for wave in (2, 3, 4, 5):
        radius += rng.normal(0, 0.09 / wave**0.5) * np.cos(wave * t + rng.uniform(0, 2 * np.pi))
    x, y = radius * np.cos(t), radius * squeeze * np.sin(t)
    return np.stack(
        [x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1
    )


def ring_nuclei(
    centre: Points, contour: Points, radius: float, wall: float, rng: np.random.Generator
) -> Points:
    """Nuclei in the wall of a gland, near its outer edge and pointing at its lumen.

    Args:
        centre: float64 [2].
        contour: float64 [n, 2], unit outline.
        radius: of the gland, px.
        wall: thickness of its epithelium, px.
        rng: source of randomness.

    Returns:
        float64 [n, 3] nuclei. A gland too small for a lumen gets a second ring, a large one a few
        piled-up nuclei nearer to the lumen.
    """
    rings = [(radius - 10.5, 1.0)]
    rings.append((radius - wall, 1.0) if radius - wall <= 14 else (radius - 19.0, 0.22))
    nuclei = []
    for size, share in rings:
        ring = contour * max(size, 2.0)
        edges = np.hypot(*(np.roll(ring, -1, axis=0) - ring).T)
        along = np.concatenate([[0.0], np.cumsum(edges)])
        count = max(int(along[-1] / 12.3), 1)
        at = (np.arange(count) + rng.uniform(-0.14, 0.14, count) + rng.uniform()) % count
        at = at[rng.random(count) < share] * along[-1] / count
        closed = np.concatenate([ring, ring[:1]])
        x, y = np.interp(at, along, closed[:, 0]), np.interp(at, along, closed[:, 1])
        angle = np.arctan2(y, x) + rng.normal(0, 0.18, len(at))
        depth = 1 + rng.normal(0, 1.5, len(at)) / max(size, 8.0)
        nuclei.append(np.stack([centre[0] + x * depth, centre[1] + y * depth, angle], axis=1))
    return np.concatenate(nuclei)


def trace_files(
    allowed: BoolMap,
    direction: Callable[[float, float], float],
    rng: np.random.Generator,
    *,
    px_per_file: float = 4200.0,
) -> Points:
    """Trace single files of cells along the fibres, and some cells apart from any file.

    Args:
        allowed: bool [height, width], where cells may lie.
        direction: direction of the fibres at (x, y), rad.
        rng: source of randomness.
        px_per_file: area for each file, px.

    Returns:
        float64 [n, 3] nuclei, no two closer than about a cell.
    """
    starts = scatter(allowed, int(allowed.sum() / px_per_file), rng)
    lengths = np.where(rng.random(len(starts)) < 0.22, 1, rng.integers(4, 13, len(starts)))
    taken: set[tuple[int, int]] = set()
    nuclei: list[tuple[float, float, float]] = []
    for (x, y), length in zip(starts, lengths, strict=True):
        sense = 1.0 if rng.random() < 0.5 else -1.0
        spare = 2  # steps a file may be blocked before it ends
        for jitter in rng.normal(0, 1.0, (int(length), 2)):
            if not _is_allowed(allowed, x, y):
                break
            angle = direction(x, y)
            cell = (int(x / _CELL_PX), int(y / _CELL_PX))
            if cell in taken:
                spare -= 1
            else:
                taken.add(cell)
                nuclei.append((x + jitter[0], y + 1.4 * jitter[1], angle + 0.2 * jitter[0]))
            if spare == 0:
                break
            step = sense * (_CELL_PX + 1.5 + 1.2 * jitter[1])
            x, y = x + step * np.cos(angle), y + step * np.sin(angle)
    return np.array(nuclei).reshape(-1, 3)


def _is_allowed(allowed: BoolMap, x: float, y: float) -> bool:
    row, col = int(y), int(x)
    return 0 <= row < allowed.shape[0] and 0 <= col < allowed.shape[1] and bool(allowed[row, col])
