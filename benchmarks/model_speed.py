"""Seconds and memory of the whole model against the literal rival, answers compared first.

Both sides run in processes of their own and take turns. Peak memory is what a run adds to the
memory of its process (resident, or allocated on a GPU) after a warm-up: weights, kept copies and
the optimiser's state are there before. The limit is the time that the useful FLOPs take at the best
rates of products and of attention that any library showed in this very run.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from modaltune.benchmarks.harness import commit_id, cpu_model, timestamp
from modaltune.benchmarks.kernel_timing import free_bytes
from modaltune.benchmarks.model_sides import Workload
from modaltune.benchmarks.model_worker import Worker
from modaltune.engine.errors import InputError
from modaltune.machine_limits import Rates
from modaltune.published_size import MEMBERSHIPS, PATHWAYS

CSV_NAME = "model_speed.csv"
MEMORY_HOW = "{} memory that a run adds after a warm-up, fresh process per side"
# The bars.
RATIO_BAR, SHARED_BAR, SHARE_BAR, MEMORY_BAR = 1.4, 4.0, 0.85, 1 / 3
# Pass marks of the golden files: outputs, and all gradients together, relative Frobenius.
LIMITS = {"outputs": 1e-5, "gradients": 1e-5}
_BYTES_PER_ROW = 4 * 768
# The rival keeps about 40 rows of width D per tile, layer and task until it goes back.
_RIVAL_ROWS = 40 * 12


@dataclass(frozen=True)
class Measured:
    """What one run of the benchmark found: seconds of each round, CPU seconds of all threads."""

    work: Workload
    ours_s: Sequence[float]
    rival_s: Sequence[float]
    ours_cpu_s: Sequence[float]
    rival_cpu_s: Sequence[float]
    ours_peak: int | None
    rival_peak: int | None
    parts: Mapping[str, float]
    rates: Rates
    facts: Mapping[str, Any]
    errors: Mapping[str, float]

    @property
    def _on_gpu(self) -> bool:
        return self.work.where == "cuda"

    @property
    def limit_s(self) -> float:
        """Least seconds of the useful FLOPs at the best rates seen."""
        training = self.work.mode == "train"
        return self.rates.seconds(self.facts["products"], self.facts["attention"], training)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command."""
        ours, rival = statistics.median(self.ours_s), statistics.median(self.rival_s)
        flops = self.facts["products"] + self.facts["attention"]
        share = self.limit_s / ours
        return {
            **self.work.to_dict(),
            "rival": "literal",
            "ours_s": round(ours, 4),
            "rival_s": round(rival, 4),
            "ratio": round(rival / ours, 3),
            **self._cpu(),
            "slides_per_h": round(3600 / ours, 1),
            "ours_peak_mib": _mib(self.ours_peak),
            "rival_peak_mib": _mib(self.rival_peak),
            "memory_share": self._memory_share(),
            "memory_how": MEMORY_HOW.format("allocated" if self._on_gpu else "resident"),
            "kept_copies_mib": _mib(self.facts["packed_bytes"]),
            "parts_s": {name: round(s, 4) for name, s in self.parts.items()},
            "useful_gflop": round(flops / 1e9, 3),
            "useful_attention_gflop": round(self.facts["attention"] / 1e9, 3),
            "gflops": round(flops / ours / 1e9, 1),
            "best_product_gflops": round(self.rates.products / 1e9, 1),
            "best_attention_gflops": round(self._attention_rate() / 1e9, 1),
            "limit_s": round(self.limit_s, 4),
            "share_of_limit": round(share, 3),
            "best_round_share_of_limit": round(self.limit_s / min(self.ours_s), 3),
            "products_by": self.facts["library"],
            "errors": dict(self.errors),
            "rounds": len(self.ours_s),
            "ours_rounds_s": [round(s, 4) for s in self.ours_s],
            "rival_rounds_s": [round(s, 4) for s in self.rival_s],
            "pathways": PATHWAYS,
            "memberships": MEMBERSHIPS,
            "device": self.facts["name"] or f"{cpu_model()}, {self.facts['threads']} threads",
            "torch": self.facts["torch"],
            "commit": commit_id(),
            "time": timestamp(),
            "bars": self._bars(rival / ours, share),
        }

    def _cpu(self) -> dict[str, float]:
        """Return processor time: what a busy machine, whose cores are shared, leaves comparable."""
        ours, rival = statistics.median(self.ours_cpu_s), statistics.median(self.rival_cpu_s)
        return {
            "ours_cpu_s": round(ours, 4),
            "rival_cpu_s": round(rival, 4),
            "cpu_ratio": round(rival / ours, 3),
            "load_average": round(os.getloadavg()[0], 1),
        }

    def _attention_rate(self) -> float:
        is_training = self.work.mode == "train"
        return self.rates.attention_training if is_training else self.rates.attention

    def _memory_share(self) -> float | None:
        if self.ours_peak is None or not self.rival_peak:
            return None
        return round(self.ours_peak / self.rival_peak, 4)

    def _bars(self, ratio: float, share: float) -> dict[str, str]:
        """Return `pass` or `missed` by bar; none for what the issue sets none on."""
        work = self.work
        if work.size != "published" or work.tasks != 3 or self._on_gpu:
            return {}
        if work.trunk == "shared":
            return {"ratio": "pass" if ratio >= SHARED_BAR else "missed"}
        bars = {"ratio": ratio >= RATIO_BAR}
        memory = self._memory_share()
        if self.work.mode == "forward":
            bars["share_of_limit"] = share >= SHARE_BAR
        elif memory is not None:
            bars["memory_share"] = memory <= MEMORY_BAR
        return {name: "pass" if reached else "missed" for name, reached in bars.items()}


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 1)


