"""The ragged pathway networks on the CPU: one segmented sum and one batched product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pathway_mlp_cpu(
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    offsets: Tensor,
    dropout_p: float,
) -> Tensor:
    """Return `[B, P, d]`, equal to the reference to rounding (and in law, with dropout)."""
    owner = torch.repeat_interleave(torch.arange(bias1.shape[0]), offsets.diff())
    genes = expression[:, gene_index]
    first = [  # one case at a time bounds the memory at nnz x d
        torch.zeros_like(bias1).index_add(0, owner, row.unsqueeze(1) * weight1) for row in genes
    ]
    summed = torch.stack(first, dim=1) if first else bias1.new_zeros(len(bias1), 0, bias1.shape[1])
    hidden = F.elu(summed + bias1.unsqueeze(1))  # [P, B, d]
    hidden = F.alpha_dropout(hidden, dropout_p, training=dropout_p > 0)
    hidden = F.elu(torch.baddbmm(bias2.unsqueeze(1), hidden, weight2.transpose(1, 2)))
    hidden = F.alpha_dropout(hidden, dropout_p, training=dropout_p > 0)
    return hidden.transpose(0, 1)
