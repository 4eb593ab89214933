"""The extractor's attention on the CPU: blocks of rows, fused attention, the fastest products.

Keys and values of a block of rows live no longer than the block: each leaves its attended values
and their log-sum-exp, which are merged as in flash-decoding. Products go to the fastest float32
library of the machine (`_products`); half precision is computed in float32, block by block. The
backward pass computes keys and values again and calls ATen's backward of each part, rather than
autograd: an operator's body may run where autograd is off, as under a mode that counts FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.kernels._products import product, product_back

# 2,048 x 768 float32 are 6 MB: a block's activations fit an L3 slice, and its products are large
# enough for every library.
BLOCK_ROWS = 2048


def exact_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a call with `x` computes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cases(offsets: Tensor, num_prefix: int) -> Iterator[tuple[int, list[slice]]]:
    """Yield the cases that have rows after their prefix, and those rows in blocks."""
    for case, (start, end) in enumerate(pairwise(offsets.tolist())):
        blocks = [
            slice(first, min(first + BLOCK_ROWS, end))
            for first in range(start + num_prefix, end, BLOCK_ROWS)
        ]
        if blocks:
            yield case, blocks


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Turn `[L, E]` into `[1, H, L, E / H]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None]


def _columns(heads: Tensor) -> Tensor:
    """Turn `[1, H, L, E / H]` back into `[L, E]`."""
    return heads[0].transpose(0, 1).flatten(1)


def extract_cpu_fwd(
    queries: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `[B, G, E]`, equal to the reference to rounding; the same unrounded; and `[B, H, G]`.

    The last is the log-sum-exp of the scores, minus infinity for a case without tiles.
    """
    exact, (cases, count, inner) = exact_dtype(x), queries.shape
    norm = (norm_weight.to(exact), norm_bias.to(exact), eps)
    weight, bias = kv_weight.to(exact), kv_bias.to(exact)
    out = torch.zeros(cases, count, inner, dtype=exact)
    lse = torch.full((cases, num_heads, count), -torch.inf, dtype=exact)
    for case, blocks in _cases(offsets, num_prefix):
        q = _heads(queries[case].to(exact), num_heads)
        parts, sums = [], []
        for rows in blocks:
            normed = F.layer_norm(x[rows].to(exact), x.shape[-1:], *norm)
            kv = product(normed, weight, bias, keep=True)
            k, v = (_heads(t, num_heads) for t in (kv[:, :inner], kv[:, inner:]))
            part, part_lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            parts.append(part[0])
            sums.append(part_lse[0].to(exact))
        of_parts = torch.stack(sums)  # [S, H, G]
        lse[case] = of_parts.logsumexp(0)
        merged = torch.stack(parts).mul_((of_parts - lse[case]).exp_().unsqueeze(-1)).sum(0)
        out[case] = _columns(merged[None])
    return out.to(x.dtype, copy=True), out, lse


def extract_cpu_bwd(
    grad_out: Tensor,
    queries: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the six inputs that need one, in the order of the arguments."""
    aten, exact, width = torch.ops.aten, exact_dtype(x), x.shape[-1:]
    inner = queries.shape[-1]
    norm = (norm_weight.to(exact), norm_bias.to(exact))
    weight, bias = kv_weight.to(exact), kv_bias.to(exact)
    tensors = (queries, x, norm_weight, norm_bias, kv_weight, kv_bias)
    found = [torch.zeros_like(t, dtype=x.dtype if t is x else exact) for t in tensors]
    for case, blocks in _cases(offsets, num_prefix):
        q, pulled, o = (_heads(t[case].to(exact), num_heads) for t in (queries, grad_out, out))
        for rows in blocks:
            tiles = x[rows].to(exact)
            normed, mean, rstd = torch.native_layer_norm(tiles, width, *norm, eps)
            kv = product(normed, weight, bias, keep=True)
            k, v = (_heads(t, num_heads) for t in (kv[:, :inner], kv[:, inner:]))
            # With o and lse over all rows, each block gives its share of dq and its own dk and dv.
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                pulled, q, k, v, o, lse[case, None], 0.0, False
            )
            found[0][case] += _columns(grads[0])
            if not any(needs[1:]):
                continue
            grad_kv = torch.cat([_columns(grads[1]), _columns(grads[2])], dim=1)  # [L, 2E]
            if needs[4]:
                found[4] += grad_kv.t() @ normed
            found[5] += grad_kv.sum(0)
            if any(needs[1:4]):
                grad_x, grad_weight, grad_bias = aten.native_layer_norm_backward(
                    product_back(grad_kv, weight, keep=True),
                    *(tiles, width, mean, rstd, *norm, [True] * 3),
                )
                found[1][rows] = grad_x
                found[2] += grad_weight
                found[3] += grad_bias
    return [t.to(x.dtype) for t, need in zip(found, needs, strict=True) if need]
