"""Every kernel is launched on the device of its tensors, whichever device is the current one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune import kernels
from modaltune.testing import INTERPRET, normal

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRET, reason="one GPU can't be the wrong one; looks at launches"),
]

ROWS = 40


def alibi(x: Tensor) -> Tensor:
    q, k, v = x.view(ROWS, 3, 2, 16).unbind(1)
    grid = torch.arange(2 * ROWS).view(ROWS, 2)
    slopes = torch.tensor([0.5, 0.25])
    return kernels.alibi_attention(q, k, v, grid, slopes, impl="triton")


def dilated(x: Tensor) -> Tensor:
    q, k, v = x.view(ROWS, 3, 2, 16).unbind(1)
    branches: dict[str, Any] = {"segment_lengths": (16, 64), "dilation_ratios": (1, 2)}
    return kernels.dilated_attention(q, k, v, **branches, impl="triton")


def extraction(x: Tensor) -> Tensor:
    return kernels.extract(
        x.flatten()[: 4 * 32].view(1, 4, 32),
        x,
        norm_weight=normal(1, 96).float(),
        norm_bias=normal(2, 96).float(),
        kv_weight=normal(3, 64, 96).float() / 96**0.5,
        kv_bias=normal(4, 64).float(),
        num_heads=2,
        impl="triton",
    )


def injection(x: Tensor) -> Tensor:
    keys, values = x.flatten()[: 2 * 4 * 32].view(2, 1, 4, 32)
    return kernels.inject(
        x,
        keys,
        values,
        normal(0, 96).float(),
        norm_weight=normal(1, 96).float(),
        norm_bias=normal(2, 96).float(),
        query_weight=normal(3, 32, 96).float() / 96**0.5,
        query_bias=normal(4, 32).float(),
        output_weight=normal(5, 96, 32).float() / 32**0.5,
        output_bias=normal(6, 96).float(),
        num_heads=2,
        impl="triton",
    )


def pooling(x: Tensor) -> Tensor:
    shapes = ((16, 96), (16,), (16, 96), (16,), (2, 16), (2,))
    weights = [normal(i, *shape).float() for i, shape in enumerate(shapes)]
    return kernels.gated_pool(x, *weights, impl="triton")[0]


def pathways(x: Tensor) -> Tensor:
    shapes = ((5, 16), (2, 16), (2, 16, 16), (2, 16))
    weights = [normal(i, *shape).float() for i, shape in enumerate(shapes)]
    genes, offsets = torch.arange(5), torch.tensor([0, 2, 5])
    return kernels.pathway_mlp(x, genes, *weights, offsets=offsets, impl="triton")


def positions(x: Tensor) -> Tensor:
    cells = torch.arange(2 * ROWS).view(ROWS, 2)
    return kernels.embed_positions(x, cells, normal(0, 96).float(), impl="triton")


def tiles(x: Tensor) -> Tensor:
    images = torch.arange(2 * 20 * 20 * 3, dtype=torch.uint8).view(2, 20, 20, 3)
    kinds: list[dict[str, Any]] = [{"crop_px": 16}, {"resize_px": 17}]
    settings: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "impl": "triton"}
    made = [kernels.normalize_tiles(images, **kind, **settings) for kind in kinds]
    return x.sum() + sum(one.sum() for one in made)


CALLS: list[Callable[[Tensor], Tensor]] = [
    alibi,
    dilated,
    extraction,
    injection,
    pooling,
    pathways,
    positions,
    tiles,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call.__name__))
def test_launches_are_on_the_device_of_the_tensors(
    call: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import GridExecutor

    devices: list[torch.device] = []
    launches: list[torch.device | None] = []
    run = GridExecutor.__call__

    class Current:
        def __init__(self, tensor: Tensor) -> None:
            self.device = tensor.device

        def __enter__(self) -> None:
            devices.append(self.device)

        def __exit__(self, *_: object) -> None:
            devices.pop()

    def launch(self: Any, *arguments: Any, **named: Any) -> None:
        launches.append(devices[-1] if devices else None)
        run(self, *arguments, **named)

    monkeypatch.setattr(torch.cuda, "device_of", Current)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    x = normal(7, ROWS, 96).float().requires_grad_()
    out = call(x)
    assert launches
    out.sum().backward()
    assert set(launches) == {x.device}
