"""Stage timer: seconds go where they were spent, and nothing is lost."""

from __future__ import annotations

import pytest

from modaltune.engine import profile


def test_stages_add_up_to_the_elapsed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.5, 20.0, 20.0])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    timer = profile.StageTimer()
    with timer.stage("read"):
        pass
    with timer.stage("encode"):
        pass
    split = timer.split()
    assert split["read"] == 2.0
    assert split["encode"] == 0.5
    assert split["other"] == pytest.approx(20.0 - 2.5)
    assert set(profile.STAGES) < set(split)


def test_a_failing_stage_is_still_counted() -> None:
    timer = profile.StageTimer()
    with pytest.raises(RuntimeError, match="boom"), timer.stage("read"):
        raise RuntimeError("boom")
    assert timer.seconds["read"] > 0
