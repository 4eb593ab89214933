"""Dilated attention of LongNet, written out: the oracle for every faster path."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

NO_ATTENTION = -1e8  # log-sum-exp of a position that a branch does not visit, as published


def branch_shape(length: int, segment: int, ratio: int) -> tuple[int, int, int]:
    """Return (segment length w', number of segments n, kept positions per segment m)."""
    clipped = min(segment, length)
    return clipped, math.ceil(length / clipped), math.ceil(clipped / ratio)


def _branch(
    q: Tensor, k: Tensor, v: Tensor, segment: int, ratio: int, scale: float
) -> tuple[Tensor, Tensor]:
    """One branch over one sequence: `[T, H, d]` each -> out `[T, H, d]`, lse `[T, H]`."""
    length, heads, dim = q.shape
    w, n, m = branch_shape(length, segment, ratio)
    per_group = math.ceil(heads / ratio)

    def gather(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, ratio * per_group - heads, 0, n * w - length))
        t = F.pad(t.reshape(n, w, -1, dim), (0, 0, 0, 0, 0, m * ratio - w))
        t = t.reshape(n, m, ratio, ratio, per_group, dim)  # position residue, head group
        return t.diagonal(dim1=2, dim2=3).permute(0, 4, 2, 1, 3)  # [n, group, head, m, d]

    def scatter(t: Tensor, fill: float) -> Tensor:
        # [n, group, head, m, c] -> [T, H, c], everything off the diagonal is `fill`.
        c = t.shape[-1]
        full = t.new_full((n, m, ratio, ratio, per_group, c), fill)
        full.diagonal(dim1=2, dim2=3).copy_(t.permute(0, 3, 2, 4, 1))
        return full.reshape(n * m * ratio, ratio * per_group, c)[:length, :heads]

    scores = gather(q) @ gather(k).transpose(-1, -2) * scale  # zero padding takes part
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = torch.exp(scores - lse) @ gather(v)
    lse = lse.detach().to(torch.promote_types(lse.dtype, torch.float32))  # float16 ends at 65,504
    lse = torch.where(lse == 0.0, torch.full_like(lse, NO_ATTENTION), lse)
    return scatter(out, 0.0), scatter(lse, NO_ATTENTION).squeeze(-1)


def dilated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets: Tensor,
    segment_lengths: tuple[int, ...],
    dilation_ratios: tuple[int, ...],
    scale: float,
) -> Tensor:
    """Return `[N, H, d]`: branches merged by a softmax over their log-sum-exp, held constant.

    The merge weights carry no gradient (the published implementation computes them without), and
    segments that are no multiple of their dilation shift the outputs of later segments, as
    published. Memory is quadratic in the segment length: use it to check, not to run.

    Source: LongNet (Ding et al., 2023), eq. 5–9; the zero padding and the constant weights as in
    the published ModalTune.
    """
    outs = []
    bounds = offsets.tolist()
    for start, end in pairwise(bounds):
        if end == start:
            continue
        one = (q[start:end], k[start:end], v[start:end])
        branches = [
            _branch(*one, segment, ratio, scale)
            for segment, ratio in zip(segment_lengths, dilation_ratios, strict=True)
        ]
        weights = torch.softmax(torch.stack([lse for _, lse in branches]), dim=0).to(q.dtype)
        merged = sum(w.unsqueeze(-1) * out for w, (out, _) in zip(weights, branches, strict=True))
        outs.append(merged)
    return torch.cat(outs) if outs else torch.zeros_like(q)
