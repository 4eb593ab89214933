"""Draws H&E-like tissue for the synthetic cohort: glands and discohesive cells in one piece.

Everything is painted as two concentration maps, haematoxylin and eosin, and turned into colour by
Beer-Lambert absorption with stain vectors of their own for each slide, so that slides differ as
scanners and laboratories differ. It is a drawing: no patient and no photograph is behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from modaltune.errors import CohortError
from modaltune.synthetic_cells import (
    FloatMap,
    blend,
    disc_stamp,
    nucleus_bank,
    paint_capillary,
    smooth_noise,
    stamp_nuclei,
)
from modaltune.synthetic_layout import (
    gland_contour,
    keep_allowed,
    ring_nuclei,
    scatter,
    scatter_discs,
    trace_files,
)

BoolMap = NDArray[np.bool_]

# Where tissue lies, one letter per tile: every marked tile is tissue to its edges, and the outline
# runs irregularly outside of them. At most 16 tiles each.
LARGE_SHAPES: tuple[tuple[str, ...], ...] = (
    ("####", "####", "####", "####"),
    (".###", "####", "####", "####"),
    (".###", "####", "####", "###."),
    (".###.", "#####", "#####", ".###."),
)
SMALL_SHAPES: tuple[tuple[str, ...], ...] = (
    ("###", "###", "###"),
    (".###", "####", "###."),
    (".##", "###", "###"),
)

_FAR_MARGIN_PX = 192
_H_FULL = 3.2  # concentration of the last entry of the colour table
_E_FULL = 1.6

# Optical density per unit of stain (red, green, blue), published vectors. Source: Ruifrok and
# Johnston 2001; Macenko et al. 2009. A slide's own vectors lie between the two.
_HAEMATOXYLIN = np.array([[0.650, 0.704, 0.286], [0.563, 0.720, 0.406]])
_EOSIN = np.array([[0.072, 0.990, 0.105], [0.216, 0.801, 0.558]])


@dataclass(frozen=True)
class Stain:
    """Colour of one slide: optical densities per unit concentration, and the empty glass.

    Attributes:
        haematoxylin: red, green and blue optical density per unit, unit length times strength.
        eosin: likewise.
        glass: red, green and blue of empty glass, 0-255.
    """

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    glass: tuple[float, float, float]


@dataclass(frozen=True)
class DrawnSlide:
    """One drawn slide.

    Attributes:
        rgb: uint8 [height, width, 3].
        coords: int64 [n, 2], level-0 px (x, y) of the top-left corner of each tissue tile.
        discohesive_share: float64 [n], share of each tissue tile's area that grows discohesively.
    """

    rgb: NDArray[np.uint8]
    coords: NDArray[np.int64]
    discohesive_share: NDArray[np.float64]


@dataclass(frozen=True)
class _Fibres:
    """Collagen: its texture and, on a grid of one value per `step` px, its direction in radians."""

    texture: FloatMap
    angle: FloatMap
    step: int

    def direction(self, x: float, y: float) -> float:
        """Direction of the fibres at a pixel, in radians."""
        row = min(int(y) // self.step, self.angle.shape[0] - 1)
        col = min(int(x) // self.step, self.angle.shape[1] - 1)
        return float(self.angle[row, col])


def sample_stain(rng: np.random.Generator) -> Stain:
    """Draw one slide's stain and scanner colour.

    Args:
        rng: source of randomness.

    Returns:
        A stain between the two published sets of vectors, with strengths of its own.
    """
    vectors = []
    for pair, low, high in ((_HAEMATOXYLIN, 0.85, 1.2), (_EOSIN, 0.75, 1.25)):
        mix = rng.uniform(0.0, 1.0)
        vector = mix * pair[0] + (1 - mix) * pair[1] + rng.normal(0.0, 0.02, 3)
        vector = np.clip(vector, 0.02, None)
        vectors.append(vector / np.linalg.norm(vector) * rng.uniform(low, high))
    glass = rng.uniform(242.0, 249.0) + rng.uniform(-2.0, 2.0, 3)
    haematoxylin, eosin, white = (
        (float(v[0]), float(v[1]), float(v[2])) for v in (*vectors, glass)
    )
    return Stain(haematoxylin, eosin, white)


class TissuePainter:
    """Draws slides from banks of nuclei and textures that are made once.

    Args:
        seed: of the banks; slides drawn by painters of one seed are made of the same elements.
        tile_px: side of a tile, px.
    """

    def __init__(self, seed: int = 0, *, tile_px: int = 256) -> None:
        if tile_px < 64:
            raise CohortError(f"tile_px must be at least 64, got {tile_px}; 256 is usual")
        rng = np.random.default_rng([seed, 0x7155])
        self.tile_px = tile_px
        self._columnar = nucleus_bank(rng, 7.4, 5.0, 1.50, 0.42)
        self._round = nucleus_bank(rng, 6.4, 5.4, 1.60, 0.34)
        self._spindle = nucleus_bank(rng, 10.0, 2.4, 1.45, 0.15)
        self._lymphocyte = nucleus_bank(rng, 4.4, 4.2, 2.20, 0.20)
        self._cytoplasm = disc_stamp(9.5)
        self._noise = smooth_noise(rng, (1024, 1024), 1.0)
        self._grain = smooth_noise(rng, (512, 512), 0.6)

    def draw(
        self,
        discohesive: float,
        shape: tuple[str, ...],
        stain: Stain,
        rng: np.random.Generator,
    ) -> DrawnSlide:
        """Draw one slide.

        Args:
            discohesive: share of the tissue tiles' area that grows as discohesive single files,
                0-1; the rest forms glands.
            shape: rows of `#` (tissue tile) and `.` (glass), such as `LARGE_SHAPES[0]`.
            stain: colour of the slide.
            rng: source of randomness.

        Returns:
            The slide, with glass all around: one tile to the left and above, less on the far side.

        Raises:
            CohortError: the share lies outside 0-1, or the shape is no rectangle with tissue.
        """
        _check(discohesive, shape)
        cells = np.array([[mark == "#" for mark in row] for row in shape])
        block = self._block(cells)
        tissue = _outline(block, rng)
        region, shares = self._growth(block, cells, discohesive, rng)
        fibres = self._fibres(tissue.shape, rng)
        eosin = 0.56 + 0.14 * fibres.texture
        haematoxylin = 0.07 + 0.02 * fibres.texture
        inside = cv2.erode(tissue.astype(np.uint8), np.ones((23, 23), np.uint8)).astype(bool)
        taken = self._paint_glands(haematoxylin, eosin, region, inside, rng)
        self._paint_files(haematoxylin, eosin, ~region & inside & ~taken, fibres, rng)
        self._paint_stroma(haematoxylin, eosin, inside & ~taken, fibres, rng)
        rgb = self._develop(haematoxylin, eosin, tissue, stain, rng)
        rows, cols = np.nonzero(cells)
        coords = (np.stack([cols, rows], axis=1) + 1) * self.tile_px
        return DrawnSlide(rgb, coords.astype(np.int64), shares)

    def _block(self, cells: BoolMap) -> BoolMap:
        height, width = (n * self.tile_px for n in cells.shape)
        near = self.tile_px
        block = np.zeros((near + height + _FAR_MARGIN_PX, near + width + _FAR_MARGIN_PX), bool)
        block[near : near + height, near : near + width] = np.kron(
            cells, np.ones((self.tile_px, self.tile_px), bool)
        )
        return block

    def _growth(
        self, block: BoolMap, cells: BoolMap, discohesive: float, rng: np.random.Generator
    ) -> tuple[BoolMap, NDArray[np.float64]]:
        """Where glands grow (the rest is discohesive), and each tile's discohesive share."""
        height, width = block.shape
        field = _field(rng, block.shape, 5)
        turn = rng.uniform(0, 2 * np.pi)
        field += 1.6 * np.cos(turn) * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        field += 1.6 * np.sin(turn) * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        ranked = field[block]
        rank = min(round(discohesive * ranked.size), ranked.size)
        edge = np.inf if rank == ranked.size else np.partition(ranked, rank)[rank]
        glands = field >= edge
        px = self.tile_px
        parts = (~glands)[px : px + cells.shape[0] * px, px : px + cells.shape[1] * px]
        share = parts.reshape(cells.shape[0], px, cells.shape[1], px).mean(axis=(1, 3))
        return glands, share[cells]

    def _fibres(self, shape: tuple[int, int], rng: np.random.Generator) -> _Fibres:
        """Wavy collagen: noise drawn out along a direction that bends slowly over the slide."""
        step = 16
        turn = rng.uniform(0, np.pi)
        bend = 30 * _field(rng, shape, 7) + 7 * _field(rng, shape, 26)
        x = np.arange(shape[1], dtype=np.float32)[None, :]
        y = np.arange(shape[0], dtype=np.float32)[:, None]
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        along = cos * x + sin * y
        across = bend + (cos * y - sin * x)
        start = rng.uniform(0, 1024, 4)
        texture = np.zeros(shape, np.float32)
        for along_scale, across_scale, weight, place in (
            (0.050, 0.26, 0.60, start[:2]),
            (0.120, 0.80, 0.50, start[2:]),
        ):
            texture += weight * cv2.remap(
                self._noise,
                along * np.float32(along_scale) + np.float32(place[0]),
                across * np.float32(across_scale) + np.float32(place[1]),
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_WRAP,
            )
        texture = np.clip(texture, -1.1, 2.0) + 0.3 * _field(rng, shape, 11)
        slope_y, slope_x = np.gradient(across[::step, ::step])
        return _Fibres(texture, np.arctan2(-slope_x, slope_y).astype(np.float32), step)

    def _paint_glands(
        self,
        haematoxylin: FloatMap,
        eosin: FloatMap,
        region: BoolMap,
        inside: BoolMap,
        rng: np.random.Generator,
    ) -> BoolMap:
        """Paint glands with their rings of nuclei; returns what they cover, with a rim."""
        allowed = region & inside
        outer, lumen = np.zeros(region.shape, np.uint8), np.zeros(region.shape, np.uint8)
        rings: list[NDArray[np.float64]] = []
        for x, y, radius in scatter_discs(allowed, rng):
            contour = gland_contour(rng)
            wall = rng.uniform(21.0, 26.0)
            middle = np.array([x, y])
            _fill(outer, middle + contour * radius)
            if radius - wall > 5:
                _fill(lumen, middle + contour * (radius - wall))
            rings.append(ring_nuclei(middle, contour, radius, wall, rng))
        rim = cv2.dilate(outer, np.ones((5, 5), np.uint8))
        cleft = cv2.blur(rim - outer, (3, 3)).astype(np.float32) / 255
        cell = cv2.GaussianBlur(outer, (0, 0), 1.2).astype(np.float32) / 255
        empty = cv2.GaussianBlur(lumen, (0, 0), 1.5).astype(np.float32) / 255
        eosin *= 1 - 0.45 * cleft
        eosin += cell * (0.40 - 0.75 * eosin)
        haematoxylin += cell * (0.17 - haematoxylin)
        # Secretion tints the lumen, so that it still counts as tissue against the glass.
        eosin += empty * (0.17 - eosin)
        haematoxylin += empty * (0.035 - haematoxylin)
        if rings:
            nuclei = np.concatenate(rings)
            stamp_nuclei(haematoxylin, eosin, self._columnar, nuclei, rng)
        return rim > 0

    def _paint_files(
        self,
        haematoxylin: FloatMap,
        eosin: FloatMap,
        allowed: BoolMap,
        fibres: _Fibres,
        rng: np.random.Generator,
    ) -> None:
        """Paint single cells in files along the fibres."""
        nuclei = trace_files(allowed, fibres.direction, rng)
        if nuclei.size == 0:
            return
        for x, y, _ in nuclei.astype(int):
            blend(eosin, self._cytoplasm, x, y, 0.30)
            blend(haematoxylin, self._cytoplasm, x, y, 0.16)
        stamp_nuclei(haematoxylin, eosin, self._round, nuclei, rng)

    def _paint_stroma(
        self,
        haematoxylin: FloatMap,
        eosin: FloatMap,
        allowed: BoolMap,
        fibres: _Fibres,
        rng: np.random.Generator,
    ) -> None:
        """Paint what both kinds of growth share: fibroblasts, lymphocytes and capillaries."""
        area = allowed.sum()
        points = scatter(allowed, int(area / 5200), rng)
        along = np.array([fibres.direction(x, y) for x, y in points])
        angles = along + rng.normal(0, 0.15, len(points))
        stamp_nuclei(haematoxylin, eosin, self._spindle, np.column_stack([points, angles]), rng)
        groups = scatter(allowed, rng.poisson(area / 170_000), rng)
        cells = [np.empty((0, 2))]
        cells += [g + rng.normal(0, 15, (int(rng.integers(5, 14)), 2)) for g in groups]
        cells.append(scatter(allowed, int(area / 30_000), rng))
        points = keep_allowed(np.concatenate(cells), allowed)
        angles = rng.uniform(0, np.pi, len(points))
        stamp_nuclei(haematoxylin, eosin, self._lymphocyte, np.column_stack([points, angles]), rng)
        for at in scatter(allowed, rng.poisson(area / 250_000), rng):
            paint_capillary(eosin, haematoxylin, at, fibres.direction(at[0], at[1]), rng)

    def _develop(
        self,
        haematoxylin: FloatMap,
        eosin: FloatMap,
        tissue: BoolMap,
        stain: Stain,
        rng: np.random.Generator,
    ) -> NDArray[np.uint8]:
        """Concentrations to colour, through the stain's table of 256 x 256 colours."""
        edge = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 1.5)
        shift = rng.integers(0, 512, 2)
        reps = (tissue.shape[0] // 512 + 2, tissue.shape[1] // 512 + 2)
        grain = np.tile(1 + np.float32(0.05) * self._grain, reps)[shift[0] :, shift[1] :]
        grain = grain[: tissue.shape[0], : tissue.shape[1]]
        grain = grain * edge
        level_h = cv2.GaussianBlur(haematoxylin, (3, 3), 0.7) * grain * np.float32(255 / _H_FULL)
        level_e = cv2.GaussianBlur(eosin, (3, 3), 0.7) * grain * np.float32(255 / _E_FULL)
        steps = np.arange(256) / 255.0
        density = (
            steps[:, None, None] * _H_FULL * np.array(stain.haematoxylin)
            + steps[None, :, None] * _E_FULL * np.array(stain.eosin)
        ).reshape(-1, 3)
        table = np.rint(np.array(stain.glass) * np.exp(-density)).astype(np.uint8)
        index = np.clip(level_h, 0, 255).astype(np.uint16) * np.uint16(256)
        index += np.clip(level_e, 0, 255).astype(np.uint16)
        return table[index]


def _check(discohesive: float, shape: tuple[str, ...]) -> None:
    if not 0.0 <= discohesive <= 1.0:
        raise CohortError(f"discohesive must lie in 0-1, got {discohesive}")
    widths = {len(row) for row in shape}
    marks = set("".join(shape))
    if len(widths) != 1 or not marks <= {"#", "."} or "#" not in marks:
        raise CohortError(
            f"shape must be rows of one length of # and . with at least one #, got {shape!r}"
        )


def _field(rng: np.random.Generator, shape: tuple[int, int], knots: int) -> FloatMap:
    """A smooth random field of about unit variance."""
    knot_values = rng.standard_normal((knots, knots), np.float32)
    # Cubic on an eighth of the grid, linear from there: the same to the eye, five times as fast.
    coarse = cv2.resize(knot_values, (shape[1] // 8, shape[0] // 8), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.resize(coarse, (shape[1], shape[0])), np.float32)


def _outline(block: BoolMap, rng: np.random.Generator) -> BoolMap:
    """Tissue around the block, which it covers whole: irregular like a cut edge."""
    height, width = (n // 8 for n in block.shape)
    small = cv2.resize(block.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    # At a corner of the block the blurred block is 0.25 and on a side 0.5: below 0.19 lies outside.
    nearness = cv2.resize(cv2.GaussianBlur(small, (0, 0), 6.5), block.shape[::-1])
    ragged = 0.42 * _field(rng, block.shape, 10) + 0.10 * _field(rng, block.shape, 70)
    limit = np.minimum(0.085 * np.exp(ragged), 0.19)
    return np.asarray(nearness > limit, bool) | block


def _fill(canvas: NDArray[np.uint8], outline: NDArray[np.float64]) -> None:
    """Fill a polygon, rows of (x, y) px, with 255, smooth to an eighth of a pixel."""
    cv2.fillPoly(canvas, [np.rint(outline * 8).astype(np.int32)], 255, cv2.LINE_AA, 3)
