"""Profiles of a model as tables, JSON and a picture, with what each stage reached of its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table

from modaltune.engine.atomic import atomic_path
from modaltune.engine.device import DeviceFacts
from modaltune.errors import InputError
from modaltune.kernels.roofline import known_device
from modaltune.learner import ModalTuneLearner, Targets
from modaltune.machine_limits import Rates, measure_rates
from modaltune.model import ModalTune
from modaltune.model_flops import Work, count_flops
from modaltune.plots import BLUE, INK, MUTED, RULE, SKY
from modaltune.profiling import Profile, profile_run
from modaltune.published_size import random_cases
from modaltune.train import make_optimizer, train_step

BACKWARD = " (backward)"


@dataclass(frozen=True)
class Limit:
    """What the device can do at best, and who says so."""

    rates: Rates
    source: str

    def describe(self) -> str:
        """Return one line for the screen."""
        return (
            f"{self.rates.products / 1e9:,.0f} GFLOP/s in products, "
            f"{self.rates.attention / 1e9:,.0f} in attention ({self.source})"
        )

    def seconds(self, work: Work, stage: str) -> float:
        """Return the least time that the work of a stage takes."""
        if not stage.endswith(BACKWARD):
            return self.rates.seconds(work.products, work.attention, training=False)
        # `attention_training` is of forward and backward together, 3 parts of work, 2 of them here.
        both = 1.5 * work.attention / self.rates.attention_training
        forward = 0.5 * work.attention / self.rates.attention
        return work.products / self.rates.products + max(both - forward, 0.0)


def profile_model(
    model: ModalTune,
    tiles: int,
    *,
    training: bool,
    device: str = "cpu",
    precision: str = "float32",
    trace: Path | None = None,
) -> Profile:
    """Profile all task prompts of one random case: a forward pass, or one AdamW step.

    Args:
        model: On `device`.
        tiles: Tiles of the case.
        training: A training step instead of a forward pass in evaluation mode.
        device: Where the model lies.
        precision: `float32`, or `bfloat16` or `float16` by autocast.
        trace: File for the Chrome trace.
    """
    batch = random_cases(model, tiles).to(device)
    mixed = partial(
        torch.autocast, torch.device(device).type, getattr(torch, precision),
        enabled=precision != "float32",
    )  # fmt: skip
    model.train(training)
    if not training:

        def forward() -> None:
            with torch.inference_mode(), mixed():
                model(batch)

        return profile_run(forward, device=device, trace=trace)
    learner = ModalTuneLearner(model)
    optimizer = make_optimizer(learner, learner.config)
    shape = (1, len(model.config.tasks), model.config.out_features)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(shape, generator=generator)
    parts = [(batch, Targets.of_text(F.normalize(targets, dim=-1)).to(device))]

    def step() -> None:
        with mixed():
            train_step(learner, optimizer, parts)

    return profile_run(step, device=device, trace=trace)


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


def limit_of(facts: DeviceFacts, *, training: bool) -> Limit | None:
    """Return the limit of a device: measured now on a CPU, of the data sheet on a known GPU."""
    if facts.kind == "cpu":
        return Limit(measure_rates(rounds=7, training=training), "measured in this run")
    known = known_device(facts.name)
    if known is None:
        return None
    return Limit(Rates(*[known.half_flops] * 3), f"data sheet of {known.name}, 16-bit products")


def stage_rows(
    found: Profile, work: Mapping[str, Work], limit: Limit | None
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
                "of_limit": (
                    limit.seconds(done, row.stage) / row.seconds if counted and limit else None
                ),
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
