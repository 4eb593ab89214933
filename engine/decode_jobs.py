"""What the decoder's processes say to each other: jobs one way, replies the other; never pixels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from modaltune.engine.decode_read import ReadShape
from modaltune.engine.tiling import TileGrid

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Tissue = Literal["lab", "lab-mean", "otsu", "hsv"]
Device = Literal["cpu", "cuda"]
FileStamp = tuple[int, int, int]  # inode, bytes, time of change in ns


@dataclass(frozen=True)
class TileOptions:
    """How slides are tiled; each as in `find_tissue`, `tile_slide` and `open_slide`."""

    mpp: float = 0.5
    tile_px: int = 256
    min_foreground: float = 0.95
    overlap_px: int = 0
    tissue: Tissue = "lab"
    reader: str | None = None


@dataclass(frozen=True)
class SlideRequest:
    """A slide to decode.

    Attributes:
        key: The caller's name for it; distinct among the slides in progress.
        path: Slide file.
        base_mpp: Microns per level-0 px; None takes the metadata's.
        overlay: PNG to write with tissue and tiles; None writes none.
        grid: The tiles to read, where they are known already; None finds tissue and lays them.
    """

    key: str
    path: Path
    base_mpp: float | None = None
    overlay: Path | None = None
    grid: TileGrid | None = None


@dataclass(frozen=True)
class SlideSource:
    """Which file to open, and how: what a worker keeps an open slide under.

    `stamp` is the file as its survey found it; None takes it as it is now.
    """

    path: Path
    base_mpp: float | None
    reader: str | None
    device: Device
    stamp: FileStamp | None = None


@dataclass(frozen=True)
class SurveyJob:
    """Open a slide, find its tissue, lay its tiles, and group them for decoding."""

    source: SlideSource
    options: TileOptions
    overlay: Path | None
    grid: TileGrid | None
    most_tiles: int


@dataclass(frozen=True)
class DecodeJob:
    """Read one group of tiles into one slab; coords int64 [n, 2] in level-0 px."""

    source: SlideSource
    coords: Int64
    shape: ReadShape
    slab: int
    is_half_scale: bool


@dataclass(frozen=True)
class Survey:
    """What a survey found.

    Attributes:
        grid: The tiles, none where `grid.reason` says why.
        groups: int64 indices of the tiles of each decoding job.
        reader: Reader in use, "cucim", "openslide" or "image".
        device: Where its pixels are decoded.
        mpp_source: Where the base mpp came from, "metadata" or "option".
        tissue_share: Share of the slide that is tissue, 0..1; None where it was not looked for.
        seconds: Seconds per stage: open, mask, and overlay where there is one.
        stamp: The slide's file, as it was opened.
    """

    grid: TileGrid
    groups: list[Int64] = field(repr=False)
    reader: str
    device: Device
    mpp_source: str
    tissue_share: float | None
    seconds: dict[str, float]
    stamp: FileStamp | None = None


@dataclass(frozen=True)
class Refusal:
    """A job that could not be done, and why; the worker goes on.

    Attributes:
        reason: Why.
        is_disk_full: Whether the overlay has no room: no fault of the slide.
    """

    reason: str
    is_disk_full: bool = False


@dataclass(frozen=True)
class LogLine:
    """A log record of a worker, to be logged by the parent."""

    logger: str
    level: int
    message: str

    def log(self) -> None:
        """Log it here."""
        logging.getLogger(self.logger).log(self.level, "%s", self.message)


@dataclass(frozen=True)
class Reply:
    """A worker's answer to its oldest job.

    Attributes:
        result: The survey; bool [n] of tiles that can't be read; or the refusal.
        seconds: Wall-clock seconds of the job.
        lines: What the worker logged meanwhile.
    """

    result: Survey | Bool | Refusal
    seconds: float
    lines: list[LogLine]
