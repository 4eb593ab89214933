"""ModalTune's stream as a process, in the terms of `end_to_end_rival`: a small slide, then one.

With an encoder that costs nothing, what is left is the engine.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modaltune import __version__
from modaltune.benchmarks.end_to_end_rival import null_features
from modaltune.engine.decode import SlideRequest
from modaltune.engine.encoders import load_encoder
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.errors import InputError
from modaltune.engine.stream import SlideStream


class NullEncoder(TileEncoder):
    """A few pixels of a tile are its features."""

    runtime = "null"

    def __init__(self) -> None:
        spec = replace(get_spec("efficientnet-lite0"), name="null", width=27)
        super().__init__(spec, device=torch.device("cpu"), precision="fp32", batch_size=32)

    @property
    def weights_sha256(self) -> str:
        """It has no weights."""
        return ""

    @property
    def version(self) -> str:
        """The package's."""
        return __version__

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        return null_features(tiles[:size].numpy())


class TwoSlides:
    """A source of two slides, of which the second one waits until it is let go.

    Attributes:
        let_go: Set to hand out the second one.
        taken_at: When the stream took the latest one. It looks for new ones every 20 ms; those of
            a cohort are there before they are asked for.
    """

    def __init__(self, first: Path, second: Path) -> None:
        self._waiting = [SlideRequest("second", second), SlideRequest("first", first)]
        self.let_go = threading.Event()
        self.taken_at = 0.0

    def take(self) -> SlideRequest | None:
        """Return the next slide, or None while it waits."""
        if not self._waiting or (len(self._waiting) == 1 and not self.let_go.is_set()):
            return None
        self.taken_at = time.monotonic()
        return self._waiting.pop()

    def is_ended(self) -> bool:
        """Whether both were taken."""
        return not self._waiting


def main(path: str) -> None:
    """Do the job of a file.

    Raises:
        InputError: A slide could not be embedded.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    encoder = NullEncoder() if job["encoder"] == "null" else load_encoder(runtime="auto")
    source = TwoSlides(Path(job["small_slide"]), Path(job["slide"]))
    with SlideStream(source, encoder) as slides:
        found = next(slides)
        source.let_go.set()
        second = next(slides)
        seconds = time.monotonic() - source.taken_at
    for slide in (found, second):
        if slide.status != "done":
            raise InputError(slide.reason)
    if job["save"]:
        np.savez(job["save"], features=second.features, coords=second.coords)
    answer = {"seconds": seconds, "tiles": len(second.coords), "version": __version__}
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
