"""Dilated attention on threads of its own: modes of the caller that belong to a thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from modaltune.kernels import dilated_attention
from modaltune.kernels.dilated_attn._threads import run_tasks
from modaltune.testing import normal, run_with_gradients

OPTIONS = {"segment_lengths": (16, 64), "dilation_ratios": (1, 2)}
INPUTS = {name: normal(seed, 40, 4, 8, dtype=torch.float32) for seed, name in enumerate("qkv")}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_inference_mode_holds_on_the_threads_of_the_cpu_path() -> None:
    want = dilated_attention(**INPUTS, **OPTIONS, impl="reference")
    with torch.inference_mode():
        got = dilated_attention(**INPUTS, **OPTIONS, impl="cpu")
    assert got.is_inference()
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("threads")
def test_gradients_stay_off_on_the_threads_of_the_cpu_path() -> None:
    want = run_with_gradients(dilated_attention, INPUTS, **OPTIONS, impl="reference")
    # Also behind a call in inference mode, which leaves its threads behind.
    with torch.inference_mode():
        dilated_attention(**INPUTS, **OPTIONS, impl="cpu")
    got = run_with_gradients(dilated_attention, INPUTS, **OPTIONS, impl="cpu")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


def test_an_error_in_a_task_is_raised_here() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("in a task")

    with pytest.raises(ValueError, match="in a task"):
        run_tasks([fail, lambda: done.append(1)])
