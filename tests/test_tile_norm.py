"""Tile normalisation against torchvision, PIL and a literal loop."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from modaltune.kernels.tile_norm.api import normalize_tiles
from modaltune.kernels.tile_norm.cost import tile_norm_cost

STATS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STD = torch.tensor(STATS["std"], dtype=torch.float64).view(1, 3, 1, 1)
MODES = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


def _tiles(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    # Hard edges beside flat areas: bicubic overshoots there, so the clamp is exercised.
    blocks = rng.integers(0, 2, (n, h // 7 + 1, w // 7 + 1, 3), dtype=np.uint8) * 255
    tiles = blocks.repeat(7, axis=1).repeat(7, axis=2)[:, :h, :w]
    noise = rng.integers(0, 256, tiles.shape, dtype=np.uint8)
    return torch.from_numpy(np.where(rng.random((n, h, w, 1)) < 0.5, tiles, noise))


def _torchvision(tiles: Tensor, resize: int | None, crop: int | None, interpolation: str) -> Tensor:
    x = tiles.permute(0, 3, 1, 2).double()
    if resize is not None:
        h, w = tv.resize(x[:1], [resize]).shape[-2:]
        for size in ([x.shape[-2], w], [h, w]):
            x = tv.resize(x, size, interpolation=MODES[interpolation], antialias=True).clamp(0, 255)
    if crop is not None:
        x = tv.center_crop(x, [crop, crop])
    return tv.normalize(x / 255, list(STATS["mean"]), list(STATS["std"]))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [
        ((64, 64), None, None),
        ((64, 64), None, 56),
        ((65, 64), None, 33),
        ((64, 64), 56, None),
        ((40, 40), 64, 56),
        ((64, 50), 45, 32),
        ((50, 64), 45, 32),
        ((32, 32), 32, 32),
        ((1, 1), None, 1),
    ],
)
def test_equals_torchvision_in_float64(
    impl: str, interpolation: str, size: tuple[int, int], resize: int | None, crop: int | None
) -> None:
    tiles = _tiles(3, *size)
    got = normalize_tiles(
        tiles,
        **STATS,
        resize_px=resize,
        crop_px=crop,
        interpolation=interpolation,
        dtype=torch.float64,
        impl=impl,
    )
    want = _torchvision(tiles, resize, crop, interpolation)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize", "crop"), [(96, 84, 84), (96, 96, 84), (128, 112, 98)])
def test_within_a_grey_level_of_the_published_pil_pipeline(
    interpolation: str, size: int, resize: int, crop: int
) -> None:
    tiles = _tiles(2, size, size)
    pipeline = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=MODES[interpolation]),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(STATS["mean"], STATS["std"]),
        ]
    )
    want = torch.stack([pipeline(Image.fromarray(tile.numpy())) for tile in tiles])
    got = normalize_tiles(
        tiles, **STATS, resize_px=resize, crop_px=crop, interpolation=interpolation
    )
    levels = (got.double() - want.double()).abs() * STD * 255
    # PIL rounds to whole grey levels after each of its two passes; ours does not round.
    assert levels.max() <= (1e-4 if size == resize else 1.1)
    assert levels.mean() <= 0.4


@given(
    h=st.integers(1, 19),
    w=st.integers(1, 19),
    data=st.data(),
    impl=st.sampled_from(["cpu", "reference"]),
)
@settings(max_examples=40, deadline=None)
def test_crop_and_scale_equal_a_literal_loop(h: int, w: int, data: Any, impl: str) -> None:
    crop = data.draw(st.integers(1, min(h, w)))
    tiles = _tiles(2, h, w, seed=h * 31 + w)
    got = normalize_tiles(tiles, **STATS, crop_px=crop, dtype=torch.float64, impl=impl)
    cropped = tv.center_crop(tiles.permute(0, 3, 1, 2), [crop, crop])
    for n in range(2):
        for c in range(3):
            for i in range(crop):
                for j in range(crop):
                    value = int(cropped[n, c, i, j]) / 255
                    want = (value - STATS["mean"][c]) / STATS["std"][c]
                    assert abs(float(got[n, c, i, j]) - want) < 1e-12


@pytest.mark.parametrize("geometry", [{"crop_px": 56}, {"resize_px": 48}, {"resize_px": 80}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_paths_lose_no_more_than_the_reference(
    geometry: dict[str, int], dtype: torch.dtype
) -> None:
    tiles = _tiles(4, 64, 64)
    exact = normalize_tiles(tiles, **STATS, **geometry, dtype=torch.float64, impl="reference")
    plain = normalize_tiles(tiles, **STATS, **geometry, dtype=dtype, impl="reference").double()
    fast = normalize_tiles(tiles, **STATS, **geometry, dtype=dtype, impl="cpu").double()
    assert fast.isfinite().all()
    step = torch.finfo(dtype).eps * exact.abs().max()
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + step


def test_white_black_and_channel_order() -> None:
    tiles = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    tiles[..., 0] = 255
    got = normalize_tiles(tiles, mean=(0.0, 0.25, 0.5), std=(1.0, 0.5, 0.25))
    assert got[0, :, 0, 0].tolist() == [1.0, -0.5, -2.0]


def test_resize_overshoot_is_clamped() -> None:
    got = normalize_tiles(
        _tiles(2, 64, 64), mean=(0.0,) * 3, std=(1.0,) * 3, resize_px=90, dtype=torch.float64
    )
    # Without the clamp bicubic overshoots by several per cent at these edges.
    assert got.min() == 0
    assert got.max() == 1


@pytest.mark.parametrize("geometry", [{"crop_px": 5}, {"resize_px": 8, "crop_px": 5}])
def test_layout_input_untouched_and_repeatable(geometry: dict[str, int]) -> None:
    tiles = _tiles(3, 9, 9)
    before = tiles.clone()
    first = normalize_tiles(tiles, **STATS, **geometry)
    assert first.shape == (3, 3, 5, 5)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tiles, before)
    assert torch.equal(first, normalize_tiles(tiles, **STATS, **geometry))
    strided = torch.empty(3, 9, 9, 6, dtype=torch.uint8)[..., ::2].copy_(tiles)
    assert torch.equal(first, normalize_tiles(strided, **STATS, **geometry))


@pytest.mark.parametrize(
    ("geometry", "side"), [({"crop_px": 5}, 5), ({"resize_px": 12}, 12), ({}, 9)]
)
def test_no_tiles_keep_their_shape(geometry: dict[str, int], side: int) -> None:
    empty = torch.empty(0, 9, 9, 3, dtype=torch.uint8)
    got = normalize_tiles(empty, **STATS, **geometry, dtype=torch.float16)
    assert got.shape == (0, 3, side, side)
    assert got.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tiles": torch.zeros(1, 8, 8, 3)}, TypeError, "tiles must be uint8 RGB, got torch.float"),
        ({"tiles": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"tiles must have sh"),
        ({"tiles": torch.zeros(8, 8, 3, dtype=torch.uint8)}, ValueError, r"\[\*, \*, \*, 3\], got"),
        ({"tiles": torch.zeros(1, 0, 8, 3, dtype=torch.uint8)}, ValueError, "have pixels, got 0 x"),
        ({"tiles": torch.zeros(1, 8, 9, 3, dtype=torch.uint8)}, ValueError, "must be square where"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean must be three finite numbers"),
        ({"std": (0.5, float("nan"), 0.5)}, ValueError, "std must be three finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be > 0 in every channel"),
        ({"resize_px": 0}, ValueError, "resize_px must be a positive number of px, got 0"),
        ({"crop_px": -1}, ValueError, "crop_px must be a positive number of px, got -1"),
        ({"crop_px": 9}, ValueError, "crop_px must be at most the tile's 8 x 8 px after resize"),
        ({"interpolation": "nearest"}, ValueError, "interpolation must be one of bilinear, bicub"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating point type"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"patches": (3, 4)}, ValueError, "patches must be a height and a width in px that divid"),
        ({"patches": (4,)}, ValueError, r"divide the output's 8 px, got \(4,\); give another"),
        ({"patches": (0, 4)}, ValueError, "patches must be a height and a width"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"tiles": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), **STATS, **change}
    with pytest.raises(error, match=message):
        normalize_tiles(arguments.pop("tiles"), **arguments)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(4, 4), (2, 6), (12, 12), (1, 1)])
def test_patches_are_what_a_patch_embedding_sees(impl: str, size: tuple[int, int]) -> None:
    tiles = _tiles(2, 15, 14)
    images = normalize_tiles(tiles, **STATS, crop_px=12, dtype=torch.float64, impl=impl)
    got = normalize_tiles(tiles, **STATS, crop_px=12, patches=size, dtype=torch.float64, impl=impl)
    want = torch.nn.functional.unfold(images, size, stride=size).transpose(1, 2)
    assert got.is_contiguous()
    assert torch.equal(got, want)


def test_one_patch_is_the_planar_image() -> None:
    tiles = _tiles(2, 9, 9)
    planar = normalize_tiles(tiles, **STATS, patches=(9, 9)).view(2, 3, 9, 9)
    assert planar.is_contiguous()
    assert torch.equal(planar, normalize_tiles(tiles, **STATS))


OPERATOR_CASES: list[dict[str, Any]] = [
    {"crop_px": 5},
    {"crop_px": 6, "patches": (3, 2)},
    {"resize_px": 8, "crop_px": 6, "dtype": torch.bfloat16},
    {"crop_px": 1},
]


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_operator_passes_opcheck(case: dict[str, Any], n: int) -> None:
    torch.library.opcheck(
        torch.ops.modaltune.tile_norm_fwd.default,
        (
            _tiles(n, 9, 10) if n else torch.empty(0, 9, 10, 3, dtype=torch.uint8),
            *(list(STATS[name]) for name in ("mean", "std")),
            case.get("resize_px"),
            case.get("crop_px"),
            "bicubic",
            case.get("patches"),
            case.get("dtype", torch.float32),
            "cpu",
        ),
    )


@pytest.mark.parametrize("impl", ["cpu", "auto"])
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_compiles_in_one_graph_for_any_number_of_tiles(case: dict[str, Any], impl: str) -> None:
    def run(tiles: Tensor) -> Tensor:
        return normalize_tiles(tiles, **STATS, **case, impl=impl) * 2

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 5):
        tiles = _tiles(n, 9, 10, seed=n)
        got, want = compiled(tiles), run(tiles)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_compiles_with_inductor() -> None:
    def run(tiles: Tensor) -> Tensor:
        return normalize_tiles(tiles, **STATS, crop_px=7, impl="cpu").mean((2, 3))

    tiles = _tiles(2, 9, 10)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(tiles), run(tiles))


def test_autocast_leaves_the_dtype_to_the_caller_and_nothing_is_saved() -> None:
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        got = normalize_tiles(_tiles(2, 9, 9), **STATS, crop_px=5)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert not saved


@pytest.mark.parametrize(
    ("interpolation", "resize"), [("bicubic", 224), ("bilinear", 180), ("bicubic", 300)]
)
def test_cost_counts_every_byte_of_a_tile(interpolation: str, resize: int) -> None:
    got = tile_norm_cost(10, 256, 256, resize_px=resize, interpolation=interpolation)
    assert got.least_bytes == 10 * (256 * 256 * 3 + resize * resize * 3 * 2)
    assert got.moved_bytes == got.least_bytes


def test_cost_of_the_published_crop() -> None:
    got = tile_norm_cost(1, 256, 256, crop_px=224)
    # 224 rows of 672 bytes, which start 48 bytes into 768: 21 whole sectors and two halves.
    assert got.least_bytes == 224 * 672 * (1 + 2)
    assert got.moved_bytes == 224 * (704 + 672 * 2)
    assert got.flops == 2 * 224 * 672
    assert (
        tile_norm_cost(1, 256, 256, crop_px=224, dtype=torch.float32).least_bytes == 224 * 672 * 5
    )


def test_cost_counts_rereads_only_where_a_tile_outgrows_half_the_l2() -> None:
    small = tile_norm_cost(1, 256, 256, resize_px=224, l2_bytes=2 * 256 * 256 * 3)
    large = tile_norm_cost(1, 256, 256, resize_px=224, l2_bytes=2 * 256 * 256 * 3 - 2)
    assert small.moved_bytes == small.least_bytes
    # 14 blocks; from the first to the last of 16 output rows 15 · 8/7 px, and a filter of
    # 4 · 8/7 px around them: 21.7 px, which touch 23 rows at most.
    assert large.moved_bytes - small.moved_bytes == (14 * 23 - 256) * 256 * 3


def test_the_kernels_say_where_they_cannot_run() -> None:
    tiles = _tiles(1, 9, 9)
    with pytest.raises(RuntimeError, match="has no float64 form"):
        normalize_tiles(tiles, **STATS, dtype=torch.float64, impl="triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
            normalize_tiles(tiles, **STATS, impl="triton")
