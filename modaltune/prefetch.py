"""Load what comes next in a thread while what came before is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from modaltune.errors import InputError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def load_ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], depth: int = 2
) -> Generator[Loaded, None, None]:
    """Yield `load(item)` of each item in order, computed in one thread ahead of its use.

    Wrap the iterator in `contextlib.closing` where the loop may leave early: closing it waits for
    the load in progress and drops the others.

    Args:
        load: Runs in the thread; must not draw from a global random generator, whose order of
            draws would then depend on timing.
        items: Read in this thread, `depth` ahead.
        depth: Loaded items that wait at most.

    Raises:
        InputError: `depth` is not positive.
    """
    if depth < 1:
        raise InputError(f"depth must be at least 1, got {depth}; load without a thread instead")
    waiting: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="modaltune-load") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()
