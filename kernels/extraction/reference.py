"""The extractor's attention, written out: the oracle for every faster path."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def extract_reference(
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
    """Return `[B, G, E]`: softmax(q k^T / sqrt(E / heads)) v with k, v = LN(x) kv_weight + bias.

    Source: ModalTune (Ramanathan et al., 2025), extractor.
    """
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
            t.unflatten(-1, (num_heads, -1)).transpose(0, 1)
            for t in (queries[case], kv[:, :inner], kv[:, inner:])
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        outs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.stack(outs) if outs else torch.zeros_like(queries)
