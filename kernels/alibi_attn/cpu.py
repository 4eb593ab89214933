"""Attention with a two-dimensional ALiBi bias on the CPU, in memory linear in the sequence.

The bias exists for one block of query rows and heads at a time, in a buffer of fixed size.
Forward: ATen's fused CPU attention, which also returns lse_ih = log sum_j exp(s_ijh) with
s_ijh = scale * q_ih . k_jh - slope_h * |g_i - g_j|. Backward, block by block, from lse alone:

    p = exp(s - lse)   dv = p^T do   ds = p * (do v^T - rowsum(do * o))   dq = scale * ds k
    dk = scale * ds^T q

Half precision inputs are computed in float32: a bias of -100 has no fraction bits in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# One block of bias; the backward pass holds two such buffers.
BLOCK_BYTES = 32 * 2**20

# Fewer query rows than this starve the matrix products, so heads are split before rows are.
MIN_BLOCK_ROWS = 128


def _block_shape(n: int, num_heads: int, itemsize: int) -> tuple[int, int]:
    """Return (query rows, heads) of a block of bias `[heads, rows, n]` that fits BLOCK_BYTES."""
    budget = BLOCK_BYTES // itemsize
    heads = min(num_heads, max(1, budget // (min(n, MIN_BLOCK_ROWS) * n)))
    rows = min(n, max(1, budget // (heads * n)))
    return rows, heads


def _bias_blocks(
    grid: Tensor, slopes: Tensor, num_prefix: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, heads, bias `[heads, rows, n]`) over one sequence, reusing one buffer.

    The bias is the consumer's to overwrite. Distances are computed once per block of rows.
    """
    n, num_heads = grid.shape[0], slopes.numel()
    block_rows, block_heads = _block_shape(n, num_heads, slopes.element_size())
    buffer = slopes.new_empty(block_heads * block_rows * n)
    # Relative to a tile of the sequence (the last row is one if any is), float32 is exact for
    # cells less than 2^24 apart, wherever the grid begins.
    x, y = (grid - grid[-1]).to(slopes.dtype).unbind(1)
    for start in range(0, n, block_rows):
        rows = slice(start, min(start + block_rows, n))
        dx, dy = x[rows, None] - x, y[rows, None] - y
        distance = dx.square_().addcmul_(dy, dy).sqrt_()  # [rows, n]
        distance[: max(0, num_prefix - start)] = 0
        distance[:, :num_prefix] = 0
        for first in range(0, num_heads, block_heads):
            heads = slice(first, min(first + block_heads, num_heads))
            shape = (heads.stop - first, rows.stop - start, n)
            bias = buffer[: shape[0] * shape[1] * n].view(shape)
            torch.mul(distance, -slopes[heads, None, None], out=bias)
            yield rows, heads, bias


def _sequences(offsets: Tensor) -> Iterator[slice]:
    return (slice(a, b) for a, b in pairwise(offsets.tolist()) if a < b)


def _head_major(tensor: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return one sequence of packed `[N, H, d]` as contiguous `[H, n, d]`."""
    return tensor[rows].transpose(0, 1).to(dtype).contiguous()


def alibi_attention_cpu_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Tensor,
    slopes: Tensor,
    offsets: Tensor,
    num_prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o `[N, H, d]` and its log-sum-exp `[H, N]`, float64 for float64 and else float32.

    Arguments as in `alibi_attention`, checked and without defaults.
    """
    slopes = _computed_in(q, slopes)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = slopes.new_empty(q.shape[1], q.shape[0])
    for seq in _sequences(offsets):
        q_s, k_s, v_s = (_head_major(t, seq, slopes.dtype) for t in (q, k, v))
        out_s, lse_s = out[seq], lse[:, seq]
        for rows, heads, bias in _bias_blocks(grid[seq], slopes, num_prefix):
            o, o_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_s[None, heads, rows],
                k_s[None, heads],
                v_s[None, heads],
                attn_mask=bias[None],
                scale=scale,
            )
            out_s[rows, heads] = o[0].transpose(0, 1).to(out.dtype)
            lse_s[heads, rows] = o_lse[0]
    return out, lse


def alibi_attention_cpu_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    grid: Tensor,
    slopes: Tensor,
    out: Tensor | None,
    lse: Tensor,
    offsets: Tensor,
    num_prefix: int,
    scale: float,
    grads: Sequence[Tensor | None],
) -> None:
    """Fill the gradients of q, k and v `[N, H, d]`; one that is None is not computed.

    v and out may be None where only v needs a gradient. The bias has none.
    """
    slopes = _computed_in(q, slopes)
    # A gradient taken inside an autocast region would have its products rounded.
    with torch.autocast("cpu", enabled=False):
        for seq in _sequences(offsets):
            packed = [
                None if t is None else _head_major(t, seq, slopes.dtype)
                for t in (q, k, v, out, grad_out)
            ]
            needs = [grad is not None for grad in grads]
            blocks = _bias_blocks(grid[seq], slopes, num_prefix)
            of_seq = _sequence_backward(packed, lse[:, seq], blocks, scale, needs)
            for grad, grad_s in zip(grads, of_seq, strict=True):
                if grad is not None and grad_s is not None:
                    grad[seq] = grad_s.transpose(0, 1).to(grad.dtype)


def _computed_in(q: Tensor, slopes: Tensor) -> Tensor:
    """Return the slopes in the dtype of the computation."""
    return slopes.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _sequence_backward(
    packed: Sequence[Tensor | None],
    lse: Tensor,
    blocks: Iterator[tuple[slice, slice, Tensor]],
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dq, dk, dv `[H, n, d]` of one sequence, those needed.

    Args:
        packed: q, k, v, out and the gradient of out, each `[H, n, d]` contiguous; v and out may be
            None where only dv is needed.
        lse: `[H, n]` log-sum-exp of the scores of each query.
        blocks: Blocks of bias, overwritten with the attention weights.
        scale: Factor of q . k.
        needs: Whether dq, dk and dv are needed.
    """
    q, k, v, out, grad_out = packed
    assert q is not None  # for the type checker: these three always come
    assert k is not None
    assert grad_out is not None
    dq, dk, dv = (torch.zeros_like(q) if need else None for need in needs)
    delta = None if out is None else (grad_out * out).sum(-1)  # [H, n]
    scratch: Tensor | None = None
    for rows, heads, p in blocks:
        q_b, do_b = q[heads, rows], grad_out[heads, rows]  # [heads, rows, d]
        p.baddbmm_(q_b, k[heads].transpose(1, 2), alpha=scale)
        p.sub_(lse[heads, rows, None]).exp_()
        if dv is not None:
            dv[heads].baddbmm_(p.transpose(1, 2), do_b)
        if v is None or delta is None:
            continue
        if scratch is None:
            scratch = torch.empty_like(p).flatten()
        ds = scratch[: p.numel()].view(p.shape)  # the first block is the largest
        torch.bmm(do_b, v[heads].transpose(1, 2), out=ds)
        ds.sub_(delta[heads, rows, None]).mul_(p)
        if dq is not None:
            dq[heads, rows] = torch.bmm(ds, k[heads]).mul_(scale)
        if dk is not None:
            dk[heads].baddbmm_(ds.transpose(1, 2), q_b, alpha=scale)
    return dq, dk, dv
