"""The decoder's worker process: takes jobs from a socket, puts pixels into shared memory.

Started by `engine.decode_worker` with its descriptors. It imports neither torch nor, until a survey
needs them, numba and matplotlib: it is up in a quarter of a second, with 25 MB of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from modaltune.engine._reader_cucim import load_library
from modaltune.engine.decode_jobs import (
    Bool,
    DecodeJob,
    FileStamp,
    LogLine,
    Refusal,
    Reply,
    SlideSource,
    Survey,
    SurveyJob,
)
from modaltune.engine.decode_plan import group_tiles
from modaltune.engine.decode_read import read_group
from modaltune.engine.errors import DiskFullError, InputError, SlideError
from modaltune.engine.file_tiles import FileTiles, open_file_tiles
from modaltune.engine.readers import SlideReader, open_slide
from modaltune.engine.shared_tiles import SharedTiles
from modaltune.engine.tiling import TileGrid, tile_slide

if TYPE_CHECKING:
    from modaltune.engine.tissue import TissueMask

# Slides kept open: those being decoded and those surveyed ahead.
_OPEN_SLIDES = 4
_PR_SET_PDEATHSIG = 1
# glibc's mallopt: the memory of a box (3 MB) stays with the process between reads, which saves the
# kernel clearing its pages anew; that of a thumbnail goes back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 2**26, 2**24
_STDERR = 2
_MOST_NOISE = 2**20


class _Lines(logging.Handler):
    """Collects what this process logs, for the parent to log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[LogLine] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        self.lines.append(LogLine(record.name, record.levelno, record.getMessage()))

    def take(self) -> list[LogLine]:
        """Return the records since the last call."""
        lines, self.lines = self.lines, []
        return lines


def _stamp(path: Path) -> FileStamp:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class _OpenSlides:
    """The slides this process has open, the last ones used; handles are its own."""

    def __init__(self) -> None:
        self._slides: OrderedDict[SlideSource, SlideReader] = OrderedDict()
        self._tiles: dict[tuple[SlideSource, int], FileTiles | None] = {}

    def get(self, source: SlideSource) -> SlideReader:
        """Return a slide, opened if it is not."""
        slide = self._slides.get(source)
        if slide is None:
            slide = open_slide(
                source.path, base_mpp=source.base_mpp, reader=source.reader, device=source.device
            )
            # Decoding jobs name the reader that the survey found, and the file: it may be another
            # by now, and what other processes have open still the old one.
            stamp = _stamp(source.path)
            if source.stamp not in (None, stamp):
                slide.close()
                raise SlideError(
                    f"slide must stay as it is while it is read, got {source.path} changed; wait "
                    "until it is whole"
                )
            named = SlideSource(source.path, source.base_mpp, slide.name, slide.device, stamp)
            if named in self._slides:
                self._slides.pop(named).close()
            self._slides[named] = slide
            source = named
            while len(self._slides) > _OPEN_SLIDES:
                self._close(next(iter(self._slides)))
        self._slides.move_to_end(source)
        return slide

    def file_tiles(self, source: SlideSource, level: int) -> FileTiles | None:
        """Return a level's file tiles, None where the slide's reader must decode them."""
        slide = self.get(source)
        key = source, level
        if key not in self._tiles:
            self._tiles[key] = open_file_tiles(slide, level)
        return self._tiles[key]

    def _close(self, source: SlideSource) -> None:
        """Close a slide, and the file tiles of its levels."""
        self._slides.pop(source).close()
        for key in [key for key in self._tiles if key[0] == source]:
            if (tiles := self._tiles.pop(key)) is not None:
                tiles.close()


def survey(job: SurveyJob, slides: _OpenSlides) -> Survey:
    """Open, mask, tile and group one slide, and draw its overlay."""
    seconds, start = {}, time.perf_counter()
    slide = slides.get(job.source)
    stamp = _stamp(job.source.path)
    _ = slide.mpp  # a slide without one fails here, before any work
    seconds["open"] = time.perf_counter() - start
    start = time.perf_counter()
    tissue, grid = _tiles(slide, job)
    seconds["mask"] = time.perf_counter() - start
    if job.overlay is not None and tissue is not None:
        from modaltune.engine.overlay import write_overlay  # brings matplotlib

        start = time.perf_counter()
        write_overlay(job.overlay, slide, tissue, grid)
        seconds["overlay"] = time.perf_counter() - start
    return Survey(
        grid=grid,
        groups=group_tiles(grid, job.most_tiles),
        reader=slide.name,
        device=slide.device,
        mpp_source=slide.mpp_source or "",
        tissue_share=None if tissue is None else tissue.share,
        seconds=seconds,
        stamp=stamp,
    )


