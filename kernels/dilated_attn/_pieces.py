"""How the CPU path cuts a call: tasks of heads, pieces of a branch, chunks, blocks of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from modaltune.kernels.dilated_attn.reference import branch_shape

# Scores of a block: 2 MB in float32, so that what follows a product finds them in the caches.
BLOCK_SCORES = 2**19
# Attention of fewer scores goes through batched products: a call costs more than its arithmetic.
_SMALL_SCORES = 2**14

Branches = tuple[tuple[int, ...], tuple[int, ...]]


class Piece(NamedTuple):
    """Equal segments of one branch and head group: rows `start + group :: ratio`, some heads."""

    start: int  # first row of the first segment, in its sequence
    segments: int
    length: int  # rows of one segment that exist
    ratio: int
    group: int
    heads: slice
    pads: int  # zero keys that the published form appends to each segment

    @property
    def places(self) -> int:
        """Rows of a segment that take part."""
        return len(range(self.group, self.length, self.ratio))

    @property
    def is_lone(self) -> bool:
        """Whether the published softmax has a single key."""
        return self.places + self.pads == 1

    def view(self, t: Tensor) -> Tensor:
        """Return the rows of this piece of `[L, H, d]` as a view `[segments, heads, places, d]`."""
        row, head, column = t.stride()
        return t.as_strided(
            (self.segments, self.heads.stop - self.heads.start, self.places, t.shape[2]),
            (self.length * row, head, self.ratio * row, column),
            t.storage_offset() + (self.start + self.group) * row + self.heads.start * head,
        )


def _of_sequence(length: int, heads: int, task: slice, branches: Branches) -> Iterator[Piece]:
    """Yield the pieces of some heads of a sequence, whose tensors start with the first of these.

    The last segment may be shorter than the others.
    """
    for segment, ratio in zip(*branches, strict=True):
        w, n, m = branch_shape(length, segment, ratio)
        runs = [(0, n - 1, w)] if n > 1 else []
        runs.append(((n - 1) * w, 1, length - (n - 1) * w))
        per_group = math.ceil(heads / ratio)
        for group in range(math.ceil(heads / per_group)):
            first_head = max(group * per_group, task.start) - task.start
            end_head = min((group + 1) * per_group, task.stop) - task.start
            for first, count, rows in runs if first_head < end_head else ():
                real = len(range(group, rows, ratio))
                if real:
                    kept = slice(first_head, end_head)
                    yield Piece(first, count, rows, ratio, group, kept, m - real)


def _head_tasks(length: int, heads: int) -> Iterator[slice]:
    """Cut the heads of a sequence: one at a time where it is long, many where it is short."""
    step = min(max(BLOCK_SCORES // length**2, 1), heads)
    for first in range(0, heads, step):
        yield slice(first, min(first + step, heads))


def tasks(
    offsets: Tensor, heads: int, branches: Branches
) -> Iterator[tuple[tuple[slice, slice], list[Piece]]]:
    """Yield rows and heads that have nothing in common with others, and their pieces."""
    for start, end in pairwise(offsets.tolist()):
        for task in _head_tasks(end - start, heads) if start < end else ():
            yield (slice(start, end), task), list(_of_sequence(end - start, heads, task, branches))


def chunks(piece: Piece) -> Iterator[Piece]:
    """Cut a piece by segments and heads: one at a time if large, many small ones at once."""
    _, segments, length, ratio, group, heads, pads = piece
    count = heads.stop - heads.start
    step, heads_step = max(BLOCK_SCORES // (count * piece.places**2), 1), count
    if piece.places**2 > _SMALL_SCORES:
        step = heads_step = 1
    for first in range(0, segments, step):
        start, some = piece.start + first * length, min(step, segments - first)
        for head in range(heads.start, heads.stop, heads_step):
            yield Piece(start, some, length, ratio, group, slice(head, head + heads_step), pads)


def blocks(problems: int, places: int) -> Iterator[slice]:
    """Cut the query rows of a chunk so that their scores are about BLOCK_SCORES."""
    step = max(BLOCK_SCORES // (problems * places), 16)
    for first in range(0, places, step):
        yield slice(first, min(first + step, places))
