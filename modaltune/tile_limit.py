"""How many tiles of a case are used, and which: once and for all, or anew in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from modaltune.cases import Case, Rows

TilePolicy = Literal["all", "random", "every_epoch"]


@dataclass(frozen=True)
class TileLimit:
    """How many tiles of a case are used: a policy that is recorded with the run.

    Attributes:
        policy: `all`; `random`: at most `max_tiles`, the same ones for a case and seed;
            `every_epoch`: at most `max_tiles` in training, others in each epoch, and elsewhere all.
        max_tiles: The limit.
        seed: Of the draw.
    """

    policy: TilePolicy = "all"
    max_tiles: int = 25_000
    seed: int = 0

    def rows(
        self, case_id: str, counts: Sequence[int], epoch: int | None = None
    ) -> tuple[Rows | None, ...]:
        """Return the rising rows of each slide that are kept, or nothing where all are.

        Args:
            case_id: The patient; decides the draw together with the seed.
            counts: Tiles of each slide.
            epoch: Of training, 0-based; None outside.
        """
        total = sum(counts)
        read_all = self.policy == "all" or (self.policy == "every_epoch" and epoch is None)
        if read_all or total <= self.max_tiles:
            return ()
        digest = hashlib.sha256(case_id.encode()).digest()
        numbers = [self.seed, int.from_bytes(digest[:8], "big")]
        if self.policy == "every_epoch" and epoch is not None:
            numbers.append(epoch)
        rng = np.random.default_rng(numbers)
        chosen = np.sort(rng.choice(total, self.max_tiles, replace=False)).astype(np.int64)
        ends = np.cumsum(counts)
        parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        return tuple(part - start for part, start in zip(parts, [0, *ends[:-1]], strict=True))

    def drawn(self, case: Case, epoch: int) -> Case:
        """Return a whole case with the rows that training uses of it in an epoch, 0-based."""
        counts = [len(slide) for slide in case.slides]
        return replace(case, kept=self.rows(case.case_id, counts, epoch))
