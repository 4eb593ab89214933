"""What a training run says of itself: metrics.jsonl, and where asked TensorBoard and wandb."""

from __future__ import annotations

import json
import resource
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from modaltune.batch import CaseBatch
from modaltune.engine.atomic import atomic_path
from modaltune.errors import InputError

METRICS = "metrics.jsonl"


@dataclass
class LoopClock:
    """How the loop's time splits: computing, waiting for data, and what is written in between.

    Attributes:
        compute_s: From data at hand to the loss known.
        waited_s: Asked for data and not at hand.
        other_s: Metrics and checkpoints between steps.
        cases, slides, tiles: Seen in that time.
    """

    compute_s: float = 0.0
    waited_s: float = 0.0
    other_s: float = 0.0
    cases: int = 0
    slides: int = 0
    tiles: int = 0

    @property
    def wall_s(self) -> float:
        """Seconds in all."""
        return self.compute_s + self.waited_s + self.other_s

    @property
    def busy(self) -> float:
        """Share of the time that is computed in."""
        return self.compute_s / self.wall_s if self.wall_s else 0.0

    def count(
        self,
        batches: Sequence[CaseBatch],
        slides: Mapping[str, int],
        took_s: float,
        waited_s: float,
    ) -> int:
        """Add a step; return its tiles.

        Args:
            batches: What it computed.
            slides: Slides of each case.
            took_s: Seconds from the end of the step before.
            waited_s: Of these, waiting for data.
        """
        tiles = sum(batch.tiles.shape[0] for batch in batches)
        self.compute_s += took_s - waited_s
        self.waited_s += waited_s
        self.cases += sum(batch.num_cases for batch in batches)
        self.slides += sum(slides.get(c, 0) for batch in batches for c in batch.case_ids)
        self.tiles += tiles
        return tiles

    def rates(self) -> dict[str, float]:
        """Return the split and what was done per second."""
        wall = self.wall_s or 1.0
        return {
            "busy": self.busy,
            "compute_s": self.compute_s,
            "waited_s": self.waited_s,
            "other_s": self.other_s,
            "slides_per_s": self.slides / wall,
            "tiles_per_s": self.tiles / wall,
            "cases_per_s": self.cases / wall,
        }


def memory_mib(device: torch.device) -> float:
    """Return the most memory in use so far, MiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class MetricsLog:
    """Appends records to `metrics.jsonl`, a line each, and hands numbers on.

    Args:
        folder: The run folder.
        tensorboard: Write event files under `tensorboard/`, too.
        wandb: Project to send numbers to, or None.
        until: Records of later steps are dropped: a run that goes on from there writes them again.
        config: Of the run, JSON values that wandb shows beside the numbers.

    Raises:
        InputError: A package asked for is not installed; says how to get it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        until: int = 0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = folder / METRICS
        self._board = _tensorboard(folder / "tensorboard", until) if tensorboard else None
        self._wandb = None if wandb is None else _wandb(wandb, folder, until, config or {})
        self._trim(until)
        self._file = self._path.open("a", encoding="utf-8")

    def _trim(self, until: int) -> None:
        kept = []
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    is_kept = record["steps"] <= until and record["kind"] != "end"
                except (ValueError, KeyError, TypeError):
                    is_kept = False  # the last line of a killed run
                kept += [line] if is_kept and until else []
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, steps: int, values: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            kind: `step`, `epoch`, `validation` or `end`.
            steps: Optimiser steps done.
            values: JSON values.
        """
        record = {"kind": kind, "steps": steps, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, steps)
        if self._wandb is not None:
            self._wandb.log(numbers, step=steps)

    def close(self) -> None:
        """Finish what is open."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_loggers(*, tensorboard: bool, wandb: str | None) -> None:
    """Refuse to log to what is not installed, before a run has prepared anything.

    Raises:
        InputError: A package asked for is not installed; says how to get it.
    """
    for package, is_asked, without in (
        ("tensorboard", tensorboard, "set output.tensorboard = false"),
        ("wandb", wandb is not None, "leave output.wandb out"),
    ):
        if is_asked and find_spec(package) is None:
            raise InputError(
                f"output.{package} needs the package {package}, got none; run: pip install "
                f"'modaltune[{package}]', or {without}"
            )


def _tensorboard(folder: Path, until: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=until + 1 if until else None)


def _wandb(project: str, folder: Path, until: int, config: Mapping[str, Any]) -> Any:
    """Begin a run of Weights & Biases, or go on with the one that this run folder began."""
    import wandb

    kept = folder / "wandb" / "id"
    if not (until and kept.is_file()):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    try:
        return wandb.init(
            project=project, dir=str(folder), name=folder.name, config=dict(config),
            id=kept.read_text(encoding="utf-8"), resume="allow",
            settings=wandb.Settings(console="off"),  # the progress bar is no log
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise InputError(
            f"output.wandb must reach project {project!r}, got: {error}; run wandb login, or set "
            "WANDB_MODE=offline and send later with wandb sync"
        ) from error
