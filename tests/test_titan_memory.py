"""TITAN's memory grows in a straight line with tiles: its bias is never a matrix."""

from __future__ import annotations

import pytest
import torch

from modaltune.memory_probe import count_memory
from modaltune.model import set_impl
from modaltune.slide_encoders.titan import TitanConfig, TitanEncoder

SIZES = (2000, 3000, 4000)  # more than the rows that attention works on at once
DENSE_SIZES = (400, 800, 1200)
CONFIG = TitanConfig(
    in_features=16, width=64, depth=2, heads=4, pooler_heads=2, pooler_queries=2, cell_px=256
)


def peaks(impl: str, gradients: bool, sizes: tuple[int, ...]) -> list[int]:
    """Peak bytes of both blocks, forward and (if asked) backward, at three numbers of tiles."""
    torch.manual_seed(0)
    encoder = TitanEncoder(CONFIG).requires_grad_(False).eval()
    set_impl(encoder, impl)
    found = []
    for tiles in sizes:
        cell = torch.arange(tiles)
        positions = torch.stack([cell % 60, cell // 60], dim=1) * CONFIG.cell_px
        with torch.no_grad():
            tokens = encoder.embed(torch.randn(tiles, 16), positions, torch.tensor([0, tiles]))
        x = tokens.x.requires_grad_(gradients)

        def run(x: torch.Tensor = x, tokens: object = tokens) -> None:
            out = encoder.blocks(tokens.with_x(x), 0, 1).x  # type: ignore[attr-defined]
            if gradients:
                out.backward(torch.ones_like(out))

        with torch.set_grad_enabled(gradients):
            run()
            _, counted = count_memory(run, torch.device("cpu"))
        found.append(counted.peak)
    return found


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_peak_memory_is_linear_in_tiles(gradients: bool) -> None:
    small, middle, large = peaks("auto", gradients, SIZES)
    # A block of scores has a fixed size, so its share wavers; a matrix would add 7 : 5.
    assert 0 < large - middle <= 1.1 * (middle - small)
    assert large < 4 * SIZES[2] ** 2 * 4 / 2, "half a dense bias of 4 heads in float32"


def test_the_measurement_sees_a_dense_bias() -> None:
    small, middle, large = peaks("reference", False, DENSE_SIZES)
    assert large - middle == pytest.approx((middle - small) * 5 / 3, rel=0.1)  # 12² - 8² : 8² - 4²
