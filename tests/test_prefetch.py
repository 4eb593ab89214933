"""Items come in order, ahead of use, and faults of the loader reach the caller."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from modaltune.errors import InputError
from modaltune.prefetch import load_ahead


def test_items_come_in_order_from_one_other_thread() -> None:
    threads: set[str] = set()

    def load(item: int) -> int:
        threads.add(threading.current_thread().name)
        return item * item

    assert list(load_ahead(load, range(7))) == [i * i for i in range(7)]
    assert len(threads) == 1
    assert threading.current_thread().name not in threads
    assert list(load_ahead(load, [])) == []


def test_the_next_item_is_loaded_while_one_is_used() -> None:
    loaded: list[int] = []
    two = threading.Event()

    def load(item: int) -> int:
        loaded.append(item)
        if item == 2:
            two.set()
        return item

    with closing(load_ahead(load, range(10), depth=2)) as ahead:
        assert next(ahead) == 0
        assert two.wait(10)  # without anybody asking for it
    assert len(loaded) <= 4  # no more than the depth ahead, and the rest is dropped


def test_a_fault_of_the_loader_is_raised_where_its_item_is_due() -> None:
    def load(item: int) -> int:
        if item == 1:
            raise KeyError(item)
        return item

    ahead = load_ahead(load, range(4))
    assert next(ahead) == 0
    with pytest.raises(KeyError):
        next(ahead)


def test_a_depth_of_none_is_refused() -> None:
    with pytest.raises(InputError, match="depth must be at least 1, got 0"):
        next(load_ahead(str, [1], depth=0))
