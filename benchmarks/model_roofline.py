"""A whole three-task forward and train step of the published model, modelled part by part.

Every launch is counted at its own roof: the larger of its products at peak and its bytes at the
memory's rate. The floor is coarser: all products at 80 % of the dense peak, nothing else. Parts of
65 rows (projections of modal tokens, prompt self-attention, head) are counted in launches only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modaltune.kernels.roofline import (
    LAUNCHES,
    Device,
    OpCost,
    costed_ops,
    on_device,
    op_cost,
    published,
)

WIDTH, FFN, LAYERS, TASKS, TILE_FEATURES = 768, 3072, 12, 3, 1536
INJECTORS, EXTRACTORS, SELF_ATTENTIONS = 3, 5, 2
TRAINABLE = 33_524_890
ATTAINABLE = 0.8  # share of the dense peak that the floor grants to products
HALF = 2  # bytes
# PyTorch launches around the kernels, read off modaltune/adapter.py and model.py.
_AROUND_INJECTOR, _AROUND_EXTRACTOR, _SELF_ATTENTION, _HEAD = 8, 15, 10, 6
_OPTIMIZER_LAUNCHES = 12
# Names of the ops whose cost the sum needs.
MODEL_OPS = ("dilated_attn", "extraction", "grouped_mlp", "injection", "position_embed")


@dataclass(frozen=True)
class Part:
    """Equal launches of one pass: how often they run and what one of them costs."""

    name: str
    count: int
    launches: int
    cost: OpCost


@dataclass(frozen=True)
class WholeModel:
    """The sum over a pass.

    Attributes:
        mode: `forward` or `train`.
        device: Name of the device.
        tiles: Tiles of the slide.
        gflop: Products of all tasks.
        floor_s: Products alone, at 80 % of the dense peak.
        roof_s: Every launch at its own roof, with the bytes that ours moves.
        launches: With the tasks packed into one pass, as batches of cases are.
        launches_separate: With one pass per task.
        missing: Ops without a `cost.py`, which are not in the sum.
    """

    mode: str
    device: str
    tiles: int
    gflop: float
    floor_s: float
    roof_s: float
    launches: int
    launches_separate: int
    missing: tuple[str, ...]


def _product(rows: int, inputs: int, outputs: int) -> OpCost:
    moved = HALF * (rows * inputs + rows * outputs + inputs * outputs)
    return OpCost(2.0 * rows * inputs * outputs, moved, moved)


def _elementwise(rows: int, columns: int, tensors: int) -> OpCost:
    moved = float(HALF * rows * columns * tensors)
    return OpCost(0.0, moved, moved)


def _layer(rows: int, mode: str) -> list[Part]:
    """One LongNet layer but for its attention; frozen weights have no gradient."""
    products = {
        "qkv": (WIDTH, 3 * WIDTH),
        "attention out": (WIDTH, WIDTH),
        "fc1": (WIDTH, FFN),
        "fc2": (FFN, WIDTH),
    }
    parts = [Part(name, LAYERS, 1, _product(rows, *sizes)) for name, sizes in products.items()]
    reads = 2 if mode == "forward" else 3  # backward: input and gradient in, gradient out
    parts.append(Part("norms", 3 * LAYERS, 1, _elementwise(rows, WIDTH, reads)))
    parts.append(Part("inner FFN norm", LAYERS, 1, _elementwise(rows, FFN, reads)))
    # Half precision: GELU runs in float32, as published; its casts are launches of their own.
    gelu = _elementwise(rows, FFN, 2 * (reads + 1))
    parts.append(Part("GELU", LAYERS, 3, gelu))
    parts.append(Part("residuals", 2 * LAYERS, 1, _elementwise(rows, WIDTH, 3)))
    return parts


def _kernel_parts(tiles: int, mode: str, device: Device) -> list[Part]:
    counts = {"dilated_attn": LAYERS, "injection": INJECTORS, "extraction": EXTRACTORS}
    counts["grouped_mlp"] = 1
    parts = []
    for op, count in counts.items():
        cost = op_cost(op, published(op, tiles), mode=mode, device=device)
        if cost is not None:
            parts.append(Part(op, count, LAUNCHES[op][mode == "backward"], cost))
    return parts


def model_parts(tiles: int, mode: str, device: Device) -> list[Part]:
    """Return what one task's pass consists of, `forward` or `backward`."""
    parts = _layer(tiles, mode) + _kernel_parts(tiles, mode, device)
    around = INJECTORS * _AROUND_INJECTOR + EXTRACTORS * _AROUND_EXTRACTOR
    around += SELF_ATTENTIONS * _SELF_ATTENTION + _HEAD
    small = around * (2 if mode == "backward" else 1)
    parts.append(Part("modal tokens and head", 1, small, OpCost(0.0, 0.0, 0.0)))
    return parts


def _once(tiles: int, device: Device) -> list[Part]:
    """Work that all tasks share: the tiles' embedding."""
    parts = [Part("patch embedding", 1, 1, _product(tiles, TILE_FEATURES, WIDTH))]
    cost = op_cost("position_embed", published("position_embed", tiles), device=device)
    if cost is not None:
        parts.append(Part("position_embed", 1, LAUNCHES["position_embed"][0], cost))
    return parts


def _optimizer() -> list[Part]:
    moved = 7.0 * 4 * TRAINABLE  # weight, gradient and two moments in; weight and moments out
    return [Part("AdamW", 1, _OPTIMIZER_LAUNCHES, OpCost(0.0, moved, moved))]


def _sum(parts: Sequence[Part], device: Device) -> tuple[float, float, int]:
    """Return FLOPs, seconds at the roof and launches."""
    flops = sum(part.count * part.cost.flops for part in parts)
    seconds = sum(part.count * on_device(part.cost, device).ours_s for part in parts)
    return flops, seconds, sum(part.count * part.launches for part in parts)


def whole_model(tiles: int, mode: str, device: Device) -> WholeModel:
    """Return the sum over a three-task pass on one slide.

    Args:
        tiles: Tiles of the slide.
        mode: `forward`, or `train`: forward, backward with a frozen trunk and nothing recomputed
            outside our kernels, and an AdamW step.
        device: Where.

    Raises:
        ValueError: The mode is neither.
    """
    if mode not in ("forward", "train"):
        raise ValueError(f"mode must be forward or train, got {mode!r}")
    per_task = model_parts(tiles, "forward", device)
    shared = _once(tiles, device)
    if mode == "train":
        per_task = per_task + model_parts(tiles, "backward", device)
        shared = shared + _optimizer()
    flops, seconds, launches = _sum(per_task, device)
    once_flops, once_seconds, once_launches = _sum(shared, device)
    total = TASKS * flops + once_flops
    return WholeModel(
        mode=mode,
        device=device.name,
        tiles=tiles,
        gflop=total / 1e9,
        floor_s=total / (ATTAINABLE * device.half_flops),
        roof_s=TASKS * seconds + once_seconds,
        launches=launches + once_launches,
        launches_separate=TASKS * launches + once_launches,
        missing=tuple(op for op in MODEL_OPS if op not in costed_ops()),
    )
