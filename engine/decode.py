"""Slides to tiles in memory, decoded by child processes: the engine's source of pixels.

A slide is surveyed (opened, masked, tiled) and decoded in jobs of some dozens of tiles that several
workers share, while the next slides are surveyed already. Pixels come through shared memory; what
hangs, crashes or grows too large costs one slide. How little is read for it: `engine.decode_plan`.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import numpy as np
import numpy.typing as npt

from modaltune.engine.decode_dispatch import Dispatcher, DispatchOptions
from modaltune.engine.decode_jobs import Device, SlideRequest, Survey, TileOptions
from modaltune.engine.decode_progress import Broken, Event, Found, Over, Progress, Ready
from modaltune.engine.errors import DecodeError, InputError
from modaltune.engine.shared_tiles import SharedTiles

__all__ = [
    "DecodeError",
    "DecodeOptions",
    "SlideDone",
    "SlideFailed",
    "SlideFound",
    "SlideRequest",
    "TileBlock",
    "TileDecoder",
    "TileOptions",
]

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Rgb = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)

MOST_WORKERS = 16
_FIRST_WORKERS = 2
_BLOCK_TILES, _BLOCK_PX = 64, 2**24
# Slabs per worker: one being filled, one waiting to be; and two with the consumer.
_SLABS_PER_WORKER, _SLABS_OF_CONSUMER = 2, 2
_CLOSE_S = 30.0
_STUCK_S = 30.0


@dataclass(frozen=True)
class DecodeOptions:
    """How slides are decoded.

    Attributes:
        tiles: How they are tiled.
        workers: Child processes; None starts 2 and adds one whenever the consumer waits while all
            are at work, up to the cores this process may use and 16.
        block_tiles: Most tiles of a block; None takes 64, fewer where those exceed 2**24 px.
        device: "cuda" has cuCIM decode on the GPU (files it reads; off until measured).
        half_scale_jpeg: Decode JPEG tiles at half scale where the level read has exactly half the
            mpp wanted, all edges are even and `engine.file_tiles` can read them. Faster; pixels
            differ slightly.
        bad_share: Share of a slide's tiles that may be unreadable, 0..1. One tile always may,
            unless the share is 0.
        decode_timeout_s: Seconds for one block; then its worker is ended and its slide fails.
        survey_timeout_s: Seconds for opening, masking and tiling one slide, likewise.
        memory_mib: Memory of one worker without shared pixels, MiB, likewise.
        lookahead: Slides opened ahead; None takes workers + 2.
    """

    tiles: TileOptions = field(default_factory=TileOptions)
    workers: int | None = None
    block_tiles: int | None = None
    device: Device = "cpu"
    half_scale_jpeg: bool = False
    bad_share: float = 0.01
    decode_timeout_s: float = 120.0
    survey_timeout_s: float = 600.0
    memory_mib: int = 4096
    lookahead: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "block_tiles", "lookahead"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; or leave it out")
        if not 0.0 <= self.bad_share <= 1.0:
            raise InputError(f"bad_share must be in 0..1, got {self.bad_share}; 0.01 if left out")
        for name in ("decode_timeout_s", "survey_timeout_s", "memory_mib"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be finite and > 0, got {value}; or leave it out")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda, got {self.device!r}; the default is cpu")

    @property
    def most_workers(self) -> int:
        """The number of workers, or the most there will be."""
        return self.workers or max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0))))

    @property
    def tiles_per_block(self) -> int:
        """Most tiles of a block."""
        return self.block_tiles or max(1, min(_BLOCK_TILES, _BLOCK_PX // self.tiles.tile_px**2))

    @property
    def slabs(self) -> int:
        """Blocks that can exist at a time."""
        return _SLABS_PER_WORKER * self.most_workers + _SLABS_OF_CONSUMER

    @property
    def shared_bytes(self) -> int:
        """Most shared memory: (2 workers + 2) x tiles of a block x 3 x tile_px**2 bytes.

        75 MB for 2 workers and the default tiles. Each worker has about 25 MB of its own besides
        (110 to 130 MB once it has surveyed a slide), and libraries that only workers load 80 MB.
        """
        return self.slabs * self.tiles_per_block * 3 * self.tiles.tile_px**2


@dataclass(frozen=True)
class SlideFound:
    """A slide was opened and tiled; its blocks follow."""

    key: str
    survey: Survey


@dataclass(frozen=True)
class SlideDone:
    """Every tile of a slide was delivered; `seconds` is the workers' time per stage."""

    key: str
    tiles: int
    bad_tiles: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class SlideFailed:
    """A slide failed; blocks of it that were delivered are of no use.

    `is_disk_full`: its overlay had no room, which is no fault of the slide.
    """

    key: str
    reason: str
    is_disk_full: bool = False


