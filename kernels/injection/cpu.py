"""The injector on the CPU: fused attention, in row blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 2048  # 2,048 x 768 float32 = 6 MB a block: the activations of a block fit an L3 slice


def inject_cpu_fwd(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
) -> Tensor:
    """Return `[N, D]`, equal to the reference to rounding."""

    def rows(tiles: Tensor, k: Tensor, v: Tensor) -> Tensor:
        normed = F.layer_norm(tiles, tiles.shape[-1:], norm_weight, norm_bias, eps)
        q = F.linear(normed, query_weight, query_bias).unflatten(-1, (num_heads, -1))
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v)
        out = F.linear(out[0].transpose(0, 1).flatten(1), output_weight, output_bias)
        return tiles + gamma * (tiles + out)

    pieces: list[Tensor] = []
    bounds = offsets.tolist()
    for case, (start, end) in enumerate(pairwise(bounds)):
        first = min(start + num_prefix, end)
        pieces.append(x[start:first])
        k, v = keys[case], values[case]
        if key_mask is not None:
            k, v = k[key_mask[case]], v[key_mask[case]]
        if k.shape[0] == 0:
            pieces.append(x[first:end])
            continue
        k, v = (t.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None] for t in (k, v))
        pieces += [rows(block, k, v) for block in x[first:end].split(BLOCK_ROWS)]
    return torch.cat(pieces) if pieces else x.clone()


class _Gradients:
    """Adds up the gradients of one call, block by block; no graph is recorded.

    With u the gradient of the output, n the normed rows, o the attended values

        dz = gamma u    do = dz Wo    dn = dq Wq    dx = u + dz + (LayerNorm backward of dn)

    and dq, dk, dv from ATen's fused attention backward.
    """

    def __init__(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], num_heads: int, eps: float
    ) -> None:
        self.x, self.keys, self.values, self.gamma, self.norm_weight, self.norm_bias = tensors[:6]
        self.query_weight, self.query_bias, self.output_weight, self.output_bias = tensors[6:]
        self.needs = needs
        self.num_heads = num_heads
        self.eps = eps
        exact = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        self.found = [torch.zeros_like(t, dtype=exact) for t in tensors[1:]]

    def rows(self, tiles: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return dx of a block and dk, dv `[H, G, d]`; add to the gradients of the weights."""
        aten = torch.ops.aten
        shape = [tiles.shape[-1]]
        normed, mean, rstd = aten.native_layer_norm(
            tiles, shape, self.norm_weight, self.norm_bias, self.eps
        )
        q = F.linear(normed, self.query_weight, self.query_bias)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)[None]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        attended = out[0].transpose(0, 1).flatten(1)  # [rows, E]
        gated = u * self.gamma
        pulled = (gated @ self.output_weight).unflatten(-1, (self.num_heads, -1))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            pulled.transpose(0, 1)[None], q, k, v, out, lse, 0.0, False
        )
        dq = dq[0].transpose(0, 1).flatten(1)  # [rows, E]
        dx, dw, db = aten.native_layer_norm_backward(
            dq @ self.query_weight,
            *(tiles, shape, mean, rstd, self.norm_weight, self.norm_bias, [True] * 3),
        )
        gate, _, _, query, _, output, _ = self.needs[3:]
        update = F.linear(attended, self.output_weight, self.output_bias) if gate else None
        parts = (
            *(0 if update is None else (u * (tiles + update)).sum(0), dw, db),
            *(dq.t() @ normed if query else 0, dq.sum(0)),
            *(gated.t() @ attended if output else 0, gated.sum(0)),
        )
        for total, part in zip(self.found[2:], parts, strict=True):
            total += part
        return u + gated + dx, dk[0], dv[0]

    def case(self, case: int, rows: slice, shown: Tensor | None, grad: Tensor, dx: Tensor) -> None:
        """Write dx of a case's tiles and its rows of dk and dv."""
        chosen = slice(None) if shown is None else shown
        k, v = self.keys[case][chosen], self.values[case][chosen]
        if k.shape[0] == 0:
            dx[rows] = grad[rows]
            return
        by_head = [t.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)[None] for t in (k, v)]
        for first in range(rows.start, rows.stop, BLOCK_ROWS):
            block = slice(first, min(first + BLOCK_ROWS, rows.stop))
            dx[block], *found = self.rows(self.x[block], grad[block], *by_head)
            for total, part in zip(self.found[:2], found, strict=True):
                total[case, chosen] += part.transpose(0, 1).flatten(1)


def inject_cpu_bwd(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients that are needed, in the order of the tensors `x` to `output_bias`."""
    norm = (norm_weight, norm_bias)
    weights = (query_weight, query_bias, output_weight, output_bias)
    run = _Gradients((x, keys, values, gamma, *norm, *weights), needs, num_heads, eps)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    # A gradient taken inside an autocast region would have its products rounded.
    with torch.autocast("cpu", enabled=False):
        for case, (start, end) in enumerate(pairwise(offsets.tolist())):
            first = min(start + num_prefix, end)
            dx[start:first] = grad[start:first]
            shown = None if key_mask is None else key_mask[case]
            run.case(case, slice(first, end), shown, grad, dx)
    return [t.to(x.dtype) for t, need in zip((dx, *run.found), needs, strict=True) if need]
