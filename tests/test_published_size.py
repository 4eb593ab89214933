"""The published size: its pathway layout, and cases that a model of it takes."""

from __future__ import annotations

import torch

from modaltune.config import ModalTuneConfig
from modaltune.published_size import (
    pathway_layout,
    pathway_sizes,
    published_size_model,
    random_cases,
)
from modaltune.slide_encoders.longnet import LongNetConfig


def test_layout_is_that_of_the_published_table() -> None:
    sizes = pathway_sizes()
    assert (len(sizes), sum(sizes), min(sizes), max(sizes)) == (331, 9745, 1, 199)
    index, offsets = pathway_layout()
    assert offsets.diff().tolist() == sizes
    assert torch.equal(index.unique(), torch.arange(4999))
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert index[first:last].unique().numel() == last - first


def test_cases_fit_the_model() -> None:
    trunk = LongNetConfig(in_features=8, width=48, depth=12, ffn_width=32)
    model = published_size_model(ModalTuneConfig(slide_encoder=trunk)).eval()
    batch = random_cases(model, tiles=5, cases=2, seed=3)
    assert batch.offsets.tolist() == [0, 5, 10]
    assert len({tuple(p) for p in batch.positions_px[:5].tolist()}) == 5
    again = random_cases(model, tiles=5, cases=2, seed=3)
    assert torch.equal(batch.tiles, again.tiles)
    with torch.no_grad():
        assert model(batch).shape == (2, 3, 256)
