"""Dilated attention on the CPU: fused attention per branch on strided views, merged in place.

Keys of zero padding are added analytically: `n_pad` of them add `n_pad * exp(0)` to a softmax's
denominator and nothing else, so neither padding nor gather nor scatter is ever materialised.
Backward feeds the corrected output and log-sum-exp to the fused backward, which then yields the
exact gradient; the merge weights are constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels.dilated_attn.reference import NO_ATTENTION, branch_shape

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Piece:
    """Equal segments of one branch and head group: rows `start + g :: ratio`, heads `heads`."""

    start: int  # first row of the first segment, in the packed tensor
    segments: int
    length: int  # rows of one segment that exist
    ratio: int
    group: int
    heads: slice
    pad_keys: int  # zero keys that the published form appends

    def view(self, t: Tensor) -> Tensor:
        """Return the rows of this piece as a view `[segments, heads, m, d]` of `[N, H, d]`."""
        rows = t[self.start : self.start + self.segments * self.length, self.heads]
        rows = rows.unflatten(0, (self.segments, self.length))
        return rows[:, self.group :: self.ratio].transpose(1, 2)


def _pieces(
    bounds: list[int], heads: int, segment_lengths: tuple[int, ...], ratios: tuple[int, ...]
) -> Iterator[_Piece]:
    for start, end in pairwise(bounds):
        length = end - start
        if length == 0:
            continue
        for segment, ratio in zip(segment_lengths, ratios, strict=True):
            w, n, m = branch_shape(length, segment, ratio)
            tail = length - (n - 1) * w
            runs = [(start, n - 1, w)] if n > 1 else []
            runs.append((start + (n - 1) * w, 1, tail))
            per_group = math.ceil(heads / ratio)
            for group in range(math.ceil(heads / per_group)):
                kept = slice(group * per_group, min((group + 1) * per_group, heads))
                for first, count, rows in runs:
                    real = len(range(group, rows, ratio))
                    if real:
                        yield _Piece(first, count, rows, ratio, group, kept, m - real)


def _attend(piece: _Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output `[s, h, m, d]` and log-sum-exp `[s, h, m]` of one piece, pads counted."""
    out, lse = _flash(piece.view(q), piece.view(k), piece.view(v), scale=scale)
    if piece.pad_keys:
        full = torch.logaddexp(lse, torch.full_like(lse, math.log(piece.pad_keys)))
        out = out * torch.exp(lse - full).to(out.dtype).unsqueeze(-1)
        lse = full
    return out, lse


def _merge_lse(lse: Tensor) -> Tensor:
    """Return the log-sum-exp `[s, h, m, 1]` that takes part in the merge, as published."""
    return torch.where(lse == 0.0, torch.full_like(lse, NO_ATTENTION), lse).unsqueeze(-1)


def _merge_weight(merge: Tensor, total: Tensor, branches: int) -> Tensor:
    """Return the constant weight `[s, h, m, 1]` of a piece among all branches.

    A row without attention in any branch (one key of score 0) has the same log-sum-exp in all of
    them, also in those that skip it: the published softmax weighs them alike.
    """
    weight = torch.exp(merge - total)
    return torch.where(total <= NO_ATTENTION / 2, torch.full_like(weight, 1 / branches), weight)


class _DilatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: list[_Piece],
        scale: float,
        branches: int,
    ) -> Any:
        total = q.new_full((*q.shape[:2], 1), -math.inf, dtype=_lse_dtype(q))
        parts = []
        for piece in plan:
            out, lse = _attend(piece, q, k, v, scale)
            merge = _merge_lse(lse)
            seen = piece.view(total)
            seen.copy_(torch.logaddexp(seen, merge.to(seen.dtype)))
            parts.append((out, lse, merge))
        merged = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for piece, (out, _, merge) in zip(plan, parts, strict=True):
            weight = _merge_weight(merge, piece.view(total), branches).to(out.dtype)
            piece.view(merged).addcmul_(out, weight)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(q, k, v, total, *(t for out, lse, _ in parts for t in (out, lse)))
            ctx.plan, ctx.scale, ctx.branches = plan, scale, branches
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, total, *parts = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        grad_out = grads[0].contiguous()
        for i, piece in enumerate(ctx.plan):
            out, lse = parts[2 * i], parts[2 * i + 1]
            weight = _merge_weight(_merge_lse(lse), piece.view(total), ctx.branches).to(out.dtype)
            views = (piece.view(q), piece.view(k), piece.view(v))
            steps = _flash_backward(
                piece.view(grad_out) * weight, *views, out, lse, 0.0, False, scale=ctx.scale
            )
            for target, step in zip((dq, dk, dv), steps, strict=True):
                piece.view(target).add_(step)
        return dq, dk, dv, None, None, None


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def dilated_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets: Tensor,
    segment_lengths: tuple[int, ...],
    dilation_ratios: tuple[int, ...],
    scale: float,
) -> Tensor:
    """Return the merged output `[N, H, d]`; extra memory is about twice that of `q`."""
    plan = list(_pieces(offsets.tolist(), q.shape[1], segment_lengths, dilation_ratios))
    return _DilatedAttention.apply(q, k, v, plan, scale, len(dilation_ratios))
