"""The extractor's attention on the CPU: one product for keys and values, fused attention.

The backward pass computes both again and calls ATen's backward of each part, rather than autograd:
an operator's body may run where autograd is off, as under a dispatch mode that counts FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def _cases(offsets: Tensor, num_prefix: int) -> Iterator[tuple[int, slice]]:
    """Yield the cases that have rows after their prefix, and those rows."""
    for case, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start + num_prefix < end:
            yield case, slice(start + num_prefix, end)


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Turn `[L, E]` into `[1, H, L, E / H]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None]


def _columns(heads: Tensor) -> Tensor:
    """Turn `[1, H, L, E / H]` back into `[L, E]`."""
    return heads[0].transpose(0, 1).flatten(1)


def extract_cpu(
    queries: Tensor,
    x: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    num_heads: int,
    offsets: Tensor,
    num_prefix: int,
    eps: float,
) -> Tensor:
    """Return `[B, G, E]`, equal to the reference to rounding."""
    inner = queries.shape[-1]
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    for case, rows in _cases(offsets, num_prefix):
        normed = F.layer_norm(x[rows], x.shape[-1:], norm_weight, norm_bias, eps)
        kv = F.linear(normed, kv_weight, kv_bias)
        q, k, v = (_heads(t, num_heads) for t in (queries[case], kv[:, :inner], kv[:, inner:]))
        out[case] = _columns(F.scaled_dot_product_attention(q, k, v))
    return out


def extract_cpu_bwd(
    grad_out: Tensor,
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
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the six inputs that need one, in the order of the arguments."""
    inner, width = queries.shape[-1], x.shape[-1:]
    found = [torch.zeros_like(t) for t in (queries, x, norm_weight, norm_bias, kv_weight, kv_bias)]
    for case, rows in _cases(offsets, num_prefix):
        normed, mean, rstd = torch.native_layer_norm(x[rows], width, norm_weight, norm_bias, eps)
        kv = F.linear(normed, kv_weight, kv_bias)
        qkv = [_heads(t, num_heads) for t in (queries[case], kv[:, :inner], kv[:, inner:])]
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(grad_out[case], num_heads), *qkv, out, lse, 0.0, False
        )
        found[0][case] = _columns(grads[0])
        if not any(needs[1:]):
            continue
        grad_kv = torch.cat([_columns(grads[1]), _columns(grads[2])], dim=1)  # [L, 2E]
        if needs[4]:
            found[4] += grad_kv.t() @ normed
        if needs[5]:
            found[5] += grad_kv.sum(0)
        if any(needs[1:4]):
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_kv @ kv_weight, x[rows], width, mean, rstd, norm_weight, norm_bias, needs[1:4]
            )
            for into, grad in (
                (found[1][rows], grad_x), (found[2], grad_weight), (found[3], grad_bias),
            ):  # fmt: skip
                if grad is not None:
                    into += grad
    return [t for t, need in zip(found, needs, strict=True) if need]
