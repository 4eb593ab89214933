"""Peak memory of a forward pass and of a training step, from tiles and settings, before running.

`modaltune plan` prints it. The formulas stand in docs/memory.md; their terms are counted on a small
run of the model's parts (`modaltune.memory_probe`), so they follow whatever the layers do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modaltune.adapter import AdapterConfig
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.kernels.frozen_product.api import most_packed_bytes
from modaltune.memory_probe import Parts, count_parts, count_plain
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNetConfig

Mode = Literal["forward", "train"]
MODES: tuple[Mode, ...] = ("forward", "train")
TRUNKS = ("separate", "shared")
RECOMPUTE = ("none", "layer", "interaction")
# A step's work in passes of the trunk: one forward, about two backward; what is computed again.
_BACKWARD_PASSES, _AGAIN = 2, {"none": 0, "layer": 1, "interaction": 2}

# A process that runs a tiny model: what importing brings, and what the first use of each part does
# (threads and their buffers, compiled loops, what the first optimiser imports).
_PROCESS = """
import torch
from modaltune.memory_plan import TINY
from modaltune.published_size import published_size_model, random_cases
from modaltune.testing import peak_memory_mib
from modaltune.learner import ModalTuneLearner, Targets
from modaltune.train import make_optimizer, train_step
model = published_size_model(TINY).eval()
batch = random_cases(model, 128)
with torch.no_grad():
    targets = torch.nn.functional.normalize(model(batch), dim=-1)
