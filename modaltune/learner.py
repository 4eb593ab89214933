"""What the training loop tunes: ModalTune towards text targets here, every baseline likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.freed_memory import return_freed_memory
from modaltune.model import ModalTune
from modaltune.prefetch import load_ahead
from modaltune.targets import Targets, distillation_loss
from modaltune.train_config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Learner",
    "ModalTuneLearner",
    "Targets",
    "TrainingCases",
    "check_finite",
    "embed_all",
]

# Tiles of a batch from which on its freed activations are worth a call to the C library.
TRIMMED_BYTES = 2**20


class TrainingCases(Protocol):
    """Cases to learn from: their tensors and their targets."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> CaseBatch:
        """Return the packed tensors of some cases; called in a thread, ahead of use."""

    def targets(self, indices: Sequence[int]) -> Targets:
        """Return the targets of some cases."""

    def for_epoch(self, epoch: int) -> TrainingCases:
        """Return the same cases with what is drawn of them in an epoch, 0-based.

        A draw depends on the epoch and the case alone, so that a run that goes on draws the same.
        """


class Learner(Protocol):
    """A module and its loss, as the training loop sees them.

    Attributes:
        model: What is put into training and evaluation mode, moved and saved.
    """

    model: nn.Module

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is tuned, in an order that is always the same."""

    def accumulate(
        self, batch: CaseBatch, targets: Targets, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Add the gradient of the mean loss over cases to the parameters'.

        Args:
            batch: B cases, on the model's device.
            targets: Of the same cases.
            backward: Pulls a scalar loss back; may be called several times, for losses that add up
                to the one returned. It refuses a loss that is not finite.

        Returns:
            The mean loss over cases, a detached scalar.
        """

    def embed(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, T, d]` without a graph, in whatever mode the model is."""


def check_finite(loss: Tensor, model: nn.Module, batch: CaseBatch) -> None:
    """Refuse a loss that is not finite, and drop the gradients so far.

    Raises:
        InputError: It is not; names the cases.
    """
    if bool(torch.isfinite(loss)):
        return
    model.zero_grad(set_to_none=True)
    ids = ", ".join(batch.case_id(b) for b in range(batch.num_cases))
    raise InputError(
        f"loss must be finite, got {loss.item()} on case(s) {ids}; check their features and "
        "targets, or lower the learning rate"
    )


class ModalTuneLearner:
    """ModalTune, tuned towards the text targets of its task prompts.

    Args:
        model: Tuned in place.
        config: Temperature and weight of the loss, and when passes are pulled back.
        embed_tasks: Indices of the task prompts that `embed` runs; all unless given.

    Attributes:
        model: The model.
        outputs: `[B, T, out_features]` raw embeddings of the latest batch, detached.

    Source: METHOD 3.10.
    """

    model: nn.Module

    def __init__(
        self,
        model: ModalTune,
        config: TrainConfig | None = None,
        *,
        embed_tasks: Sequence[int] | None = None,
    ) -> None:
        self.model = self._model = model
        self.config = config or TrainConfig()
        self.embed_tasks = embed_tasks
        self.outputs: Tensor | None = None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is tuned."""
        return self._model.trainable_parameters()

    def loss(self, outputs: Tensor, text: Tensor) -> Tensor:
        """Return the mean loss over cases (a scalar) of `[B, T, out]` outputs and unit targets."""
        config = self.config
        return distillation_loss(outputs, text, config.temperature, config.loss_factor).mean()

    def accumulate(
        self, batch: CaseBatch, targets: Targets, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """See `Learner.accumulate`.

        The loss is a sum over tasks, so `task_backward="sequential"` pulls each pass of the trunk
        back before the next one starts: the same gradient to rounding, in the memory of one pass.

        Raises:
            InputError: There are no text targets.
        """
        text = targets.text
        if text is None:
            raise InputError(
                "targets must hold text rows to tune ModalTune towards, got none; embed the label "
                "sentences, or train a baseline on classes or survival"
            )
        if self.config.task_backward == "joint":
            outputs = self._model(batch)
            loss = self.loss(outputs, text)
            backward(loss)
            self.outputs, loss = outputs.detach(), loss.detach()
            _return_activations(batch)
            return loss
        parts: list[Tensor] = []
        dtype = torch.float32
        total = torch.zeros((), dtype=torch.float64, device=text.device)
        for columns, outputs in self._model.each_pass(batch, backward=True):
            loss = self.loss(outputs, text[:, columns])
            backward(loss)
            parts.append(outputs.detach())
            dtype = loss.dtype
            total += loss.detach()
            del outputs, loss  # their graph would outlive the next pass
            _return_activations(batch)
        self.outputs = torch.cat(parts, dim=1)
        return total.to(dtype)

    @torch.inference_mode()
    def embed(self, batch: CaseBatch) -> Tensor:
        """See `Learner.embed`: raw embeddings `[B, T, out_features]` float32."""
        return self._model(batch, self.embed_tasks).float()


def embed_all(
    learner: Learner,
    cases: TrainingCases,
    indices: Sequence[int],
    cases_per_batch: int = 1,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Return embeddings `[n, T, d]` float32 on the CPU of some cases, in evaluation mode.

    Args:
        learner: On its device; left in the mode it was in.
        cases: Read ahead in a thread.
        indices: Which of them, at least one.
        cases_per_batch: Cases computed at once.
        accelerator: Precision, and processes to share the work with.
    """
    was_training = learner.model.training
    learner.model.eval()
    rank, world = (0, 1) if accelerator is None else _place(accelerator)
    device = learner.trainable_parameters()[0].device
    starts = range(0, len(indices), cases_per_batch)
    chosen = [list(indices[i : i + cases_per_batch]) for i in starts]
    rows: dict[int, Tensor] = {}
    with closing(load_ahead(cases.batch, chosen[rank::world])) as loaded:
        for number, batch in zip(range(rank, len(chosen), world), loaded, strict=True):
            with nullcontext() if accelerator is None else accelerator.autocast():
                rows[number] = learner.embed(batch.to(device)).float()
    learner.model.train(was_training)
    if accelerator is None or world == 1:
        return torch.cat(list(rows.values())).cpu()
    if not rows:  # fewer batches than processes: any batch tells the shape
        rows[0] = torch.zeros_like(learner.embed(cases.batch(chosen[0]).to(device)).float())
    whole = torch.zeros(len(indices), *next(iter(rows.values())).shape[1:], device=device)
    for number, values in rows.items():
        start = number * cases_per_batch
        whole[start : start + len(values)] += values
    return accelerator.reduce(whole, "sum").cpu()


def _place(accelerator: Accelerator) -> tuple[int, int]:
    return accelerator.process_index, accelerator.num_processes


def _return_activations(batch: CaseBatch) -> None:
    if batch.tiles.device.type == "cpu" and batch.tiles.nbytes >= TRIMMED_BYTES:
        return_freed_memory()
