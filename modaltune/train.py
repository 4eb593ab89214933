"""The training loop: order, schedule, gradients, AdamW. Reads top to bottom.

On a CPU, one GPU, or many through `torchrun`; what goes on around it is a `Watcher`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.kernels.ranges import stage_range
from modaltune.learner import (
    Learner,
    ModalTuneLearner,
    Targets,
    TrainingCases,
    check_finite,
    embed_all,
)
from modaltune.model import ModalTune
from modaltune.prefetch import load_ahead
from modaltune.processes import add_over_processes, make_accelerator
from modaltune.schedule import learning_rate
from modaltune.train_config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["EpochLog", "TrainConfig", "Training", "TrainingCases", "Watcher", "embed_cases", "fit"]

Part = tuple[CaseBatch, Targets]


@dataclass(frozen=True)
class EpochLog:
    """What one epoch did: its number, learning rate, mean loss per case and cases seen."""

    epoch: int
    lr: float
    loss: float
    cases: int


@dataclass
class Training:
    """A training run where it stands: all that decides how it goes on, beside global generators.

    Attributes:
        learner: What is tuned.
        config: The recipe.
        optimizer: AdamW, prepared by `accelerator`.
        accelerator: Precision, scaler and processes.
        order: Draws the order of cases, once per epoch.
        epoch_order: State of `order` before this epoch's draw.
        epoch: Epoch under way, 0-based.
        step: Steps done in it.
        loss_sum: Sum of its cases' losses so far.
        log: Epochs that are done.
    """

    learner: Learner
    config: TrainConfig
    optimizer: Any
    accelerator: Accelerator
    order: torch.Generator
    epoch_order: Tensor
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    log: list[EpochLog] = field(default_factory=list)

    @classmethod
    def begin(
        cls, learner: Learner, config: TrainConfig, accelerator: Accelerator | None = None
    ) -> Training:
        """Seed torch and make the optimiser: a run before its first step."""
        accelerator = accelerator or make_accelerator(learner, config)
        torch.manual_seed(config.seed + accelerator.process_index)
        order = torch.Generator().manual_seed(config.seed)
        optimizer = accelerator.prepare(make_optimizer(learner, config))
        return cls(learner, config, optimizer, accelerator, order, order.get_state())


class Watcher:
    """What a loop tells as it goes. The methods of this one do nothing."""

    def begin(self, training: Training, num_cases: int) -> None:
        """Before the first step: the place to put a checkpoint's state into `training`."""

    def step(self, training: Training, parts: Sequence[Part], loss: float, waited_s: float) -> None:
        """After a step: its batches here, the mean loss of its cases, seconds waited for data."""

    def epoch(self, training: Training, log: EpochLog) -> bool:
        """After an epoch; True ends the training."""
        return False


