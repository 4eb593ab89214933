"""Tiles of several slides in batches of one size, in memory that is used again and again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Rgb = npt.NDArray[np.uint8]
Slide = TypeVar("Slide")

_LOOK_S = 0.1


@dataclass(frozen=True)
class Part(Generic[Slide]):
    """Tiles of one slide in a batch.

    Attributes:
        slide: Whose they are.
        indices: int64 [n], their places among the slide's tiles.
        start: Row of the first in the batch.
    """

    slide: Slide
    indices: Int64
    start: int

    @property
    def rows(self) -> slice:
        """Where they lie in the batch."""
        return slice(self.start, self.start + len(self.indices))


class Loan:
    """Tiles in somebody else's memory, which goes back once nobody uses them any more.

    Its maker is the first user, batches are others.

    Args:
        give_back: Called when the last user has ended, by that user's thread.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back, self._users, self._lock = give_back, 1, threading.Lock()

    def use(self) -> Loan:
        """Take note of one more user; return this."""
        with self._lock:
            self._users += 1
        return self

    def end(self) -> None:
        """Take note that a user has ended."""
        with self._lock:
            self._users -= 1
            is_over = not self._users
        if is_over:
            self._give_back()


@dataclass
class Batch(Generic[Slide]):
    """Up to as many tiles as there is room for.

    Attributes:
        memory: uint8 [most, side, side, 3], its own.
        count: Tiles that are there.
        parts: Whose they are, in the order of their rows.
        lent: As many tiles as there is room for, in memory of a loan; None where they are copied.
        loan: The loan.
    """

    memory: Rgb
    count: int = 0
    parts: list[Part[Slide]] = field(default_factory=list)
    lent: Rgb | None = None
    loan: Loan | None = None

    @property
    def tiles(self) -> Rgb:
        """Where the tiles lie, uint8 [most, side, side, 3]."""
        return self.memory if self.lent is None else self.lent

    @property
    def room(self) -> int:
        """Tiles that still fit."""
        return len(self.memory) - self.count

    def take(self, slide: Slide, indices: Int64, tiles: Rgb) -> None:
        """Copy tiles in; there must be room."""
        end = self.count + len(indices)
        self.memory[self.count : end] = tiles
        self.parts.append(Part(slide, indices, self.count))
        self.count = end

    def padded(self, multiple: int) -> Rgb:
        """Return the tiles, the last one repeated up to a multiple: every pass has one size.

        The same tile then gives the same bits whatever else was in the batch.
        """
        end = min(-(-self.count // multiple) * multiple, len(self.tiles))
        if self.count < end:
            self.tiles[self.count : end] = self.tiles[self.count - 1]
        return self.tiles[:end]


class BatchBuilder(Generic[Slide]):
    """Fills batches; waits where all memory is in use, which is the back-pressure.

    Args:
        batch_tiles: Tiles of a batch.
        tile_px: Side of a tile.
        batches: Batches that can exist at a time.
        stop: Set by whoever ends the run; waiting ends then.
    """

    def __init__(self, batch_tiles: int, tile_px: int, batches: int, stop: threading.Event) -> None:
        self._free: queue.SimpleQueue[Rgb] = queue.SimpleQueue()
        for _ in range(batches):
            self._free.put(np.empty((batch_tiles, tile_px, tile_px, 3), dtype=np.uint8))
        self._batches, self._stop = batches, stop
        self._current: Batch[Slide] | None = None

    @property
    def waiting(self) -> int:
        """Tiles in the batch that is not full yet."""
        return 0 if self._current is None else self._current.count

    @property
    def is_idle(self) -> bool:
        """Whether no full batch is in use."""
        return self._free.qsize() + (self._current is not None) == self._batches

    def add(
        self, slide: Slide, indices: Int64, tiles: Rgb, loan: Loan | None = None
    ) -> Iterator[Batch[Slide]]:
        """Add tiles; yields the batches that are full now. Ends early once stopped.

        Args:
            slide: Whose they are.
            indices: int64 [n], their places among the slide's tiles.
            tiles: uint8 [n, side, side, 3].
            loan: Lets whole batches use `tiles` itself; the others are copies, and all without one.
        """
        start = 0
        while start < len(indices):
            if self._current is None:
                memory = self._memory()
                if memory is None:
                    return
                end = start + len(memory)
                if loan is not None and end <= len(indices):
                    parts = [Part(slide, indices[start:end], 0)]
                    yield Batch(memory, len(memory), parts, tiles[start:end], loan.use())
                    start = end
                    continue
                self._current = Batch(memory)
            end = start + min(self._current.room, len(indices) - start)
            self._current.take(slide, indices[start:end], tiles[start:end])
            start = end
            if not self._current.room:
                yield from self.flush()

    def flush(self) -> Iterator[Batch[Slide]]:
        """Yield the batch at hand, full or not, if it holds anything."""
        batch, self._current = self._current, None
        if batch is not None:
            yield batch

    def give_back(self, batch: Batch[Slide]) -> None:
        """Let a batch's memory be filled again; any thread may."""
        if batch.loan is not None:
            batch.loan.end()
        self._free.put(batch.memory)

    def _memory(self) -> Rgb | None:
        while not self._stop.is_set():
            try:
                return self._free.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
        return None
