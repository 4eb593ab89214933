"""Dilated attention on the CPU: every branch in place, blocks of scores that fit the cache.

    s_ij = scale log2(e) q_i . k_j       Z_i = sum_b (sum_{j in b(i)} 2^s_ij + pad_b(i))
    o_i = sum_b sum_{j in b(i)} 2^s_ij v_j / Z_i

b(i): keys of row i's segment in branch b; pad_b(i): zero keys that the published form appends to it.
The published merge by log-sum-exp is this same sum, so branches add up in one accumulator: no
padding, gather, scatter or output of a branch exists. No maximum is subtracted where norms bound
the scores; otherwise the accumulators follow the largest score of their row.

The backward pass computes the scores again, with the merge weights alpha as constants:

    P_ij = 2^s_ij / Z_i        alpha_ib = sum_{j in b(i)} P_ij + pad_b(i) / Z_i
    dS_ij = P_ij (do_i . v_j - delta_ib)   delta_ib = sum_{j in b(i)} P_ij (do_i . v_j) / alpha_ib
    dv_j = sum P_ij do_i    dq_i = scale sum dS_ij k_j    dk_j = scale sum dS_ij q_i

What makes it fast is oneDNN's products, twice as fast as those inside ATen's fused attention on an
AMD processor, and exp2, which is four times as fast as exp there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from modaltune.kernels.dilated_attn.reference import branch_shape

# Scores of a block: 4 MB in float32, so that what follows a product finds them in the caches.
BLOCK_SCORES = 2**20
# Attention of fewer scores goes through batched products: a call costs more than its arithmetic.
_SMALL_SCORES = 2**14
# Largest |score|, to base 2, without a shift: sums and gradients then keep clear of float32's ends.
_SAFE_SCORE = 64.0
# Below every score, but finite: the difference of two of them is zero, not NaN.
_LOWEST = -1e30
_LOG2E = 1 / math.log(2)

_Branches = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Piece:
    """Equal segments of one branch and head group: rows `start + group :: ratio`, some heads."""

    start: int  # first row of the first segment, in its sequence
    segments: int
    length: int  # rows of one segment that exist
    ratio: int
    group: int
    heads: slice
    pads: int  # zero keys that the published form appends to each segment

    @property
    def places(self) -> int:
        """Rows of a segment that take part."""
        return len(range(self.group, self.length, self.ratio))

    @property
    def is_lone(self) -> bool:
        """Whether the published softmax has a single key."""
        return self.places + self.pads == 1

    def view(self, t: Tensor) -> Tensor:
        """Return the rows of this piece of `[L, H, d]` as a view `[segments, heads, places, d]`."""
        rows = t[self.start : self.start + self.segments * self.length, self.heads]
        rows = rows.unflatten(0, (self.segments, self.length))
        return rows[:, self.group :: self.ratio].transpose(1, 2)


def _pieces(length: int, heads: int, branches: _Branches) -> Iterator[_Piece]:
    """Yield the pieces of a sequence; its last segment may be shorter than the others."""
    for segment, ratio in zip(*branches, strict=True):
        w, n, m = branch_shape(length, segment, ratio)
        runs = [(0, n - 1, w)] if n > 1 else []
        runs.append(((n - 1) * w, 1, length - (n - 1) * w))
        per_group = math.ceil(heads / ratio)
        for group in range(math.ceil(heads / per_group)):
            kept = slice(group * per_group, min((group + 1) * per_group, heads))
            for first, count, rows in runs:
                real = len(range(group, rows, ratio))
                if real:
                    yield _Piece(first, count, rows, ratio, group, kept, m - real)


class _Chunk:
    """Attention problems of a piece that are worked on together: its view's segments and heads."""

    def __init__(self, piece: _Piece, segments: slice, heads: slice) -> None:
        self.piece, self.at = piece, (segments, heads)

    def view(self, t: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return `[s, h, rows, d]` of `[L, H, d]`, as a view."""
        return self.piece.view(t)[(*self.at, rows)]

    def take(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `[problems, places, d]` of `[L, H, d]`: a contiguous copy, free to be changed."""
        rows = self.view(t)
        return torch.empty(rows.shape, dtype=dtype).copy_(rows).flatten(0, 1)


def _chunks(piece: _Piece) -> Iterator[_Chunk]:
    """Cut a piece: one problem at a time where it is large, many small ones at once."""
    count = piece.heads.stop - piece.heads.start
    if piece.places**2 > _SMALL_SCORES:
        for segment in range(piece.segments):
            for head in range(count):
                yield _Chunk(piece, slice(segment, segment + 1), slice(head, head + 1))
        return
    step = max(BLOCK_SCORES // (count * piece.places**2), 1)
    for first in range(0, piece.segments, step):
        yield _Chunk(piece, slice(first, first + step), slice(None))


def _blocks(problems: int, places: int) -> Iterator[slice]:
    """Cut the query rows of a chunk so that their scores are about BLOCK_SCORES."""
    step = max(BLOCK_SCORES // (problems * places), 16)
    for first in range(0, places, step):
        yield slice(first, min(first + step, places))


def _find_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return oneDNN's a b^T for `[m, k]` and `[n, k]` in float32, where this torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return linear and (lambda a, b: linear.default(a, b, None, "none", [], ""))


_PRODUCT = _find_product()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T `[n, M, N]` of `[n, M, K]` and `[n, N, K]`."""
    if _PRODUCT is not None and a.dtype == torch.float32 and a.shape[0] == 1:
        return _PRODUCT(a[0], b[0]).unsqueeze(0)
    return torch.bmm(a, b.transpose(1, 2))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and log-sum-exps: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_safe(q: Tensor, k: Tensor, scale_log2: float) -> bool:
    """Whether no score of `[L, H, d]` queries and keys, to base 2, can exceed _SAFE_SCORE."""
    exact = accumulation_dtype(q.dtype)
    longest = [torch.linalg.vector_norm(t, dim=-1, dtype=exact).amax(0) for t in (q, k)]  # [H]
    return float((longest[0] * longest[1]).amax()) * abs(scale_log2) <= _SAFE_SCORE


@dataclass
class _Sums:
    """Accumulators of a sequence: weights times values `[L, H, d]`, weights `[L, H, 1]`.

    `top` is the largest score of each row so far, which both are relative to; None for 0.
    """

    acc: Tensor
    total: Tensor
    top: Tensor | None

    def add(self, chunk: _Chunk, rows: slice, acc: Tensor, total: Tensor, top: Tensor) -> None:
        """Add a block's share `[s, h, rows, .]`, which is relative to its own `top`."""
        our_acc, our_total = chunk.view(self.acc, rows), chunk.view(self.total, rows)
        if self.top is not None:
            before = chunk.view(self.top, rows)
            after = torch.maximum(before, top)
            shrink, factor = torch.exp2(before - after), torch.exp2(top - after)
            our_acc.mul_(shrink)
            our_total.mul_(shrink)
            before.copy_(after)
            acc, total = acc * factor, total * factor
        our_acc.add_(acc)
        our_total.add_(total)


def _attend(chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor, scale: float, sums: _Sums) -> None:
    """Add the attention of a chunk to the accumulators; `scale` is that of scores to base 2."""
    exact, pads = sums.acc.dtype, chunk.piece.pads
    queries, keys, values = (chunk.take(t, exact) for t in (q, k, v))  # [n, places, d]
    queries.mul_(scale)
    at = chunk.view(sums.total).shape[:2]
    for rows in _blocks(*keys.shape[:2]):
        weights = _product(queries[:, rows], keys)  # [n, rows, places]
        top = weights.new_zeros(*weights.shape[:2], 1)
        if sums.top is not None:
            top = weights.amax(-1, keepdim=True)
            top = top.clamp_(min=0.0) if pads else top
            weights.sub_(top)
        weights.exp2_()
        total = weights.sum(-1, keepdim=True)
        if pads:
            total += pads * torch.exp2(-top)
        acc = _product(weights, values.transpose(1, 2))
        sums.add(chunk, rows, *(t.unflatten(0, at) for t in (acc, total, top)))


def _attend_alone(
    chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor, scale: float, sums: _Sums
) -> None:
    """Add rows whose softmax has one key; a score of 0 counts as no attention, as published."""
    exact = sums.acc.dtype
    queries, keys, values = (chunk.view(t).to(exact) for t in (q, k, v))
    top = (queries * keys).sum(-1, keepdim=True) * scale  # [s, h, 1, 1]
    weight = (top != 0.0).to(exact)
    if sums.top is None:
        weight *= torch.exp2(top)
    else:
        top = torch.where(top == 0.0, _LOWEST, top)
    sums.add(chunk, slice(None), values * weight, weight, top)


def _visits(like: Tensor, pieces: list[_Piece]) -> Tensor:
    """Return how many branches visit each row and head, as `[L, H, 1]`."""
    found = torch.zeros_like(like)
    for piece in pieces:
        piece.view(found).add_(1.0)
    return found


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, branches: _Branches, scale: float
) -> None:
    """Fill out `[L, H, d]` and lse `[L, H, 1]`, to base 2, of one sequence."""
    exact = lse.dtype
    pieces = list(_pieces(q.shape[0], q.shape[1], branches))
    acc = out.zero_() if out.dtype == exact else torch.zeros(out.shape, dtype=exact)
    is_safe = _is_safe(q, k, scale)
    sums = _Sums(acc, torch.zeros_like(lse), None if is_safe else torch.full_like(lse, _LOWEST))
    for piece in pieces:
        attend = _attend_alone if piece.is_lone else _attend
        for chunk in _chunks(piece):
            attend(chunk, q, k, v, scale, sums)
    lse.copy_(sums.total.log2())
    if sums.top is not None:
        lse.add_(sums.top)
    acc.div_(sums.total)
    is_bare = sums.total == 0.0
    if bool(is_bare.any()):
        # No branch has attention here: they weigh alike, those that skip the row included.
        share = _visits(lse, pieces) / len(branches[0])
        acc.copy_(torch.where(is_bare, v * share, acc))
    if acc is not out:
        out.copy_(acc)


def dilated_attn_cpu_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    branches: _Branches,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the merged output `[N, H, d]` and its log-sum-exp `[H, N]`, to base 2.

    A row without attention in any branch has a log-sum-exp of minus infinity.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))
    rows_lse = lse.t().unsqueeze(-1)  # [N, H, 1]
    for start, end in pairwise(offsets.tolist()):
        if start < end:
            one = (t[start:end] for t in (q, k, v, out, rows_lse))
            _forward(*one, branches, scale * _LOG2E)
    return out, lse


