"""What tests of training share: the gradient of one batch, without an optimiser."""

from __future__ import annotations

from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.learner import ModalTuneLearner, Targets, check_finite
from modaltune.model import ModalTune
from modaltune.train_config import TrainConfig


def accumulate_gradients(
    model: ModalTune, batch: CaseBatch, text: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a model's loss, as a training step does; return embeddings and loss.

    Args:
        model: In the mode it should run in.
        batch: B cases.
        text: `[B, T, out]` unit target rows.
        config: Temperature and weight of the loss, and when passes are pulled back.
    """
    learner = ModalTuneLearner(model, config)

    def backward(loss: Tensor) -> None:
        check_finite(loss, model, batch)
        loss.backward()

    loss = learner.accumulate(batch, Targets.of_text(text), backward)
    if learner.outputs is None:
        raise RuntimeError("a learner must keep the embeddings of its batch")
    return learner.outputs, loss
