"""A slide on its way through the decoder, and what the dispatcher says of it to the consumer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from modaltune.engine.decode_jobs import SlideRequest, Survey

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(eq=False)
class Progress:
    """One slide on its way.

    Attributes:
        request: What was asked for.
        generation: The caller's mark, to tell slides that it has dropped.
        survey: What was found, None before.
        groups: Groups not yet handed out.
        in_hand: Jobs in workers' hands.
        delivered: Tiles delivered, bad ones too.
        bad: Bad tiles among them.
        is_over: Done, failed or dropped: nothing more is delivered.
        seconds: Seconds that workers spent per stage.
    """

    request: SlideRequest
    generation: int = 0
    survey: Survey | None = None
    groups: deque[Int64] = field(default_factory=deque)
    in_hand: int = 0
    delivered: int = 0
    bad: int = 0
    is_over: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Event: a survey is done."""

    slide: Progress
    survey: Survey


@dataclass(frozen=True)
class Ready:
    """Event: a slab holds the tiles of one group."""

    slide: Progress
    indices: Int64
    is_bad: Bool
    slab: int


@dataclass(frozen=True)
class Over:
    """Event: a slide is done, or failed with a reason."""

    slide: Progress
    reason: str = ""
    is_disk_full: bool = False


@dataclass(frozen=True)
class Broken:
    """Event: no worker can be started."""

    reason: str


Event = Found | Ready | Over | Broken
