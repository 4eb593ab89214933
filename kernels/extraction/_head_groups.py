"""How an extraction is cut into programs: head groups, query parts, blocks of rows.

The kernels and the cost model read the same rules here; nothing in it needs Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from modaltune.kernels._schedule import row_blocks

MAX_HEAD_DIM = 128
MAX_QUERIES = 128
MAX_QUERIES_FLOAT32 = 80  # more spill registers in the backward kernel
GROUP_COLUMNS = 64  # key columns of a head group; as many of values stand beside them


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class HeadPlan(NamedTuple):
    """How heads stand side by side in a program.

    Attributes:
        heads: H, number of heads.
        dim: Width of a head.
        padded_dim: The width on chip: the next power of two, at least 16.
        per_group: Heads of one program.
        groups: Programs that share the rows of a split.
    """

    heads: int
    dim: int
    padded_dim: int
    per_group: int
    groups: int

    @property
    def columns(self) -> int:
        """Key and value columns of a group, padding included."""
        return 2 * self.per_group * self.padded_dim

    @property
    def padded_heads(self) -> int:
        """Heads of all groups, padding included."""
        return self.per_group * self.groups


def head_plan(inner: int, heads: int) -> HeadPlan:
    """Return the head groups of `heads` heads that share `inner` columns."""
    dim = inner // heads
    padded = max(16, _next_power_of_two(dim))
    per_group = min(max(GROUP_COLUMNS // padded, 1), _next_power_of_two(heads))
    return HeadPlan(heads, dim, padded, per_group, -(-heads // per_group))


def query_parts(queries: int, least_tail: int = 16) -> tuple[int, int]:
    """Return the rows of the two parts (the second may be 0) that hold up to 128 queries.

    Both are powers of two from 16 to 64: 65 queries are 64 + 16, not 128.

    Args:
        queries: G.
        least_tail: Rows of the second part at least; 64 where smaller products are not built in.
    """
    if queries <= 64:
        return max(16, _next_power_of_two(queries)), 0
    return 64, max(least_tail, _next_power_of_two(queries - 64))


def partial_bytes(queries: int, plan: HeadPlan, itemsize: int) -> int:
    """Return the bytes that one block of rows leaves for the merge, all heads.

    Args:
        queries: G.
        plan: Head groups.
        itemsize: Bytes of a number of x; the log-sum-exp is float32.
    """
    return queries * plan.padded_heads * (plan.padded_dim * itemsize + 4)


class Work(NamedTuple):
    """What the programs of a launch do, on the device.

    Attributes:
        items: `[n, 3]` int32 case, first row, end of the case.
        first: `[B + 1]` int32 first item of each case and n.
        prefix: Rows `[p]` int64 that are left out.
        blocks: n.
    """

    items: Tensor
    first: Tensor
    prefix: Tensor
    blocks: int


def work_list(offsets: Tensor, block: int, num_prefix: int, device: torch.device) -> Work:
    """Return the items of `block` rows, none of which crosses a case; cached by value.

    Args:
        offsets: `[B + 1]` int64 on the CPU.
        block: Rows per item.
        num_prefix: Rows at the start of each case to leave out.
        device: Where the kernels run.
    """
    return _work_list(tuple(offsets.tolist()), block, num_prefix, device)


@lru_cache(maxsize=64)
def _work_list(bounds: tuple[int, ...], block: int, num_prefix: int, device: torch.device) -> Work:
    offsets = torch.tensor(bounds, dtype=torch.int64)
    blocks = row_blocks(offsets, block, num_prefix)
    items = torch.stack([blocks.case, blocks.start, blocks.end], dim=1)
    rows = torch.arange(bounds[-1])
    case = torch.bucketize(rows, offsets[1:], right=True)
    prefix = rows[rows - offsets[case] < num_prefix] if num_prefix else rows[:0]
    return Work(items.to(device), blocks.first.to(device), prefix.to(device), blocks.blocks)
