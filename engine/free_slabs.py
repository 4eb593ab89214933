"""Which slabs of the shared memory are free, and which worker had each of them last."""

from __future__ import annotations


class FreeSlabs:
    """Slabs that no block is in; used by one thread.

    A worker is given slabs that it had before: their pages are mapped in it already. The first time
    that a process writes to a slab of 12 MB costs it 4 to 8 ms, half of what decoding into it does.

    Args:
        count: Slabs in all, all free.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._owners: list[int | None] = [None] * count

    def __len__(self) -> int:
        return len(self._free)

    def unclaimed(self, most: int) -> list[int]:
        """Return some slabs that no worker has had: what a new one can map while it waits."""
        return [slab for slab in reversed(self._free) if self._owners[slab] is None][:most]

    def claim(self, slabs: list[int], owner: int) -> None:
        """Take note that slabs are mapped in a worker, named by its process id."""
        for slab in slabs:
            self._owners[slab] = owner

    def take(self, owner: int) -> int:
        """Take one for a worker: its own, else nobody's, else the last one given back."""
        wanted = [self._last_of(owner), self._last_of(None), self._free[-1]]
        slab = next(found for found in wanted if found is not None)
        self._free.remove(slab)
        self._owners[slab] = owner
        return slab

    def give(self, slab: int) -> None:
        """Take one back."""
        self._free.append(slab)

    def _last_of(self, owner: int | None) -> int | None:
        found = (slab for slab in reversed(self._free) if self._owners[slab] == owner)
        return next(found, None)
