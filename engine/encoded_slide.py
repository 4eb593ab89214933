"""A slide on its way through the stream, and what comes out at the end."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from modaltune.engine.decode_jobs import SlideRequest, Survey

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


def _no_features() -> Float32:
    return np.empty((0, 0), dtype=np.float32)


def _no_coords() -> Int64:
    return np.empty((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class EncodedSlide:
    """A slide's features, or why there are none.

    Attributes:
        request: The slide, as its source asked for it.
        features: float32 [N, D], one row per tile; [0, D] of an empty slide, [0, 0] of a failed.
        coords: int64 [N, 2], (x, y) of the tiles' top left corners in level-0 px.
        survey: Geometry and provenance; None of a slide that could not be opened.
        bad_tiles: Tiles left out because they could not be read.
        reason: Why it failed or has no tiles.
        seconds: Seconds of other processes by stage.
        is_disk_full: Whether it failed because its overlay had no room.
    """

    request: SlideRequest
    features: Float32 = field(default_factory=_no_features, repr=False)
    coords: Int64 = field(default_factory=_no_coords, repr=False)
    survey: Survey | None = None
    bad_tiles: int = 0
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    is_disk_full: bool = False

    @property
    def key(self) -> str:
        """Its name: the slide's id."""
        return self.request.key

    @property
    def status(self) -> Literal["done", "empty", "failed"]:
        """What became of it."""
        if len(self.features):
            return "done"
        return "failed" if self.survey is None or len(self.survey.grid) else "empty"


class OpenSlide:
    """A slide in progress: filled by several threads, finished when all its tiles are back.

    Attributes:
        request: The slide.
        features: float32 [N, D]; rows are filled as they come.
    """

    def __init__(self, request: SlideRequest, survey: Survey, width: int) -> None:
        self.request = request
        self.features = np.empty((len(survey.grid), width), dtype=np.float32)
        self._survey = survey
        self._is_bad = np.zeros(len(survey.grid), dtype=bool)
        self._lock = threading.Lock()
        self._pending = 0  # tiles given to the encoder that have not come back
        self._is_delivered = False
        self._reason = ""
        self._bad_tiles = 0
        self._seconds: dict[str, float] = {}

    def expect(self, bad: Int64, tiles: int) -> None:
        """Take note of tiles that can't be read, and of others that go to the encoder."""
        with self._lock:
            self._is_bad[bad] = True
            self._pending += tiles

    def encoded(self, tiles: int) -> OpenSlide | None:
        """Take note that tiles came back; return this slide if it is finished now."""
        with self._lock:
            self._pending -= tiles
            return self if self._is_delivered and not self._pending else None

    def delivered(self, bad_tiles: int, seconds: dict[str, float]) -> OpenSlide | None:
        """Take note that no tiles will follow; return this slide if it is finished now."""
        with self._lock:
            self._is_delivered = True
            self._bad_tiles, self._seconds = bad_tiles, seconds
            return None if self._pending else self

    def fail(self, reason: str) -> None:
        """Take note that tiles could not be encoded; the first reason stands."""
        with self._lock:
            self._reason = self._reason or reason

    def finished(self) -> EncodedSlide:
        """Return what comes out; bad tiles are left out."""
        grid, reason = self._survey.grid, self._reason
        if not reason and len(grid) and self._is_bad.all():
            reason = f"none of its {len(grid)} tiles can be read; copy the slide again"
        if reason:
            return EncodedSlide(self.request, survey=self._survey, reason=reason)
        good = ~self._is_bad
        is_whole = bool(good.all())
        return EncodedSlide(
            self.request,
            self.features if is_whole else self.features[good],
            grid.coords if is_whole else grid.coords[good],
            self._survey,
            self._bad_tiles,
            grid.reason,
            self._seconds,
        )
