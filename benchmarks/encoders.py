"""Tile encoders on this machine: uint8 tiles in memory to features, runtimes against each other."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modaltune.benchmarks.harness import commit_id, cpu_model, timestamp
from modaltune.engine.encoders import load_encoder
from modaltune.engine.encoders.agreement import check_gate, measure_agreement, probe_tiles
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.encoders.runtime_choice import open_runtime
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError

CSV_NAME = "encoders.csv"
RANDOM_VIT = "vit-small"
ENCODERS = ("efficientnet-lite0", RANDOM_VIT)
BATCHES = (1, 2, 4, 8, 16, 32)  # of which each eager side takes its best
BARS = {"efficientnet-lite0": 2.5, "vit-small": 1.3}
PLAIN = "plain torch"
_PASS_S = 0.5


@dataclass(frozen=True)
class Side:
    """One way to encode.

    Attributes:
        name: What the row calls it.
        encode: `[n, h, w, 3]` uint8 to `[n, width]` float32.
        setting: Batch size and layout, in words.
        cosine: Least cosine to eager PyTorch on a probe batch.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    setting: str
    cosine: float


def load_case(name: str) -> TorchEncoder:
    """Load the default encoder, or a random ViT-S/16 (its speed does not depend on its weights)."""
    if name == "efficientnet-lite0":
        encoder = load_encoder(name)
        if not isinstance(encoder, TorchEncoder):
            raise InputError(f"{name} must load in eager PyTorch, got {encoder.runtime}")
        return encoder
    if name != RANDOM_VIT:
        raise InputError(f"--encoder must be one of {', '.join(ENCODERS)}, got {name!r}")
    import timm

    torch.manual_seed(0)
    spec = replace(
        get_spec("dinov2-small"), name=RANDOM_VIT, backend="timm", model_args={},
        architecture="vit_small_patch16_224",
    )  # fmt: skip
    network = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    return TorchEncoder(spec, TimmFeatures(network, "cls"))


def plain_torch(eager: TorchEncoder, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Return what a user writes: torchvision's transforms, then eager channels-last inference."""
    from torchvision.transforms import v2

    spec = eager.spec
    mode = v2.InterpolationMode(spec.interpolation)
    steps: list[Any] = [] if spec.resize_px is None else [v2.Resize(spec.resize_px, mode)]
    steps += [
        v2.CenterCrop(spec.input_px),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(spec.mean, spec.std),
    ]
    transform = v2.Compose(steps)

    def encode(tiles: Tensor) -> Tensor:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(tiles), batch_size):
                images = transform(tiles[start : start + batch_size].permute(0, 3, 1, 2))
                parts.append(eager.features(images.contiguous(memory_format=torch.channels_last)))
        return torch.cat(parts)

    return encode


def sides_of(eager: TorchEncoder, *, compiled: bool) -> list[Side]:
    """Return the rivals of one encoder, each checked against eager PyTorch before it is timed.

    Raises:
        InputError: A side gives other features.
    """
    tiles = probe_tiles(8, eager.spec.tile_px, eager.spec.tile_px)
    want = eager.encode(tiles)
    rated = {size: _rate(plain_torch(eager, size), tiles.repeat(4, 1, 1, 1)) for size in BATCHES}
    size = max(rated, key=lambda batch: rated[batch])
    plain = plain_torch(eager, size)
    agreement = measure_agreement(plain(tiles), want)
    if not agreement.passes("fp32"):
        raise InputError(f"{PLAIN} must give {eager.name}'s features, got {agreement}")
    sides = [Side(PLAIN, plain, f"batch {size}", agreement.cosine)]
    for name in ("torch", "auto", *(("torch-compile",) if compiled else ())):
        # The eager encoder is shared: its batch size must not follow what `auto` tried.
        encoder = open_runtime(
            TorchEncoder(eager.spec, eager.features), name, batch_size=8 if "-" in name else None
        )
        cosine = check_gate(encoder, want, tiles).cosine
        shown = f"auto: {encoder.runtime}" if name == "auto" else name
        sides.append(Side(shown, encoder.encode, _setting(encoder), cosine))
    return sides


