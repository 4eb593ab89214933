"""TITAN against a literal reading of METHOD, section 5: dense, one case, cell by cell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from modaltune.errors import InputError
from modaltune.kernels import frozen_linear
from modaltune.model import set_impl
from modaltune.slide_encoders import frozen_layers
from modaltune.slide_encoders.titan import TitanConfig, TitanEncoder, alibi_slopes

# METHOD 5.3, written out; four heads by the ALiBi paper: 2^(-8/4 i).
SLOPES = {
    12: [2.0**-e for e in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
}
TINY = {
    "width": 48,
    "depth": 3,
    "in_features": 20,
    "mlp_ratio": 2.0,
    "pooler_heads": 6,
    "pooler_queries": 5,
}


def oracle_grid(
    features: Tensor, coords: list[tuple[float, float]], cell_px: int
) -> tuple[list[tuple[int, int]], Tensor]:
    """METHOD 5.1: cells in raster order (col0-major), features added, empty cells left out."""
    low0, low1 = min(c[0] for c in coords), min(c[1] for c in coords)
    places = [(int((a - low0) // cell_px), int((b - low1) // cell_px)) for a, b in coords]
    height, width = max(p[0] for p in places) + 1, max(p[1] for p in places) + 1
    board = [torch.zeros(features.shape[1], dtype=features.dtype) for _ in range(height * width)]
    for place, feature in zip(places, features, strict=True):
        cell = place[0] * width + place[1]
        board[cell] = board[cell] + feature
    kept = [c for c in range(height * width) if bool((board[c] != 0).any())]
    return [(c // width, c % width) for c in kept], torch.stack([board[c] for c in kept])


def oracle_bias(cells: list[tuple[int, int]], heads: int) -> Tensor:
    """METHOD 5.3: minus slope times distance in cells; the cls row and column are 0."""
    n = len(cells)
    bias = torch.zeros(heads, n + 1, n + 1, dtype=torch.float64)
    for h in range(heads):
        for i, first in enumerate(cells):
            for j, second in enumerate(cells):
                bias[h, i + 1, j + 1] = -SLOPES[heads][h] * math.dist(first, second)
    return bias


def oracle_block(t: Tensor, w: dict[str, Tensor], at: str, bias: Tensor) -> Tensor:
    """METHOD 5.4 with qkv as three blocks of rows and consecutive heads."""
    rows, width = t.shape
    heads = bias.shape[0]
    dim = width // heads
    n = F.layer_norm(t, (width,), w[at + "norm1.weight"], w[at + "norm1.bias"], 1e-6)
    qkv = n @ w[at + "attn.qkv.weight"].T + w[at + "attn.qkv.bias"]
    joined = torch.empty(rows, 0, dtype=t.dtype)
    for h in range(heads):
        q, k, v = (qkv[:, p * width + h * dim : p * width + (h + 1) * dim] for p in range(3))
        weights = torch.softmax(q @ k.T / math.sqrt(dim) + bias[h], dim=1)
        joined = torch.cat([joined, weights @ v], dim=1)
    t = t + joined @ w[at + "attn.proj.weight"].T + w[at + "attn.proj.bias"]
    n = F.layer_norm(t, (width,), w[at + "norm2.weight"], w[at + "norm2.bias"], 1e-6)
    hidden = n @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return t + hidden @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"]


def oracle_pool(t: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """LN(1e-6), then METHOD 5.5: one query reads all tokens, cls included, without residual."""
    at, width = "attn_pool_contrastive.", t.shape[1]
    dim = width // heads
    t = F.layer_norm(t, (width,), w["norm.weight"], w["norm.bias"], 1e-6)
    keys = F.layer_norm(t, (width,), w[at + "ln_k.weight"], w[at + "ln_k.bias"], 1e-5)
    query = F.layer_norm(
        w[at + "query"], (width,), w[at + "ln_q.weight"], w[at + "ln_q.bias"], 1e-5
    )
    wq, wk, wv = w[at + "attn.in_proj_weight"].split(width)
    bq, bk, bv = w[at + "attn.in_proj_bias"].split(width)
    q, k, v = query @ wq.T + bq, keys @ wk.T + bk, keys @ wv.T + bv
    parts = []
    for h in range(heads):
        own = slice(h * dim, (h + 1) * dim)
        parts.append(torch.softmax(q[:, own] @ k[:, own].T / math.sqrt(dim), 1) @ v[:, own])
    out = torch.cat(parts, dim=1) @ w[at + "attn.out_proj.weight"].T + w[at + "attn.out_proj.bias"]
    return out[0]


def oracle(
    w: dict[str, Tensor],
    features: Tensor,
    coords: list[tuple[float, float]],
    config: TitanConfig,
    between: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[list[tuple[int, int]], list[Tensor], Tensor]:
    """Return cells, tokens after embedding and after each block, and the slide vector."""
    cells, board = oracle_grid(features, coords, config.cell_px)
    x = F.gelu(board @ w["patch_embed.0.weight"].T + w["patch_embed.0.bias"])
    stages = [torch.cat([w["cls_token"][0], x])]
    bias = oracle_bias(cells, config.heads)
    for i in range(config.depth):
        into = between(stages[-1]) if i == 1 else stages[-1]
        stages.append(oracle_block(into, w, f"blocks.modules_list.{i}.", bias))
    return cells, stages, oracle_pool(stages[-1], w, config.pooler_heads)


def make_encoder(**options: object) -> TitanEncoder:
    """A tiny float64 encoder in which every tensor is random, norms and biases included."""
    torch.manual_seed(3)
    encoder = TitanEncoder(TitanConfig(**{"heads": 12, "cell_px": 512, **TINY, **options})).double()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.normal_(std=0.3)
            if re.search(r"(norm\d?|ln_[qk])\.weight$", name):
                parameter.add_(1)
    return encoder.eval()


def make_case(seed: int, tiles: int, distinct: bool = True) -> tuple[Tensor, Tensor]:
    """Features with one all-zero tile and shuffled coordinates that start below zero."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tiles, 20, generator=generator, dtype=torch.float64)
    if tiles > 3:
        features[2] = 0
    places = torch.randperm(12 * 9, generator=generator)[:tiles]
    if not distinct:
        places[1::2] = places[: tiles // 2]
    cells = torch.stack([places // 9, places % 9], dim=1)
    return features, cells * 512 - torch.tensor([1300, 7777])


def pack(cases: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = [0, *(len(features) for features, _ in cases)]
    return (
        torch.cat([features for features, _ in cases]),
        torch.cat([coords for _, coords in cases]),
        torch.tensor(lengths).cumsum(0),
    )


def as_pairs(coords: Tensor) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in coords.tolist()]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("tiles", [1, 2, 17, 40])
def test_every_stage_matches_the_oracle(heads: int, tiles: int) -> None:
    encoder = make_encoder(heads=heads)
    features, coords = make_case(tiles, tiles)
    cells, stages, pooled = oracle(
        encoder.published_state_dict(), features, as_pairs(coords), encoder.config
    )
    tokens = encoder.embed(features, coords, torch.tensor([0, tiles]))
    assert tokens.grid is not None
    assert tokens.grid.tolist() == [[0, 0], *([a, b] for a, b in cells)]
    assert tokens.offsets.tolist() == [0, len(cells) + 1]
    close(tokens.x, stages[0])
    for block in range(encoder.depth):
        tokens = encoder.blocks(tokens, block, block)
        close(tokens.x, stages[block + 1])
    close(encoder.pool(tokens)[0], pooled)


def test_cells_are_summed_only_when_asked() -> None:
    features, coords = make_case(5, 21, distinct=False)
    encoder = make_encoder(on_collision="sum")
    weights = encoder.published_state_dict()
    cells, stages, pooled = oracle(weights, features, as_pairs(coords), encoder.config)
    assert len(cells) < 13
    tokens = encoder.embed(features, coords, torch.tensor([0, 21]))
    close(tokens.x, stages[0])
    close(encoder.pool(encoder.blocks(tokens, 0, 2))[0], pooled)
    message = r"at most one tile in a cell of 512 px, got 10 collisions in case 1;.*on_collision="
    with pytest.raises(InputError, match=message):
        make_encoder().embed(*pack([make_case(1, 4), (features, coords)]))


def test_tiles_that_cancel_are_background() -> None:
    encoder = make_encoder(on_collision="sum")
    features = torch.tensor([[1.0], [-1.0], [2.0]]).double() * torch.ones(20).double()
    coords = torch.tensor([[0, 0], [100, 511], [512, 0]])
    tokens = encoder.embed(features, coords, torch.tensor([0, 3]))
    assert tokens.grid is not None
    assert tokens.grid.tolist() == [[0, 0], [1, 0]]


def test_background_tiles_still_anchor_the_grid() -> None:
    encoder = make_encoder()
    features = torch.ones(3, 20).double()
    features[0] = 0  # the tile with the smallest coordinates
    coords = torch.tensor([[-512, -1024], [1024, 0], [0, 512]])
    tokens = encoder.embed(features, coords, torch.tensor([0, 3]))
    assert tokens.grid is not None
    assert tokens.grid.tolist() == [[0, 0], [1, 3], [3, 2]]


def test_order_of_tiles_and_origin_do_not_matter() -> None:
    encoder = make_encoder()
    features, coords = make_case(8, 30)
    order = torch.randperm(30)
    offsets = torch.tensor([0, 30])
    here = encoder.embed(features, coords, offsets)
    there = encoder.embed(features[order], coords[order] + torch.tensor([90_001, -4]), offsets)
    assert torch.equal(here.x, there.x)
    assert torch.equal(here.grid, there.grid)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_positions_of_any_dtype(dtype: torch.dtype) -> None:
    encoder = make_encoder()
    features, coords = make_case(8, 30)
    want = encoder.embed(features, coords, torch.tensor([0, 30]))
    got = encoder.embed(features, coords.to(dtype), torch.tensor([0, 30]))
    assert torch.equal(got.grid, want.grid)


@pytest.mark.parametrize("base_mpp", [0.2, 0.25, 0.2527, 0.2481, 0.5, 0.4991])
def test_scaled_positions_keep_their_cells(base_mpp: float) -> None:
    """Tiles of 512 px at 0.5 mpp, laid at whole level-0 px, then scaled as positions are."""
    step = round(512 * 0.5 / base_mpp)
    index = torch.cartesian_prod(torch.arange(100), torch.arange(3))
    scaled = (index * step).double() * base_mpp / 0.5
    encoder = make_encoder(cell_rounding="nearest")
    tokens = encoder.embed(torch.ones(300, 20).double(), scaled, torch.tensor([0, 300]))
    assert tokens.grid is not None
    assert torch.equal(tokens.grid[1:], index)


def test_floor_forgives_float_error_but_not_a_wrong_step() -> None:
    encoder = make_encoder()
    features = torch.ones(60, 20).double()
    index = torch.stack([torch.arange(60), torch.zeros(60).long()], dim=1)
    exact = (index * 800 + 777).double() * 0.32 / 0.5  # 512 px apart up to float error
    assert bool((exact[:, 0] - exact[0, 0] < 512 * index[:, 0]).any())
    tokens = encoder.embed(features, exact, torch.tensor([0, 60]))
    assert tokens.grid is not None
    assert torch.equal(tokens.grid[1:], index)
    with pytest.raises(InputError, match="cell_rounding='nearest'"):
        encoder.embed(features, index * 511.97, torch.tensor([0, 60]))


def test_batch_equals_one_at_a_time() -> None:
    encoder = make_encoder()
    cases = [make_case(seed, tiles) for seed, tiles in enumerate([1, 33, 2, 16, 50])]
    together = encoder.blocks(encoder.embed(*pack(cases)), 0, 2)
    assert together.num_cases == 5
    pooled = encoder.pool(together)
    assert pooled.shape == (5, 48)
    for case, (start, stop) in enumerate(pairwise(together.offsets.tolist())):
        alone = encoder.blocks(encoder.embed(*pack([cases[case]])), 0, 2)
        close(together.x[start:stop], alone.x)
        close(pooled[case], encoder.pool(alone)[0])


def test_ranges_of_blocks_add_up() -> None:
    encoder = make_encoder()
    tokens = encoder.embed(*pack([make_case(1, 9), make_case(2, 12)]))
    whole = encoder.blocks(tokens, 0, 2)
    parts = encoder.blocks(encoder.blocks(tokens, 0, 0), 1, 2)
    assert torch.equal(whole.x, parts.x)
    for first, last in ((0, 3), (-1, 1), (2, 1)):
        with pytest.raises(ValueError, match=r"blocks must lie in 0\.\.2"):
            encoder.blocks(tokens, first, last)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_match_the_oracle(impl: str) -> None:
    """With respect to tile features, to tokens between blocks and to every weight used."""
    encoder = make_encoder(on_collision="sum")
    for layer in encoder.layers:
        layer.attn.impl = impl
    features, coords = make_case(6, 19, distinct=False)
    features.requires_grad_()
    target = torch.randn(48, dtype=torch.float64)
    names = [n for n in encoder.published_state_dict() if not re.match(r"proj$|attn_pool\.", n)]

    shift = torch.zeros(1, 48, dtype=torch.float64, requires_grad=True)
    weights = {n: p.clone().requires_grad_() for n, p in encoder.published_state_dict().items()}
    out = oracle(weights, features, as_pairs(coords), encoder.config, lambda t: t + shift)[2]
    want = torch.autograd.grad(out @ target, [features, shift, *(weights[n] for n in names)])

    tokens = encoder.blocks(encoder.embed(features, coords, torch.tensor([0, 19])), 0, 0)
    tokens = encoder.blocks(tokens.with_x(tokens.x + shift), 1, 2)
    ours = dict(encoder.named_parameters())
    used = [ours[n.replace("blocks.modules_list", "layers")] for n in names]
    got = torch.autograd.grad(encoder.pool(tokens)[0] @ target, [features, shift, *used])
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).abs().max() <= 1e-10 * (1 + theirs.abs().max())


def test_every_frozen_map_runs_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(on_collision="sum").requires_grad_(False)
    set_impl(encoder, "reference")
    asked: list[str] = []

    def watched(*arguments: Any, impl: str, **named: Any) -> Tensor:
        asked.append(impl)
        return frozen_linear(*arguments, impl=impl, **named)

    monkeypatch.setattr(frozen_layers, "frozen_linear", watched)
    encoder.blocks(encoder.embed(*make_case(6, 19), torch.tensor([0, 19])), 0, 2)
    assert asked == ["reference"] * 4  # the embedding, and one behind the attention of each block


def test_slopes() -> None:
    for heads, want in SLOPES.items():
        assert alibi_slopes(heads) == pytest.approx(want, abs=0)
    assert alibi_slopes(8) == [2.0**-e for e in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    for heads in range(1, 40):
        slopes = alibi_slopes(heads)
        assert len(set(slopes)) == heads
        assert all(0 < s < 1 for s in slopes)


@pytest.mark.parametrize(
    ("tiles", "positions", "offsets", "message"),
    [
        ((4, 21), (4, 2), [0, 4], r"tiles must be \[N, 20\] features"),
        ((4, 20), (3, 2), [0, 4], r"positions_px must be \[4, 2\]"),
        ((4, 20), (4, 2), [0, 0, 4], "at least one tile per case"),
        ((4, 20), (4, 2), [0, 3], "number of tiles 4"),
    ],
)
def test_bad_shapes(
    tiles: tuple[int, int], positions: tuple[int, int], offsets: list[int], message: str
) -> None:
    encoder = make_encoder()
    with pytest.raises(InputError, match=message):
        encoder.embed(torch.ones(tiles).double(), torch.zeros(positions), torch.tensor(offsets))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e15])
def test_bad_positions_name_the_case(bad: float) -> None:
    features, coords, offsets = pack([make_case(1, 5), make_case(2, 6)])
    coords = coords.double()
    coords[7, 1] = bad
    with pytest.raises(InputError, match=r"finite and span fewer than .* in case 1"):
        make_encoder().embed(features, coords, offsets)


def test_case_of_zeros_is_an_error() -> None:
    features, coords, offsets = pack([make_case(1, 5), make_case(2, 6)])
    features[5:] = 0
    with pytest.raises(InputError, match="other than zero, got none in case 1"):
        make_encoder().embed(features, coords, offsets)


def test_config_is_checked() -> None:
    for wrong in ({"heads": 5}, {"pooler_heads": 7}, {"cell_px": 0}, {"colour": 1}, {"depth": 0}):
        with pytest.raises(ValidationError):
            TitanConfig(**wrong)
    with pytest.raises(ValidationError, match="heads must divide width 768, got 5"):
        TitanConfig(heads=5)


def test_drop_path_drops_whole_cases_in_training_only() -> None:
    encoder = make_encoder(drop_path_rate=0.5, depth=1)
    encoder.layers[0].drop_path_p = 0.5  # a lone block is the first, whose rate is 0
    tokens = encoder.embed(*pack([make_case(s, 6) for s in range(40)]))
    assert torch.equal(encoder.blocks(tokens, 0, 0).x, encoder.blocks(tokens, 0, 0).x)
    encoder.train()
    moved = (encoder.blocks(tokens, 0, 0).x - tokens.x).abs().sum(1) > 0
    cases = moved.split(tokens.offsets.diff().tolist())
    assert all(bool(m.all()) or not bool(m.any()) for m in cases)
    still = sum(not bool(m.any()) for m in cases)  # both branches dropped: 1 in 4
    assert 1 <= still <= 25


def test_bfloat16_weights_keep_exact_slopes() -> None:
    """Slopes are no weights: 2^-0.5 rounded to bfloat16 would move every distance by 0.1 %."""
    encoder = make_encoder().to(torch.bfloat16)
    seen = []
    encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    features, coords = make_case(1, 9)
    encoder.blocks(encoder.embed(features, coords, torch.tensor([0, 9])), 0, 0)
    assert seen[0].tolist() == SLOPES[12]