class TileBlock:
    """Some tiles of one slide, in shared memory until `release`.

    A context manager, which releases it.

    Attributes:
        key: The slide.
        indices: int64 [n], the tiles' places in the grid's coords.
        tiles: uint8 [n, tile_px, tile_px, 3], RGB; a view that must not be used after `release`.
        is_bad: bool [n], tiles that could not be read: white, to be dropped.
    """

    def __init__(self, event: Ready, tiles: Rgb, dispatcher: Dispatcher) -> None:
        self.key = event.slide.request.key
        self.indices, self.is_bad = event.indices, event.is_bad
        self.tiles = tiles
        self._slab: int | None = event.slab
        self._dispatcher = dispatcher

    def __len__(self) -> int:
        return len(self.indices)

    def release(self) -> None:
        """Give the memory back for other tiles; any thread may, once or more."""
        slab, self._slab = self._slab, None
        if slab is not None:
            self._dispatcher.give_back(slab)

    def __enter__(self) -> TileBlock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


DecodeEvent = SlideFound | TileBlock | SlideDone | SlideFailed


class TileDecoder:
    """Decodes slides in child processes; a context manager.

    Blocks come in any order, of several slides in turns; all blocks of a slide come between its
    SlideFound and its SlideDone or SlideFailed. At most `options.slabs` blocks exist at a time, so
    a consumer that does not release them stops the decoder: that is the back-pressure.

    Example:
        with TileDecoder() as decoder:
            for event in decoder.stream(SlideRequest(str(p), p) for p in paths):
                if isinstance(event, SlideFound):
                    features[event.key] = np.empty((len(event.survey.grid), width), np.float32)
                elif isinstance(event, TileBlock):
                    with event:
                        features[event.key][event.indices] = encode(event.tiles)
                elif isinstance(event, SlideDone):
                    write(event.key, features.pop(event.key))
                else:
                    report(event.key, event.reason)
    """

    def __init__(self, options: DecodeOptions | None = None, *, is_warmed_up: bool = False) -> None:
        """Start the workers; warmed up, the first loads what finds tissue (a second's work) now.

        Raises:
            InputError: `device` is cuda and there is no GPU.
            OSError: The system gives no memory or no process.
        """
        self.options = options = options or DecodeOptions()
        if options.device == "cuda":
            from modaltune.engine._reader_cucim import require_cuda

            require_cuda()
        most = options.most_workers
        shape = options.slabs, options.tiles_per_block, options.tiles.tile_px
        self._shared = SharedTiles(shape)
        self._keys: set[str] = set()
        self._generation = 0
        self._dispatcher = Dispatcher(
            self._shared,
            DispatchOptions(
                tiles=options.tiles,
                device=options.device,
                is_half_scale=options.half_scale_jpeg,
                first_workers=min(_FIRST_WORKERS, most) if options.workers is None else most,
                most_workers=most,
                lookahead=options.lookahead or most + 2,
                decode_timeout_s=options.decode_timeout_s,
                survey_timeout_s=options.survey_timeout_s,
                memory_bytes=options.memory_mib * 2**20,
                bad_share=options.bad_share,
                is_warmed_up=is_warmed_up,
            ),
        )
        self._dispatcher.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return self._dispatcher.pids

    @property
    def ready_pids(self) -> tuple[int, ...]:
        """Process ids of the workers that have started and take jobs."""
        return self._dispatcher.ready_pids

    @property
    def in_progress(self) -> int:
        """Slides submitted and not yet done or failed."""
        return len(self._keys)

    def submit(self, request: SlideRequest) -> None:
        """Take a slide on; returns at once.

        Raises:
            InputError: A slide of this key is in progress, or the decoder is closed.
        """
        if self._shared.descriptor < 0:  # one that broke down says why in `next_event`
            raise InputError("decoder must be open to take slides, got a closed one; make another")
        if request.key in self._keys:
            raise InputError(
                f"key must be distinct among the slides in progress, got {request.key!r} twice; "
                "number them"
            )
        self._keys.add(request.key)
        slide = Progress(request, self._generation)
        self._dispatcher.call(partial(self._dispatcher.submit, slide))

    def next_event(self, timeout_s: float | None = None) -> DecodeEvent:
        """Wait for what comes next; for one consuming thread.

        Raises:
            TimeoutError: Nothing came in time.
            DecodeError: The decoder's processes don't start, or it is closed.
        """
        while True:
            event = self._wait(timeout_s)
            if isinstance(event, Broken):
                raise DecodeError(event.reason)
            if event.slide.generation == self._generation:
                return self._public(event)
            if isinstance(event, Ready):  # of a slide that was dropped
                self._dispatcher.give_back(event.slab)

    def _wait(self, timeout_s: float | None) -> Event:
        """Take the next event, and let the dispatcher know of waiting for it."""
        try:
            return self._dispatcher.events.get_nowait()
        except queue.Empty:
            if not self._dispatcher.is_alive():
                raise DecodeError("the decoder is closed") from None
        self._dispatcher.waiting_since = time.monotonic()
        try:
            return self._dispatcher.events.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TimeoutError(f"no tiles within {timeout_s} s") from error
        finally:
            self._dispatcher.waiting_since = None

    def stream(self, requests: Iterable[SlideRequest]) -> Iterator[DecodeEvent]:
        """Decode slides; yields events until all are done or failed.

        Requests are taken as they are needed. Leaving the loop drops the slides in progress; the
        decoder stays usable.

        Raises:
            InputError: Two slides in progress have one key.
            DecodeError: The decoder's processes don't start.
        """
        waiting = iter(requests)
        is_open = True
        ahead = (self.options.lookahead or self.options.most_workers + 2) + 1
        try:
            while True:
                while is_open and self.in_progress < ahead:
                    request = next(waiting, None)
                    if request is None:
                        is_open = False
                    else:
                        self.submit(request)
                if not self.in_progress:
                    return
                yield self._patient_event()
        finally:
            self._drop_all()

    def _patient_event(self) -> DecodeEvent:
        """Wait for the next event, and say so where blocks that are kept may be the cause."""
        while True:
            try:
                return self.next_event(_STUCK_S)
            except TimeoutError:
                logger.info("no tiles for %g s; are all blocks released?", _STUCK_S)

    def _public(self, event: Found | Ready | Over) -> DecodeEvent:
        """Turn the dispatcher's event into the caller's."""
        slide = event.slide
        key = slide.request.key
        if isinstance(event, Found):
            return SlideFound(key, event.survey)
        if isinstance(event, Ready):
            tiles = self._shared.array[event.slab, : len(event.indices)]
            return TileBlock(event, tiles, self._dispatcher)
        self._keys.discard(key)
        if event.reason:
            return SlideFailed(key, event.reason, event.is_disk_full)
        return SlideDone(key, slide.delivered, slide.bad, slide.seconds)

    def _drop_all(self) -> None:
        """Drop the slides in progress; what comes of them still is passed over."""
        if self._keys:
            self._keys.clear()
            self._generation += 1
            self._dispatcher.call(self._dispatcher.drop_all)

    def close(self) -> None:
        """End the workers; blocks that are out stay valid. May be called again."""
        self._dispatcher.call(self._dispatcher.stop)
        self._dispatcher.join(_CLOSE_S)
        self._shared.close()

    def __enter__(self) -> TileDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
