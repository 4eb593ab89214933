"""Time runtimes of one encoder against each other, in seconds rather than minutes."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.errors import InputError

logger = logging.getLogger(__name__)

PASS_S = 0.2  # of each setting; below, one interrupt of the machine decides
_ROUNDS = 3  # of the best setting of each runtime, in turns
_MAX_TILES = 4096


@dataclass(frozen=True)
class Candidate:
    """A runtime with settings.

    Attributes:
        runtime: Its name.
        settings: `batch_size` and what else it takes.
        build: Opens it.
    """

    runtime: str
    settings: dict[str, int]
    build: Callable[[], TileEncoder]


def fastest(candidates: Sequence[Candidate], tiles: Tensor) -> dict[str, Any]:
    """Return the fastest candidate as JSON values: `runtime`, `settings`, and `rates` by runtime.

    Every setting runs once; then the best of each runtime take turns, and the medians decide. A
    runtime that can't be opened is left out, with the reason in the log; a batch that does not fit
    into memory ends the larger ones.

    Args:
        candidates: Settings of a runtime in a row, batches growing.
        tiles: `[n, h, w, 3]` uint8 that are repeated as needed.

    Raises:
        InputError: No runtime can be opened.
    """
    best = _best_settings(candidates, tiles)
    if not best:
        names = sorted({candidate.runtime for candidate in candidates})
        raise InputError(
            f"--runtime must be one that works here, got {', '.join(names)}, which "
            "could not be opened (see above); use torch"
        )
    seconds: dict[str, list[float]] = {name: [] for name in best}
    opened = {name: candidate.build() for name, (candidate, _) in best.items()}
    if len(best) > 1:
        # The same work for all, sized for the fastest.
        batch = _repeated(tiles, max(rate for _, rate in best.values()))
        for _ in range(_ROUNDS):
            for name, encoder in opened.items():
                size = best[name][0].settings["batch_size"]
                seconds[name].append(_seconds(encoder, batch, size) / len(batch))
    rates = {
        name: 1 / statistics.median(seconds[name]) if seconds[name] else rate
        for name, (_, rate) in best.items()
    }
    winner = max(rates, key=lambda name: rates[name])
    return {
        "runtime": winner,
        "settings": best[winner][0].settings,
        "rates": {name: round(rate, 2) for name, rate in rates.items()},
    }


def _best_settings(
    candidates: Sequence[Candidate], tiles: Tensor
) -> dict[str, tuple[Candidate, float]]:
    """Return the best candidate of each runtime with its tiles/s."""
    best: dict[str, tuple[Candidate, float]] = {}
    unfit: set[str] = set()
    full: dict[str, int] = {}
    for candidate in candidates:
        name, size = candidate.runtime, candidate.settings["batch_size"]
        if name in unfit or size >= full.get(name, size + 1):
            continue
        try:
            rate = _rate(candidate, tiles)
        except (InputError, ImportError, RuntimeError) as error:
            if name == "torch":
                raise
            logger.warning("--runtime %s is left out: %s", name, error)
            unfit.add(name)
            best.pop(name, None)
            continue
        if rate is None:
            full[name] = size
        elif name not in best or rate > best[name][1]:
            best[name] = (candidate, rate)
    return best


def _rate(candidate: Candidate, tiles: Tensor) -> float | None:
    """Return tiles/s of a setting, or None if its batch does not fit into memory."""
    encoder = candidate.build()
    size = candidate.settings["batch_size"]
    first = tiles.repeat(-(-size // len(tiles)), 1, 1, 1)[: max(size, len(tiles))]
    encoder.encode(first, batch_size=size)  # compiles, fills caches
    took = _seconds(encoder, first, size)
    rate = len(first) / took
    if took < PASS_S:
        batch = _repeated(tiles, max(rate, size / PASS_S))
        rate = len(batch) / _seconds(encoder, batch, size)
    return rate if encoder.batch_size >= size else None


def _repeated(tiles: Tensor, rate: float) -> Tensor:
    """Return tiles that take about `PASS_S` at a rate."""
    count = min(max(round(rate * PASS_S), len(tiles)), _MAX_TILES)
    return tiles.repeat(-(-count // len(tiles)), 1, 1, 1)[:count]


def _seconds(encoder: TileEncoder, tiles: Tensor, size: int) -> float:
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    started = time.perf_counter()
    encoder.encode(tiles, batch_size=size)  # ends with features on the CPU
    return time.perf_counter() - started
