"""What the injector costs: FLOPs, least bytes and bytes that our kernels move, modelled.

Rule: what a program reads twice comes from L2 the second time as far as the rows that all resident
programs wait to read again fit half of it; the rest is read from memory again. Weights, keys and
values (under 1 MB) stay in L2. Backward, every [N, E] tensor between kernels is written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """FLOPs and bytes of one call.

    Attributes:
        flops: Multiplications and additions of the products that the result needs.
        least_bytes: Every input read once and every output written once.
        moved_bytes: What our kernels move through DRAM.
    """

    flops: float
    least_bytes: float
    moved_bytes: float


def _small_elements(cases: int, tokens: int, width: int, inner: int) -> int:
    """Return the elements of keys, values, weights and vectors."""
    return 2 * cases * tokens * inner + 2 * inner * width + 4 * width + inner


def _read_again(read_bytes: float, waiting_bytes: float, l2_bytes: int) -> float:
    """Return what of a second read of `read_bytes` comes from memory."""
    return read_bytes * max(0.0, 1.0 - l2_bytes / 2 / max(waiting_bytes, 1.0))


def injection_cost(
    rows: int,
    *,
    cases: int = 1,
    tokens: int = 65,
    width: int = 768,
    inner: int = 192,
    dtype: torch.dtype = torch.bfloat16,
    l2_bytes: int = 50 * 2**20,
    multiprocessors: int = 132,
    block_rows: int = 128,
) -> Cost:
    """Return the modelled cost of `inject`, forward.

    Args:
        rows: Tiles of all cases, N.
        cases: B.
        tokens: Keys G of a case.
        width: D.
        inner: E.
        dtype: Of the tensors.
        l2_bytes: L2 of the device.
        multiprocessors: Of the device; one program runs on each at a time.
        block_rows: Rows of a program.
    """
    size = dtype.itemsize
    flops = rows * (4 * inner * width + 4 * inner * tokens)
    small = _small_elements(cases, tokens, width, inner) * size
    x = rows * width * size
    least = 2 * x + small
    waiting = min(rows, multiprocessors * block_rows) * width * size
    # The folded weights are written beside their sources, and read back from L2.
    folded = 2 * inner * width * size
    return Cost(flops, least, least + folded + _read_again(x, waiting, l2_bytes))


def injection_cost_backward(
    rows: int,
    *,
    cases: int = 1,
    tokens: int = 65,
    width: int = 768,
    inner: int = 192,
    dtype: torch.dtype = torch.bfloat16,
    trainable_weights: bool = True,
    key_span: int = 1024,
    weight_span: int = 2048,
) -> Cost:
    """Return the modelled cost of the backward pass with every gradient, or all but weights'.

    Args:
        rows: Tiles of all cases, N.
        cases: B.
        tokens: Keys G of a case.
        width: D.
        inner: E.
        dtype: Of the tensors.
        trainable_weights: Whether gradients of the weights are asked for.
        key_span: Rows of a partial sum of the gradients of keys and values.
        weight_span: Rows of a partial sum of the gradients of weights.
    """
    size = dtype.itemsize
    # Products E x D: q, do, dq W', and T and M; with the keys: s, dp, o, dq, dk, dv.
    products = 5 if trainable_weights else 3
    flops = rows * (2 * products * inner * width + 12 * inner * tokens)
    small = _small_elements(cases, tokens, width, inner) * size
    tall, narrow = rows * width * size, rows * inner * size
    least = 3 * tall + 2 * small
    # project: x, u in, q, do out; attention: q, do in, o, dq out; input: x, u, q, dq in, dx out.
    moved = 5 * tall + 8 * narrow + 2 * small
    key_partials = -(-rows // key_span) * 2 * tokens * inner * 4
    moved += 2 * key_partials
    if trainable_weights:
        # x and dq for T; x, u and o for M.
        moved += 3 * tall + 2 * narrow
        moved += 2 * 2 * -(-rows // weight_span) * inner * width * 4
    return Cost(flops, least, moved)
