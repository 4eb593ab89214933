"""Which shipped configuration a GPU takes."""

from __future__ import annotations

import pytest

from modaltune.kernels._tuning import COMPUTE_CAPABILITIES, nearest
from modaltune.kernels.resources import LIMITS


@pytest.mark.parametrize(
    ("capability", "shipped"),
    [(80, 80), (87, 80), (90, 90), (100, 100), (103, 100), (120, 120), (121, 120)],
)
def test_the_largest_capability_not_above_the_device(capability: int, shipped: int) -> None:
    assert nearest(capability) == shipped


@pytest.mark.parametrize("capability", [86, 89])
def test_consumer_gpus_take_blocks_that_fit_their_shared_memory(capability: int) -> None:
    """An RTX 3090 or 4090 has 99 KiB a block, an A100 163."""
    assert LIMITS[nearest(capability)]["block_kib"] <= 99


def test_every_shipped_capability_is_its_own() -> None:
    assert [nearest(c) for c in COMPUTE_CAPABILITIES] == list(COMPUTE_CAPABILITIES)