def measure(work: Workload, rounds: int) -> Measured:
    """Compare the answers of both sides, then time them in turn.

    Raises:
        InputError: The workload makes no sense, or the rival would not fit the memory.
        RuntimeError: The answers differ, or a side failed.
    """
    _check(work, rounds)
    workers: list[Worker] = []
    try:
        for side in ("ours", "literal"):
            workers.append(Worker(side, work))
        ours = workers[0]
        # Answers first: a warm-up step moves the weights, in 16 bits not quite alike on both sides.
        # The first whole run of a process pays for its pages; the comparison is that run.
        errors = _compare(workers, work)
        for worker in workers:
            worker.ask("warm")
        times: dict[str, list[dict[str, float]]] = {"ours": [], "literal": []}
        rates = Rates()
        for _ in range(rounds):
            rates = rates.better(Rates(**ours.ask("rates")))
            for worker in workers:
                times[worker.side].append(worker.ask("time"))
        rates = rates.better(Rates(**ours.ask("rates")))
        peaks = [worker.ask("peak")["bytes"] for worker in workers]
        return Measured(
            work=work,
            ours_s=[one["seconds"] for one in times["ours"]],
            rival_s=[one["seconds"] for one in times["literal"]],
            ours_cpu_s=[one["cpu_seconds"] for one in times["ours"]],
            rival_cpu_s=[one["cpu_seconds"] for one in times["literal"]],
            ours_peak=peaks[0],
            rival_peak=peaks[1],
            parts=ours.ask("profile"),
            rates=rates,
            facts=ours.ask("facts"),
            errors=errors,
        )
    finally:
        for worker in workers:
            worker.close()


def _check(work: Workload, rounds: int) -> None:
    if work.tiles < 1 or rounds < 1 or not 1 <= work.tasks <= 3:
        raise InputError(
            "--tiles and --rounds must be at least 1 and --tasks 1 to 3, got "
            f"{work.tiles}, {rounds} and {work.tasks}"
        )
    if work.where == "cuda" and not torch.cuda.is_available():
        raise InputError("--device must be cpu on a machine without a GPU, got cuda")
    if work.mode == "forward" or work.size == "small":
        return
    needed = work.tiles * work.tasks * _RIVAL_ROWS * _BYTES_PER_ROW
    free = free_bytes(torch.device(work.where))
    if needed > free:
        raise InputError(
            f"the rival must find about {needed / 2**30:.0f} GiB for a training step, got "
            f"{free / 2**30:.0f} GiB free; take fewer --tiles"
        )


def _compare(workers: Sequence[Worker], work: Workload) -> dict[str, float]:
    """Return the relative errors between the sides, or in 16 bits of ours to a float32 rival.

    Raises:
        RuntimeError: They exceed their limits: the golden files' pass marks, or in 16 bits twice
            the rival's own error and a rounding step.
    """
    is_training = work.mode == "train"
    ours, rival = _answers(workers)
    if work.precision == "float32":
        return check_answers(relative_errors(ours, rival, is_training=is_training))
    exact_worker = Worker("literal", replace(work, precision="float32"))
    try:
        (exact,) = _answers([exact_worker])
    finally:
        exact_worker.close()
    lost = relative_errors(rival, exact, is_training=is_training)
    limits = {name: 2 * error + torch.finfo(torch.bfloat16).eps for name, error in lost.items()}
    return check_answers(relative_errors(ours, exact, is_training=is_training), limits)


def _answers(workers: Sequence[Worker]) -> list[dict[str, Tensor]]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(len(workers))]
        for worker, path in zip(workers, paths, strict=True):
            worker.ask("answers", path=str(path))
        return [load_file(path) for path in paths]


def relative_errors(
    ours: Mapping[str, Tensor], rival: Mapping[str, Tensor], *, is_training: bool
) -> dict[str, float]:
    """Return the relative error of the embeddings, and in training of all gradients together.

    Raises:
        RuntimeError: A gradient is missing on a side.
    """
    from modaltune.golden import relative_error

    if set(ours) != set(rival):
        odd = sorted(set(ours) ^ set(rival))
        raise RuntimeError(f"the answers must have the same tensors, only one side has {odd[:5]}")
    errors = {"outputs": relative_error(ours["out"], rival["out"])}
    if is_training:
        names = sorted(set(ours) - {"out"})
        flat = [torch.cat([side[n].double().flatten() for n in names]) for side in (ours, rival)]
        errors["gradients"] = relative_error(*flat)
    return errors


def check_answers(
    errors: Mapping[str, float], limits: Mapping[str, float] = MappingProxyType(LIMITS)
) -> dict[str, float]:
    """Return errors that are within their limits.

    Raises:
        RuntimeError: One is beyond, or NaN.
    """
    wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
    if wrong:
        raise RuntimeError(
            f"the answers must agree to {dict(limits)}, got {wrong}: a wrong result is not timed"
        )
    return dict(errors)


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the CSV row of a result: lists and tables as JSON text."""
    order: tuple[str, ...] = ("time", "commit", "device", "torch", "tiles", "mode", "tasks", "size")
    order += ("trunk", "where", "precision", "rival")
    left_out = {"memory_how", "bars", *order}
    flat = {name: found[name] for name in order}
    for name, value in found.items():
        if name not in left_out:
            flat[name] = json.dumps(value) if isinstance(value, list | dict) else value
    return flat
