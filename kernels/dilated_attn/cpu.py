"""Dilated attention on the CPU: every branch in place, blocks of scores that fit the cache.

    s_ij = scale log2(e) q_i . k_j       Z_i = sum_b (sum_{j in b(i)} 2^s_ij + pad_b(i))
    o_i = sum_b sum_{j in b(i)} 2^s_ij v_j / Z_i

b(i): keys of row i's segment in branch b; pad_b(i): zero keys that the published form appends.
The published merge by log-sum-exp is this same sum, so branches add up in one accumulator: no
padding, gather, scatter or output of a branch exists. No maximum is subtracted where norms bound
the scores; otherwise the accumulators follow the largest score of their row.

The backward pass computes the scores again, with the merge weights alpha as constants:

    P_ij = 2^s_ij / Z_i        alpha_ib = sum_{j in b(i)} P_ij + pad_b(i) / Z_i
    dS_ij = P_ij (do_i . v_j - delta_ib)   delta_ib = sum_{j in b(i)} P_ij (do_i . v_j) / alpha_ib
    dv_j = sum P_ij do_i    dq_i = scale sum dS_ij k_j    dk_j = scale sum dS_ij q_i

Without a shift both passes run in compiled loops (`_branch_loops`, `_branch_gradients`). The rest
is oneDNN's products, twice as fast as those inside ATen's fused attention on an AMD processor, and
exp2, which is four times as fast as exp there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modaltune.kernels.dilated_attn._pieces import Branches, Piece, blocks, chunks, tasks
from modaltune.kernels.dilated_attn._threads import run_tasks

# Largest |score|, to base 2, without a shift: sums and gradients then keep clear of float32's ends.
_SAFE_SCORE = 64.0
# Below every score, but finite: the difference of two of them is zero, not NaN.
_LOWEST = -1e30
_LOG2E = 1 / math.log(2)


def _find_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return oneDNN's a b^T for `[m, k]` and `[n, k]` in float32, where this torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return linear and (lambda a, b: linear.default(a, b, None, "none", [], ""))


PRODUCT = _find_product()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T `[n, M, N]` of `[n, M, K]` and `[n, N, K]`."""
    if PRODUCT is not None and a.dtype == torch.float32 and a.shape[0] == 1:
        return PRODUCT(a[0], b[0]).unsqueeze(0)
    return torch.bmm(a, b.transpose(1, 2))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and log-sum-exps: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _safe_heads(q: Tensor, k: Tensor, offsets: Tensor, scale_log2: float) -> dict[int, list[bool]]:
    """Whether no score of `[N, H, d]` queries and keys, to base 2, can exceed _SAFE_SCORE.

    Returns:
        For every head, by the first row of a sequence.
    """
    exact = accumulation_dtype(q.dtype)
    norms = [torch.linalg.vector_norm(t, dim=-1, dtype=exact) for t in (q, k)]  # [N, H]
    found = {}
    for start, end in pairwise(offsets.tolist()):
        if start < end:
            longest = [t[start:end].amax(0) for t in norms]  # [H]
            is_safe = longest[0] * longest[1] * abs(scale_log2) <= _SAFE_SCORE
            found[start] = is_safe.tolist()
    return found


