"""The ragged pathway networks, written out one by one: the oracle for every faster path."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.kernels._philox import philox_words

DROPPED = -1.7580993408473766  # - lambda alpha of SELU, what a dropped unit is set to


class AlphaDropout(NamedTuple):
    """Alpha dropout as one affine map: a kept h becomes `scale h + shift`, a dropped one `dropped`.

    Attributes:
        threshold: A unit is dropped where its 32 random bits, as a number, lie below this.
        scale: Restores variance 1.
        shift: Restores mean 0.
        dropped: `scale DROPPED + shift`.
    """

    threshold: int
    scale: float
    shift: float
    dropped: float

    @classmethod
    def of(cls, p: float) -> AlphaDropout:
        """Return the map for a probability p to drop, 0 to 1.

        Source: Klambauer et al., "Self-Normalizing Neural Networks" (NeurIPS 2017), section 3.
        """
        scale = ((1 - p) * (1 + p * DROPPED**2)) ** -0.5
        shift = -scale * p * DROPPED
        return cls(int(p * 2**32), scale, shift, scale * DROPPED + shift)


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
    dropped = dropped_units(seed, dropout_p, cases, pathways, width, expression.device)
    outs = []
    for p, (start, end) in enumerate(pairwise(offsets.tolist())):
        hidden = expression[:, gene_index[start:end]]
        layers = ((weight1[start:end].t(), bias1[p]), (weight2[p], bias2[p]))
        for (weight, bias), gone in zip(layers, dropped, strict=True):
            hidden = F.elu(F.linear(hidden, weight, bias))
            if dropout_p > 0:
                kept = hidden * drop.scale + drop.shift
                hidden = torch.where(gone[:, p], drop.dropped, kept)
        outs.append(hidden)
    return torch.stack(outs, dim=1)
