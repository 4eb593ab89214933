"""Where the time goes: of stages one after another, and of a stream whose stages overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# In the order of a slide's way. `decode` reads, decodes and resizes; `encode` preprocesses too.
STAGES = ("open", "mask", "overlay", "decode", "encode", "write")

# Called with stage, slide, and start and end in seconds of time.perf_counter.
Observer = Callable[[str, str, float, float], None]


class StageTimer:
    """Adds up wall-clock seconds of stages that follow each other; what none claims is `other`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time of a block to one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def elapsed_s(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self._started

    def split(self) -> dict[str, float]:
        """Return seconds per stage, with `other` for the rest of the elapsed time."""
        known = sum(self.seconds.values())
        return {**self.seconds, "other": max(self.elapsed_s - known, 0.0)}


class StreamClock:
    """Adds up seconds per stage over workers that run side by side; for several threads.

    Their sum may exceed the time that passed: that is the point of a stream. What counts is `idle`,
    in which the encoder had nothing to do between its first batch and its last.

    Attributes:
        seconds: Seconds by stage.
    """

    def __init__(self, observe: Observer | None = None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._observe = observe
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._running = 0
        self._busy_since = self._first = self._last = 0.0
        self._busy_s = 0.0

    def add(self, stages: dict[str, float]) -> None:
        """Add seconds that other processes spent."""
        with self._lock:
            for name, seconds in stages.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str, slide: str = "") -> Iterator[None]:
        """Charge the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.add({name: end - start})
            if self._observe is not None:
                self._observe(name, slide, start, end)

    @contextmanager
    def encoding(self, slide: str) -> Iterator[None]:
        """Charge the time of a block to `encode`, where blocks overlap once."""
        with self._lock:
            now = time.perf_counter()
            self._first = self._first or now
            if self._running == 0:
                self._busy_since = now
            self._running += 1
        try:
            yield
        finally:
            end = time.perf_counter()
            with self._lock:
                self._running -= 1
                self._last = end
                if self._running == 0:
                    self._busy_s += end - self._busy_since
            if self._observe is not None:
                self._observe("encode", slide, now, end)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    def _encoder(self) -> tuple[float, float]:
        """Seconds at work, and seconds from the first batch to the last."""
        with self._lock:
            now = time.perf_counter() if self._running else self._last
            running = now - self._busy_since if self._running else 0.0
            return self._busy_s + running, now - self._first

    @property
    def encoder_busy(self) -> float:
        """Share of the time from the first batch to the last in which the encoder was at work."""
        busy, span = self._encoder()
        return busy / span if span > 0 else 0.0

    def split(self) -> dict[str, float]:
        """Return seconds per stage, and `idle`: those between the first batch and the last."""
        busy, span = self._encoder()
        with self._lock:
            seconds = dict(self.seconds)
        return {**seconds, "encode": busy, "idle": span - busy}
