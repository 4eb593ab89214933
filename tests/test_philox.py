"""Counter-based random words: the published known answer and the definition."""

from __future__ import annotations

import pytest
import torch

from modaltune.kernels._philox import philox_words

# The known answer that Random123 ships for Philox 4x32-10 with counter and key zero.
ZERO = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def literal(seed: int, low: int, high: int) -> tuple[int, ...]:
    """Ten rounds in Python's unbounded integers, from the paper."""
    mask = 2**32 - 1
    c, k = [low, high, 0, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return tuple(c)


def test_known_answer() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert tuple(int(word) for word in philox_words(0, zero, zero)) == ZERO
    assert literal(0, 0, 0) == ZERO


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**32 + 5, 2**64 - 1])
def test_equals_the_definition(seed: int) -> None:
    low = torch.tensor([0, 1, 77, 2**31, 2**32 - 1]).view(-1, 1)
    high = torch.tensor([0, 3, 2**32 - 1])
    words = torch.stack(philox_words(seed, low, high), dim=-1)
    for i, first in enumerate(low.flatten().tolist()):
        for j, second in enumerate(high.tolist()):
            assert tuple(words[i, j].tolist()) == literal(seed, first, second)
