"""What the parts of a model hold and need for a moment, counted on a small run of each.

Counting is exact: every allocation and release of torch while a part runs. Nothing about layers is
written down here, so the counts follow whatever the layers do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modaltune.errors import InputError
from modaltune.kernels.frozen_product.api import packed_bytes, products_kept
from modaltune.model import ModalTune
from modaltune.published_size import random_cases
from modaltune.slide_encoders.protocol import SlideTokens

# Rows beyond which a part grows in a straight line: more than any block of rows that is worked on
# at once (2,048). The second size is where the slope is taken.
PROBE_ROWS = (2560, 3584)
WARM_ROWS = 128
Run = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Line:
    """Bytes as a straight line of the number of tiles."""

    constant: float
    slope: float

    def at(self, tiles: int) -> float:
        """Return the bytes at a number of tiles."""
        return self.constant + self.slope * tiles

    @classmethod
    def through(cls, sizes: tuple[int, int], counts: tuple[float, float]) -> Line:
        """Return the line through two measurements."""
        slope = (counts[1] - counts[0]) / (sizes[1] - sizes[0])
        return cls(counts[0] - slope * sizes[0], slope)


@dataclass(frozen=True)
class Part:
    """Bytes of one part beyond its input.

    Attributes:
        plain: The most at once without gradients, output included.
        held: Kept after a forward pass with its graph, output included.
        peak: The most at once over forward and backward pass: `held`, the gradients of output and
            input, and what is needed for a moment.
    """

    plain: Line
    held: Line
    peak: Line


@dataclass(frozen=True)
class Parts:
    """Everything counted on a model.

    Attributes:
        tokens: The embedded tiles: one activation of the trunk's width.
        embed: The most at once while tiles are embedded, result included.
        layer: An encoder block.
        injector: An injector.
        extractor: An extractor.
        modalities: The encoders of genes, clinical records and further modalities.
        packed_embed: Reordered copies of frozen weights that embedding tiles leaves behind.
        packed_plain: What one encoder block leaves behind without gradients.
        packed_train: What it leaves behind in a training step.
    """

    tokens: Line
    embed: Line
    layer: Part
    injector: Part
    extractor: Part
    modalities: Part
    packed_embed: int
    packed_plain: int
    packed_train: int


@dataclass(frozen=True)
class Counted:
    """Bytes of one run: what is left of what it allocated, and the most at once."""

    left: int
    peak: int


def count_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, Counted]:
    """Run something and count torch's memory on a device, against what was there before.

    Returns:
        What `run` returned, and the counts.
    """
    if device.type == "cuda":
        return _count_cuda(run, device)
    threads = torch.get_num_threads()
    with products_kept():  # another library may be the fastest on one thread
        torch.set_num_threads(1)  # the profiler sees the memory of its own thread alone
        try:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profiler:
                result = run()
        finally:
            torch.set_num_threads(threads)
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return result, Counted(live, peak)


def _count_cuda(run: Callable[[], Any], device: torch.device) -> tuple[Any, Counted]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return result, Counted(torch.cuda.memory_allocated(device) - before, peak)


def count_parts(model: ModalTune, tiles: int) -> Parts:
    """Count the memory of every part of a model, on its device.

    Args:
        model: Left in evaluation mode, without gradients.
        tiles: What will be asked for; the parts run on fewer (`PROBE_ROWS`) where that is enough.

    Raises:
        InputError: There are no tiles, or a further modality does not state `in_features`.
    """
    if tiles < 2:
        raise InputError(f"tiles must be at least 2 to count memory, got {tiles}; give more")
    sizes = _probe_rows(tiles)
    packed = _warm(model)
    seen = [_Probe(model, size).count() for size in sizes]
    model.eval()
    model.zero_grad(set_to_none=True)
    found: dict[str, Line] = {
        name: Line.through(sizes, (seen[0][name], seen[1][name])) for name in seen[0]
    }

    def part(name: str) -> Part:
        return Part(*(found[f"{name} {what}"] for what in ("plain", "held", "peak")))

    layer, injector, extractor = (part(name) for name in ("layer", "injector", "extractor"))
    return Parts(
        found["tokens"], found["embed"], layer, injector, extractor, part("modalities"), *packed
    )


def count_plain(model: ModalTune, rows: int) -> dict[str, Line]:
    """Count what the parts of the trunk need at once without gradients, where many rows go through.

    Args:
        model: Of which `count_parts` counted everything before, so that it is warm.
        rows: Rows of all cases and tasks that go through together.

    Returns:
        `layer`, `injector` and `extractor` to bytes.
    """
    sizes = _probe_rows(rows)
    first, second = (_Probe(model, size).count_plain() for size in sizes)
    return {name: Line.through(sizes, (first[name], second[name])) for name in first}


def _probe_rows(rows: int) -> tuple[int, int]:
    """Return the two sizes that a part is run at: beyond them it goes through whole blocks."""
    return PROBE_ROWS if rows > PROBE_ROWS[1] else (rows // 2, rows)


def _warm(model: ModalTune) -> tuple[int, int, int]:
    """Run what is counted later once, and return the copies of weights that it leaves behind."""
    probe = _Probe(model, WARM_ROWS)
    was = [packed_bytes()]
    probe.embed()
    was.append(packed_bytes())
    with torch.no_grad():
        probe.layer(probe.tokens.x, probe.modal)
    was.append(packed_bytes())
    probe.count()
    was.append(packed_bytes())
    embed, plain, more = (after - before for before, after in pairwise(was))
    return embed, plain, plain + more


class _Probe:
    """The parts of a model, to be run on one case of random tiles."""

    def __init__(self, model: ModalTune, tiles: int) -> None:
        self.model, self.device = model, model.modal_positions.device
        self.batch = random_cases(model, tiles).to(self.device, model.modal_positions.dtype)
        self.block = model.adapter.interactions()[-1]
        model.eval()
        with torch.no_grad():
            self.tokens = self.embed()
            self.modal = self.modalities(self.tokens.x, self.tokens.x)
        self.positions = model.modal_positions[: self.modal.shape[1]]

    def embed(self) -> SlideTokens:
        tokens, _ = self.model.embed_tiles(self.batch)
        assert tokens is not None  # there are tiles
        return tokens

    def modalities(self, x: Tensor, _: Tensor) -> Tensor:
        encoded = self.model.encode_modalities(self.batch).values()
        if not encoded:
            return x.new_zeros(1, 1, x.shape[1])
        return torch.cat([e.tokens for e in encoded], dim=1)

    def layer(self, x: Tensor, _: Tensor) -> Tensor:
        last = self.block.last
        return self.model.slide_encoder.blocks(self.tokens.with_x(x), last, last).x

    def injector(self, x: Tensor, modal: Tensor) -> Tensor:
        return self.block.injector(self.tokens.with_x(x), modal, self.positions, None).x

    def extractor(self, x: Tensor, modal: Tensor) -> Tensor:
        return self.block.extractor(modal, self.positions, self.tokens.with_x(x))

    def count(self) -> dict[str, float]:
        """Return the bytes of every part at this number of tiles."""
        self.model.eval()
        with torch.no_grad():
            _, embedding = count_memory(self.embed, self.device)
        found: dict[str, float] = {"tokens": self.tokens.x.nbytes, "embed": embedding.peak}
        for name, run in {**self._trunk(), "modalities": self.modalities}.items():
            found |= {f"{name} {what}": n for what, n in self._count_part(run).items()}
        return found

    def count_plain(self) -> dict[str, float]:
        """Return the bytes of the trunk's parts without gradients."""
        return {name: self._count_plain(run) for name, run in self._trunk().items()}

    def _trunk(self) -> dict[str, Run]:
        return {"layer": self.layer, "injector": self.injector, "extractor": self.extractor}

    def _count_plain(self, run: Run) -> float:
        self.model.eval()
        with torch.no_grad():
            start = partial(run, self.tokens.x.detach(), self.modal.detach())
            return count_memory(start, self.device)[1].peak

    def _count_part(self, run: Run) -> dict[str, float]:
        plain = self._count_plain(run)
        x, modal = self.tokens.x.detach(), self.modal.detach()
        self.model.train()
        x, modal = x.requires_grad_(), modal.requires_grad_()
        out, forward = count_memory(partial(run, x, modal), self.device)

        def pull() -> None:
            if out.requires_grad:
                out.backward(torch.ones_like(out))

        _, backward = count_memory(pull, self.device)
        self.model.zero_grad(set_to_none=True)
        peak = max(forward.peak, forward.left + backward.peak)
        return {"plain": plain, "held": forward.left, "peak": peak}
