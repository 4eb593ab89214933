"""Stochastic depth: whole cases, unbiased, off in evaluation."""

from __future__ import annotations

from itertools import pairwise

import torch

from modaltune.stochastic import drop_path


def test_nothing_happens_in_evaluation_or_at_rate_zero() -> None:
    x = torch.randn(4, 3)
    assert drop_path(x, 0.9, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


def test_packed_cases_are_dropped_or_scaled_whole() -> None:
    lengths = torch.arange(200) % 4  # some cases hold no rows
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    torch.manual_seed(0)
    out = drop_path(torch.ones(int(offsets[-1]), 2), 0.25, True, offsets)
    fates = [out[a:b].unique().tolist() for a, b in pairwise(offsets.tolist())]
    fates = [fate for fate in fates if fate]
    assert all(len(fate) == 1 for fate in fates)
    scale = float(torch.tensor(1.0) / 0.75)
    assert {fate[0] for fate in fates} == {0.0, scale}
    share = sum(fate[0] == 0 for fate in fates) / len(fates)
    assert 0.15 < share < 0.35


def test_unpacked_entries_are_cases() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 2, 3)
    out = drop_path(x, 0.5, True)
    kept = (out != 0).flatten(1).all(dim=1)
    assert torch.equal(out[kept], x[kept] * 2)
    assert float(out[~kept].abs().max()) == 0
    assert 0.4 < float(kept.float().mean()) < 0.6
