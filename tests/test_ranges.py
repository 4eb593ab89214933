"""Stage labels: seen by torch.profiler, by NVTX where CUDA is in use, and by no compiler."""

from __future__ import annotations

import pytest
import torch

from modaltune.kernels.ranges import stage_range


def labels(profile: torch.profiler.profile) -> list[str]:
    return [event.name for event in profile.events() if event.name.startswith("modaltune.")]


def test_the_profiler_sees_nested_stages() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with stage_range("slide"), stage_range("slide.part"):
            torch.ones(3).sum()
        with stage_range("slide"):
            pass
    assert sorted(labels(profile)) == ["modaltune.slide", "modaltune.slide", "modaltune.slide.part"]


class Pushes:
    """Records what would reach NVTX."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, initialized: bool) -> None:
        self.seen: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", self.seen.append)
        monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: self.seen.append("pop"))


def test_nvtx_ranges_close_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx = Pushes(monkeypatch, initialized=True)
    with pytest.raises(ZeroDivisionError), stage_range("outer"), stage_range("inner"):
        raise ZeroDivisionError
    assert nvtx.seen == ["outer", "inner", "pop", "pop"]


def test_a_label_does_not_initialise_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx = Pushes(monkeypatch, initialized=False)
    with stage_range("outer"):
        pass
    assert nvtx.seen == []


def test_compiled_code_passes_through() -> None:
    def labelled(x: torch.Tensor) -> torch.Tensor:
        with stage_range("slide"):
            return x * 2

    compiled = torch.compile(labelled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.arange(3)), torch.arange(3) * 2)
