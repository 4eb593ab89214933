"""How the Triton kernels cut a call into blocks of rows; shared with the cost model. No Triton.

Rows with the same residue modulo all dilations are visited by the same branches. A block holds
`rows` consecutive rows of each of BLOCK_M / rows residues of one head, chosen so that the branches
that visit one of them visit the others as far as possible: a class.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import groupby

# Beyond this many residues blocks are consecutive rows, and masks do the rest.
MAX_RESIDUES = 64


def block_layout(
    heads: int, segment_lengths: tuple[int, ...], ratios: tuple[int, ...], block: int
) -> tuple[int, int]:
    """Return the modulus R and how many rows of each residue a block of `block` rows holds.

    The block/rows residues of a block span R * rows rows, at most the shortest segment if that is
    possible: then few blocks see two segments of a branch.
    """
    modulus = math.lcm(*ratios)
    if modulus > MAX_RESIDUES or heads == 0:
        modulus = 1
    fewest = block >> (modulus.bit_length() - 1)
    fitting = max(min(segment_lengths) // modulus, 1)
    return modulus, min(block, max(fewest, 1 << (fitting.bit_length() - 1), 1))


def visits(head: int, heads: int, residue: int, ratios: tuple[int, ...]) -> tuple[bool, ...]:
    """Return which branches visit rows of a residue (modulo all dilations) of a head."""
    return tuple(residue % r == head // math.ceil(heads / r) for r in ratios)


def _any_visits(
    head: int, heads: int, residues: list[int], ratios: tuple[int, ...]
) -> tuple[bool, ...]:
    """Return which branches visit rows of any of some residues."""
    seen = [visits(head, heads, residue, ratios) for residue in residues]
    return tuple(any(of_branch) for of_branch in zip(*seen, strict=True))


@lru_cache(maxsize=64)
def residue_classes(
    heads: int,
    segment_lengths: tuple[int, ...],
    ratios: tuple[int, ...],
    modulus: int,
    residues: int,
) -> list[list[list[int]]]:
    """Return, per head, classes of `residues` residues, those with most work first.

    The last classes are filled up with -1.
    """
    if modulus == 1:
        return [[[0] * residues] for _ in range(heads)]

    def work(visited: tuple[bool, ...]) -> float:
        keys = (w / r for w, r in zip(segment_lengths, ratios, strict=True))
        return sum(n for n, seen in zip(keys, visited, strict=True) if seen)

    found = []
    for head in range(heads):
        by_branches = sorted(
            range(modulus), key=lambda c: (visits(head, heads, c, ratios), -c), reverse=True
        )
        alike, rest = [], []
        for _, group in groupby(by_branches, key=lambda c: visits(head, heads, c, ratios)):
            members = list(group)
            whole = len(members) // residues * residues
            alike += [members[i : i + residues] for i in range(0, whole, residues)]
            rest += members[whole:]
        classes = alike + [rest[i : i + residues] for i in range(0, len(rest), residues)]
        classes.sort(key=lambda c: work(_any_visits(head, heads, c, ratios)), reverse=True)
        found.append([c + [-1] * (residues - len(c)) for c in classes])
    return found
