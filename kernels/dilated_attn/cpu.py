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


def parts_shape(
    rows: int, cases: int, heads: int, dim: int, ratios: tuple[int, ...]
) -> tuple[int, int, int]:
    """Return the shape of the branch outputs that the CPU path keeps, from sizes alone.

    A branch of dilation r visits at most `N // r + cases` rows of a head.
    """
    return sum(rows // r + cases for r in ratios), heads, dim


class _Parts:
    """Branch outputs and log-sum-exps, piece after piece in flat memory."""

    def __init__(self, out: Tensor, lse: Tensor, plan: list[_Piece]) -> None:
        self.out, self.lse, self.plan = out.flatten(), lse.flatten(), plan

    def __iter__(self) -> Iterator[tuple[_Piece, Tensor, Tensor]]:
        """Yield pieces with output `[s, h, m, d]` and log-sum-exp `[s, h, m]`, as views."""
        at, dim = 0, self.out.numel() // max(self.lse.numel(), 1)
        for piece in self.plan:
            heads = piece.heads.stop - piece.heads.start
            places = len(range(piece.group, piece.length, piece.ratio))
            size = piece.segments * heads * places
            lse = self.lse[at : at + size].view(piece.segments, heads, places)
            # The layout in which the fused attention returns its output.
            out = self.out[at * dim : (at + size) * dim].view(piece.segments, places, heads, dim)
            at += size
            yield piece, out.transpose(1, 2), lse


def dilated_attn_cpu_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    segment_lengths: tuple[int, ...],
    ratios: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the merged output `[N, H, d]`, its log-sum-exp `[H, N]`, and those of the branches.

    The latter two are for the backward pass alone; their shapes are those of `parts_shape`.
    """
    bounds = offsets.tolist()
    rows, heads, dim = q.shape
    plan = list(_pieces(bounds, heads, segment_lengths, ratios))
    total = q.new_full((*q.shape[:2], 1), -math.inf, dtype=lse_dtype(q))
    shape = parts_shape(rows, len(bounds) - 1, heads, dim, ratios)
    out_parts, lse_parts = q.new_empty(shape), q.new_empty(shape[:2], dtype=lse_dtype(q))
    parts = _Parts(out_parts, lse_parts, plan)
    for piece, kept_out, kept_lse in parts:
        out, lse = _attend(piece, q, k, v, scale)
        kept_out.copy_(out)
        kept_lse.copy_(lse)
        seen = piece.view(total)
        seen.copy_(torch.logaddexp(seen, _merge_lse(kept_lse)))
    merged = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for piece, out, lse in parts:
        weight = _merge_weight(_merge_lse(lse), piece.view(total), len(ratios))
        piece.view(merged).addcmul_(out, weight.to(out.dtype))
    return merged, total.squeeze(-1).t().contiguous(), out_parts, lse_parts


def dilated_attn_cpu_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    out_parts: Tensor,
    lse_parts: Tensor,
    offsets: Tensor,
    segment_lengths: tuple[int, ...],
    ratios: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v `[N, H, d]`; the merge weights are constants."""
    plan = list(_pieces(offsets.tolist(), q.shape[1], segment_lengths, ratios))
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    grad_out, total = grad_out.contiguous(), lse.t().unsqueeze(-1)
    for piece, out, piece_lse in _Parts(out_parts, lse_parts, plan):
        weight = _merge_weight(_merge_lse(piece_lse), piece.view(total), len(ratios))
        views = (piece.view(q), piece.view(k), piece.view(v))
        steps = _flash_backward(
            piece.view(grad_out) * weight.to(out.dtype),
            *views,
            out,
            piece_lse,
            0.0,
            False,
            scale=scale,
        )
        for target, step in zip((dq, dk, dv), steps, strict=True):
            piece.view(target).add_(step)
    return dq, dk, dv


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of log-sum-exps: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