def _tiles(slide: SlideReader, job: SurveyJob) -> tuple[TissueMask | None, TileGrid]:
    """Find the tissue where it is needed, and the tiles unless they are given."""
    tissue = None
    if job.grid is None or job.overlay is not None:
        from modaltune.engine.tissue import find_tissue  # brings numba

        tissue = find_tissue(slide, job.options.tissue)
    if job.grid is None and tissue is not None:
        options = job.options
        return tissue, tile_slide(
            slide,
            tissue,
            tile_px=options.tile_px,
            mpp=options.mpp,
            min_foreground=options.min_foreground,
            overlap_px=options.overlap_px,
        )
    grid = job.grid
    if grid is None or grid.dimensions != slide.dimensions or grid.tile_px != job.options.tile_px:
        raise InputError(
            f"grid must have tiles of {job.options.tile_px} px of {slide.path.name} "
            f"({slide.dimensions[0]} x {slide.dimensions[1]} px), got {_said(grid)}; tile it again"
        )
    return tissue, grid


def _said(grid: TileGrid | None) -> str:
    """Describe a grid in a message."""
    if grid is None:
        return "none"
    return (
        f"tiles of {grid.tile_px} px of a slide of {grid.dimensions[0]} x {grid.dimensions[1]} px"
    )


def decode(job: DecodeJob, slides: _OpenSlides, shared: SharedTiles) -> Bool:
    """Read one group of tiles into its slab; return which tiles are bad."""
    slide = slides.get(job.source)
    tiles = slides.file_tiles(job.source, job.shape.level)
    out = shared.array[job.slab, : len(job.coords)]
    return read_group(slide, job.coords, job.shape, out, tiles, is_half_scale=job.is_half_scale)


def serve(connection: Connection, shared: SharedTiles, ahead: list[int], lines: _Lines) -> None:
    """Answer jobs until the other end closes; until there is one, prepare for it."""
    slides = _OpenSlides()
    preparation: list[Callable[[], None]] = [partial(shared.populate, slab) for slab in ahead]
    preparation.append(_load_cucim)
    while True:
        while preparation and not connection.poll():
            preparation.pop()()
        try:
            job: SurveyJob | DecodeJob = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        result: Survey | Bool | Refusal
        try:
            if isinstance(job, SurveyJob):
                result = survey(job, slides)
            else:
                result = decode(job, slides, shared)
        except (InputError, OSError) as error:
            result = Refusal(str(error), isinstance(error, DiskFullError))
        except Exception as error:  # a decoder's surprise costs this slide, not the process
            result = Refusal(f"{type(error).__name__}: {error}")
        said = lines.take()
        # Every worker that opens the slide says the same as the one that surveyed it.
        heard = said if isinstance(job, SurveyJob) else []
        connection.send(Reply(result, time.perf_counter() - start, heard))
        _drop_noise()


def _load_cucim() -> None:
    """Load the reader that most slides need; where it is not installed, others are used."""
    with contextlib.suppress(ImportError):
        load_library()


def _drop_noise() -> None:
    """Keep the file that this process's standard error goes to small."""
    with contextlib.suppress(OSError):
        if os.fstat(_STDERR).st_size > _MOST_NOISE:
            os.ftruncate(_STDERR, 0)


def _settle(parent: int, device: str) -> None:
    """Tie this process to its parent, and keep it to one thread and little memory."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
    cv2.setNumThreads(1)
    if device == "cpu":
        # cuCIM imports CuPy where it can: 0.15 s and 200 MB that nothing here needs.
        sys.modules["cupy"] = None  # type: ignore[assignment]


def main(argument: str) -> None:
    """Run the worker.

    Args:
        argument: JSON of `parent` (process id), `socket`, `memory` (descriptors), `shape` (of the
            shared memory), `device`, `warm_up` (rule of tissue to load at once, or null) and
            `ahead` (slabs to map while there is no job).
    """
    given = json.loads(argument)
    _settle(given["parent"], given["device"])
    lines = _Lines()
    logger = logging.getLogger("modaltune")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    slabs, tiles, tile_px = given["shape"]
    shared = SharedTiles((slabs, tiles, tile_px), given["memory"])
    connection = Connection(given["socket"])
    connection.send(os.getpid())
    if given["warm_up"] is not None:
        from modaltune.engine.tissue import tissue_mask

        tissue_mask(np.zeros((8, 8, 3), dtype=np.uint8), given["warm_up"])
    serve(connection, shared, given["ahead"], lines)


if __name__ == "__main__":
    main(sys.argv[1])
