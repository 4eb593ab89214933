"""What the parts of a model hold and need for a moment, counted on a small run of each.

Counting is exact: every allocation and release of torch while a part runs. Nothing about layers is
written down here, so the counts follow whatever the layers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.model import ModalTune
from modaltune.slide_encoders.protocol import SlideTokens

# Rows beyond which a part grows in a straight line: more than any block of rows that is worked on
# at once. The second size is where the slope is taken.
PROBE_ROWS = (4352, 5632)


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
    """

    tokens: Line
    embed: Line
    layer: Part
    injector: Part
    extractor: Part
    modalities: Part


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
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run()
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


def synthetic_batch(model: ModalTune, tiles: int, seed: int = 0) -> CaseBatch:
    """Return one case of random tiles on a square grid and random values of every modality.

    Raises:
        InputError: A further modality does not say how many values it takes.
    """
    generator = torch.Generator().manual_seed(seed)
    device, dtype = model.modal_positions.device, model.modal_positions.dtype
    config: Any = model.slide_encoder
    cell_px = int(getattr(config.config, "cell_px", 256)) if hasattr(config, "config") else 256
    side = math.isqrt(max(tiles - 1, 0)) + 1
    cell = torch.arange(tiles)
    values = {}
    for name, module in model.each_modality().items():
        if module.in_features is None:
            raise InputError(
                f"modality {name} must state in_features to be planned for, got None; set it"
            )
        values[name] = torch.randn(1, module.in_features, generator=generator)
    return CaseBatch(
        tiles=torch.randn(tiles, model.slide_encoder.in_features, generator=generator),
        positions_px=torch.stack([cell % side, cell // side], dim=1) * cell_px,
        offsets=torch.tensor([0, tiles]),
        modalities=values,
    ).to(device, dtype)


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
    sizes = PROBE_ROWS if tiles > PROBE_ROWS[1] else (tiles // 2, tiles)
    seen = [_count_at(model, size) for size in sizes]
    model.eval()
    model.zero_grad(set_to_none=True)
    found: dict[str, Line] = {
        name: Line.through(sizes, (seen[0][name], seen[1][name])) for name in seen[0]
    }

    def part(name: str) -> Part:
        return Part(*(found[f"{name} {what}"] for what in ("plain", "held", "peak")))

    layer, injector, extractor = (part(name) for name in ("layer", "injector", "extractor"))
    return Parts(found["tokens"], found["embed"], layer, injector, extractor, part("modalities"))


def _count_at(model: ModalTune, tiles: int) -> dict[str, float]:
    device, batch = model.modal_positions.device, synthetic_batch(model, tiles)
    block, encoder = model.adapter.interactions()[-1], model.slide_encoder

    def embed() -> SlideTokens | None:
        return model.embed_tiles(batch)[0]

    def modalities() -> Tensor:
        return torch.cat([e.tokens for e in model.encode_modalities(batch).values()], dim=1)

    model.eval()
    with torch.no_grad():
        tokens, embedding = count_memory(embed, device)
        modal = modalities()
    positions = model.modal_positions[: modal.shape[1]]
    found: dict[str, float] = {"tokens": tokens.x.nbytes, "embed": embedding.peak}

    def layer(x: Tensor, _: Tensor) -> Tensor:
        return encoder.blocks(tokens.with_x(x), block.last, block.last).x

    def injector(x: Tensor, modal: Tensor) -> Tensor:
        return block.injector(tokens.with_x(x), modal, positions, None).x

    def extractor(x: Tensor, modal: Tensor) -> Tensor:
        return block.extractor(modal, positions, tokens.with_x(x))

    runs = {"layer": layer, "injector": injector, "extractor": extractor}
    for name, run in {**runs, "modalities": lambda _, __: modalities()}.items():
        x, given = tokens.x.detach(), modal.detach()
        model.eval()
        with torch.no_grad():
            _, plain = count_memory(partial(run, x, given), device)
        model.train()
        x, given = x.requires_grad_(), given.requires_grad_()
        out, forward = count_memory(partial(run, x, given), device)
        _, backward = count_memory(lambda out=out: out.backward(torch.ones_like(out)), device)
        found |= {
            f"{name} plain": plain.peak,
            f"{name} held": forward.left,
            f"{name} peak": max(forward.peak, forward.left + backward.peak),
        }
        del out
        model.zero_grad(set_to_none=True)
    return found
