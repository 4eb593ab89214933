"""Slides for the decoding benchmark: the shared H&E slide as a mosaic, in several codecs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modaltune.engine.pyramid import Compression, write_pyramid
from modaltune.engine.readers import open_slide
from modaltune.engine.tiling import TileGrid

SHARED_SLIDE = "data/slides/CMU-1-Small-Region.svs"
SIDE = 20_000
# Decoders of JPEG 2000 are a hundred times slower, so a smaller slide gives as many seconds.
JPEG2000_SIDE = 4_096
JPEG_QUALITY = 80
TILE_PX, TILE_MPP = 256, 0.5


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        codec: Compression of the file.
        file_tile: Side of its tiles, px.
        base_mpp: Microns per px that the slide is said to have; 0.25 means reading 512 px for each
            tile of 256 px and averaging, for the file has one level.
        offset_px: Distance of the tiles from the file's tile grid, along both axes.
        side_tiles: Tiles per side of the square that is read.
    """

    codec: Compression
    file_tile: int
    base_mpp: float
    offset_px: int
    side_tiles: int

    @property
    def name(self) -> str:
        """A name for rows and plots."""
        place = f"{self.offset_px} px off" if self.offset_px else "on the grid"
        return f"{self.codec} {self.file_tile}, {self.base_mpp:g} mpp, {place}"

    @property
    def read_px(self) -> int:
        """Side of the square read for a tile."""
        return round(TILE_PX * TILE_MPP / self.base_mpp)

    @property
    def slide_px(self) -> int:
        """Side of the slide."""
        return JPEG2000_SIDE if self.codec == "jpeg2000" else SIDE

    def bar(self, rival: str) -> float | None:
        """How many times a rival's speed we aim at, None where there is no aim."""
        if rival.startswith("hs2p"):
            return 1.5
        if rival == "openslide":
            return 4.0
        if rival != "cucim":
            return None
        if self.read_px != TILE_PX:
            return 1.4
        if self.file_tile != TILE_PX:
            return 2.0
        return 1.8 if self.offset_px else 0.8

    def grid(self) -> TileGrid:
        """The tiles, row by row."""
        places = self.offset_px + self.read_px * np.arange(self.side_tiles, dtype=np.int64)
        if places[-1] + self.read_px > self.slide_px:
            raise ValueError(f"{self.name}: the tiles leave the slide")
        x, y = np.meshgrid(places, places)
        coords = np.stack([x.ravel(), y.ravel()], axis=1)
        return TileGrid(
            coords=coords,
            tile_px=TILE_PX,
            mpp=TILE_MPP,
            base_mpp=self.base_mpp,
            level=0,
            read_px=self.read_px,
            tile_px_level0=self.read_px,
            foreground=np.ones(len(coords), dtype=np.float32),
            dimensions=(self.slide_px, self.slide_px),
            shape=(self.side_tiles, self.side_tiles),
        )


CASES = (
    *(Case("jpeg", file_tile, 0.5, off, 64) for file_tile in (256, 512) for off in (0, 100)),
    *(Case("jpeg", file_tile, 0.25, off, 32) for file_tile in (256, 512) for off in (0, 100)),
    *(Case("deflate", 256, 0.5, off, 48) for off in (0, 100)),
    Case("deflate", 256, 0.25, 0, 24),
    *(Case("jpeg2000", 256, 0.5, off, 12) for off in (0, 100)),
)


def default_source() -> Path:
    """The shared slide beside the checkout."""
    return Path(__file__).resolve().parents[2] / "shared" / SHARED_SLIDE


def default_folder() -> Path:
    """Where the mosaics are kept between runs."""
    return Path(tempfile.gettempdir()) / "modaltune-bench-decode"


def mosaic(source: Path, side: int) -> npt.NDArray[np.uint8]:
    """Fill a square with a slide, mirrored at every seam: uint8 [side, side, 3]."""
    with open_slide(source) as slide:
        tile = slide.read_region((0, 0), slide.dimensions)
    rows = np.concatenate([tile, tile[::-1]])
    pair = np.concatenate([rows, rows[:, ::-1]], axis=1)
    repeats = -(-side // pair.shape[0]), -(-side // pair.shape[1])
    return np.ascontiguousarray(np.tile(pair, (*repeats, 1))[:side, :side])


def write_slides(cases: tuple[Case, ...], source: Path, folder: Path) -> dict[Case, Path]:
    """Write the slides of some cases, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[Case, Path] = {}
    for case in cases:
        path = folder / f"{source.stem}-{case.codec}-{case.file_tile}-{case.slide_px}.tif"
        if not path.exists():
            write_pyramid(
                path,
                mosaic(source, case.slide_px),
                mpp=None,
                tile_px=case.file_tile,
                compression=case.codec,
                quality=JPEG_QUALITY if case.codec == "jpeg" else None,
            )
        paths[case] = path
    return paths
