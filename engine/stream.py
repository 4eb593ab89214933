"""Slides to features as one stream: while one slide is encoded, the next are opened and decoded.

    child processes            pump thread              encoder threads          caller
    open, mask, decode  ──►  fill batches across  ──►  encode, share out  ──►  finished slides
    (`engine.decode`)        slides (`batches`)        to the slides

Every arrow is bounded, so whoever is slow slows down all before it: the decoder by its slabs of
shared memory, batches by their memory, and slides altogether by `StreamOptions.most_slides`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from modaltune.engine.batches import Batch, BatchBuilder, Loan
from modaltune.engine.cohort import SlideItem
from modaltune.engine.decode import (
    DecodeOptions,
    SlideDone,
    SlideFound,
    SlideRequest,
    TileBlock,
    TileDecoder,
)
from modaltune.engine.encoded_slide import EncodedSlide, OpenSlide
from modaltune.engine.errors import DeviceMemoryError, InputError
from modaltune.engine.profile import Observer, StreamClock

if TYPE_CHECKING:
    from modaltune.engine.encoders.runtime import TileEncoder

__all__ = ["EncodedSlide", "SlideSource", "SlideStream", "StreamOptions", "embed"]

logger = logging.getLogger(__name__)

_TILES_AT_ONCE = 32  # least of a batch: calls, locks and scattering then cost nothing beside it
_IN_FLIGHT = 2  # batches given to the encoder at a time: one waits while one is worked on
_LOOK_S = 0.1
_STARVED_S = 0.02


@dataclass(frozen=True)
class StreamOptions:
    """How a stream runs.

    Attributes:
        decode: How slides are tiled and decoded.
        batch_tiles: Tiles of a batch, a multiple of the encoder's batch size; None takes at least
            32 of them.
        finished_ahead: Slides that may wait for the encoder or the caller, beside those being
            decoded, before the stream waits.
    """

    decode: DecodeOptions = field(default_factory=DecodeOptions)
    batch_tiles: int | None = None
    finished_ahead: int = 4

    def __post_init__(self) -> None:
        for name in ("batch_tiles", "finished_ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; or leave it out")

    @property
    def slides_ahead(self) -> int:
        """Slides that the decoder is given at a time."""
        return (self.decode.lookahead or self.decode.most_workers + 2) + 1

    @property
    def most_slides(self) -> int:
        """Slides taken and not handed over that there may be at a time: 9 with 2 workers."""
        return self.slides_ahead + self.finished_ahead


class SlideSource(Protocol):
    """Where a stream takes its slides from; asked from one thread of the stream."""

    def take(self) -> SlideRequest | None:
        """Return a slide, or None where there is none just now."""
        ...

    def is_ended(self) -> bool:
        """Whether there will be no further slide; asked when none is in progress."""
        ...


class _Listed:
    """Slides of an iterable, taken one by one."""

    def __init__(self, items: Iterable[SlideItem]) -> None:
        self._items = iter(items)
        self._is_ended = False

    def take(self) -> SlideRequest | None:
        item = next(self._items, None)
        if item is None:
            self._is_ended = True
            return None
        return SlideRequest(item.slide_id, item.path, base_mpp=item.base_mpp)

    def is_ended(self) -> bool:
        return self._is_ended


class _Ended:
    """The last thing in the queue of finished slides."""


class SlideStream(Iterator[EncodedSlide]):
    """Encoded slides in the order they are finished; an iterator and a context manager.

    Memory, beside encoder and children: the decoder's shared memory (`DecodeOptions.shared_bytes`),
    three batches of `batch_tiles` tiles, and the features of `StreamOptions.most_slides` slides.

    Leaving the block, `close`, or an exception ends threads and processes and drops what is not
    finished.

    Args:
        source: Where slides come from.
        encoder: The tile encoder; any runtime.
        options: How to run.
        on_tiles: Called, from several threads, with the number of tiles encoded so far.
        observe: Called, from several threads, with every stretch of work (for timelines).
        decoder: A decoder of the same options that runs already; the stream closes it. None starts
            one.

    Attributes:
        clock: Where the time goes.
        batch_tiles: Tiles of a batch.

    Raises:
        InputError: `options` ask for a GPU that is not there, or `decoder` has others.
    """

    def __init__(
        self,
        source: SlideSource,
        encoder: TileEncoder,
        options: StreamOptions | None = None,
        *,
        on_tiles: Callable[[int], None] | None = None,
        observe: Observer | None = None,
        decoder: TileDecoder | None = None,
    ) -> None:
        options = options or StreamOptions()
        if decoder is not None and decoder.options != options.decode:
            raise InputError(
                f"decoder must have the stream's options {options.decode}, got {decoder.options}; "
                "make it of them"
            )
        self.clock = StreamClock(observe)
        self._source, self._encoder, self._options = source, encoder, options
        self._multiple = encoder.batch_size
        wanted = max(options.batch_tiles or _TILES_AT_ONCE, 1)
        self.batch_tiles = -(-wanted // self._multiple) * self._multiple
        self._on_tiles, self._tiles, self._counting = on_tiles, 0, threading.Lock()
        self._stop = threading.Event()
        self._finished: queue.SimpleQueue[EncodedSlide | BaseException | _Ended] = (
            queue.SimpleQueue()
        )
        self._asked: dict[str, SlideRequest] = {}
        self._open: dict[str, OpenSlide] = {}
        self._taken = self._handed_over = 0
        tile_px = options.decode.tiles.tile_px
        self._batches: BatchBuilder[OpenSlide] = BatchBuilder(
            self.batch_tiles, tile_px, _IN_FLIGHT + 1, self._stop
        )
        self._is_over = False
        self._decoder = decoder or TileDecoder(options.decode)
        self._threads = ThreadPoolExecutor(_IN_FLIGHT, "modaltune-encode")
        self._pump = threading.Thread(target=self._run, name="modaltune-pump", daemon=True)
        self._pump.start()

    def __next__(self) -> EncodedSlide:
        if self._is_over:
            raise StopIteration
        found = self._finished.get()
        if isinstance(found, EncodedSlide):
            self._handed_over += 1
            return found
        self.close()
        if isinstance(found, BaseException):
            raise found
        raise StopIteration

    def close(self) -> None:
        """End threads and processes; waits for the batch in work. May be called again."""
        self._is_over = True
        self._stop.set()
        self._pump.join()
        self._open.clear()

    def __enter__(self) -> SlideStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        """Pump: slides into the decoder, its tiles into batches, batches into the encoder."""
        end: BaseException | _Ended = _Ended()
        try:
            with self._decoder, self._threads:
                while not self._stop.is_set() and self._turn():
                    pass
        except BaseException as error:  # raised where the caller is
            end = error
        self._finished.put(end)

    def _turn(self) -> bool:
        """Do one thing; return False when all is done."""
        self._take_slides()
        if not self._decoder.in_progress:
            self._submit(self._batches.flush())
            if self._batches.is_idle and not self._open and self._source.is_ended():
                return False
            self._stop.wait(_STARVED_S)
            return True
        # A batch that is not full waits for more tiles as long as the encoder has others.
        is_starved = bool(self._batches.waiting) and self._batches.is_idle
        try:
            event = self._decoder.next_event(_STARVED_S if is_starved else _LOOK_S)
        except TimeoutError:
            if is_starved:
                self._submit(self._batches.flush())
            return True
        if isinstance(event, SlideFound):
            asked = self._asked[event.key]
            self._open[event.key] = OpenSlide(asked, event.survey, self._encoder.width)
        elif isinstance(event, TileBlock):
            self._add(event)
        elif isinstance(event, SlideDone):
            self.clock.add(event.seconds)
            self._asked.pop(event.key)
            self._settle(self._open[event.key].delivered(event.bad_tiles, event.seconds))
        else:
            self._open.pop(event.key, None)
            asked = self._asked.pop(event.key)
            self._finished.put(
                EncodedSlide(asked, reason=event.reason, is_disk_full=event.is_disk_full)
            )
        return True

    def _take_slides(self) -> None:
        # Of both counters one thread writes and others read.
        while (
            self._decoder.in_progress < self._options.slides_ahead
            and self._taken - self._handed_over < self._options.most_slides
        ):
            request = self._source.take()
            if request is None:
                return
            if request.key in self._open:  # decoded, and not encoded yet
                raise InputError(
                    f"key must be distinct among the slides in progress, got {request.key!r} "
                    "twice; number them"
                )
            self._decoder.submit(request)
            self._asked[request.key] = request
            self._taken += 1

    def _add(self, block: TileBlock) -> None:
        """Put a block into batches; its memory goes back when they need it no more."""
        slide = self._open[block.key]
        loan = Loan(block.release)
        try:
            good = ~block.is_bad
            is_whole = bool(good.all())
            indices = block.indices if is_whole else block.indices[good]
            tiles = block.tiles if is_whole else block.tiles[good]
            slide.expect(block.indices[block.is_bad], len(indices))
            self._submit(self._batches.add(slide, indices, tiles, loan))
        finally:
            loan.end()

    def _submit(self, batches: Iterable[Batch[OpenSlide]]) -> None:
        for batch in batches:
            self._threads.submit(self._encode, batch)

    def _encode(self, batch: Batch[OpenSlide]) -> None:
        """Encode a batch and share its features out; runs in the encoder's threads."""
        try:
            if self._stop.is_set():
                return
            with self.clock.encoding(batch.parts[0].slide.request.key):
                self._share_out(batch)
            self._count(batch.count)
            for part in batch.parts:
                self._settle(part.slide.encoded(len(part.indices)))
        except BaseException as error:
            self._stop.set()
            self._finished.put(error)
        finally:
            self._batches.give_back(batch)

    def _share_out(self, batch: Batch[OpenSlide]) -> None:
        tiles = batch.padded(self._multiple)
        try:
            features = self._encoder.encode(tiles).numpy()
        except DeviceMemoryError:
            raise  # every slide would fail by it
        except InputError as error:
            if len(batch.parts) == 1:
                batch.parts[0].slide.fail(str(error))
                return
            # Whose tiles are they that can't be encoded?
            for part in batch.parts:
                try:
                    alone = self._encoder.encode(batch.tiles[part.rows]).numpy()
                    part.slide.features[part.indices] = alone
                except DeviceMemoryError:
                    raise
                except InputError as own:
                    part.slide.fail(str(own))
            return
        for part in batch.parts:
            part.slide.features[part.indices] = features[part.rows]

    def _count(self, tiles: int) -> None:
        with self._counting:
            self._tiles += tiles
            if self._on_tiles is not None:
                self._on_tiles(self._tiles)

    def _settle(self, slide: OpenSlide | None) -> None:
        """Hand a slide over that has nothing left to wait for."""
        if slide is not None:
            self._open.pop(slide.request.key, None)
            self._finished.put(slide.finished())


