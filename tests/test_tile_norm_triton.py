"""The Triton kernels of tile normalisation in the interpreter, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels.tile_norm.api import normalize_tiles
from modaltune.kernels.tile_norm.ops import empty_output, output_side, run_triton
from modaltune.testing import allowed_error, at_default

pytestmark = pytest.mark.triton

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# More than a whole program stores, so that a dropped mask fails here instead of crashing.
GUARD = 1 << 14
Geometry = dict[str, Any]

# A program takes 16 rows and 256 of a row's bytes: one pixel, odd, blocks less one pixel, whole
# and plus one (a row of 85 px is 255 bytes, of 86 px 258), other shapes before the crop than after.
CROPS: list[tuple[int, int, int, Geometry]] = [
    (1, 1, 1, {}),
    (3, 7, 5, {"crop_px": 5}),
    (2, 15, 15, {}),
    (2, 17, 40, {"crop_px": 16}),
    (1, 90, 85, {"crop_px": 85}),
    (1, 86, 86, {}),
    (2, 48, 48, {"crop_px": 32, "patches": (16, 16)}),
    (3, 30, 29, {"crop_px": 28, "patches": (14, 7)}),
    (2, 9, 9, {"patches": (9, 9)}),
    (1, 96, 96, {"crop_px": 90, "patches": (1, 90)}),
]
RESIZES: list[tuple[int, int, int, Geometry]] = [
    (2, 20, 20, {"resize_px": 17}),
    (1, 17, 23, {"resize_px": 15, "crop_px": 15}),
    (1, 23, 17, {"resize_px": 16, "crop_px": 13, "interpolation": "bilinear"}),
    (2, 9, 9, {"resize_px": 33, "crop_px": 28, "patches": (14, 14)}),
    (1, 96, 99, {"resize_px": 86, "crop_px": 86, "interpolation": "bilinear"}),
    (1, 60, 64, {"resize_px": 16, "crop_px": 16, "patches": (4, 8)}),
    (1, 1, 1, {"resize_px": 5}),
    (1, 2, 3, {"resize_px": 1, "crop_px": 1}),
    (1, 70, 66, {"resize_px": 8, "crop_px": 8}),
    (1, 1, 300, {"resize_px": 2, "crop_px": 2}),
]


def _tiles(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Noise beside black and white squares of 5 px, at whose edges bicubic overshoots."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        made = torch.randint(0, high, shape, generator=generator, dtype=torch.uint8, device="cpu")
        return at_default(made)

    squares = draw(2, n, height // 5 + 1, width // 5 + 1, 3).mul(255)
    squares = squares.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    return torch.where(draw(2, n, height, width, 1) == 0, squares, draw(256, n, height, width, 3))


def _run(tiles: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Run the kernels into the middle of a buffer of NaN and return the result, guards checked."""
    g = {"resize_px": None, "crop_px": None, "interpolation": "bicubic", "patches": None}
    g |= geometry
    side = output_side(tiles.shape[1], tiles.shape[2], g["resize_px"], g["crop_px"])
    plan = empty_output(tiles.shape[0], side, g["patches"], dtype, tiles.device)
    buffer = torch.full((plan.numel() + 2 * GUARD,), torch.nan, dtype=dtype)
    out = buffer.as_strided(plan.shape, plan.stride(), GUARD)
    run_triton(
        tiles, MEAN, STD, g["resize_px"], g["crop_px"], g["interpolation"], g["patches"], out
    )
    assert buffer[:GUARD].isnan().all()
    assert buffer[-GUARD:].isnan().all()
    return out


def _check(tiles: Tensor, geometry: Geometry, dtype: torch.dtype) -> None:
    def reference(dtype: torch.dtype) -> Tensor:
        return normalize_tiles(tiles, mean=MEAN, std=STD, dtype=dtype, impl="reference", **geometry)

    exact = reference(torch.float64)
    got = _run(tiles, geometry, dtype)
    assert got.shape == exact.shape
    error = float((got.double() - exact).abs().max())
    # A NaN compares as false, and so fails.
    assert error <= allowed_error(exact, reference(dtype), dtype), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CROPS, *RESIZES], ids=str)
def test_equals_the_float64_reference(
    case: tuple[int, int, int, Geometry], dtype: torch.dtype
) -> None:
    n, height, width, geometry = case
    _check(_tiles(n, height, width), geometry, dtype)


@pytest.mark.parametrize(
    ("resize", "patches"), [(None, None), (None, (16, 16)), (240, None)], ids=str
)
def test_published_shapes(resize: int | None, patches: tuple[int, int] | None) -> None:
    geometry = {"crop_px": 224, "resize_px": resize, "patches": patches}
    _check(_tiles(1, 256, 256), geometry, torch.float16)


@pytest.mark.parametrize("geometry", [{"crop_px": 24}, {"crop_px": 20, "resize_px": 26}])
def test_views_are_read_in_place_and_other_layouts_copied(geometry: Geometry) -> None:
    mosaic = _tiles(2, 70, 81, seed=1)
    view = mosaic[:, 5:45, 7:37]
    planar = view.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    want = _run(view.contiguous(), geometry, torch.float32)
    assert torch.equal(_run(view, geometry, torch.float32), want)
    assert torch.equal(_run(planar, geometry, torch.float32), want)
    assert torch.equal(_run(view.flip(0).flip(0), geometry, torch.float32), want)
    # Nothing outside the view matters.
    mosaic[:, :5], mosaic[:, 45:], mosaic[:, :, :7], mosaic[:, :, 37:] = 0, 255, 255, 0
    assert torch.equal(_run(view, geometry, torch.float32), want)


@pytest.mark.parametrize("geometry", [{"crop_px": 30}, {"crop_px": 7, "resize_px": 8}])
def test_same_bits_twice_and_for_each_tile_alone(geometry: Geometry) -> None:
    tiles = _tiles(2, 31, 35)
    first = _run(tiles, geometry, torch.float16)
    assert torch.equal(first, _run(tiles, geometry, torch.float16))
    alone = [_run(tiles[i : i + 1], geometry, torch.float16) for i in range(2)]
    assert torch.equal(first, torch.cat(alone))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_flat_tile_stays_flat(interpolation: str) -> None:
    tiles = torch.full((1, 31, 37, 3), 255, dtype=torch.uint8)
    got = _run(
        tiles, {"resize_px": 18, "crop_px": 18, "interpolation": interpolation}, torch.float16
    )
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(
        got.float(), white.view(1, 3, 1, 1).expand(1, 3, 18, 18), rtol=2**-11, atol=0
    )


@pytest.mark.parametrize("patches", [None, (4, 4)])
def test_public_function_runs_the_kernels(
    patches: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modaltune.kernels.tile_norm import ops

    calls = []
    monkeypatch.setattr(ops, "run_triton", lambda *a: calls.append(run_triton(*a)))
    tiles = _tiles(2, 12, 12)
    got = normalize_tiles(
        tiles, mean=MEAN, std=STD, crop_px=8, patches=patches, dtype=torch.float16, impl="triton"
    )
    assert len(calls) == 1
    want = _run(tiles, {"crop_px": 8, "patches": patches}, torch.float16)
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


def test_no_tiles() -> None:
    empty = torch.empty(0, 12, 12, 3, dtype=torch.uint8)
    got = normalize_tiles(empty, mean=MEAN, std=STD, resize_px=8, impl="triton")
    assert got.shape == (0, 3, 8, 8)
