"""The extractor's attention on the CPU: one product for keys and values, fused attention."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


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
    outs = []
    bounds = offsets.tolist()
    for case, (start, end) in enumerate(pairwise(bounds)):
        tiles = x[min(start + num_prefix, end) : end]
        if tiles.shape[0] == 0:
            outs.append(torch.zeros_like(queries[case]))
            continue
        normed = F.layer_norm(tiles, x.shape[-1:], norm_weight, norm_bias, eps)
        kv = F.linear(normed, kv_weight, kv_bias)
        q, k, v = (
            t.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None]
            for t in (queries[case], kv[:, :inner], kv[:, inner:])
        )
        outs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
    return torch.stack(outs) if outs else torch.zeros_like(queries)
