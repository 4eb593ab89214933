"""Which implementation runs: the whole table of requests, devices and what an op offers."""

from __future__ import annotations

import importlib.util
import logging
from itertools import product

import pytest
import torch

from modaltune.kernels import (
    dilated_attention,
    embed_positions,
)
from modaltune.kernels._dispatch import IMPLS, choose_impl

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
ALL = ("triton", "cpu", "reference")


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        (CPU, ALL, "cpu"),
        (CPU, ("triton", "reference"), "reference"),
        (CPU, ("reference",), "reference"),
        (CUDA, ALL, "triton"),
        (CUDA, ("cpu", "reference"), "reference"),
        (META, ("reference",), "reference"),
    ],
)
def test_auto(device: torch.device, available: tuple[str, ...], chosen: str) -> None:
    assert choose_impl("op", "auto", device, available) == chosen


def test_named_implementations_run_where_they_can() -> None:
    for device, available in product((CPU, CUDA), (ALL, ("reference",))):
        assert choose_impl("op", "reference", device, available) == "reference"
    assert choose_impl("op", "cpu", CPU, ALL) == "cpu"
    # The reference is the best CPU path of an op without another.
    assert choose_impl("op", "cpu", CPU, ("triton", "reference")) == "reference"
    assert choose_impl("op", "triton", CUDA, ALL) == "triton"


@pytest.mark.parametrize(
    ("impl", "device", "available", "error", "message"),
    [
        ("cpu", CUDA, ALL, RuntimeError, "op: impl='cpu' needs CPU tensors, got cuda; use impl="),
        ("triton", CUDA, ("cpu", "reference"), RuntimeError, "op: impl='triton' is not available"),
        ("fast", CPU, ALL, ValueError, "impl must be one of auto, triton, cpu, reference, got 'fa"),
        ("", CPU, ALL, ValueError, "impl must be one of"),
        ("CPU", CPU, ALL, ValueError, "impl must be one of"),
    ],
)
def test_named_implementations_never_fall_back(
    impl: str,
    device: torch.device,
    available: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        choose_impl("op", impl, device, available)


def test_triton_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    with pytest.raises(RuntimeError, match=r"op: impl='triton' needs Triton; .* pip install tri"):
        choose_impl("op", "triton", CUDA, ALL)
    assert choose_impl("op", "auto", CPU, ALL) == "cpu"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="modaltune.kernels._dispatch"):
        for _ in range(3):
            choose_impl("once", "auto", CPU, ALL)
        choose_impl("once", "cpu", CPU, ALL)
        choose_impl("twice", "auto", CPU, ("reference",))
    assert caplog.messages == [
        "once: using the cpu path (device cpu, once offers triton, cpu, reference)",
        "twice: using the reference path (device cpu, twice offers reference)",
    ]


def test_requests_reach_every_value_named() -> None:
    assert set(IMPLS) == {"auto", *ALL}


def test_public_functions_pass_their_tensors_device() -> None:
    """Tensors without storage: an explicit CPU path is refused rather than moved."""
    x = torch.empty(4, 8, device="meta")
    cells = torch.zeros(4, 2, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="embed_positions: impl='cpu' needs CPU tensors"):
        embed_positions(x, cells, x[0], impl="cpu")
    q = torch.empty(4, 2, 4, device="meta")
    with pytest.raises(RuntimeError, match="dilated_attention: impl='cpu' needs CPU tensors"):
        dilated_attention(q, q, q, segment_lengths=(4,), dilation_ratios=(1,), impl="cpu")
