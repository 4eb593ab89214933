"""Attention with a two-dimensional ALiBi bias, as defined: the dense bias, plain PyTorch.

    o_ih = sum_j softmax_j( scale * q_ih . k_jh - slope_h * |g_i - g_j| ) v_jh

i, j are rows of one sequence, h a head, g a row's position in grid cells, |.| the Euclidean
distance; the bias of every pair that holds a prefix row (cls) is 0. Memory grows with n^2.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def alibi_bias(grid: Tensor, slopes: Tensor, num_prefix: int) -> Tensor:
    """Return the dense bias `[H, n, n]` float64 of one sequence.

    Args:
        grid: `[n, 2]` integer positions in cells; the first `num_prefix` rows are ignored.
        slopes: `[H]` bias per cell of distance.
        num_prefix: Rows at the head of the sequence whose rows and columns carry no bias.
    """
    # Distances are differences of integers: exact until the square root, wherever the grid begins.
    step = (grid[:, None, :] - grid[None, :, :]).double()
    distance = step.square().sum(-1).sqrt()
    distance[:num_prefix] = 0
    distance[:, :num_prefix] = 0
    return -slopes.detach().double()[:, None, None] * distance


def alibi_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Tensor,
    slopes: Tensor,
    offsets: Tensor,
    num_prefix: int,
    scale: float,
) -> Tensor:
    """Return `[N, H, d]`; arguments as in `alibi_attention`, checked and without defaults.

    Products run in the dtype of the inputs; scores, bias and softmax in float32, or in float64
    for float64 inputs.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = [(q + k + v)[:0]]  # without sequences the inputs stay in the graph
    for start, stop in pairwise(offsets.tolist()):
        q_s, k_s, v_s = (t[start:stop].transpose(0, 1) for t in (q, k, v))  # [H, n, d]
        scores = (q_s @ k_s.transpose(1, 2)).to(exact) * scale
        scores = scores + alibi_bias(grid[start:stop], slopes, num_prefix).to(exact)
        weights = torch.softmax(scores, dim=-1).to(v.dtype)  # [H, n, n]
        outputs.append((weights @ v_s).transpose(0, 1))
    return torch.cat(outputs)