def _copied(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[s, h, places, d]` as `[s * h, places, d]`: a contiguous copy, free to be changed."""
    return torch.empty(t.shape, dtype=dtype).copy_(t).flatten(0, 1)


@dataclass
class _Sums:
    """Accumulators, as views `[s, h, places, .]`: weights times values, and weights.

    `top` is the largest score of each row so far, which both are relative to; None for 0.
    """

    acc: Tensor
    total: Tensor
    top: Tensor | None

    def add(self, rows: slice, acc: Tensor, total: Tensor, top: Tensor | None) -> None:
        """Add what some rows get, relative to its own `top`; the shapes need not be split."""
        our_acc, our_total = self.acc[:, :, rows], self.total[:, :, rows]
        acc, total = acc.view(our_acc.shape), total.view(our_total.shape)
        if self.top is not None and top is not None:
            before = self.top[:, :, rows]
            top = top.view(before.shape)
            after = torch.maximum(before, top)
            shrink, factor = torch.exp2(before - after), torch.exp2(top - after)
            our_acc.mul_(shrink)
            our_total.mul_(shrink)
            before.copy_(after)
            acc, total = acc * factor, total * factor
        our_acc.add_(acc)
        our_total.add_(total)


def _attend(pads: int, scale: float, q: Tensor, k: Tensor, v: Tensor, sums: _Sums) -> None:
    """Add attention to the accumulators; q, k, v are views `[s, h, places, d]`.

    `scale` is that of scores to base 2.
    """
    queries, keys, values = (_copied(t, sums.acc.dtype) for t in (q, k, v))  # [n, places, d]
    queries.mul_(scale)
    for rows in blocks(*keys.shape[:2]):
        weights = _product(queries[:, rows], keys)  # [n, rows, places]
        top = None
        if sums.top is not None:
            top = weights.amax(-1, keepdim=True)
            top = top.clamp_(min=0.0) if pads else top
            weights.sub_(top)
        weights.exp2_()
        total = weights.sum(-1, keepdim=True)
        if pads:
            total += pads if top is None else pads * torch.exp2(-top)
        sums.add(rows, _product(weights, values.transpose(1, 2)), total, top)


def _piece_rows(pieces: list[Piece]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return pieces as the compiled loops take them, `[n, 8]`."""
    rows = [
        (p.start, p.segments, p.length, p.ratio, p.group, p.heads.start, p.heads.stop, p.pads)
        for p in pieces
    ]
    return np.array(rows, np.int64)


def _attend_in_loops(
    pieces: list[Piece],
    scale: float,
    inputs: tuple[Tensor, Tensor, Tensor],
    acc: Tensor,
    total: Tensor,
) -> None:
    """Do what `_attend` does for pieces whose scores need no shift, `[L, h, d]`, in one call."""
    # Here: numba takes as long to import as all the rest, and only this path needs it.
    from modaltune.kernels.dilated_attn import _branch_loops

    if pieces:
        arrays = [t.to(acc.dtype).numpy() for t in (*inputs, acc, total.squeeze(-1))]
        _branch_loops.attend_pieces(*arrays, _piece_rows(pieces), np.float32(scale))


def _attend_alone(scale: float, q: Tensor, k: Tensor, v: Tensor, sums: _Sums) -> None:
    """Add rows whose softmax has one key; a score of 0 counts as no attention, as published."""
    exact = sums.acc.dtype
    score = (q.to(exact) * k.to(exact)).sum(-1, keepdim=True) * scale  # [s, h, 1, 1]
    weight, top = (score != 0.0).to(exact), None
    if sums.top is None:
        weight *= torch.exp2(score)
    else:
        top = torch.where(score == 0.0, _LOWEST, score)
    sums.add(slice(None), v.to(exact) * weight, weight, top)


def _visits(like: Tensor, pieces: list[Piece]) -> Tensor:
    """Return how many branches visit each row and head, as `[L, H, 1]`."""
    found = torch.zeros_like(like)
    for piece in pieces:
        piece.view(found).add_(1.0)
    return found


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: list[Piece],
    branches: int,
    scale: float,
    is_safe: bool,
) -> None:
    """Fill out `[L, h, d]` and lse `[L, h, 1]`, to base 2, of some heads of a sequence."""
    exact = lse.dtype
    acc = out.zero_() if out.dtype == exact else torch.zeros(out.shape, dtype=exact)
    total = torch.zeros_like(lse)
    top = None if is_safe else torch.full_like(lse, _LOWEST)
    looped: list[Piece] = []
    if is_safe and exact == torch.float32:
        looped = [p for p in pieces if not p.is_lone]
        _attend_in_loops(looped, scale, (q, k, v), acc, total)
    for piece in [p for p in pieces if p not in looped]:
        for chunk in chunks(piece):
            here = (chunk.view(q), chunk.view(k), chunk.view(v))
            our_top = None if top is None else chunk.view(top)
            sums = _Sums(chunk.view(acc), chunk.view(total), our_top)
            if piece.is_lone:
                _attend_alone(scale, *here, sums)
            else:
                _attend(piece.pads, scale, *here, sums)
    lse.copy_(total.log2())
    if top is not None:
        lse.add_(top)
    acc.div_(total)
    # A branch that visits every row with more than one key leaves none without attention.
    dense = [piece.is_lone for piece in pieces if piece.ratio == 1]
    is_bare = total == 0.0 if not dense or any(dense) else None
    if is_bare is not None and bool(is_bare.any()):
        # No branch has attention here: they weigh alike, those that skip the row included.
        share = _visits(lse, pieces) / branches
        acc.copy_(torch.where(is_bare, v * share, acc))
    if acc is not out:
        out.copy_(acc)


def dilated_attn_cpu_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    branches: Branches,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the merged output `[N, H, d]` and its log-sum-exp `[H, N]`, to base 2.

    A row without attention in any branch has a log-sum-exp of minus infinity.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))
    rows_lse = lse.t().unsqueeze(-1)  # [N, H, 1]
    count = len(branches[0])
    safe = _safe_heads(q, k, offsets, scale * _LOG2E)
    work = []
    for at, pieces in tasks(offsets, q.shape[1], branches):
        here = (q[at], k[at], v[at], out[at], rows_lse[at])
        is_safe = all(safe[at[0].start][at[1]])
        work.append(partial(_forward, *here, pieces, count, scale * _LOG2E, is_safe))
    run_tasks(work)
    return out, lse


@dataclass
class _Grads:
    """Gradients that are added up, as views `[s, h, places, d]`; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


def _transposed(t: Tensor) -> Tensor:
    """Return `[n, d, places]` as a contiguous `[n, places, d]`."""
    # torch copies a transposed matrix block by block, but a batch of them number by number.
    return t[0].t().contiguous().unsqueeze(0) if t.shape[0] == 1 else t.transpose(1, 2).contiguous()


def _pull_back(
    pads: int, scale: float, is_safe: bool, inputs: list[Tensor], lse: Tensor, grads: _Grads
) -> None:
    """Add to the gradients. `inputs`: views of q, k, v and the gradient of the output.

    Weights are 2^(s - c) and the gradient is multiplied by 2^(c - lse), c = 0 where scores are
    safe: the same products without a pass over the weights.
    """
    queries, keys, values, pulled, lse_rows = (_copied(t, lse.dtype) for t in (*inputs, lse))
    shift = torch.zeros_like(lse_rows) if is_safe else lse_rows  # [n, places, 1]
    queries.mul_(scale * _LOG2E)
    pulled.mul_(torch.exp2(shift - lse_rows))
    count, places, dim = keys.shape
    dk, dv = (torch.zeros(count, dim, places, dtype=lse.dtype) for _ in range(2))
    for rows in blocks(count, places):
        weights = _product(queries[:, rows], keys)  # [n, rows, places]
        weights = (weights if is_safe else weights.sub_(shift[:, rows])).exp2_()
        if grads.v is not None:
            dv += _product(pulled[:, rows].transpose(1, 2), weights.transpose(1, 2))
        if grads.q is None and grads.k is None:
            continue
        slopes = _product(pulled[:, rows], values).mul_(weights)  # [n, rows, places]
        alpha = weights.sum(-1, keepdim=True)
        if pads:
            alpha += pads * torch.exp2(-shift[:, rows])
        delta = slopes.sum(-1, keepdim=True) / alpha.masked_fill_(alpha == 0.0, 1.0)
        slopes.addcmul_(weights, delta, value=-1.0)
        if grads.q is not None:
            target = grads.q[:, :, rows]
            step = _product(slopes, keys.transpose(1, 2))
            target.add_(step.view(target.shape), alpha=scale)
        if grads.k is not None:
            dk += _product(queries[:, rows].transpose(1, 2), slopes.transpose(1, 2))
    if grads.k is not None:
        # The queries were multiplied by scale * log2(e).
        grads.k.add_(_transposed(dk).view(grads.k.shape), alpha=1 / _LOG2E)
    if grads.v is not None:
        grads.v.add_(_transposed(dv).view(grads.v.shape))


def _pull_back_in_loops(
    pieces: list[Piece],
    scale: float,
    inputs: list[Tensor],
    lse: Tensor,
    grads: list[Tensor | None],
) -> None:
    """Do what `_pull_back` does for pieces whose scores need no shift, in one call."""
    from modaltune.kernels.dilated_attn import _branch_gradients

    if pieces:
        arrays = [t.to(lse.dtype).numpy() for t in (*inputs, lse.squeeze(-1))]
        arrays += [
            (lse[:0].expand(0, *inputs[0].shape[1:]) if t is None else t).numpy() for t in grads
        ]
        _branch_gradients.pull_back_pieces(*arrays, _piece_rows(pieces), np.float32(scale * _LOG2E))


def _pull_back_alone(
    scale: float, bare_weight: float, inputs: list[Tensor], lse: Tensor, grads: _Grads
) -> None:
    """Add the gradient of v from rows whose softmax has one key; it has no slope for q and k.

    `bare_weight`: weight of a branch where no branch has attention.
    """
    if grads.v is None:
        return
    q, k, _, pulled = (t.to(lse.dtype) for t in inputs)
    score = (q * k).sum(-1, keepdim=True) * (scale * _LOG2E)
    weight_at_zero = (lse == -math.inf).to(lse.dtype) * bare_weight
    weight = torch.where(score == 0.0, weight_at_zero, torch.exp2(score - lse))
    grads.v.add_(pulled * weight)


def _backward(
    inputs: list[Tensor],
    lse: Tensor,
    grads: list[Tensor | None],
    pieces: list[Piece],
    branches: int,
    scale: float,
    is_safe: bool,
) -> None:
    """Fill the gradients of some heads of a sequence, which are zero."""
    looped: list[Piece] = []
    if is_safe and lse.dtype == torch.float32:
        looped = [p for p in pieces if not p.is_lone]
        _pull_back_in_loops(looped, scale, inputs, lse, grads)
    for piece in [p for p in pieces if p not in looped]:
        for chunk in chunks(piece):
            *given, lse_here = (chunk.view(t) for t in (*inputs, lse))
            wanted = _Grads(*(None if t is None else chunk.view(t) for t in grads))
            if piece.is_lone:
                _pull_back_alone(scale, 1 / branches, given, lse_here, wanted)
            else:
                _pull_back(piece.pads, scale, is_safe, given, lse_here, wanted)


def dilated_attn_cpu_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    offsets: Tensor,
    branches: Branches,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of those of q, k and v that `needs` names, `[N, H, d]`."""
    found = [torch.zeros(q.shape, dtype=lse.dtype) if need else None for need in needs]
    inputs, rows_lse = (q, k, v, grad_out), lse.t().unsqueeze(-1)
    safe = _safe_heads(q, k, offsets, scale * _LOG2E)
    work = []
    for at, pieces in tasks(offsets, q.shape[1], branches):
        grads = [None if t is None else t[at] for t in found]
        here = [t[at] for t in inputs]
        rest = (pieces, len(branches[0]), scale, all(safe[at[0].start][at[1]]))
        work.append(partial(_backward, here, rows_lse[at], grads, *rest))
    run_tasks(work)
    return [t.to(q.dtype) for t in found if t is not None]