@dataclass
class _Grads:
    """Gradients of a sequence `[L, H, d]` each, added up piece by piece; None: not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


def _pull_back(
    chunk: _Chunk,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    scale: float,
    is_safe: bool,
    grads: _Grads,
) -> None:
    """Add a chunk's part of the gradients. `inputs`: q, k, v and the gradient of the output.

    Weights are 2^(s - c) and the gradient is multiplied by 2^(c - lse), c = 0 where scores are
    safe: the same products without a pass over the weights.
    """
    exact, pads = lse.dtype, chunk.piece.pads
    queries, keys, values, pulled = (chunk.take(t, exact) for t in inputs)  # [n, places, d]
    lse_rows = chunk.take(lse, exact)  # [n, places, 1]
    shift = torch.zeros_like(lse_rows) if is_safe else lse_rows
    queries.mul_(scale * _LOG2E)
    pulled.mul_(torch.exp2(shift - lse_rows))
    dk, dv = (torch.zeros_like(t).transpose(1, 2).contiguous() for t in (keys, values))
    at = chunk.view(lse).shape[:2]
    for rows in _blocks(*keys.shape[:2]):
        weights = _product(queries[:, rows], keys)  # [n, rows, places]
        if not is_safe:
            weights.sub_(shift[:, rows])
        weights.exp2_()
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
            step = _product(slopes, keys.transpose(1, 2)).mul_(scale)
            chunk.view(grads.q, rows).add_(step.unflatten(0, at))
        if grads.k is not None:
            dk += _product(queries[:, rows].transpose(1, 2), slopes.transpose(1, 2))
    if grads.k is not None:
        # The factor of the queries goes: they were multiplied by log2(e), too.
        chunk.view(grads.k).add_(dk.mul_(1 / _LOG2E).transpose(1, 2).unflatten(0, at))
    if grads.v is not None:
        chunk.view(grads.v).add_(dv.transpose(1, 2).unflatten(0, at))


def _pull_back_alone(
    chunk: _Chunk,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    scale: float,
    share: float,
    grads: _Grads,
) -> None:
    """Add the gradients of rows whose softmax has one key: of v alone, as it has no slope.

    `share`: weight of a branch where no branch has attention.
    """
    if grads.v is None:
        return
    queries, keys, _, pulled = (chunk.view(t).to(lse.dtype) for t in inputs)
    score, lse_rows = (queries * keys).sum(-1, keepdim=True), chunk.view(lse)
    weight = torch.exp2(score * (scale * _LOG2E) - lse_rows)
    weight = torch.where(score == 0.0, torch.where(lse_rows == -math.inf, share, 0.0), weight)
    chunk.view(grads.v).add_(pulled * weight)


def dilated_attn_cpu_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    offsets: Tensor,
    branches: _Branches,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of those of q, k and v that `needs` names, `[N, H, d]`."""
    found = [torch.zeros(q.shape, dtype=lse.dtype) if need else None for need in needs]
    rows_lse = lse.t().unsqueeze(-1)  # [N, H, 1]
    share = 1 / len(branches[0])
    for start, end in pairwise(offsets.tolist()):
        if start == end:
            continue
        one = slice(start, end)
        inputs = (q[one], k[one], v[one], grad_out[one])
        grads = _Grads(*(None if t is None else t[one] for t in found))
        is_safe = _is_safe(q[one], k[one], scale * _LOG2E)
        for piece in _pieces(end - start, q.shape[1], branches):
            for chunk in _chunks(piece):
                if piece.is_lone:
                    _pull_back_alone(chunk, inputs, rows_lse[one], scale, share, grads)
                else:
                    _pull_back(chunk, inputs, rows_lse[one], scale, is_safe, grads)
    return [t.to(q.dtype) for t in found if t is not None]