def make_optimizer(learner: Learner, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over every trainable tensor in one group, as published (biases decay too)."""
    return torch.optim.AdamW(
        learner.trainable_parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def epoch_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, 0-based."""
    return learning_rate(
        epoch,
        epochs=config.epochs,
        lr=config.lr,
        warmup_epochs=config.warmup_epochs,
        warmup_factor=config.warmup_factor,
    )


def train_step(
    learner: Learner,
    optimizer: Any,
    parts: Sequence[Part],
    accelerator: Accelerator | None = None,
    num_cases: int | None = None,
) -> Tensor:
    """Take one optimiser step; return the mean loss over its cases from before it, a scalar.

    Args:
        learner: In the mode it should run in.
        optimizer: Of `make_optimizer`, or what accelerate made of it.
        parts: Batches whose gradients are added up; may be none here if others have some.
        accelerator: Precision and processes; float32 in this process alone without.
        num_cases: Cases of the step over all processes.

    Raises:
        InputError: The loss is not finite; the weights are untouched.
    """
    optimizer.zero_grad(set_to_none=True)
    count = num_cases or sum(batch.num_cases for batch, _ in parts)
    total: Tensor | None = None
    for batch, targets in parts:
        share = batch.num_cases / count

        def backward(loss: Tensor, batch: CaseBatch = batch, share: float = share) -> None:
            check_finite(loss, learner.model, batch)
            # Each backward op runs in the types of its forward op; nothing is cast anew.
            with stage_range("backward"), torch.autocast(loss.device.type, enabled=False):
                scaled = loss if share == 1 else loss * share
                scaled.backward() if accelerator is None else accelerator.backward(scaled)

        with nullcontext() if accelerator is None else accelerator.autocast():
            loss = learner.accumulate(batch, targets, backward) * share
        total = loss if total is None else total + loss
    parameters = learner.trainable_parameters()
    total = parameters[0].new_zeros(()) if total is None else total
    if accelerator is not None and accelerator.num_processes > 1:
        total = add_over_processes(parameters, total, accelerator)
    with stage_range("optimizer"):
        optimizer.step()
    return total


def fit(
    learner: Learner,
    cases: TrainingCases,
    config: TrainConfig,
    on_step: Callable[[int, int], None] | None = None,
    *,
    watcher: Watcher | None = None,
    accelerator: Accelerator | None = None,
) -> list[EpochLog]:
    """Tune a learner on cases, in place; it is left in evaluation mode.

    Args:
        learner: On its device.
        cases: With their targets; read ahead in a thread.
        config: The recipe; `seed` fixes order and dropout.
        on_step: Called with steps done and steps in all.
        watcher: Told of every step and epoch.
        accelerator: One made before, by `make_accelerator`.

    Returns:
        One entry per epoch.

    Raises:
        InputError: There are no cases, or a loss is not finite.
    """
    if len(cases) == 0:
        raise InputError("training cases must not be empty, got 0; check the split")
    watcher = watcher or Watcher()
    training = Training.begin(learner, config, accelerator)
    watcher.begin(training, len(cases))
    accelerator = training.accelerator
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    def load(chosen: Tensor) -> tuple[int, list[Part]]:
        mine = chosen[rank::world].tensor_split(config.accumulation)
        own = [part.tolist() for part in mine if len(part)]
        return len(chosen), [(drawn.batch(part), drawn.targets(part)) for part in own]

    for epoch in range(training.epoch, config.epochs):
        lr, drawn = epoch_rate(config, epoch), cases.for_epoch(epoch)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        learner.model.train()
        training.order.set_state(training.epoch_order)
        steps = torch.randperm(len(cases), generator=training.order).split(config.cases_per_step)
        with closing(load_ahead(load, steps[training.step :])) as loaded:
            asked = time.perf_counter()
            for count, read in loaded:
                waited_s = time.perf_counter() - asked
                parts = [(batch.to(device), targets.to(device)) for batch, targets in read]
                loss = float(train_step(learner, training.optimizer, parts, accelerator, count))
                training.step += 1
                training.loss_sum += loss * count
                if on_step is not None:
                    on_step(epoch * len(steps) + training.step, config.epochs * len(steps))
                watcher.step(training, parts, loss, waited_s)
                asked = time.perf_counter()
        log = EpochLog(epoch, lr, training.loss_sum / len(cases), len(cases))
        training.log.append(log)
        training.epoch, training.step, training.loss_sum = epoch + 1, 0, 0.0
        training.epoch_order = training.order.get_state()
        if watcher.epoch(training, log):
            break
    learner.model.eval()
    return training.log


def embed_cases(
    model: ModalTune,
    cases: TrainingCases,
    indices: Sequence[int],
    cases_per_batch: int = 1,
    tasks: Sequence[int] | None = None,
) -> Tensor:
    """Return raw embeddings `[n, T, out_features]` float32 of some cases, in evaluation mode."""
    if len(indices) == 0:
        count = len(model.config.tasks if tasks is None else tasks)
        return torch.zeros(0, count, model.config.out_features)
    return embed_all(ModalTuneLearner(model, embed_tasks=tasks), cases, indices, cases_per_batch)
