"""The whole engine on a cohort: does the encoder ever wait, and what does the rest cost it?

A cohort of small slides is drawn and written as JPEG pyramids, then embedded as `modaltune embed`
does it, feature files and ledger included. Rival in the same run: the encoder alone, on the same
tiles in memory, before and after. Rates count from the fifth slide on: each decoding process loads
its compiled loops with its first slide.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modaltune.benchmarks.encoders import RANDOM_VIT, load_case
from modaltune.benchmarks.harness import commit_id, cpu_model, timestamp
from modaltune.benchmarks.process_tree import TreeMemory
from modaltune.engine.cohort import items_from_paths
from modaltune.engine.decode import DecodeOptions, SlideRequest, TileBlock, TileDecoder
from modaltune.engine.encoders import load_encoder
from modaltune.engine.encoders.runtime_choice import open_runtime
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError
from modaltune.engine.folder import EmbedOptions, EmbedReport, SlideOutcome, embed_slides
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.store import read_features
from modaltune.engine.stream import StreamOptions
from modaltune.synthetic_tissue import TissuePainter, sample_stain

if TYPE_CHECKING:
    from modaltune.engine.encoders.runtime import TileEncoder

CSV_NAME = "stream.csv"
TILE_PX = 256
SMALLEST, LARGEST, MEAN = 30, 300, 125
BUSY_BAR, RATE_BAR, FLAT_BAR = 0.95, 0.95, 0.05
STEADY = 0.1  # the encoder alone, before and after: apart by more, something else was at work
FROM_SLIDE = 5  # warm from here on: rates count, and memory is flat
ALONE_TILES = 512
# Of each decoding process, once it has surveyed a slide; of the libraries that only they load.
WORKER_MIB, LIBRARIES_MIB = 130, 90
_FIELD = ("#" * 8,) * 8


@dataclass(frozen=True)
class Stretch:
    """A stretch of work, seconds since the run's start."""

    stage: str
    slide: str
    start_s: float
    end_s: float


@dataclass
class Measured:
    """What one run showed.

    Attributes:
        row: What is kept in the CSV.
        stages_s: Seconds by stage.
        rss_mib: Resident memory of this process and its children after each slide.
        stretches: Who worked when.
    """

    row: dict[str, Any]
    stages_s: dict[str, float]
    rss_mib: list[float]
    stretches: list[Stretch] = field(default_factory=list, repr=False)


