"""metrics.jsonl: a line per record, each step once, whatever a killed run left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modaltune.batch import CaseBatch
from modaltune.train_metrics import METRICS, LoopClock, MetricsLog


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_records_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for steps in range(1, 5):
        log.write("step", steps, {"loss": steps / 2, "note": None})
    log.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "ste')  # killed while it wrote
    log = MetricsLog(tmp_path, until=3)
    log.write("step", 4, {"loss": 9.0})
    log.close()
    assert [(r["steps"], r["loss"]) for r in read(tmp_path)] == [
        (1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0),
    ]  # fmt: skip


def test_a_run_that_begins_anew_has_no_old_records(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path)
        log.write("epoch", 1, {"loss": 1.0})
        log.close()
    assert len(read(tmp_path)) == 1


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        log.write("step", 1, {"loss": float("nan")})
    log.close()


def test_the_clock_tells_computing_from_waiting() -> None:
    tiles, where = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.int64)
    batch = CaseBatch(tiles, where, torch.tensor([0, 3, 5]), case_ids=("A", "B"))
    clock = LoopClock()
    assert clock.count([batch], {"A": 2, "B": 1, "C": 9}, took_s=4.0, waited_s=1.0) == 5
    clock.other_s += 1.0
    assert (clock.compute_s, clock.waited_s, clock.wall_s, clock.busy) == (3.0, 1.0, 5.0, 0.6)
    rates = clock.rates()
    assert (rates["cases_per_s"], rates["slides_per_s"], rates["tiles_per_s"]) == (0.4, 0.6, 1.0)
