"""How busy the training loop is on given cases: what is computed, waited for and written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from modaltune.errors import InputError
from modaltune.processes import make_accelerator
from modaltune.run_config import RunConfig
from modaltune.train import Part, Training, Watcher, fit
from modaltune.train_metrics import LoopClock
from modaltune.train_prepare import prepare
from modaltune.train_run import device_of
from modaltune.train_signals import TrainingStopped

WARMUP = 1  # steps not counted: compilation, memory pools, and the first read, ahead of nothing


@dataclass
class _Clocked(Watcher):
    """Counts steps after the first, and ends the loop."""

    last: int
    slides: Mapping[str, int]
    clock: LoopClock = field(default_factory=LoopClock)
    steps: int = 0
    _mark: float = 0.0

    def step(self, training: Training, parts: Sequence[Part], loss: float, waited_s: float) -> None:
        """Count a step."""
        now = time.perf_counter()
        self.steps += 1
        if self.steps > WARMUP:
            batches = [batch for batch, _ in parts]
            self.clock.count(batches, self.slides, now - self._mark, waited_s)
        if self.steps >= self.last:
            raise TrainingStopped(self.steps)
        self._mark = time.perf_counter()


def profile_loop(config: RunConfig, steps: int = 50) -> dict[str, Any]:
    """Train a few steps of a run, writing nothing, and say how the loop's time splits.

    Files are read as they lie: from the page cache where they were read before.

    Args:
        config: Of the run.
        steps: Steps to take, one of them before the clock starts; fewer where the run is shorter.

    Returns:
        `busy` and all of `LoopClock.rates`, `steps` counted, `learner` and `device`.

    Raises:
        InputError: The configuration breaks a rule, or the run has no second step.
    """
    device = device_of(config)
    prepared = prepare(config)
    prepared.learner.model.to(device)
    accelerator = make_accelerator(prepared.learner, config.training)
    watcher = _Clocked(steps, prepared.train.slide_counts)
    recipe, train = config.training, prepared.train
    with suppress(TrainingStopped):  # as asked
        fit(prepared.learner, train, recipe, watcher=watcher, accelerator=accelerator)
    counted = watcher.steps - WARMUP
    if counted < 1:
        raise InputError(
            f"steps must be 2 or more, the first of which is not counted, got {watcher.steps}; "
            "raise --steps, or training.epochs"
        )
    about = {"learner": config.learner.kind, "device": str(device), "steps": counted}
    return {**about, **watcher.clock.rates()}


def loop_table(found: Mapping[str, Any]) -> Table:
    """Return how the time splits as a table for the screen."""
    wall = found["compute_s"] + found["waited_s"]
    title = f"{found['steps']} training steps of {found['learner']} on {found['device']}"
    table = Table(title=title, title_justify="left")
    table.add_column("the loop")
    for column in ("seconds", "share"):
        table.add_column(column, justify="right")
    for said, key in (("computes", "compute_s"), ("waits for data", "waited_s")):
        table.add_row(said, f"{found[key]:.3f}", f"{found[key] / wall:.1%}")
    return table
