"""Gated attention pooling, written out: the oracle for every faster path.

h_l = tanh(V x_l + bV) * sigmoid(U x_l + bU)      a_lc = s_c . h_l + bs_c
w_lc = softmax of a_lc over the tiles l of a case  pooled_bc = sum_l w_lc x_l
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_pool_reference(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return `[B, C, D]` pooled tiles and `[N, C]` scores; arguments as in `gated_pool`, checked.

    Products run in the dtype of the inputs; the softmax and the returned scores in float32, or in
    float64 for float64 inputs.

    Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning" (ICML 2018),
    equations 7 and 9.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = torch.tanh(F.linear(x, value_weight, value_bias))  # [N, K]
    hidden = hidden * torch.sigmoid(F.linear(x, gate_weight, gate_bias))
    scores = F.linear(hidden, score_weight, score_bias).to(exact)  # [N, C]
    pooled = []
    for start, stop in pairwise(offsets.tolist()):
        # A case without tiles is a product over nothing: zeros.
        weights = torch.softmax(scores[start:stop], dim=0).to(x.dtype)  # [L, C]
        pooled.append(weights.t() @ x[start:stop])
    if not pooled:
        return x.new_zeros(0, score_weight.shape[0], x.shape[1]), scores
    return torch.stack(pooled), scores
