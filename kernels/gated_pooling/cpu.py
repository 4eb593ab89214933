"""Gated attention pooling on the CPU: row blocks, one product for both gates, a closed backward.

Nothing of size N x K is kept: the backward pass computes the gates of a block again. With
w = exp(a - lse), g_lc = x_l . P_bc and delta_bc = pooled_bc . P_bc, P the gradient of pooled:

    da = w (g - delta) + (gradient of scores)          dh = da s
    dv = dh sigmoid(u) (1 - tanh(v)^2)                 du = dh tanh(v) sigmoid(u) (1 - sigmoid(u))
    dx_l = sum_c w_lc P_bc + dv V + du U               dV = dv^T x    dU = du^T x    ds = da^T h

for v = V x + bV, u = U x + bU. Half precision inputs are computed in float32, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # 1,024 rows of both gates at K = 256 are 2 MB in float32: a core's L2


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the case and the rows of each block; no block crosses a case."""
    for case, (start, end) in enumerate(pairwise(offsets.tolist())):
        for first in range(start, end, BLOCK_ROWS):
            yield case, slice(first, min(first + BLOCK_ROWS, end))


def _stacked(value: Tensor, gate: Tensor) -> Tensor:
    """Return V over U, or their biases, in the dtype of the computation."""
    return torch.cat([value, gate]).to(_accumulation_dtype(value))


def _gates(tiles: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return tanh(v) and sigmoid(u), `[rows, K]` each, from the stacked weights."""
    value, gate = torch.addmm(bias, tiles, weight.t()).chunk(2, dim=1)
    return value.tanh_(), gate.sigmoid_()


def gated_pool_cpu_fwd(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled `[B, C, D]`, scores `[N, C]` and their log-sum-exp `[B, C]`."""
    exact = _accumulation_dtype(x)
    weight, bias = _stacked(value_weight, gate_weight), _stacked(value_bias, gate_bias)
    score_weight, score_bias = score_weight.to(exact), score_bias.to(exact)
    cases, heads = offsets.numel() - 1, score_weight.shape[0]
    scores = torch.empty(x.shape[0], heads, dtype=exact)
    for tiles, out in zip(x.split(BLOCK_ROWS), scores.split(BLOCK_ROWS), strict=True):
        value, gate = _gates(tiles.to(exact), weight, bias)
        torch.addmm(score_bias, value.mul_(gate), score_weight.t(), out=out)
    lse = torch.full((cases, heads), -torch.inf, dtype=exact)
    for case, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start < end:
            lse[case] = torch.logsumexp(scores[start:end], dim=0)
    pooled = torch.zeros(cases, heads, x.shape[1], dtype=exact)
    for case, rows in _blocks(offsets):
        weights = torch.exp(scores[rows] - lse[case])  # [rows, C]
        pooled[case].addmm_(weights.t(), x[rows].to(exact))
    return pooled.to(x.dtype), scores, lse


def gated_pool_cpu_bwd(
    grad_pooled: Tensor,
    grad_scores: Tensor | None,
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    pooled: Tensor,
    scores: Tensor,
    lse: Tensor,
    offsets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of those of x and the six weights that `needs` names, in this order."""
    exact = _accumulation_dtype(x)
    weight, bias = _stacked(value_weight, gate_weight), _stacked(value_bias, gate_bias)
    score_weight, pulled = score_weight.to(exact), grad_pooled.to(exact)
    delta = (pooled.to(exact) * pulled).sum(-1)  # [B, C]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    # A shift of all scores moves no attention weight: the pooled output gives its bias nothing.
    grad_score_bias = torch.zeros_like(score_bias) if grad_scores is None else grad_scores.sum(0)
    sums = [torch.zeros_like(t) for t in (weight, bias, score_weight)]
    # A gradient taken inside an autocast region would have its products rounded.
    with torch.autocast("cpu", enabled=False):
        for case, rows in _blocks(offsets) if any(needs[:6]) else ():
            tiles = x[rows].to(exact)
            value, gate = _gates(tiles, weight, bias)  # [rows, K]
            weights = torch.exp(scores[rows] - lse[case])  # [rows, C]
            grad_score = weights * (tiles @ pulled[case].t() - delta[case])
            if grad_scores is not None:
                grad_score += grad_scores[rows]
            grad_gates = _gate_gradients(grad_score @ score_weight, value, gate)  # [rows, 2K]
            if needs[0]:
                grad = torch.addmm(weights @ pulled[case], grad_gates, weight)
                grad_x[rows] = grad.to(x.dtype)
            if needs[1] or needs[3]:
                sums[0].addmm_(grad_gates.t(), tiles)
            if needs[2] or needs[4]:
                sums[1] += grad_gates.sum(0)
            if needs[5]:
                sums[2].addmm_(grad_score.t(), value.mul_(gate))
    (grad_v, grad_u), (grad_bv, grad_bu) = sums[0].chunk(2), sums[1].chunk(2)
    found = (grad_x, grad_v, grad_bv, grad_u, grad_bu, sums[2], grad_score_bias)
    return [
        # Copied: an operator must not return two views of one tensor.
        t if t is grad_x else t.to(x.dtype, copy=True)
        for t, need in zip(found, needs, strict=True)
        if need
    ]


def _gate_gradients(grad_hidden: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Return dv and du side by side, `[rows, 2K]`."""
    by_gate = grad_hidden * gate
    return torch.cat([by_gate * (1 - value * value), by_gate * value * (1 - gate)], dim=1)
