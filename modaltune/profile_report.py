"""Profiles of a model as tables, JSON and a picture, with what each stage reached of its limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table

from modaltune.engine.atomic import atomic_path
from modaltune.engine.device import DeviceFacts
from modaltune.errors import InputError
from modaltune.kernels import dilated_attention, frozen_linear
from modaltune.kernels.roofline import DEVICES
from modaltune.model import ModalTune
from modaltune.model_flops import Work, count_flops
from modaltune.plots import BLUE, INK, MUTED, RULE, SKY
from modaltune.profiling import Profile, profile_run
from modaltune.published_size import random_cases
from modaltune.train import TrainConfig, make_optimizer, train_step

BACKWARD = " (backward)"


@dataclass(frozen=True)
class Roofs:
    """What the device can do at best.

    Attributes:
        products: FLOP/s of matrix products.
        attention: FLOP/s of fused attention.
        source: Where the figures come from: measured in this run, or a data sheet.
    """

    products: float
    attention: float
    source: str

    def describe(self) -> str:
        """Return one line for the screen."""
        return (
            f"{self.products / 1e9:,.0f} GFLOP/s in products, {self.attention / 1e9:,.0f} in "
            f"attention ({self.source})"
        )

    def seconds(self, work: Work) -> float:
        """Return the least time that some work takes."""
        return work.products / self.products + work.attention / self.attention


def profile_model(
    model: ModalTune,
    tiles: int,
    *,
    training: bool,
    device: str = "cpu",
    trace: Path | None = None,
) -> Profile:
    """Profile all task prompts of one random case: a forward pass, or one AdamW step.

    Args:
        model: On `device`.
        tiles: Tiles of the case.
        training: A training step instead of a forward pass in evaluation mode.
        device: Where the model lies.
        trace: File for the Chrome trace.
    """
    batch = random_cases(model, tiles).to(device)
    model.train(training)
    if not training:

        def forward() -> None:
            with torch.inference_mode():
                model(batch)

        return profile_run(forward, device=device, trace=trace)
    recipe = TrainConfig()
    optimizer = make_optimizer(model, recipe)
    shape = (1, len(model.config.tasks), model.config.out_features)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(shape, generator=generator)
    targets = F.normalize(targets, dim=-1).to(device)
    return profile_run(
        lambda: train_step(model, optimizer, batch, targets, recipe), device=device, trace=trace
    )


def stage_work(model: ModalTune, tiles: int, *, training: bool) -> dict[str, Work]:
    """Return the useful FLOPs of every stage by its name in profiles, backward parts apart.

    Empty where they can't be counted (a slide encoder other than LongNet).
    """
    tasks = len(model.config.tasks)
    try:
        forward = count_flops(model, [tiles], tasks=tasks)
        both = count_flops(model, [tiles], tasks=tasks, training=True) if training else forward
    except InputError:
        return {}
    return {
        **forward,
        **{stage + BACKWARD: work + forward[stage] * -1 for stage, work in both.items()},
    }


def roofs(facts: DeviceFacts) -> Roofs | None:
    """Return the limits of a device: measured now on a CPU, of the data sheet on a known GPU."""
    if facts.kind == "cpu":
        return _measured_roofs()
    for device in DEVICES.values():
        if device.name in facts.name:
            rate = device.half_flops
            return Roofs(rate, rate, f"data sheet of {device.name}, 16-bit products")
    return None


def _measured_roofs() -> Roofs:
    """Time products and attention of the model's shapes, the best of a few runs each."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 768, generator=generator) for n in (2048, 3072))
    q = torch.randn(2048, 16, 48, generator=generator)
    heads, one = q.transpose(0, 1)[None].contiguous(), (q.shape[0],)
    pairs = 4.0 * q.shape[0] * q.numel()
    with torch.inference_mode():
        products = 2.0 * x.numel() * weight.shape[0] / _best(lambda: frozen_linear(x, weight))
        attention = pairs / min(
            _best(
                lambda: dilated_attention(q, q, q, segment_lengths=(2048,), dilation_ratios=(1,))
            ),
            _best(lambda: F.scaled_dot_product_attention(heads, heads, heads)),
        )
    return Roofs(products, attention, "measured in this run")


def _best(run: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def stage_rows(
    found: Profile, work: Mapping[str, Work], limits: Roofs | None
) -> list[dict[str, Any]]:
    """Return a row per stage: seconds, share, and where known GFLOP, GFLOP/s, share of limit."""
    rows = []
    for row in found.stages:
        done = work.get(row.stage, Work())
        counted = done.total > 0 and row.seconds > 0
        rows.append(
            {
                "stage": row.stage,
                "calls": row.calls,
                "seconds": row.seconds,
                "share": row.share,
                "gflop": done.total / 1e9 if counted else None,
                "gflops": done.total / 1e9 / row.seconds if counted else None,
                "of_limit": limits.seconds(done) / row.seconds if counted and limits else None,
            }
        )
    return rows


def stage_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return the stages as a table for the screen."""
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for column in ("calls", "seconds", "share", "GFLOP", "GFLOP/s", "of limit"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["stage"],
            str(row["calls"] or ""),
            f"{row['seconds']:.3f}",
            f"{row['share']:.1%}",
            *("" if row[key] is None else f"{row[key]:,.0f}" for key in ("gflop", "gflops")),
            "" if row["of_limit"] is None else f"{row['of_limit']:.0%}",
        )
    return table


def operator_table(found: Profile, top: int) -> Table:
    """Return the operators (CPU) or kernels (GPU) that took the longest."""
    kind = "kernel" if found.device.kind == "cuda" else "operator"
    table = Table(title=f"The {top} {kind}s that took the longest", title_justify="left")
    table.add_column(kind, overflow="fold")
    for column in ("calls", "seconds", "share"):
        table.add_column(column, justify="right")
    for row in found.operators[:top]:
        table.add_row(row.operator, str(row.calls), f"{row.seconds:.3f}", f"{row.share:.1%}")
    return table


def stage_picture(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw seconds per stage as bars; the dark part is what the limit of the device allows."""
    shown = [row for row in rows if row["share"] >= 0.005]
    figure = Figure(figsize=(7.5, 0.36 * len(shown) + 1.3), dpi=160, layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(shown):
        axes.barh(at, row["seconds"], height=0.62, color=SKY if row["of_limit"] else RULE)
        said = f" {row['seconds']:.2f} s, {row['share']:.0%}"
        if row["of_limit"]:
            least = min(row["of_limit"], 1.0) * row["seconds"]
            axes.barh(at, least, height=0.62, color=BLUE)
            said += f", {row['of_limit']:.0%} of the limit"
        axes.text(row["seconds"], at, said, va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(shown)), [row["stage"] for row in shown], fontsize=8.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(row["seconds"] for row in shown))  # room for what bars say
    axes.set_xlabel("seconds (dark: what the device's limit allows)", color=INK, fontsize=8.5)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
