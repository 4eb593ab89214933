"""A fault of Triton's pipelining on sm_90, found in what it compiled: buffers filled too early.

The loop that loads ahead leaves its last products running into the next turn (`pendings` of
`warp_group_dot_wait` above 0), while the loads for a later turn are under way. A buffer that only
products read has a slot for each turn in flight, `num_stages` of them. One that something else
reads too, a sum of the same tile say, is given a slot less (Triton 3.6 to 3.8): its oldest slot is
filled anew while a product still reads it. Results are wrong now and then, on the GPU alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ALLOC = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+),")
_IN_FLIGHT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = [1-9]")


def early_refills(ttgir: str, num_stages: int) -> list[int]:
    """Return the slots of every buffer that a product in flight reads and that has too few.

    Args:
        ttgir: What Triton made of a kernel for its GPU.
        num_stages: Turns that are in flight at most.
    """
    slots = {match[1]: int(match[2]) for match in _ALLOC.finditer(ttgir)}
    view_of = {match[1]: match[2] for match in _VIEW.finditer(ttgir)}

    def buffer(name: str) -> str:
        while name in view_of:
            name = view_of[name]
        return name

    few: dict[str, int] = {}
    for body in _loops(ttgir.splitlines()):
        if not any(_IN_FLIGHT.search(line) for line in body):
            continue
        for match in filter(None, map(_PRODUCT.search, body)):
            for read in map(buffer, match.groups()):
                if slots.get(read, num_stages) < num_stages:
                    few[read] = slots[read]
    return sorted(few.values())


def _loops(lines: list[str]) -> Iterator[list[str]]:
    """Yield the lines of every loop; one ends at the brace below its first letter."""
    for first, line in enumerate(lines):
        if " scf.for " in line:
            margin = line[: len(line) - len(line.lstrip())]
            ends = (i for i in range(first + 1, len(lines)) if lines[i].startswith(f"{margin}}}"))
            yield lines[first + 1 : next(ends)]
