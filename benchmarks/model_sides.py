"""The two sides of the whole-model benchmark: ours and the literal rival, from the same weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modaltune.adapter import AdapterConfig, Injector
from modaltune.batch import CaseBatch
from modaltune.benchmarks.literal_model import LiteralModel
from modaltune.config import PUBLISHED_TASKS, ModalTuneConfig
from modaltune.learner import ModalTuneLearner, Targets
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.published_size import published_size_model, random_cases
from modaltune.reference_import import model_rules, to_published
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.train import TrainConfig, make_optimizer, train_step

Answers = dict[str, Tensor]
WARM_TILES = 128  # enough rows for every library and every kept copy of a weight


@dataclass(frozen=True)
class Workload:
    """What both sides compute.

    Attributes:
        tiles: Tiles of the case.
        mode: `forward` without gradients, or `train`: one optimiser step. Without dropout, so that
            the sides can be compared.
        tasks: Task prompts, 1 to 3.
        size: `published`, or `small`: a toy that tries the benchmark itself.
        trunk: `separate`, a pass for each task, or `shared`; the rival has a pass for each task
            under the same masks.
        where: `cpu` or `cuda`.
        precision: Of products and attention: `float32`, or `bfloat16` by autocast, both sides.
    """

    tiles: int
    mode: Literal["forward", "train"] = "forward"
    tasks: int = 3
    size: Literal["published", "small"] = "published"
    trunk: Literal["separate", "shared"] = "separate"
    where: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for another process."""
        return asdict(self)


class Side(Protocol):
    """One way to compute a workload."""

    def run(self, tiles: int | None = None) -> Tensor:
        """Compute the workload (or a case of fewer tiles) once; return the embeddings."""

    def gradients(self) -> Answers:
        """Return the gradients of the last step by published name."""


def configuration(work: Workload) -> ModalTuneConfig:
    """Return the configuration of a workload's model."""
    tasks = PUBLISHED_TASKS[: work.tasks]
    if work.size == "published":
        return ModalTuneConfig(tasks=tasks, task_trunk=work.trunk)
    return ModalTuneConfig(
        tasks=tasks,
        task_trunk=work.trunk,
        slide_encoder=LongNetConfig(
            in_features=24,
            width=48,
            depth=2,
            heads=4,
            ffn_width=96,
            segment_lengths=(32, 64),
            dilation_ratios=(1, 2),
        ),
        adapter=AdapterConfig(heads=3, interactions=((0, 0), (1, 1))),
        genes=GeneConfig(width=16, depth=1, tokens=4),
        out_features=8,
    )


def build_model(work: Workload) -> ModalTune:
    """Return the model of a workload with random weights; injectors let something in.

    Without that, their gate of zero would keep most gradients at zero.
    """
    torch.manual_seed(0)
    model = published_size_model(configuration(work))
    for module in model.modules():
        if isinstance(module, Injector):
            nn.init.normal_(module.gamma, std=0.5)
    return model.eval()


def random_targets(work: Workload, model: ModalTune) -> Tensor:
    """Return unit target rows `[1, T, out]`."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, work.tasks, model.config.out_features, generator=generator)
    return F.normalize(rows, dim=-1)


class _Base(ABC):
    def __init__(self, work: Workload) -> None:
        self.work = work
        self.model = build_model(work).to(work.where)
        self.targets = random_targets(work, self.model).to(work.where)
        self._cases = {work.tiles: random_cases(self.model, work.tiles).to(work.where)}

    def _case(self, tiles: int | None) -> CaseBatch:
        count = self.work.tiles if tiles is None else tiles
        if count not in self._cases:
            self._cases[count] = random_cases(self.model, count).to(self.work.where)
        return self._cases[count]

    def run(self, tiles: int | None = None) -> Tensor:
        """See `Side.run`."""
        is_half = self.work.precision == "bfloat16"
        with torch.autocast(self.work.where, torch.bfloat16, enabled=is_half):
            out = self._run(self._case(tiles))
        if self.work.where == "cuda":
            torch.cuda.synchronize()
        return out

    @abstractmethod
    def _run(self, batch: CaseBatch) -> Tensor:
        """Compute the workload on a case."""


class Ours(_Base):
    """The product: `ModalTune`, and its training step."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self._learner = ModalTuneLearner(self.model)
        self._optimizer = make_optimizer(self._learner, self._learner.config)

    def _run(self, batch: CaseBatch) -> Tensor:
        if self.work.mode == "forward":
            with torch.inference_mode():
                return self.model(batch)
        parts = [(batch, Targets.of_text(self.targets))]
        train_step(self._learner, self._optimizer, parts)
        if self._learner.outputs is None:
            raise RuntimeError("a training step must leave its embeddings with the learner")
        return self._learner.outputs

    def gradients(self) -> Answers:
        """See `Side.gradients`."""
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return to_published(model_rules(self.model), grads)


class Rival(_Base):
    """The literal formulation and its step."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.literal = LiteralModel(self.model)
        recipe = TrainConfig()
        self._optimizer = torch.optim.AdamW(
            self.literal.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )

    def _run(self, batch: CaseBatch) -> Tensor:
        if self.work.mode == "forward":
            with torch.inference_mode():
                return self.literal(batch)
        return self.literal.train_step(batch, self.targets, self._optimizer)[0]

    def gradients(self) -> Answers:
        """See `Side.gradients`."""
        found = {name: self.literal.weights[name].grad for name in self.literal.trainable}
        return {name: grad for name, grad in found.items() if grad is not None}


SIDES: dict[str, type[Ours] | type[Rival]] = {"ours": Ours, "literal": Rival}
