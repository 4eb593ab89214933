"""The injector, written out: the oracle for every faster path."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def inject_reference(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    num_heads: int,
    offsets: Tensor,
    num_prefix: int,
    key_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """Return `[N, D]`: `x + gamma * (x + attention(LN(x), keys, values))`, prefix rows unchanged.

    Source: ModalTune (Ramanathan et al., 2025), injector; the residual stands inside and outside.
    """
    pieces = []
    bounds = offsets.tolist()
    for case, (start, end) in enumerate(pairwise(bounds)):
        pieces.append(x[start : min(start + num_prefix, end)])
        tiles = x[min(start + num_prefix, end) : end]
        k, v = keys[case], values[case]
        if key_mask is not None:
            k, v = k[key_mask[case]], v[key_mask[case]]
        if tiles.shape[0] == 0 or k.shape[0] == 0:
            pieces.append(tiles)
            continue
        q = F.linear(F.layer_norm(tiles, x.shape[-1:], norm_weight, norm_bias, eps), query_weight)
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(0, 1) for t in (q + query_bias, k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        attended = (weights @ v).transpose(0, 1).flatten(1)
        pieces.append(tiles + gamma * (tiles + F.linear(attended, output_weight, output_bias)))
    return torch.cat(pieces) if pieces else x.clone()
