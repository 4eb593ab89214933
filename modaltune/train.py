"""The training loop: text targets, loss, AdamW, schedule, checkpoint. Reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.freed_memory import return_freed_memory
from modaltune.kernels.ranges import stage_range
from modaltune.model import ModalTune
from modaltune.schedule import learning_rate
from modaltune.targets import distillation_loss
from modaltune.train_config import TrainConfig

__all__ = [
    "EpochLog",
    "TrainConfig",
    "TrainingCases",
    "accumulate_gradients",
    "compute_loss",
    "embed_cases",
    "fit",
    "make_optimizer",
    "train_step",
]

# Tiles of a batch from which on its freed activations are worth a call to the C library.
TRIMMED_BYTES = 2**20


class TrainingCases(Protocol):
    """Cases to learn from: their tensors and the targets of their task prompts."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> CaseBatch:
        """Return the packed tensors of some cases."""

    def targets(self, indices: Sequence[int]) -> Tensor:
        """Return unit target rows `[B, T, out_features]`, one per case and task prompt."""


@dataclass(frozen=True)
class EpochLog:
    """What one epoch did: its number, learning rate, mean loss per case and cases seen."""

    epoch: int
    lr: float
    loss: float
    cases: int


def make_optimizer(model: ModalTune, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over every trainable tensor in one group, as published (biases decay too)."""
    return torch.optim.AdamW(
        model.trainable_parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def compute_loss(
    model: ModalTune, batch: CaseBatch, targets: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Return raw embeddings `[B, T, out]` and the mean loss over cases (a scalar).

    Args:
        model: The model, in the mode it should run in.
        batch: B cases.
        targets: `[B, T, out]` unit rows.
        config: Temperature and weight of the loss.
    """
    outputs = model(batch)
    loss = distillation_loss(outputs, targets, config.temperature, config.loss_factor)
    return outputs, loss.mean()


def accumulate_gradients(
    model: ModalTune, batch: CaseBatch, targets: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Add the gradient of `compute_loss` to the weights' and return what it returns, detached.

    The loss is a sum over tasks, so `task_backward="sequential"` pulls each pass of the trunk back
    before the next one starts: the same gradient to rounding, in the memory of one pass.

    Raises:
        InputError: The loss is not finite; the weights hold no gradient then.
    """
    if config.task_backward == "joint":
        outputs, loss = compute_loss(model, batch, targets, config)
        _check_finite(model, batch, loss)
        with stage_range("backward"):
            loss.backward()
        outputs, loss = outputs.detach(), loss.detach()
        _return_activations(batch)
        return outputs, loss
    parts: list[Tensor] = []
    dtype = torch.float32
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    for columns, outputs in model.each_pass(batch, backward=True):
        loss = distillation_loss(
            outputs, targets[:, columns], config.temperature, config.loss_factor
        ).mean()
        _check_finite(model, batch, loss)
        with stage_range("backward"):
            loss.backward()
        parts.append(outputs.detach())
        dtype = loss.dtype
        total += loss.detach()
        del outputs, loss  # their graph would outlive the next pass
        _return_activations(batch)
    return torch.cat(parts, dim=1), total.to(dtype)


def _return_activations(batch: CaseBatch) -> None:
    if batch.tiles.device.type == "cpu" and batch.tiles.nbytes >= TRIMMED_BYTES:
        return_freed_memory()


def _check_finite(model: ModalTune, batch: CaseBatch, loss: Tensor) -> None:
    if bool(torch.isfinite(loss)):
        return
    model.zero_grad(set_to_none=True)
    ids = ", ".join(batch.case_id(b) for b in range(batch.num_cases))
    raise InputError(
        f"loss must be finite, got {loss.item()} on case(s) {ids}; check their features and "
        "targets, or lower the learning rate"
    )


def train_step(
    model: ModalTune,
    optimizer: torch.optim.Optimizer,
    batch: CaseBatch,
    targets: Tensor,
    config: TrainConfig,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step; return the embeddings and the loss from before it.

    Raises:
        InputError: The loss is not finite; the weights are untouched.
    """
    optimizer.zero_grad(set_to_none=True)
    outputs, loss = accumulate_gradients(model, batch, targets, config)
    with stage_range("optimizer"):
        optimizer.step()
    return outputs, loss


def fit(
    model: ModalTune,
    cases: TrainingCases,
    config: TrainConfig,
    on_step: Callable[[int, int], None] | None = None,
) -> list[EpochLog]:
    """Tune `model` on `cases`, in place.

    Args:
        model: Left in evaluation mode.
        cases: Training cases with their targets.
        config: The recipe; `seed` fixes order and dropout.
        on_step: Called with steps done and steps in all.

    Returns:
        One entry per epoch.

    Raises:
        InputError: There are no cases, or a loss is not finite.
    """
    if len(cases) == 0:
        raise InputError("training cases must not be empty, got 0; check the split")
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    optimizer = make_optimizer(model, config)
    per_epoch = -(-len(cases) // config.cases_per_step)
    log = []
    for epoch in range(config.epochs):
        lr = learning_rate(
            epoch,
            epochs=config.epochs,
            lr=config.lr,
            warmup_epochs=config.warmup_epochs,
            warmup_factor=config.warmup_factor,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        shuffled = torch.randperm(len(cases), generator=order)
        total = 0.0
        for step, chosen in enumerate(shuffled.split(config.cases_per_step)):
            indices = chosen.tolist()
            _, loss = train_step(
                model, optimizer, cases.batch(indices), cases.targets(indices), config
            )
            total += float(loss) * len(indices)
            if on_step is not None:
                on_step(epoch * per_epoch + step + 1, config.epochs * per_epoch)
        log.append(EpochLog(epoch, lr, total / len(cases), len(cases)))
    model.eval()
    return log


@torch.inference_mode()
def embed_cases(
    model: ModalTune,
    cases: TrainingCases,
    indices: Sequence[int],
    cases_per_batch: int = 1,
    tasks: Sequence[int] | None = None,
) -> Tensor:
    """Return raw embeddings `[n, T, out_features]` float32 of some cases, in evaluation mode."""
    was_training = model.training
    model.eval()
    parts = [
        model(cases.batch(list(indices[i : i + cases_per_batch])), tasks).float()
        for i in range(0, len(indices), cases_per_batch)
    ]
    model.train(was_training)
    count = len(model.config.tasks if tasks is None else tasks)
    return torch.cat(parts) if parts else torch.zeros(0, count, model.config.out_features)
