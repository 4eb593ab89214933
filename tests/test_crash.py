"""Real runs of the command line that are killed, starved of disk, doubled or fed a broken slide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modaltune.engine.stream import StreamOptions

KILLS = 20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `crash_runs.py` saw."""
    script = Path(__file__).with_name("crash_runs.py")
    folder = tmp_path_factory.mktemp("crash")
    words = [sys.executable, str(script), str(folder), str(KILLS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_at_random_points_lose_nothing(found: dict[str, Any]) -> None:
    killed = found["killed"]
    assert killed["code"] == 0
    assert killed["beside"] == ["crash.csv"]
    assert killed["kills"] == KILLS
    assert killed["finished"] >= 1
    assert killed["whole_at_kill"] > 0
    assert killed["redone"] == 0  # so that only what was in flight is
    assert killed["in_flight"] <= KILLS * StreamOptions().most_slides
    assert killed["changed"] == 0
    assert killed["left_over"] == 0


def test_a_full_disk_leaves_nothing_half_written(found: dict[str, Any]) -> None:
    for run in found["full"]:
        said = " ".join(run["said"].split())
        assert run["code"] == 1, run
        assert "Traceback" not in said
        assert "free space" in said, run
        assert "run the same command" in said
        assert any(name in said for name in (".h5", ".png", "ledger.sqlite"))
        assert run["temporary"] == [], run
        assert run["kept_is_right"], run
        assert run["resumed_code"] == 0, run
        assert run["resumed_is_right"], run
        assert set(run["statuses"]) == {"done"}  # a full disk is no slide's fault
    everything = " ".join(" ".join(run["said"].split()) for run in found["full"])
    for name in ("ledger.sqlite must", ".h5 must fit on its disk", ".png must fit on its disk"):
        assert name in everything
    # Two were finished before the fourth limit came; others may fit under it, the largest does not.
    assert [run["before"] for run in found["full"]] == [0, 0, 0, 2, 0]
    assert all(run["kept_before"] for run in found["full"])
    kept = [run["kept"] for run in found["full"]]
    assert kept[:3] + kept[4:] == [0, 0, 0, 0]
    assert 2 <= kept[3] < 5


def test_eight_processes_do_each_slide_once(found: dict[str, Any]) -> None:
    shared = found["shared"]
    assert shared["codes"] == [0] * 8, shared["said"]
    assert sum(shared["done"]) == 16
    assert shared["finished"] == [16] * 8
    assert shared["attempts"] == [1] * 16
    assert shared["same"]


def test_a_truncated_slide_costs_itself_only(found: dict[str, Any]) -> None:
    cut = found["truncated"]
    assert cut["code"] == cut["again_code"] == 1
    assert cut["counts"] == {
        "pending": 0, "running": 0, "done": 4, "empty": 0, "failed": 0, "quarantined": 1,
    }  # fmt: skip
    (row,) = cut["problems"]
    assert (row["slide_id"], row["status"], row["attempts"]) == (cut["bad"], "quarantined", 3)
    assert cut["bad"] in row["reason"]
    assert "truncated" in row["reason"]
    assert f"{cut['bad']} is quarantined after 3 attempts" in " ".join(cut["said"].split())
    assert cut["others_same"]
    assert cut["retried"] == [cut["bad"]]
    assert cut["mended_code"] == 0
    assert cut["mended_same"]
