"""Batches out of blocks: whole ones in the block's own memory, the others copied."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest

from modaltune.engine.batches import Batch, BatchBuilder, Loan

Int64 = npt.NDArray[np.int64]
Rgb = npt.NDArray[np.uint8]

SIDE = 8


def builder(batches: int = 3, stop: threading.Event | None = None) -> BatchBuilder[str]:
    return BatchBuilder(4, SIDE, batches, stop or threading.Event())


def block(count: int) -> tuple[Int64, Rgb]:
    """Indices and tiles; a tile is filled with its index."""
    indices = np.arange(count)
    tiles = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    tiles[:] = indices[:, None, None, None]
    return indices, tiles


def contents(batch: Batch[str]) -> list[tuple[str, list[int], list[int]]]:
    """Whose tiles, which, and what is in them."""
    return [
        (part.slide, part.indices.tolist(), batch.tiles[part.rows, 0, 0, 0].tolist())
        for part in batch.parts
    ]


def test_whole_batches_use_the_block_and_the_others_are_copies() -> None:
    given_back: list[bool] = []
    batches = builder(4)
    assert list(batches.add("a", *block(2))) == []
    indices, tiles = block(11)
    loan = Loan(lambda: given_back.append(True))
    found = list(batches.add("b", indices, tiles, loan))
    loan.end()
    assert [contents(batch) for batch in found] == [
        [("a", [0, 1], [0, 1]), ("b", [0, 1], [0, 1])],
        [("b", [2, 3, 4, 5], [2, 3, 4, 5])],
        [("b", [6, 7, 8, 9], [6, 7, 8, 9])],
    ]
    assert [np.shares_memory(batch.tiles, tiles) for batch in found] == [False, True, True]
    batches.give_back(found[1])
    batches.give_back(found[0])
    assert not given_back
    batches.give_back(found[2])
    assert given_back == [True]
    assert batches.is_idle
    tiles[:] = 77  # the block may be filled anew: nobody looks at it now
    (last,) = batches.flush()
    assert contents(last) == [("b", [10], [10])]
    assert last.padded(4)[:, 0, 0, 0].tolist() == [10, 10, 10, 10]
    assert np.shares_memory(found[1].padded(4), tiles)


def test_without_a_loan_everything_is_copied() -> None:
    indices, tiles = block(8)
    found = list(builder().add("a", indices, tiles))
    tiles[:] = 77
    assert [contents(batch) for batch in found] == [
        [("a", [0, 1, 2, 3], [0, 1, 2, 3])],
        [("a", [4, 5, 6, 7], [4, 5, 6, 7])],
    ]


@pytest.mark.parametrize("is_lent", [True, False])
def test_no_more_batches_exist_than_there_is_memory_for(is_lent: bool) -> None:
    """A batch in a block's memory counts like one of its own; stopping ends the wait."""
    stop = threading.Event()
    batches = builder(2, stop)
    loan = Loan(lambda: None) if is_lent else None
    adding = batches.add("a", *block(12), loan)
    first, _ = next(adding), next(adding)
    assert not batches.is_idle
    batches.give_back(first)
    assert contents(next(adding)) == [("a", [8, 9, 10, 11], [8, 9, 10, 11])]
    stop.set()
    assert list(batches.add("a", *block(4), loan)) == []
