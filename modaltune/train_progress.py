"""What a user sees of a training run: one bar with loss, rates, memory and time left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from modaltune.train_metrics import LoopClock

_SHOWN = (
    ("loss", "validation loss"),
    ("balanced_accuracy", "balanced accuracy"),
    ("c_index", "c-index"),
)


class TrainProgress:
    """A bar on a console, or nothing.

    Args:
        console: Where to; None for silence.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, steps: int, done: int) -> None:
        """Show the bar: steps in all, and those done by an earlier run."""
        if self._console is None:
            return
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, said="")
        self._bar.start()

    def step(self, steps: int, loss: float, clock: LoopClock, memory: float) -> None:
        """Show a step."""
        if self._bar is None or self._task is None:
            return
        rates = clock.rates()
        done = (
            f"{rates['slides_per_s']:.3g} slides/s  {rates['tiles_per_s']:,.0f} tiles/s"
            if clock.slides
            else f"{rates['cases_per_s']:.3g} cases/s"
        )
        said = f"loss {loss:.4g}  {done}  {memory / 1024:.1f} GiB  busy {rates['busy']:.0%}"
        self._bar.update(self._task, completed=steps, said=said)

    def say(self, text: str) -> None:
        """Show what is done beside steps."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, said=text)

    def validated(self, epoch: int, loss: float, found: Mapping[str, Any], is_best: bool) -> None:
        """Leave a line about a validated epoch."""
        if self._console is None:
            return
        figures = "  ".join(
            f"{label} {found[name]:.3f}" for name, label in _SHOWN if found.get(name) is not None
        )
        mark = "  best so far" if is_best else ""
        self._console.print(
            f"epoch {epoch}: loss {loss:.4g}  {figures or 'no validation figure'}{mark}",
            highlight=False,
        )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self.say("")
            self._bar.stop()
            self._bar = None