print(peak_memory_mib())
learner = ModalTuneLearner(model.train())
optimizer = make_optimizer(learner, learner.config)
train_step(learner, optimizer, [(batch, Targets.of_text(targets))])
print(peak_memory_mib())
"""
TINY = ModalTuneConfig(
    slide_encoder=LongNetConfig(in_features=64, width=64, depth=1, heads=4, ffn_width=64),
    adapter=AdapterConfig(heads=4, interactions=((0, 0),)),
    genes=GeneConfig(width=16, depth=1, tokens=4),
    out_features=16,
)

# glibc keeps what is freed below a block in use, unless the block is of 32 MB or more. In training
# that comes to about 5 activations per block of the encoder and graph kept: a measurement
# (published size, 1,000 to 4,000 tiles; with every block of 4 MB or more apart there are none).
_HOLES_PER_BLOCK, _KEPT_BELOW = 5, 32 * 2**20


@dataclass(frozen=True)
class Setting:
    """One way to run a model."""

    mode: Mode
    task_trunk: str = "separate"
    task_backward: str = "sequential"
    recompute: str = "none"

    def passes(self, tasks: int) -> int:
        """Return how often the trunk runs forward for a case."""
        return 1 if self.task_trunk == "shared" else tasks

    def trunk_passes(self, tasks: int) -> int:
        """Return the work of a case in forward passes of the trunk; a backward pass counts two."""
        if self.mode == "forward":
            return self.passes(tasks)
        return self.passes(tasks) * (1 + _BACKWARD_PASSES + _AGAIN[self.recompute])

    def to_dict(self) -> dict[str, str]:
        """Return the fields as JSON values; those of training only for a training step."""
        kept = {"mode": self.mode, "task_trunk": self.task_trunk}
        if self.mode == "train":
            kept |= {"task_backward": self.task_backward, "recompute": self.recompute}
        return kept


def settings(mode: Mode, tasks: int) -> Iterator[Setting]:
    """Yield every setting of a mode, the cheapest in time first; at equal time the leaner first."""
    if mode == "forward":
        yield from (
            Setting(mode, trunk)
            for trunk in (("shared", "separate") if tasks > 1 else ("separate",))
        )
        return
    for trunk in ("shared", "separate") if tasks > 1 else ("separate",):
        for recompute in RECOMPUTE:
            yield Setting(mode, trunk, "sequential", recompute)
            if trunk == "separate" and tasks > 1:
                yield Setting(mode, trunk, "joint", recompute)


@dataclass(frozen=True)
class Planned:
    """A setting, the peak memory predicted for it, and whether that fits the budget."""

    setting: Setting
    peak_mib: float
    trunk_passes: int
    fits: bool | None  # None without a budget


class MemoryPlan:
    """Predicts peak memory of one model on its device.

    Args:
        model: The model; left in evaluation mode, without gradients.
        tiles: Tiles of the case to plan for.
        process_mib: Memory of a process without the model, in a forward pass and in training;
            measured unless given.
    """

    def __init__(
        self, model: ModalTune, tiles: int, process_mib: Mapping[Mode, float] | None = None
    ) -> None:
        self.tiles, self.tasks = tiles, len(model.config.tasks)
        self.parts: Parts = count_parts(model, tiles)
        interactions = model.adapter.interactions()
        self.interactions = len(interactions)
        self.ranges = [block.last - block.first + 1 for block in interactions]
        self.blocks_run = model.adapter.first_block + sum(self.ranges)
        self.extractors = [len(block.extractors()) for block in interactions]
        self.is_gpu = model.modal_positions.is_cuda
        self.packs = self.tasks > 1 and model.is_packed(tiles, self.tasks)
        # The rows of all tasks fill blocks that those of one may not.
        self.packed = count_plain(model, self.tasks * tiles) if self.packs else {}
        if process_mib is None:
            process_mib = dict.fromkeys(MODES, 0.0) if self.is_gpu else measured_process_mib()
        self.process = {mode: mib * 2**20 for mode, mib in process_mib.items()}
        state = [*model.parameters(), *model.buffers()]
        self.weights = sum(t.nbytes for t in state)
        tuned = [t.nbytes for t in model.trainable_parameters()]
        self.tuned, self.largest = sum(tuned), max(tuned)
        itemsize = model.modal_positions.element_size()
        self.inputs = tiles * (model.slide_encoder.in_features * itemsize + 16)

    def peak_mib(self, setting: Setting) -> float:
        """Return the predicted peak of a fresh process (of the device, on a GPU) in MiB."""
        fixed = self.process[setting.mode] + self.weights + self.inputs + self._packed(setting)
        if setting.mode == "forward":
            return (fixed + self.activations(setting)) / 2**20
        fixed += 2 * self.tuned  # both moments of AdamW
        step = self.tuned + 2 * self.largest  # gradients, and two tensors of the update
        whole = (fixed + max(self.activations(setting), step)) / 2**20
        return whole + self._holes(setting) / 2**20

    def _holes(self, setting: Setting) -> float:
        """Return the bytes that the C library keeps beside what is in use in a training step."""
        row = self.parts.tokens.at(self.tiles)
        if self.is_gpu or row >= _KEPT_BELOW:
            return 0.0
        kept = setting.passes(self.tasks) if setting.task_backward == "joint" else 1
        return kept * self.blocks_run * _HOLES_PER_BLOCK * row

    def activations(self, setting: Setting) -> float:
        """Return the most bytes at once beside weights, inputs and the optimiser's moments.

        The gradients that earlier passes of a training step left behind are part of it.
        """
        if setting.mode == "forward":
            return self._forward(setting.passes(self.tasks))
        several = setting.task_backward == "sequential" and setting.passes(self.tasks) > 1
        return self._train(setting) + several * self.tuned

    def _packed(self, setting: Setting) -> float:
        """Return the bytes of reordered copies of frozen weights, as far as they are kept."""
        parts = self.parts
        each = parts.packed_plain if setting.mode == "forward" else parts.packed_train
        return min(parts.packed_embed + self.blocks_run * each, most_packed_bytes())

    def _forward(self, passes: int) -> float:
        parts, own = self.parts, self.parts.tokens.at(self.tiles)
        n, beside = self.tiles, 0.0
        trunk = {name: getattr(parts, name).plain for name in ("injector", "layer", "extractor")}
        if passes > 1 and self.packs:
            # One pass over the rows of all tasks, beside the tiles' embedding that they share.
            n, passes, beside, trunk = passes * self.tiles, 1, own, self.packed
        row = parts.tokens.at(n)
        between = max(
            trunk["injector"].at(n),
            (1 + (max(self.ranges) > 1)) * row + trunk["layer"].at(n),
            row + trunk["extractor"].at(n),
        )
        held = row + (self.interactions > 1) * row  # embedded tiles, input of the interaction
        held += (passes > 1) * passes * row  # every task's rows behind the first injector
        before = max(parts.embed.at(self.tiles), own + parts.modalities.plain.at(self.tiles))
        return max(beside + held + between, before)

    def _train(self, setting: Setting) -> float:
        n, parts = self.tiles, self.parts
        row, layers = parts.tokens.at(n), sum(self.ranges)
        trunk = (parts.layer, parts.injector, parts.extractor)
        highest = max(part.peak.at(n) for part in trunk)
        kept = setting.passes(self.tasks) if setting.task_backward == "joint" else 1
        ends = parts.modalities.held.at(n)
        if setting.recompute == "none":
            last = self.extractors[-1] * parts.extractor.held.at(n)
            held = (
                layers * parts.layer.held.at(n)
                + self.interactions * parts.injector.held.at(n)
                + sum(self.extractors) * parts.extractor.held.at(n)
            )
            layer, extractor = (
                part.peak.at(n) - part.held.at(n) for part in (parts.layer, parts.extractor)
            )
            inside = row + kept * held + max(extractor, layer - last)
        elif setting.recompute == "layer":
            inside = row + kept * (self.interactions + layers) * row + highest
        else:
            again = (1 + max(self.ranges)) * row
            inside = row + kept * (self.interactions - 1) * row + again + highest
        return max(inside + ends, row + parts.modalities.peak.at(n))

    def table(
        self, modes: Sequence[Mode] = MODES, budget_mib: float | None = None
    ) -> list[Planned]:
        """Return every setting with its prediction, the cheapest in time first within a mode."""
        rows = []
        for mode in modes:
            for setting in settings(mode, self.tasks):
                peak = self.peak_mib(setting)
                fits = None if budget_mib is None else peak <= budget_mib
                rows.append(Planned(setting, peak, setting.trunk_passes(self.tasks), fits))
        return sorted(rows, key=lambda r: (modes.index(r.setting.mode), r.trunk_passes, r.peak_mib))


def cheapest(rows: Sequence[Planned], mode: Mode, trunks: Sequence[str]) -> Planned | None:
    """Return the first setting of a mode that fits, among some forms of the trunk."""
    for row in rows:
        if row.setting.mode == mode and row.setting.task_trunk in trunks and row.fits is not False:
            return row
    return None


def measured_process_mib() -> dict[Mode, float]:
    """Return the peak memory of a fresh process that runs no model, by mode, in MiB.

    Raises:
        InputError: The process failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"a fresh Python must import modaltune, got: {last}; see modaltune doctor")
    forward, train = (float(line) for line in done.stdout.split()[-2:])
    return {"forward": forward, "train": train}
