"""A baseline under the common training loop: its heads, their loss, and what they predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modaltune.baselines.baseline import Baseline
from modaltune.baselines.heads import (
    CoxHead,
    HazardHead,
    SurvivalKind,
    class_loss,
    make_survival_head,
)
from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.targets import Targets


@dataclass(frozen=True)
class Outputs:
    """What a `SupervisedModel` returns for B cases.

    Attributes:
        embedding: `[B, d]`.
        logits: `[B, C]`, None without a class head.
        survival: `[B, ...]` raw outputs of the survival head, None without one.
    """

    embedding: Tensor
    logits: Tensor | None
    survival: Tensor | None


@dataclass(frozen=True)
class Predictions:
    """What the heads say of B cases; None where there is no such head.

    Attributes:
        probabilities: `[B, C]` of the classes.
        risk: `[B]`, higher for cases that should die sooner.
        survival: `[B, K]` probability to live beyond `times`; None for a Cox head whose baseline
            was not fitted.
        times: `[K]` months.
    """

    probabilities: Tensor | None
    risk: Tensor | None
    survival: Tensor | None
    times: Tensor | None


class SupervisedModel(nn.Module):
    """A baseline with linear heads.

    Args:
        baseline: Embeds cases.
        num_classes: Classes C of the class head; 0 for none.
        survival: Survival head, or None.

    Raises:
        InputError: There is no head at all.
    """

    def __init__(
        self, baseline: Baseline, num_classes: int, survival: HazardHead | CoxHead | None
    ) -> None:
        super().__init__()
        if num_classes < 2 and survival is None:
            raise InputError(
                f"a baseline must have a class head (2 classes or more) or a survival head, got "
                f"{num_classes} classes and none; give labels of either kind"
            )
        self.baseline = baseline
        self.class_head = nn.Linear(baseline.width, num_classes) if num_classes > 1 else None
        self.survival_head = survival

    def forward(self, batch: CaseBatch) -> Outputs:
        """Return embeddings and the raw outputs of the heads.

        Raises:
            InputError: The batch does not fit the baseline; the message names the case.
        """
        self.baseline.check(batch)
        return self.heads(self.baseline(batch))

    def heads(self, embedding: Tensor) -> Outputs:
        """Return embeddings `[B, d]` beside what the heads make of them."""
        return Outputs(
            embedding,
            None if self.class_head is None else self.class_head(embedding),
            None if self.survival_head is None else self.survival_head(embedding),
        )


class SupervisedLearner:
    """A baseline trained on classes and survival; implements `modaltune.learner.Learner`.

    Args:
        baseline: Trained in place.
        num_classes: Classes C; 0 for no class head.
        survival: Survival head (`make_survival_head`), or None.
        class_weights: `[C]` weight of each class in the loss, or None.
        survival_weight: Weight of the survival loss beside the class loss.

    Attributes:
        model: The baseline with its heads.
        supervised: The same, as what it is.

    Raises:
        InputError: There is no head at all.
    """

    model: nn.Module

    def __init__(
        self,
        baseline: Baseline,
        *,
        num_classes: int = 0,
        survival: HazardHead | CoxHead | None = None,
        class_weights: Tensor | None = None,
        survival_weight: float = 1.0,
    ) -> None:
        self.model = self.supervised = SupervisedModel(baseline, num_classes, survival)
        self.class_weights, self.survival_weight = class_weights, survival_weight

    @classmethod
    def for_training(
        cls,
        baseline: Baseline,
        targets: Targets,
        *,
        classes: bool = True,
        survival: SurvivalKind | None = "hazard",
        bins: int = 4,
        cases_per_batch: int = 1,
        balanced: bool = False,
        survival_weight: float = 1.0,
    ) -> SupervisedLearner:
        """Return a learner whose heads fit the labels of the training cases.

        Args:
            baseline: Trained in place.
            targets: Of the training cases, all of them, and no others.
            classes: Whether to have a class head, where cases of two classes are given.
            survival: Which survival head; None for none.
            bins: Bins of survival time.
            cases_per_batch: Cases that are pulled back together (per step, process and part of an
                accumulation).
            balanced: Weigh classes by the inverse of their frequency.
            survival_weight: Weight of the survival loss beside the class loss.

        Raises:
            InputError: See `make_survival_head` and `SupervisedModel`.
        """
        head = None
        if survival is not None:
            head = make_survival_head(
                survival,
                baseline.width,
                targets.durations,
                targets.events,
                bins=bins,
                cases_per_batch=cases_per_batch,
            )
        counts = targets.classes[targets.classes >= 0].bincount()
        if int((counts > 0).sum()) < 2:  # nothing to tell apart, whatever number the class has
            counts = counts[:0]
        weights = None
        if balanced and len(counts):
            weights = counts.sum() / (len(counts) * counts.clamp(min=1).to(torch.float32))
        return cls(
            baseline,
            num_classes=len(counts) if classes else 0,
            survival=head,
            class_weights=weights,
            survival_weight=survival_weight,
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is trained, in order of definition."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Return the mean loss over cases, a scalar; what is not labelled counts as 0."""
        total = outputs.embedding.new_zeros((), dtype=torch.float32)
        if outputs.logits is not None:
            weights = self.class_weights
            if weights is not None:
                weights = weights.to(outputs.logits)
            total = total + class_loss(_at_least_float32(outputs.logits), targets.classes, weights)
        head = self.supervised.survival_head
        if head is not None and outputs.survival is not None:
            raw = _at_least_float32(outputs.survival)
            own = head.loss(raw, targets.durations, targets.events)
            total = total + self.survival_weight * own
        return total

    def accumulate(
        self, batch: CaseBatch, targets: Targets, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """See `modaltune.learner.Learner.accumulate`."""
        loss = self.loss(self.supervised(batch), targets)
        backward(loss)
        return loss.detach()

    def fit_baseline(self, risk: Tensor, targets: Targets) -> None:
        """Fit the baseline hazard of a trained Cox head; a hazard head needs none.

        Args:
            risk: `[n]` predicted for the training cases.
            targets: Of the same cases.

        Raises:
            ProbeError: No death, or the risk does not vary.
        """
        head = self.supervised.survival_head
        if isinstance(head, CoxHead):
            head.fit_baseline(risk, targets.durations, targets.events)

    @torch.inference_mode()
    def embed(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, 1, d]` float32 without a graph, in whatever mode the model is."""
        return self.supervised(batch).embedding.float().unsqueeze(1)

    @torch.inference_mode()
    def predict(self, batch: CaseBatch) -> Predictions:
        """Return what the heads say, in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        outputs: Outputs = self.supervised(batch)
        self.model.train(was_training)
        return self._read(outputs)

    @torch.inference_mode()
    def predict_embedded(self, embeddings: Tensor) -> Predictions:
        """Return what the heads say of embeddings `[B, 1, d]` of `embed`."""
        weight = next(self.model.parameters())
        return self._read(self.supervised.heads(embeddings[:, 0].to(weight.device, torch.float32)))

    @torch.inference_mode()
    def loss_embedded(self, embeddings: Tensor, targets: Targets) -> Tensor:
        """Return the mean loss over cases, a scalar, of embeddings `[n, 1, d]` of `embed`.

        A class that training cases lack has no output: it counts as 0, like one not labelled.
        """
        weight = next(self.model.parameters())
        head = self.supervised.class_head
        if head is not None:
            unseen = targets.classes >= head.out_features
            targets = replace(targets, classes=targets.classes.masked_fill(unseen, -1))
        outputs = self.supervised.heads(embeddings[:, 0].to(weight.device, torch.float32))
        return self.loss(outputs, targets.to(weight.device))

    def _read(self, outputs: Outputs) -> Predictions:
        head = self.supervised.survival_head
        risk = survival = times = None
        if head is not None and outputs.survival is not None:
            raw = _at_least_float32(outputs.survival)
            risk, survival, times = head.risk(raw), head.survival(raw), head.times
        logits = outputs.logits
        return Predictions(
            None if logits is None else _at_least_float32(logits).softmax(dim=1),
            risk,
            survival,
            times,
        )


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
