"""The CPU path of dilated attention on worker threads: what the caller has set holds there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modaltune.kernels import dilated_attention
from modaltune.testing import normal

OPTIONS = {"segment_lengths": (64, 128, 256), "dilation_ratios": (1, 2, 4)}


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def inputs() -> dict[str, Tensor]:
    """Enough work that the CPU path splits it into several tasks."""
    return {name: normal(seed, 1200, 16, 8, dtype=torch.float32) for seed, name in enumerate("qkv")}


@pytest.mark.usefixtures("_threads")
def test_inference_mode_holds() -> None:
    want = dilated_attention(**inputs(), **OPTIONS, impl="reference")
    with torch.inference_mode():
        got = dilated_attention(**inputs(), **OPTIONS, impl="cpu")
    assert got.is_inference()
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("_threads")
def test_gradients_pass() -> None:
    found = {}
    for impl in ("cpu", "reference"):
        leaves = {name: t.requires_grad_() for name, t in inputs().items()}
        out = dilated_attention(**leaves, **OPTIONS, impl=impl)
        out.square().sum().backward()
        found[impl] = [out.detach(), *(t.grad for t in leaves.values())]
    torch.testing.assert_close(found["cpu"], found["reference"])
