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


def test_a_failing_stage_is_still_counted() -> None:
    timer = profile.StageTimer()
    with pytest.raises(RuntimeError, match="boom"), timer.stage("read"):
        raise RuntimeError("boom")
    assert timer.seconds["read"] > 0


def test_the_encoder_is_busy_while_any_batch_is_in_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two overlapping batches from 1 to 5, a gap of 3, and one from 8 to 10."""
    clock = iter([0.0, 1.0, 2.0, 4.0, 5.0, 8.0, 10.0])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    seen = []
    timer = profile.StreamClock(lambda *stretch: seen.append(stretch))
    first, second = timer.encoding("a"), timer.encoding("b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with timer.encoding("c"):
        pass
    assert timer.encoder_busy == pytest.approx(6 / 9)
    split = timer.split()
    assert (split["encode"], split["idle"]) == (6.0, 3.0)
    assert seen == [
        ("encode", "a", 1.0, 4.0),
        ("encode", "b", 2.0, 5.0),
        ("encode", "c", 8.0, 10.0),
    ]


def test_a_stream_without_a_batch_is_neither_busy_nor_idle() -> None:
    timer = profile.StreamClock()
    timer.add({"open": 1.5, "sketch": 2.0})
    timer.add({"open": 0.5})
    split = timer.split()
    assert timer.encoder_busy == 0.0
    assert (split["open"], split["sketch"], split["encode"], split["idle"]) == (2.0, 2.0, 0.0, 0.0)
    assert set(profile.STAGES) < set(split)
