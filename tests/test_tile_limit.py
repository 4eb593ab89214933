"""The limit of tiles: seeded by case and epoch, recorded, and absent outside of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modaltune.cases import Case, PreparedCases
from modaltune.planted import PlantedCohort, PlantedConfig, plant
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.tile_limit import TileLimit
from modaltune.train_prepare import prepare


@pytest.fixture(scope="module")
def planted() -> PlantedCohort:
    return plant(PlantedConfig(num_train=40, num_test=1, min_tiles=40, max_tiles=60))


def whole(planted: PlantedCohort) -> list[Case]:
    return [Case(name, planted.cohort.read_slides(name)) for name in planted.split.train]


def test_a_limit_is_drawn_once_per_case_and_seed() -> None:
    limit = TileLimit("random", 10, seed=1)
    rows = limit.rows("A", [8, 0, 30])
    assert [len(r) for r in rows if r is not None][1] == 0
    assert sum(len(r) for r in rows if r is not None) == 10
    for r, count in zip(rows, [8, 0, 30], strict=True):
        assert r is not None
        assert list(r) == sorted(set(r.tolist()))
        assert all(0 <= i < count for i in r)
    for again in (limit.rows("A", [8, 0, 30]), limit.rows("A", [8, 0, 30], epoch=3)):
        assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    others = [limit.rows("B", [8, 0, 30]), TileLimit("random", 10, 2).rows("A", [8, 0, 30])]
    assert all(not np.array_equal(other[2], rows[2]) for other in others)
    assert limit.rows("A", [4, 6]) == ()
    assert TileLimit("all", 10).rows("A", [99]) == ()


def test_every_epoch_draws_other_tiles_and_outside_of_training_all_are_used() -> None:
    limit = TileLimit("every_epoch", 10, seed=1)
    epochs = [limit.rows("A", [60], epoch)[0] for epoch in range(30)]
    again = limit.rows("A", [60], 7)[0]
    assert all(rows is not None and len(rows) == 10 for rows in epochs)
    np.testing.assert_array_equal(again, epochs[7])
    assert len({tuple(rows.tolist()) for rows in epochs if rows is not None}) == 30
    # 30 draws of 10 of 60: a tile stays unseen with probability 0.004.
    assert len(set(np.concatenate([rows for rows in epochs if rows is not None]).tolist())) > 55
    assert limit.rows("A", [60]) == ()
    assert limit.rows("A", [10], 0) == ()


def test_cases_in_memory_are_drawn_for_an_epoch(planted: PlantedCohort) -> None:
    cases = whole(planted)
    prepared = PreparedCases(cases, None, "scaled", 32, TileLimit("every_epoch", 15).drawn)
    rows = list(range(len(cases)))
    full, first = prepared.batch(rows), prepared.for_epoch(0).batch(rows)
    assert full.tiles.shape[0] == sum(len(case.slides[0]) for case in cases)
    assert first.offsets.diff().tolist() == [15] * len(cases)
    assert torch.equal(first.tiles, prepared.for_epoch(0).batch(rows).tiles)
    assert not torch.equal(first.tiles, prepared.for_epoch(1).batch(rows).tiles)
    bare = PreparedCases(cases, None, "scaled", 32)
    assert torch.equal(bare.for_epoch(3).batch(rows).tiles, full.tiles)


def test_cases_from_disk_are_drawn_for_an_epoch_and_the_policy_is_recorded(tmp_path: Path) -> None:
    folder = write_training_cases(tmp_path / "study")
    sets = ("inputs.tile_limit=every_epoch", "inputs.max_tiles=4")
    made = prepare(tiny_run_config([folder], tmp_path / "run", *sets))
    rows = list(range(len(made.train)))
    full = made.train.batch(rows)
    epochs = [made.train.for_epoch(epoch).batch(rows) for epoch in range(2)]
    for batch in epochs:
        assert int(batch.offsets.diff().max()) == 4 < int(full.offsets.diff().max())
    assert not torch.equal(epochs[0].tiles, epochs[1].tiles)
    assert torch.equal(epochs[0].tiles, made.train.for_epoch(0).batch(rows).tiles)
    assert torch.equal(made.train.batch(rows).tiles, full.tiles)  # an epoch changes no other
    recorded = made.run.info["tile_limit"]
    assert (recorded["policy"], recorded["max_tiles"]) == ("every_epoch", 4)
    counts = dict(zip(made.train.case_ids, full.offsets.diff().tolist(), strict=True))
    # Training cases alone: validation reads all tiles.
    assert recorded["limited"] == {case: (4, n) for case, n in counts.items() if n > 4}
