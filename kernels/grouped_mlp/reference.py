"""The ragged pathway networks, written out one by one: the oracle for every faster path."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def pathway_mlp_reference(
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
    """Return `[B, P, d]`: per pathway `ELU(W2 ELU(W1 genes + b1) + b2)` with alpha dropout.

    Source: self-normalising networks (Klambauer et al., 2017) per pathway, as in SurvPath and
    ModalTune.
    """
    outs = []
    bounds = offsets.tolist()
    for p, (start, end) in enumerate(pairwise(bounds)):
        genes = expression[:, gene_index[start:end]]
        hidden = F.elu(genes @ weight1[start:end] + bias1[p])
        hidden = F.alpha_dropout(hidden, dropout_p, training=dropout_p > 0)
        hidden = F.elu(F.linear(hidden, weight2[p], bias2[p]))
        outs.append(F.alpha_dropout(hidden, dropout_p, training=dropout_p > 0))
    return torch.stack(outs, dim=1)
