"""Where the time goes: seconds per stage, summed over slides."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("open", "mask", "read", "encode", "write")


class StageTimer:
    """Adds up wall-clock seconds per stage; what no stage claims is `other`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
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
