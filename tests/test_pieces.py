"""Pieces of dilated attention on the CPU: large ones are worked on in several blocks."""

from __future__ import annotations

import pytest

from modaltune.kernels import dilated_attention
from modaltune.kernels.dilated_attn import _pieces
from modaltune.testing import check_against_reference, normal

# As in test_dilated_attn.py: a log-sum-exp of up to log2(200) + 1 < 9 is read back, rounded once.
BACKWARD_STEPS = 10


@pytest.mark.parametrize("safe", [True, False])
def test_large_pieces_in_several_blocks(safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One problem at a time through the fast product, its rows in blocks; both ways to scale."""
    monkeypatch.setattr(_pieces, "BLOCK_SCORES", 150 * 40)
    how = {"segment_lengths": (150, 300), "dilation_ratios": (1, 2)}
    shares = check_against_reference(
        dilated_attention,
        {name: normal(i, 340, 2, 8) for i, name in enumerate("qkv")},
        impl="cpu",
        gradient_steps=BACKWARD_STEPS,
        scale=None if safe else 5.0,
        **how,
    )
    assert set(shares) == {"out", "grad q", "grad k", "grad v"}
