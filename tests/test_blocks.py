"""Blocks of rows that the kernels of dilated attention take, and the branches that visit them."""

from __future__ import annotations

import pytest

from modaltune.kernels.dilated_attn._blocks import block_layout, residue_classes, visits

SEGMENTS, RATIOS = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("block", [16, 128])
def test_every_row_is_in_one_block_of_rows(heads: int, block: int) -> None:
    """Residues of all classes are each residue once; rows of a block fit the shortest segment."""
    modulus, rows = block_layout(heads, SEGMENTS, RATIOS, block)
    assert modulus == 16
    assert modulus * rows <= max(SEGMENTS[0], block)
    classes = residue_classes(heads, SEGMENTS, RATIOS, modulus, block // rows)
    for of_head in classes:
        assert sorted(r for c in of_head for r in c if r >= 0) == list(range(modulus))
        assert all(len(c) == block // rows for c in of_head)


def test_branches_per_row_of_the_published_heads() -> None:
    """KERNELS: 1.94 branches are active per row and head, on average."""
    seen = [sum(visits(h, 16, c, RATIOS)) for h in range(16) for c in range(16)]
    assert sum(seen) / len(seen) == 1.9375
