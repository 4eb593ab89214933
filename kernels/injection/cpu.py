"""The injector on the CPU: row blocks in the cache, fused attention, the fastest products.

Nothing of the size of x is made but the result. Products go to the fastest float32 library of the
machine (`_products`); half precision is computed in float32, block by block. Attention over a
case's own keys is ATen's fused one. With the keys common to T tasks, its log-sum-exp L lets each
task add its key k' and value v' afterwards: the online softmax merges by w = sigmoid(q . k' - L),

    o' = o + w (v' - o)
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


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_head(tokens: Tensor, num_heads: int) -> Tensor:
    """Turn `[L, E]` into `[1, H, L, E / H]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None]


def _columns(heads: Tensor) -> Tensor:
    """Turn `[1, H, L, E / H]` back into `[L, E]`."""
    return heads[0].transpose(0, 1).flatten(1)


def _blocks(start: int, end: int) -> Iterator[slice]:
    for first in range(start, end, BLOCK_ROWS):
        yield slice(first, min(first + BLOCK_ROWS, end))


def _shown(tokens: Tensor, key_mask: Tensor | None, case: int, exact: torch.dtype) -> Tensor:
    """Return the rows of a case that its mask shows."""
    rows = tokens[case] if key_mask is None else tokens[case][key_mask[case]]
    return rows.to(exact)


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
    exact = _accumulation_dtype(x)
    scale, norm = gamma.to(exact), (norm_weight.to(exact), norm_bias.to(exact), eps)
    query = (query_weight.to(exact), query_bias.to(exact))
    output = (output_weight.to(exact), output_bias.to(exact))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for case, (start, end) in enumerate(pairwise(offsets.tolist())):
        k, v = (_shown(t, key_mask, case, exact) for t in (keys, values))
        first = min(start + num_prefix, end) if k.shape[0] else end
        out[start:first] = x[start:first]
        k, v = _by_head(k, num_heads), _by_head(v, num_heads)
        for rows in _blocks(first, end):
            tiles = x[rows].to(exact)
            q = product(F.layer_norm(tiles, tiles.shape[-1:], *norm), *query, keep=True)
            attended = F.scaled_dot_product_attention(_by_head(q, num_heads), k, v)
            update = product(_columns(attended), *output, keep=True)
            torch.addcmul(tiles, scale, update.add_(tiles), out=out[rows])
    return out


def _task_scores(task_keys: Tensor, num_heads: int) -> Tensor:
    """Return `[E, T * H]`: what a query is multiplied with for its scores with every task's key."""
    tasks, inner = task_keys.shape
    head_dim = inner // num_heads
    own = torch.eye(num_heads, dtype=task_keys.dtype).repeat_interleave(head_dim, 0)  # [E, H]
    by_task = task_keys.t()[:, :, None] * own[:, None, :] * head_dim**-0.5  # [E, T, H]
    return by_task.reshape(inner, tasks * num_heads)


def inject_tasks_cpu(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    task_keys: Tensor,
    task_values: Tensor,
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
    """Return `[T, N, D]`: LayerNorm, queries and the common keys once for all T tasks."""
    exact = _accumulation_dtype(x)
    scale, norm = gamma.to(exact), (norm_weight.to(exact), norm_bias.to(exact), eps)
    query = (query_weight.to(exact), query_bias.to(exact))
    output = (output_weight.to(exact), output_bias.to(exact))
    out = x.new_empty(task_keys.shape[1], *x.shape)
    for case, (start, end) in enumerate(pairwise(offsets.tolist())):
        first = min(start + num_prefix, end)
        out[:, start:first] = x[start:first]
        k, v = (_by_head(_shown(t, key_mask, case, exact), num_heads) for t in (keys, values))
        select = _task_scores(task_keys[case].to(exact), num_heads)
        added = task_values[case].to(exact).unflatten(-1, (num_heads, -1))  # [T, H, E / H]
        for rows in _blocks(first, end):
            tiles = x[rows].to(exact)
            q = product(F.layer_norm(tiles, tiles.shape[-1:], *norm), *query, keep=True)
            common, lse = _attend(_by_head(q, num_heads), k, v)  # [rows, H, E / H], [rows, H]
            shares = (q @ select).unflatten(-1, (-1, num_heads)) - lse[:, None]
            shares = shares.sigmoid_().unsqueeze(-1)  # [rows, T, H, 1]
            for task in range(out.shape[0]):
                attended = torch.lerp(common, added[task], shares[:, task]).flatten(1)
                update = product(attended, *output, keep=True)
                torch.addcmul(tiles, scale, update.add_(tiles), out=out[task, rows])
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attended values `[rows, H, E / H]` (0 without keys) and log-sum-exp `[rows, H]`."""
    if k.shape[2] == 0:
        out = torch.zeros_like(q[0]).transpose(0, 1)
        return out, out.new_full(out.shape[:2], -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out[0].transpose(0, 1), lse[0].t().to(q.dtype)


class _Gradients:
    """Adds up the gradients of one call, block by block; no graph is recorded.

    With u the gradient of the output, n the normed rows, o the attended values

        dz = gamma u    do = dz Wo    dn = dq Wq    dx = u + dz + (LayerNorm backward of dn)

    and dq, dk, dv from ATen's fused attention backward.
    """

    def __init__(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], num_heads: int, eps: float
    ) -> None:
        exact = _accumulation_dtype(tensors[0])
        self.x, self.keys, self.values = tensors[:3]
        self.gamma, self.norm_weight, self.norm_bias = (t.to(exact) for t in tensors[3:6])
        self.query_weight, self.query_bias = (t.to(exact) for t in tensors[6:8])
        self.output_weight, self.output_bias = (t.to(exact) for t in tensors[8:])
        self.needs = needs
        self.num_heads = num_heads
        self.eps = eps
        self.exact = exact
        self.found = [torch.zeros_like(t, dtype=exact) for t in tensors[1:]]

    def rows(self, tiles: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return dx of a block and dk, dv `[1, H, G, d]`; add to the gradients of the weights."""
        aten = torch.ops.aten
        shape = [tiles.shape[-1]]
        normed, mean, rstd = aten.native_layer_norm(
            tiles, shape, self.norm_weight, self.norm_bias, self.eps
        )
        q = product(normed, self.query_weight, self.query_bias, keep=True)
        q = _by_head(q, self.num_heads)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        attended = _columns(out)  # [rows, E]
        gated = u * self.gamma
        pulled = product_back(gated, self.output_weight, keep=True)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _by_head(pulled, self.num_heads), q, k, v, out, lse, 0.0, False
        )
        dq = _columns(dq)  # [rows, E]
        x, _, _, gate, scale, shift, query, _, output, _ = self.needs
        dx = None
        if x or scale or shift:
            pulled = product_back(dq, self.query_weight, keep=True)
            dx, dw, db = aten.native_layer_norm_backward(
                pulled, tiles, shape, mean, rstd, self.norm_weight, self.norm_bias, [True] * 3
            )
            self.found[3] += dw
            self.found[4] += db
        if gate:
            update = product(attended, self.output_weight, self.output_bias, keep=True)
            self.found[2] += (u * update.add_(tiles)).sum(0)
        if query:
            self.found[5] += dq.t() @ normed
        if output:
            self.found[7] += gated.t() @ attended
        self.found[6] += dq.sum(0)
        self.found[8] += gated.sum(0)
        return gated if dx is None else dx.add_(u).add_(gated), dk, dv

    def case(self, case: int, rows: slice, shown: Tensor | None, grad: Tensor, dx: Tensor) -> None:
        """Write dx of a case's tiles and its rows of dk and dv."""
        chosen = slice(None) if shown is None else shown
        k, v = (t[case][chosen].to(self.exact) for t in (self.keys, self.values))
        if k.shape[0] == 0:
            dx[rows] = grad[rows]
            return
        k, v = _by_head(k, self.num_heads), _by_head(v, self.num_heads)
        for block in _blocks(rows.start, rows.stop):
            tiles, u = self.x[block].to(self.exact), grad[block].to(self.exact)
            dx[block], *found = self.rows(tiles, u, k, v)
            for total, part in zip(self.found[:2], found, strict=True):
                total[case, chosen] += _columns(part)


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
