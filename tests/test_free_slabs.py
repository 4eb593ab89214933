"""Which free slab a worker is given: its own, then nobody's, then any."""

from __future__ import annotations

from modaltune.engine.free_slabs import FreeSlabs


def test_a_worker_gets_its_own_slabs_again() -> None:
    slabs = FreeSlabs(4)
    assert slabs.unclaimed(2) == [0, 1]
    slabs.claim([0, 1], 10)
    assert slabs.unclaimed(3) == [2, 3]
    slabs.claim([2], 20)
    assert [slabs.take(20), slabs.take(20)] == [2, 3]  # its own, then nobody's
    assert [slabs.take(10), slabs.take(10)] == [0, 1]
    assert not slabs
    for slab in (0, 3, 1, 2):
        slabs.give(slab)
    assert len(slabs) == 4
    assert slabs.unclaimed(4) == []
    assert [slabs.take(10), slabs.take(20)] == [1, 2]  # the last one given back of its own


def test_a_worker_without_slabs_takes_the_last_one_given_back() -> None:
    slabs = FreeSlabs(2)
    slabs.claim([0, 1], 10)
    taken = [slabs.take(10), slabs.take(10)]
    assert taken == [0, 1]
    slabs.give(1)
    slabs.give(0)
    assert slabs.take(20) == 0
    assert slabs.take(20) == 1