def _setting(encoder: TileEncoder) -> str:
    layout = encoder.settings().get("layout", {})
    parts = [f"batch {encoder.batch_size}"]
    parts += [f"{layout[name]} {name}" for name in ("workers", "threads") if name in layout]
    return ", ".join(parts)


def _rate(encode: Callable[[Tensor], Tensor], tiles: Tensor) -> float:
    encode(tiles[:2])
    started = time.perf_counter()
    encode(tiles)
    return len(tiles) / (time.perf_counter() - started)


def measure(name: str, rounds: int, *, compiled: bool = False) -> list[dict[str, Any]]:
    """Return one row for each side of an encoder; the sides take turns on the same tiles.

    Args:
        name: One of `ENCODERS`.
        rounds: Turns.
        compiled: Whether `torch.compile` takes part (a compilation of up to a minute).

    Raises:
        InputError: The encoder is unknown, or a side gives other features.
    """
    eager = load_case(name)
    sides = sides_of(eager, compiled=compiled)
    px = eager.spec.tile_px
    fastest = max(_rate(side.encode, probe_tiles(16, px, px)) for side in sides)
    tiles = probe_tiles(max(16, round(fastest * _PASS_S)), px, px)
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            started = time.perf_counter()
            side.encode(tiles)
            rates[side.name].append(len(tiles) / (time.perf_counter() - started))
    flops = tile_flops(eager)
    base = statistics.median(rates[PLAIN])
    return [_row(name, side, rates[side.name], base, len(tiles), flops) for side in sides]


def tile_flops(eager: TorchEncoder) -> int:
    """Return the FLOPs (a multiplication and an addition are two) of one tile's network."""
    side = eager.spec.input_px
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager.features(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def _row(
    name: str, side: Side, rates: Sequence[float], base: float, tiles: int, flops: int
) -> dict[str, Any]:
    import onnxruntime

    p20, p50, p80 = (_quantile(rates, share) for share in (0.2, 0.5, 0.8))
    return {
        "time": timestamp(),
        "commit": commit_id(),
        "device": f"{cpu_model()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "torch": str(torch.__version__),
        "onnxruntime": onnxruntime.__version__,
        "encoder": name,
        "side": side.name,
        "setting": side.setting,
        "tiles": tiles,
        "rounds": len(rates),
        "tiles_per_s_p20": round(p20, 2),
        "tiles_per_s": round(p50, 2),
        "tiles_per_s_p80": round(p80, 2),
        "ratio": round(p50 / base, 3),
        "gflops_per_s": round(p50 * flops / 1e9, 1),
        "cosine": round(side.cosine, 8),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


def missed_bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each encoder whose chosen runtime is below its bar on a CPU."""
    return [
        f"{row['encoder']}: {row['side']} is {row['ratio']} x {PLAIN}, the bar is {BARS[name]} x"
        for name in BARS
        for row in rows
        if row["encoder"] == name and row["side"].startswith("auto") and row["ratio"] < BARS[name]
    ]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw tiles/s by encoder and side, p20 to p80 as a line, and return the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["encoder"] for row in rows))
    figure, axes = plt.subplots(
        len(names), 1, figsize=(7.5, 0.5 + 1.55 * len(names)), layout="constrained"
    )
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        mine = [row for row in rows if row["encoder"] == name][::-1]
        values = [row["tiles_per_s"] for row in mine]
        low = [row["tiles_per_s"] - row["tiles_per_s_p20"] for row in mine]
        high = [row["tiles_per_s_p80"] - row["tiles_per_s"] for row in mine]
        colours = ["#3b6fb6" if row["side"].startswith("auto") else "#b9c3cf" for row in mine]
        bars = axis.barh(
            [row["side"] for row in mine], values, xerr=[low, high], color=colours, height=0.65,
            error_kw={"elinewidth": 1, "ecolor": "#555"},
        )  # fmt: skip
        axis.bar_label(
            bars, [f"{row['tiles_per_s']:.0f}  ({row['ratio']:.1f} x)" for row in mine], padding=6
        )
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"tiles/s, 256 px, {rows[0]['device']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