def embed(
    slides: Iterable[SlideItem | Path | str],
    *,
    encoder: TileEncoder | str,
    options: StreamOptions | None = None,
    observe: Observer | None = None,
) -> SlideStream:
    """Encode slides as a stream, nothing written: the engine inside another program.

    Args:
        slides: Slide files or items; taken as they are needed, so it may be a generator.
        encoder: A tile encoder, or the name of one.
        options: How to run.
        observe: Called with every stretch of work.

    Returns:
        An iterator over the slides in the order they are finished; also a context manager, to end
        it early. A slide's `key` is its id, a file's stem. Slides that fail come with a reason and
        without features.

    Raises:
        InputError: The encoder is unknown, or something else asked for breaks a rule; from the
            iterator: two slides in progress have one id.
        WeightsError: The encoder's weights are missing.
        DeviceMemoryError: From the iterator: the encoder has no memory for a single tile.

    Example:
        >>> with embed(paths, encoder="efficientnet-lite0") as slides:
        ...     for slide in slides:
        ...         if slide.status == "failed":
        ...             print(slide.request.path, slide.reason)
        ...         else:
        ...             use(slide.key, slide.features, slide.coords)  # [N, D] float32, [N, 2] int64
    """
    if isinstance(encoder, str):
        # Here: it loads torch, which whoever has an encoder has paid for already.
        from modaltune.engine.encoders import load_encoder

        encoder = load_encoder(encoder, runtime="auto")
    return SlideStream(_Listed(map(_as_item, slides)), encoder, options, observe=observe)


def _as_item(slide: SlideItem | Path | str) -> SlideItem:
    if isinstance(slide, SlideItem):
        return slide
    path = Path(slide)
    return SlideItem(path, path.stem, path.stem)
