"""What `modaltune plan` asks for and prints: peak memory by setting, and what fits a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from modaltune.checkpoint import load_run
from modaltune.engine.device import check_device
from modaltune.errors import InputError
from modaltune.memory_plan import (
    MODES,
    MemoryPlan,
    Mode,
    Planned,
    cheapest,
)
from modaltune.published_size import published_size_model


@dataclass(frozen=True)
class PlanReport:
    """Settings with their predicted memory, and the cheapest that fits by mode.

    Attributes:
        tiles: Tiles of the case planned for.
        device: `cpu` or `cuda`.
        budget_mib: What may be used.
        budget_source: Where the budget comes from.
        trunks: Forms of the trunk that the choice is among.
        rows: Every setting, the cheapest in time first within a mode.
        choice: The cheapest in time that fits, by mode; None where nothing does.
    """

    tiles: int
    device: str
    budget_mib: float
    budget_source: str
    trunks: tuple[str, ...]
    rows: list[Planned]
    choice: dict[Mode, Planned | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; memory in GiB."""

        def flat(row: Planned | None) -> dict[str, Any] | None:
            if row is None:
                return None
            peak = {"peak_gib": round(row.peak_mib / 1024, 3), "trunk_passes": row.trunk_passes}
            return {**row.setting.to_dict(), **peak, "fits": row.fits}

        return {
            "tiles": self.tiles,
            "device": self.device,
            "budget_gib": round(self.budget_mib / 1024, 3),
            "budget_source": self.budget_source,
            "task_trunk": list(self.trunks),
            "settings": [flat(row) for row in self.rows],
            "cheapest": {mode: flat(row) for mode, row in self.choice.items()},
        }

    def render(self, console: Console) -> None:
        """Draw the settings as a table, and say which to take."""
        table = Table(title=f"{self.tiles:,} tiles on {self.device}")
        for name in ("mode", "task_trunk", "task_backward", "recompute"):
            table.add_column(name)
        for name in ("peak GiB", "trunk passes", "fits"):
            table.add_column(name, justify="right")
        for row in self.rows:
            said = row.setting.to_dict()
            words = [said.get(n, "-") for n in ("mode", "task_trunk", "task_backward", "recompute")]
            figures = [f"{row.peak_mib / 1024:.2f}", str(row.trunk_passes)]
            table.add_row(*words, *figures, "yes" if row.fits else "no")
        console.print(table)
        console.print(f"budget: {self.budget_mib / 1024:.2f} GiB ({self.budget_source})")
        for mode, choice in self.choice.items():
            console.print(f"{mode}: {self._say(choice)}", highlight=False, soft_wrap=True)

    def _say(self, choice: Planned | None) -> str:
        if choice is None:
            return (
                "nothing fits; take fewer tiles per case, another machine, or --task-trunk any"
                if len(self.trunks) == 1
                else "nothing fits; take fewer tiles per case or another machine"
            )
        said = choice.setting.to_dict()
        words = ", ".join(f"{n}={v}" for n, v in said.items() if n != "mode")
        return f"cheapest that fits: {words} ({choice.peak_mib / 1024:.2f} GiB)"


def plan(
    tiles: int,
    *,
    mode: Mode | None = None,
    budget_gib: float | None = None,
    device: str = "cpu",
    run: Path | None = None,
    task_trunk: str | None = None,
) -> PlanReport:
    """Predict peak memory for a number of tiles, for every setting.

    Args:
        tiles: Tiles of the largest case, at least 2.
        mode: `forward` or `train`; both unless given.
        budget_gib: Memory that may be used; what the device has free unless given.
        device: `cpu` or `cuda`, one of this machine.
        run: Run folder whose model is planned for; the published size with random weights unless
            given.
        task_trunk: `separate`, `shared` or `any`: what the cheapest setting is chosen among. That
            of the run unless given, since another trunk is another model.

    Raises:
        InputError: A value breaks its rule, or the run can't be read.
    """
    where = check_device(device)
    if budget_gib is not None and not budget_gib > 0:
        raise InputError(f"budget must be positive, got {budget_gib} GiB; give another")
    model = published_size_model().to(where) if run is None else load_run(run, device=where).model
    if budget_gib is None:
        budget, source = free_mib(where), "free on this machine now"
    else:
        budget, source = budget_gib * 1024, "given"
    wanted = task_trunk or model.config.task_trunk
    trunks = ("separate", "shared") if wanted == "any" else (wanted,)
    modes = MODES if mode is None else (mode,)
    rows = MemoryPlan(model, tiles).table(modes, budget)
    choice = {m: cheapest(rows, m, trunks) for m in modes}
    return PlanReport(tiles, where.type, budget, source, trunks, rows, choice)


def free_mib(device: torch.device) -> float:
    """Return the memory of a device that nobody uses, in MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    info = Path("/proc/meminfo").read_text(encoding="ascii")
    fields = dict(line.split(":") for line in info.splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024
