"""What goes on around the training loop: metrics, validation, checkpoints, early stop, signals."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modaltune.engine.atomic import fsync_folder
from modaltune.errors import CheckpointError
from modaltune.kernels import pin_products, product_choice, product_libraries
from modaltune.run_config import RunConfig
from modaltune.train import EpochLog, Part, Training, Watcher
from modaltune.train_checkpoint import (
    Saved,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    restore,
    write_checkpoint,
)
from modaltune.train_metrics import LoopClock, MetricsLog, memory_mib
from modaltune.train_progress import TrainProgress
from modaltune.train_signals import StopRequest, TrainingStopped

logger = logging.getLogger(__name__)

Validation = Callable[[Training], dict[str, Any]]
# What a run is chosen by unless it is told, the first of them that validation gives.
CHOSEN_BY = ("balanced_accuracy", "c_index")
LOSS = "loss"  # of these figures the one of which less is better


@dataclass
class Choice:
    """The best epoch so far.

    Attributes:
        by: Figure of validation it was chosen by; None without any: the last epoch.
        value: Its value.
        epoch: Epochs done then.
        checkpoint: Stem of its checkpoint.
        stale: Validations since one was better than all before.
    """

    by: str | None = None
    value: float | None = None
    epoch: int = 0
    checkpoint: str | None = None
    stale: int = 0

    def offer(self, found: Mapping[str, Any], epoch: int, first: str = CHOSEN_BY[0]) -> bool:
        """Take note of a validation; whether it is at least as good as the best one.

        Args:
            found: Figures of the validation.
            epoch: Epochs done.
            first: The figure to choose by. As long as no validation has had it, the first of
                `CHOSEN_BY` that there is.
        """
        names = (first, *CHOSEN_BY)
        if self.by not in (None, first) and found.get(first) is not None:
            self.by, self.value = first, None  # the figure asked for is there now
        by = self.by or next((n for n in names if found.get(n) is not None), None)
        value = None if by is None else found.get(by)
        gain = math.inf
        if value is None:
            gain = math.nan
        elif self.value is not None:
            gain = self.value - value if by == LOSS else value - self.value
        if by is not None:  # without any figure there is nothing to wait for
            self.stale = 0 if gain > 0 else self.stale + 1
        if by is not None and not gain >= 0:
            return False
        self.by, self.value, self.epoch = by, value, epoch
        return True


@dataclass
class RunWatcher(Watcher):
    """Watches a run that is written to a folder.

    Attributes:
        config: Of the run.
        folder: Of its checkpoints.
        facts: JSON values that a continued run must agree with (`check_same`).
        describe: Writes what the run is; called where nothing speaks against going on.
        open_metrics: Opens the log, given the steps that are done.
        validation: Embeds and judges.
        slides: Slides of each case, for the rates.
        stop: Whether to stop after this step.
        progress: What the user sees.
        choice: The best epoch so far.
        clock: Of this process's part of the run.
    """

    config: RunConfig
    folder: Path
    facts: Mapping[str, Any]
    describe: Callable[[], None]
    open_metrics: Callable[[int], MetricsLog]
    validation: Validation
    slides: Mapping[str, int]
    stop: StopRequest
    progress: TrainProgress
    choice: Choice = field(default_factory=Choice)
    clock: LoopClock = field(default_factory=LoopClock)
    _metrics: MetricsLog | None = None
    _per_epoch: int = 0
    _mark: float = 0.0
    _written: float = 0.0

    def begin(self, training: Training, num_cases: int) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._per_epoch = -(-num_cases // training.config.cases_per_step)
        saved = newest_checkpoint(self.folder)
        if saved is not None:
            check_same(saved, self.config, self.facts)
            restore(saved, training)
            self.choice = Choice(**saved.state["facts"]["choice"])
            _same_products(saved.state["facts"]["products"])
            logger.info("going on after %d steps", saved.state["steps"])
        steps = self._steps(training)
        if training.accelerator.is_main_process:
            self.describe()
            self._metrics = self.open_metrics(steps)
        self.progress.start(self.config.training.epochs * self._per_epoch, steps)
        if self._ends_early():  # stopped early, and killed before the run was saved
            training.epoch = self.config.training.epochs
        self._mark = self._written = time.perf_counter()

    def _ends_early(self) -> bool:
        patience = self.config.training.early_stop
        return bool(patience) and self.choice.stale >= patience

    def _steps(self, training: Training) -> int:
        return training.epoch * self._per_epoch + training.step

    def step(self, training: Training, parts: Sequence[Part], loss: float, waited_s: float) -> None:
        """Count, log, and write a checkpoint when one is due or the run is to stop."""
        now = time.perf_counter()
        took, clock = now - self._mark, self.clock
        tiles = clock.count([batch for batch, _ in parts], self.slides, took, waited_s)
        steps, memory = self._steps(training), memory_mib(training.accelerator.device)
        values = {
            "epoch": training.epoch,
            "loss": loss,
            "lr": training.optimizer.param_groups[0]["lr"],
            "seconds": took,
            "waited_s": waited_s,
            "tiles": tiles,
            "memory_mib": memory,
        }
        self._log("step", steps, values)
        self.progress.step(steps, loss, clock, memory)
        is_due, is_stopped = self._agree(
            training, self._is_due(training, steps, now), self.stop.requested
        )
        if is_due or is_stopped:
            self._write(training, steps)
        if is_stopped:
            self.close()
            raise TrainingStopped(steps)
        self._mark = time.perf_counter()
        clock.other_s += self._mark - now

    def _is_due(self, training: Training, steps: int, now: float) -> bool:
        output = self.config.output
        if training.step == self._per_epoch:
            return False  # written after validation
        by_steps = output.checkpoint_steps and steps % output.checkpoint_steps == 0
        return bool(by_steps) or now - self._written > 60 * output.checkpoint_minutes

    def _agree(self, training: Training, *wanted: bool) -> list[bool]:
        """Return what any process wants: a checkpoint is written by all or by none."""
        accelerator = training.accelerator
        if accelerator.num_processes == 1:
            return list(wanted)
        flags = torch.tensor([float(one) for one in wanted], device=accelerator.device)
        return [value > 0 for value in accelerator.reduce(flags, "sum").tolist()]

    def epoch(self, training: Training, log: EpochLog) -> bool:
        """Validate, write a checkpoint, and say whether to stop early."""
        steps, section = self._steps(training), self.config.training
        self._log("epoch", steps, {**vars(log), **self.clock.rates()})
        is_last = training.epoch == section.epochs
        is_best = False
        if training.epoch % section.validate_every == 0 or is_last:
            self.progress.say(f"validating after epoch {training.epoch}")
            found = self.validation(training)
            is_best = self.choice.offer(found, training.epoch, section.choose_by)
            self._log("validation", steps, {"epoch": log.epoch, "best": is_best, **found})
            self.progress.validated(training.epoch, log.loss, found, is_best)
        ends = self._ends_early()
        if is_best:
            self.choice.checkpoint = f"step-{steps:09d}"
        self._write(training, steps)
        self._mark = time.perf_counter()
        (is_stopped,) = self._agree(training, self.stop.requested)
        if is_stopped and not (is_last or ends):
            self.close()
            raise TrainingStopped(steps)
        return ends

    def _write(self, training: Training, steps: int) -> None:
        facts = {**self.facts, "config": self.config.model_dump(mode="json")}
        facts["choice"] = vars(self.choice)
        facts["products"] = product_choice().library
        written = write_checkpoint(self.folder, training, steps, facts)
        if written is not None:
            prune_checkpoints(self.folder, self.config.output.keep_last, self.choice.checkpoint)
            fsync_folder(self.folder)
        self._written = time.perf_counter()

    def _log(self, kind: str, steps: int, values: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(kind, steps, values)

    def finish(self, training_log: Sequence[EpochLog]) -> None:
        """Log the end of the run and close what is open."""
        steps = len(training_log) * self._per_epoch
        self._log("end", steps, {**self.clock.rates(), "epochs": len(training_log)})
        self.close()

    def close(self) -> None:
        """Close log and progress."""
        self.progress.stop()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def best(self) -> Saved | None:
        """Return the checkpoint of the best epoch, or the newest without any validation."""
        if self.choice.checkpoint is None:
            return newest_checkpoint(self.folder)
        return read_checkpoint(self.folder / f"{self.choice.checkpoint}.json")


def _same_products(library: str) -> None:
    """Compute frozen products with the library the run was begun with: others round otherwise."""
    if product_choice().library == library:
        return
    if library in product_libraries():
        pin_products(library)
    else:
        logger.warning(
            "%s, which the run was begun with, is not here: it goes on with %s, and its last bits "
            "may differ from an unbroken run's", library, product_choice().library,
        )  # fmt: skip


def check_same(saved: Saved, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Refuse to go on with another configuration, other cases or other frozen weights.

    Raises:
        CheckpointError: Something differs; names it.
    """
    before = saved.state["facts"]
    changed = config.differences(before["config"])
    old, new = _without_paths(before), _without_paths(facts)
    if old["cases"] == new["cases"]:  # wherever they lie now
        changed = [name for name in changed if name != "cases.folders"]
    changed += [name for name, value in new.items() if old.get(name) != value]
    if changed:
        raise CheckpointError(
            f"a run that goes on must have the configuration and cases it was begun with, got "
            f"another {', '.join(changed)}; put it back, or choose another output.folder"
        )


def _without_paths(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts with cases folders known by their checksums and folds alone."""
    known = [{k: v for k, v in s.items() if k != "path"} for s in facts.get("cases") or ()]
    return {**facts, "cases": known}
