"""What ALiBi attention costs: arithmetic, least bytes, and bytes moved by the Triton kernels.

Rule for bytes: a re-read is free only while what is re-read fits half of the device's L2. Programs
that re-read the same rows run next to each other: all blocks of a sequence under one head (under a
pair of heads in the forward kernel). What is re-read is then two tensors of one sequence under
those heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from modaltune.kernels._tuning import shipped

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_CELL, _GRID, _ROW_STATE = 8, 16, 4  # x and y in float32, x and y in int64, lse or delta


class Cost(NamedTuple):
    """Cost of one call.

    Attributes:
        flops: Of the matrix products.
        special_ops: Exponentials and square roots, which run on the special-function units.
        least_bytes: Every input read once, every output written once.
        moved_bytes: What the kernels move between memory and L2.
    """

    flops: int
    special_ops: int
    least_bytes: int
    moved_bytes: int


class _Blocks(NamedTuple):
    """The shipped block sizes of one variant of the kernels."""

    dtype: str
    head_dim: int
    capability: int

    def size(self, kernel: str, name: str) -> int:
        variant = f"alibi_attn_{kernel}_kernel" + (":fp32" if self.dtype == "fp32" else "")
        variant += ":wide" if self.head_dim > 64 else ""
        return shipped("alibi_attn")[variant][str(self.capability)][name]


def _reread(lengths: Sequence[int], block: int, row_bytes: int, l2_bytes: int) -> int:
    """Bytes from memory for rows that every block of their sequence reads."""
    return sum(
        n * row_bytes * (1 if n * row_bytes <= l2_bytes // 2 else -(-n // block)) for n in lengths
    )


def alibi_cost(
    lengths: Sequence[int],
    *,
    mode: str,
    l2_bytes: int,
    dtype: str = "bf16",
    heads: int = 12,
    head_dim: int = 64,
    capability: int = 90,
) -> Cost:
    """Return the cost of one call on a ragged batch; the defaults are TITAN's.

    Args:
        lengths: Rows of each sequence.
        mode: `forward`, or `backward` (all three gradients).
        l2_bytes: L2 cache of the device.
        dtype: `fp16`, `bf16` or `fp32`.
        heads: Number of heads.
        head_dim: Columns per head.
        capability: Compute capability whose block sizes are taken.

    Raises:
        ValueError: `mode` is neither.
    """
    if mode not in ("forward", "backward"):
        raise ValueError(f"mode must be forward or backward, got {mode!r}")
    n_rows, pairs = sum(lengths), heads * sum(n * n for n in lengths)
    blocks = _Blocks(dtype, head_dim, capability)
    row = head_dim * _BYTES[dtype]  # one tensor, one head
    of_tensor, of_state = n_rows * heads * row, n_rows * heads * _ROW_STATE
    cells = n_rows * (_GRID + _CELL)  # the conversion
    if mode == "forward":
        paired = blocks.size("fwd", "HEADS")
        paired = 1 if heads % paired else paired
        # Read once: q. Written: o, lse. Read again and again: k, v and cells.
        again = _reread(lengths, blocks.size("fwd", "BLOCK_M"), 2 * row * paired + _CELL, l2_bytes)
        moved = 2 * of_tensor + of_state + cells + heads // paired * (n_rows * _CELL + again)
        least = 4 * of_tensor + of_state + n_rows * _GRID
        return Cost(4 * head_dim * pairs, pairs + pairs // paired, least, moved)
    # dq kernel: q, do, o, lse in, delta and dq out, k and v again and again. dk / dv kernel: k, v
    # in, dk and dv out, q, do, lse and delta again and again.
    keys = _reread(lengths, blocks.size("bwd_dq", "BLOCK_M"), 2 * row + _CELL, l2_bytes)
    queries = 2 * row + _CELL + 2 * _ROW_STATE
    queries = _reread(lengths, blocks.size("bwd_dkdv", "BLOCK_N"), queries, l2_bytes)
    moved = 8 * of_tensor + 2 * of_state + cells + heads * (2 * n_rows * _CELL + keys + queries)
    least = 8 * of_tensor + of_state + n_rows * _GRID
    return Cost(14 * head_dim * pairs, 4 * pairs, least, moved)
