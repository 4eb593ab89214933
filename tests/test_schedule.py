"""The closed form against the published tables, a torch scheduler and its own promises."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modaltune.errors import InputError
from modaltune.schedule import learning_rate


@pytest.mark.shared
def test_published_tables(shared_dir: Path) -> None:
    tables = [
        json.loads(path.read_text())
        for path in sorted((shared_dir / "golden").glob("*.json"))
        if '"lr_schedule"' in path.read_text()
    ]
    assert tables
    for table in tables:
        for epochs, rates in table["lrs_torch_2_0"].items():
            assert len(rates) == int(epochs) + 1
            got = [
                learning_rate(
                    epoch,
                    epochs=int(epochs),
                    lr=table["lr"],
                    warmup_epochs=table["warmup_epochs"],
                    warmup_factor=table["warmup_factor"],
                )
                for epoch in range(int(epochs) + 1)
            ]
            assert got == pytest.approx(rates, rel=1e-12, abs=0)


@pytest.mark.parametrize(("warmup", "factor", "epochs"), [(3, 5.0, 12), (1, 20.0, 4), (6, 2.0, 6)])
def test_ramp_equals_torch(warmup: int, factor: float, epochs: int) -> None:
    """torch multiplies its way up from lr / F; only the ramp is the same in every torch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / factor, end_factor=1.0, total_iters=warmup
    )
    for epoch in range(warmup + 1):
        expected = optimizer.param_groups[0]["lr"]
        got = learning_rate(
            epoch, epochs=epochs, lr=1e-3, warmup_epochs=warmup, warmup_factor=factor
        )
        assert got == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_values_by_hand() -> None:
    # E = 5, W = 1: epochs 0..5 are lr/4, lr, then cosine steps of pi / 4 from epoch 2 on.
    got = [learning_rate(e, epochs=5, lr=2.0, warmup_epochs=1, warmup_factor=4) for e in range(6)]
    half = math.sqrt(0.5)
    assert got == pytest.approx([0.5, 2.0, 2.0, 1 + half, 1.0, 1 - half], rel=1e-12)


@given(
    epochs=st.integers(1, 60),
    warmup=st.integers(0, 70),
    factor=st.floats(1, 1000),
    lr=st.floats(1e-8, 10),
)
def test_rises_then_falls(epochs: int, warmup: int, factor: float, lr: float) -> None:
    rates = [
        learning_rate(e, epochs=epochs, lr=lr, warmup_epochs=warmup, warmup_factor=factor)
        for e in range(epochs + 1)
    ]
    tolerance = lr * 1e-12
    top = min(warmup, epochs)
    assert all(0 < rate <= lr + tolerance for rate in rates)
    assert all(a <= b + tolerance for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - tolerance for a, b in pairwise(rates[top:]))
    if warmup <= epochs:
        assert rates[warmup] == pytest.approx(lr)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert learning_rate(0, epochs=3, lr=0.5, warmup_epochs=0) == 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epoch": -1}, r"epoch must lie in 0\.\.4, got -1"),
        ({"epoch": 5}, r"epoch must lie in 0\.\.4, got 5; raise epochs"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"warmup_epochs": -2}, "warmup_epochs must be 0 or more, got -2"),
        ({"warmup_factor": 0.5}, "warmup_factor must be at least 1, got 0.5"),
    ],
)
def test_out_of_range_arguments(changed: dict[str, float], message: str) -> None:
    arguments: dict[str, float] = {"epoch": 1, "epochs": 4, "lr": 1e-4} | changed
    with pytest.raises(InputError, match=message):
        learning_rate(arguments.pop("epoch"), **arguments)  # type: ignore[arg-type]
