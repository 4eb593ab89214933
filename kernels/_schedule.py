"""Work lists for ragged batches: which rows each program of a launch takes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class RowBlocks(NamedTuple):
    """Blocks of at most `block` rows, none of which crosses a case.

    Attributes:
        case: `[n]` int32, the case of each block.
        start: `[n]` int32, its first row in the packed tensor.
        end: `[n]` int32, one past the last row of its case.
        first: `[B + 1]` int32, first block of each case and n.
    """

    case: Tensor
    start: Tensor
    end: Tensor
    first: Tensor

    @property
    def blocks(self) -> int:
        """Number of blocks n."""
        return self.case.numel()

    def to(self, device: torch.device) -> RowBlocks:
        """Move the lists without waiting for the device."""
        return RowBlocks(*(t.to(device, non_blocking=True) for t in self))


def row_blocks(offsets: Tensor, block: int, num_prefix: int = 0) -> RowBlocks:
    """Cut the rows of every case, after its prefix, into blocks.

    Args:
        offsets: `[B + 1]` int64 on the CPU.
        block: Rows per block.
        num_prefix: Rows at the start of each case to leave out.
    """
    ends = offsets[1:]
    starts = torch.minimum(offsets[:-1] + num_prefix, ends)
    counts = torch.div(ends - starts + block - 1, block, rounding_mode="floor")
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    case = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    within = torch.arange(int(first[-1]), device=first.device) - first[case]
    return RowBlocks(
        case.to(torch.int32),
        (starts[case] + within * block).to(torch.int32),
        ends[case].to(torch.int32),
        first.to(torch.int32),
    )


@lru_cache(maxsize=64)
def kept_row_blocks(offsets: tuple[int, ...], block: int, device: torch.device) -> RowBlocks:
    """Return the blocks of a layout on a device, kept: a captured CUDA graph copies nothing."""
    return row_blocks(torch.tensor(offsets, device="cpu"), block).to(device)
