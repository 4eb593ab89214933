"""Counter-based random bits in plain PyTorch: what the kernels draw, on any device, by position.

Philox 4x32 with ten rounds turns a counter and a key into random words, so a mask needs no state:
backward draws again what forward drew, and a reference can draw what a kernel drew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels import _checks  # noqa: F401  (the import guard)

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _high_low(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits of a product of two 32-bit words, as int64."""
    # The product of two 32-bit words wraps int64; its bits are right, and >> brings in sign bits.
    product = word * factor
    return (product >> 32) & _MASK, product & _MASK


def philox_words(seed: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words of random bits for each counter (low, high, 0, 0).

    Args:
        seed: Key, 0 to 2^64 - 1.
        low: int64, lowest 32 bits of the counter.
        high: int64, next 32 bits; broadcasts against `low`.

    Returns:
        Four int64 tensors with values 0 to 2^32 - 1.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the same words
    as `triton.language.philox`.
    """
    c0, c1 = torch.broadcast_tensors(low, high)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        high_b, low_b = _high_low(MULTIPLIERS[1], c2)
        high_a, low_a = _high_low(MULTIPLIERS[0], c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3
