"""The ragged pathway networks, written out one by one: the oracle for every faster path."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.kernels._philox import philox_words
from modaltune.kernels.grouped_mlp._dropout import AlphaDropout


def dropped_units(
    seed: int, p: float, cases: int, pathways: int, width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return which units alpha dropout drops after the first and the second ELU, `[B, P, d]` each.

    The bits of a unit follow from the seed, its case, its pathway and its place alone.
    """
    unit = torch.arange(pathways * width, device=device).view(pathways, width)
    case = torch.arange(cases, device=device).view(cases, 1, 1)
    first, second, _, _ = philox_words(seed, unit, case)
    threshold = AlphaDropout.of(p).threshold
    return first < threshold, second < threshold


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
    seed: int,
) -> Tensor:
    """Return `[B, P, d]`: per pathway `ELU(W2 ELU(W1 genes + b1) + b2)` with alpha dropout.

    Source: self-normalising networks (Klambauer et al., 2017) per pathway, as in SurvPath and
    ModalTune.
    """
    cases, (pathways, width) = expression.shape[0], bias1.shape
    drop = AlphaDropout.of(dropout_p)
    dropped: tuple[Tensor, ...] = ()
    if dropout_p > 0:
        dropped = dropped_units(seed, dropout_p, cases, pathways, width, expression.device)
    outs = []
    for p, (start, end) in enumerate(pairwise(offsets.tolist())):
        hidden = expression[:, gene_index[start:end]]
        layers = ((weight1[start:end].t(), bias1[p]), (weight2[p], bias2[p]))
        for layer, (weight, bias) in enumerate(layers):
            hidden = F.elu(F.linear(hidden, weight, bias))
            if dropped:
                kept = hidden * drop.scale + drop.shift
                hidden = torch.where(dropped[layer][:, p], drop.dropped, kept)
        outs.append(hidden)
    return torch.stack(outs, dim=1)