def slide_sizes(slides: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return columns and rows of each slide's tissue: 30 to 300 tiles, 125 in the mean."""
    rng = np.random.default_rng(seed)
    counts = SMALLEST + (LARGEST - SMALLEST) * rng.beta(1.0, 1.84, slides)
    sizes = []
    for count in counts:
        columns = max(4, round(float(np.sqrt(count * rng.uniform(0.6, 1.6)))))
        rows = min(max(-(-SMALLEST // columns), round(count / columns)), LARGEST // columns)
        sizes.append((columns, rows))
    return sizes


def write_cohort(folder: Path, slides: int, seed: int = 0) -> list[Path]:
    """Write JPEG slides of drawn tissue at 0.5 mpp, with a margin of glass.

    One field is drawn and laid out differently in each slide: drawing 3,000 tiles takes minutes.
    """
    rng = np.random.default_rng(seed)
    painter = TissuePainter(seed, tile_px=TILE_PX)
    drawn = painter.draw(0.5, _FIELD, sample_stain(rng), rng).rgb
    field_rgb = drawn[TILE_PX : 9 * TILE_PX, TILE_PX : 9 * TILE_PX]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (columns, rows) in enumerate(slide_sizes(slides, seed)):
        shift = rng.integers(0, field_rgb.shape[0], 2)
        rolled = np.roll(field_rgb, shift, axis=(0, 1))
        repeats = (-(-rows * TILE_PX // rolled.shape[0]), -(-columns * TILE_PX // rolled.shape[1]))
        tissue = np.tile(rolled, (*repeats, 1))[: rows * TILE_PX, : columns * TILE_PX]
        rgb = np.full(((rows + 2) * TILE_PX, (columns + 2) * TILE_PX, 3), 245, dtype=np.uint8)
        rgb[TILE_PX:-TILE_PX, TILE_PX:-TILE_PX] = tissue
        path = folder / f"slide-{number:02d}.tiff"
        paths.append(write_pyramid(path, rgb, mpp=0.5, levels=2, compression="jpeg"))
    return paths


def tiles_in_memory(paths: Sequence[Path], most: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return tiles of the first slides, uint8 [n, 256, 256, 3]."""
    found: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    with TileDecoder(DecodeOptions(workers=1)) as decoder:
        for event in decoder.stream(SlideRequest(p.stem, p) for p in paths):
            if isinstance(event, TileBlock):
                with event:
                    found.append(event.tiles.copy())
                if sum(map(len, found)) >= most:
                    break
    return np.concatenate(found)[:most]


def alone_rate(
    encoder: TileEncoder, tiles: np.ndarray[Any, np.dtype[np.uint8]]
) -> tuple[float, float]:
    """Return tiles per second of the encoder by itself, and core seconds per tile."""
    encoder.encode(tiles[: len(tiles) // 2])  # first calls are slower
    start, cores = time.perf_counter(), time.process_time()
    encoder.encode(tiles)
    rate = len(tiles) / (time.perf_counter() - start)
    return rate, (time.process_time() - cores) / len(tiles)


def bound_mib(
    encoder: TileEncoder, base_mib: float, workers: int | None, largest_tiles: int
) -> float:
    """Return the most memory a run may take: the formula of `SlideStream` and `DecodeOptions`.

    Args:
        encoder: Its features count.
        base_mib: Memory before the run, encoder warm.
        workers: Decoding processes; None for the engine's own rule.
        largest_tiles: Tiles of the largest slide.
    """
    options = StreamOptions(decode=DecodeOptions(workers=workers))
    tile_bytes = 3 * TILE_PX**2
    batches = 3 * 32 * tile_bytes
    features = options.most_slides * largest_tiles * encoder.width * 4
    shared = options.decode.shared_bytes + batches + features
    return base_mib + shared / 2**20 + options.decode.most_workers * WORKER_MIB + LIBRARIES_MIB


def _gate(outcomes: Sequence[SlideOutcome], encoder: TileEncoder) -> None:
    """Refuse to report a run whose features are not those of the tiles.

    Raises:
        InputError: A slide failed, or its features differ.
    """
    lost = [o.reason for o in outcomes if o.status != "done"]
    if lost:
        raise InputError(f"every slide must be embedded, got {lost[0]}; nothing is timed")
    smallest = min(outcomes, key=lambda outcome: outcome.tiles)
    if smallest.features is None:
        raise InputError(f"{smallest.slide_id} must have a feature file, got none")
    stored = read_features(smallest.features).features
    if not np.isfinite(stored).all() or len(stored) != smallest.tiles:
        raise InputError(f"{smallest.slide_id} must have finite features, got others")


def open_encoder(name: str, runtime: str, device: str) -> TileEncoder:
    """Open a tile encoder in a runtime; `vit-small` is a random ViT-S/16."""
    if name != RANDOM_VIT:
        return load_encoder(name, runtime=runtime, device=device)
    random = load_case(name)
    return open_runtime(TorchEncoder(random.spec, random.features, device=device), runtime)


@dataclass
class _Timed:
    """A run: `counts` are (time, tiles encoded), `warm` the one when the fifth slide was done.

    `cores_s` are core seconds of this process and of its children.
    """

    report: EmbedReport
    cores_s: tuple[float, float]
    started: float
    stretches: list[Stretch]
    counts: list[tuple[float, int]]
    warm: tuple[float, int] | None

    @property
    def tiles_per_s(self) -> float:
        """Tiles per second from the fifth slide on, or of all if all are encoded by then."""
        until, total = self.counts[-1]
        whole = (min(s.start_s for s in self.encoding) + self.started, 0)
        since, done = self.warm if self.warm and self.warm[1] < total else whole
        return (total - done) / (until - since)

    @property
    def encoding(self) -> list[Stretch]:
        """When the encoder worked."""
        return [s for s in self.stretches if s.stage == "encode"]


def _timed(paths: Sequence[Path], encoder: TileEncoder, out: Path, workers: int | None) -> _Timed:
    """Embed a cohort, and see who worked when."""
    started, lock, before = time.perf_counter(), threading.Lock(), os.times()
    stretches: list[Stretch] = []
    counts: list[tuple[float, int]] = []
    at: list[tuple[float, int]] = []

    def observe(stage: str, slide: str, start: float, end: float) -> None:
        with lock:
            stretches.append(Stretch(stage, slide, start - started, end - started))

    report = embed_slides(
        items_from_paths(paths),
        encoder,
        out,
        EmbedOptions(overlays=False, workers=workers),
        on_tiles=lambda done: counts.append((time.perf_counter(), done)),
        on_slide=lambda _: at.append(counts[-1] if counts else (started, 0)),
        observe=observe,
    )
    after = os.times()
    own = after.user + after.system - before.user - before.system
    # Those of processes that have ended, as the workers have.
    children = sum(after[2:4]) - sum(before[2:4])
    _gate(report.outcomes, encoder)
    warm = at[FROM_SLIDE - 1] if len(at) >= FROM_SLIDE else None
    return _Timed(report, (own, children), started, stretches, counts, warm)


def _memory(
    paths: Sequence[Path], encoder: TileEncoder, out: Path, workers: int | None
) -> list[float]:
    """Embed a cohort; return MiB of all processes after each slide."""
    memory, rss = TreeMemory(os.getpid()), []
    options = EmbedOptions(overlays=False, workers=workers)
    embed_slides(
        items_from_paths(paths), encoder, out, options, on_slide=lambda _: rss.append(memory.mib())
    )
    return rss


def measure(
    encoder_name: str,
    *,
    slides: int = 24,
    runtime: str = "auto",
    device: str = "cpu",
    workers: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> Measured:
    """Embed a cohort twice, for times and then for memory, and compare with the encoder alone.

    Reading how much memory all processes have takes 40 ms a slide, a tenth of the default encoder's
    time: a run in which it is read is not timed.

    Args:
        encoder_name: The tile encoder, or `vit-small` for a random ViT-S/16, which is slower.
        slides: Slides of the cohort.
        runtime: As `--runtime` takes it.
        device: Of the encoder.
        workers: Decoding processes; None for the engine's own rule.
        seed: Of the cohort.
        folder: Where the cohort lies or is written; a temporary one unless given.

    Raises:
        InputError: A slide can't be embedded.
    """
    encoder = open_encoder(encoder_name, runtime, device)
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_cohort(folder or Path(scratch) / "slides", slides, seed)
        tiles = tiles_in_memory(paths, ALONE_TILES)
        before, cores_before = alone_rate(encoder, tiles)
        base = TreeMemory(os.getpid()).mib()  # before both: what the first leaves behind counts
        timed = _timed(paths, encoder, Path(scratch) / "out", workers)
        after, cores_after = alone_rate(encoder, tiles)
        rss = _memory(paths, encoder, Path(scratch) / "again", workers)
    report, encoding = timed.report, timed.encoding
    span = max(s.end_s for s in encoding) - min(s.start_s for s in encoding)
    rate, alone = timed.tiles_per_s, (before + after) / 2
    steady = rss[FROM_SLIDE - 1 :] or rss
    bound = bound_mib(encoder, base, workers, max(o.tiles for o in report.outcomes))
    row = {
        "time": timestamp(),
        "commit": commit_id(),
        "device": f"{cpu_model()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "torch": torch.__version__,
        "encoder": encoder.name,
        "runtime": encoder.runtime,
        "slides": len(paths),
        "tiles": report.new_tiles,
        "elapsed_s": round(report.elapsed_s, 2),
        "encoding_s": round(span, 2),
        "encoder_busy": round(report.encoder_busy, 4),
        "tiles_per_s": round(rate, 1),
        "alone_tiles_per_s": round(alone, 1),
        "alone_before_tiles_per_s": round(before, 1),
        "alone_after_tiles_per_s": round(after, 1),
        "ratio": round(rate / alone, 4),
        "base_mib": round(base),
        "peak_mib": round(max(rss)),
        "bound_mib": round(bound),
        "spread": round((max(steady) - min(steady)) / (sum(steady) / len(steady)), 4),
        **{f"{stage}_s": round(seconds, 3) for stage, seconds in report.stages_s.items()},
        # Core seconds: of the encoder alone for as many tiles, of this process, of the workers.
        "alone_cores_s": round((cores_before + cores_after) / 2 * report.new_tiles, 2),
        "own_cores_s": round(timed.cores_s[0], 2),
        "workers_cores_s": round(timed.cores_s[1], 2),
    }
    return Measured(row, report.stages_s, [round(mib, 1) for mib in rss], timed.stretches)


def missed_bars(row: dict[str, Any]) -> list[str]:
    """Return which bars a row misses, in words; a ratio that says nothing misses its bar."""
    said = []
    before, after = row["alone_before_tiles_per_s"], row["alone_after_tiles_per_s"]
    if row["encoder_busy"] < BUSY_BAR:
        said.append(f"encoder busy {row['encoder_busy']:.1%}, bar {BUSY_BAR:.0%}")
    if abs(before - after) > STEADY * max(before, after):
        said.append(
            f"ratio unknown, alone {before} tiles/s before and {after} after: not a quiet machine"
        )
    elif row["ratio"] < RATE_BAR:
        said.append(f"{row['ratio']:.1%} of the encoder alone, bar {RATE_BAR:.0%}")
    if row["peak_mib"] > row["bound_mib"]:
        said.append(f"memory {row['peak_mib']} MiB, bound {row['bound_mib']} MiB")
    if row["spread"] > 2 * FLAT_BAR:
        said.append(f"memory varies by {row['spread']:.1%}, bar +- {FLAT_BAR:.0%}")
    return said
