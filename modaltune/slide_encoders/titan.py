"""TITAN behind the slide encoder protocol: a grid of CONCH v1.5 tile features under 2-D ALiBi.

Built from the facts about the model's form in this project's method notes (METHOD, section 5) and
**unverified against the gated weights** (MahmoodLab/TITAN, CC-BY-NC-ND 4.0): the tests compare it
with a literal reading of those facts, not with the published model. No weights are shipped.

Source: Ding et al., "A multimodal whole-slide foundation model for pathology" (2025); ALiBi after
Press, Smith, Lewis, "Train Short, Test Long" (ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modaltune.errors import InputError
from modaltune.kernels import alibi_attention
from modaltune.kernels.ranges import stage_range
from modaltune.slide_encoders.frozen_layers import feed_forward, linear, qkv_heads
from modaltune.slide_encoders.protocol import SlideEncoder, SlideTokens
from modaltune.slide_encoders.titan_weights import check_state, read_vision_encoder
from modaltune.stochastic import drop_path

# The protocol's method `blocks` takes the name under which the published model keeps its blocks.
_PUBLISHED_BLOCKS, _OUR_BLOCKS = "blocks.modules_list.", "layers."

_TRUNK_EPS, _POOLER_EPS = 1e-6, 1e-5

# Positions scaled to another mpp carry float error; whole pixels are 1 / cell_px cells apart.
_SLACK_CELLS = 1e-6

# Far above any slide (a cell is about 0.25 mm), and small enough for a cell number in int64.
_MAX_CELLS_PER_AXIS = 2**31


class TitanConfig(BaseModel):
    """Form of a TITAN slide encoder; the defaults are the published model's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["titan"] = Field("titan", description="kind of slide encoder")
    in_features: int = Field(default=768, gt=0, description="tile feature width (CONCH v1.5)")
    width: int = Field(default=768, gt=0, description="token width D; a multiple of both heads")
    depth: int = Field(default=6, gt=0, description="number of blocks")
    heads: int = Field(default=12, gt=0, description="attention heads")
    mlp_ratio: float = Field(default=4.0, gt=0, description="MLP width over D")
    pooler_heads: int = Field(default=8, gt=0, description="attention heads of the poolers")
    pooler_queries: int = Field(
        default=128, gt=0, description="of the captioning pooler, kept for lossless loading only"
    )
    cell_px: int = Field(
        default=1024,
        gt=0,
        description="side of a grid cell, which is the side of a tile, px of the tile positions: "
        "for 512 px tiles at 0.5 mpp, 512 where positions are at 0.5 mpp (scaled); at level 0, "
        "1024 for a 0.25 mpp slide and 512 for a 0.5 mpp slide (reference)",
    )
    cell_rounding: Literal["floor", "nearest"] = Field(
        default="floor",
        description="floor as published; nearest keeps tiles apart whose step is not exactly "
        "cell_px (a 0.2527 mpp slide scaled to 0.5); both agree on whole multiples of cell_px",
    )
    on_collision: Literal["error", "sum"] = Field(
        default="error", description="two tiles in one cell; sum of their features as published"
    )
    drop_path_rate: float = Field(
        default=0.0, ge=0, lt=1, description="at the last block, in training; published trunk: 0"
    )

    @model_validator(mode="after")
    def _check_heads(self) -> TitanConfig:
        for name in ("heads", "pooler_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"{name} must divide width {self.width}, got {getattr(self, name)}"
                )
        return self


def alibi_slopes(heads: int) -> list[float]:
    """Return the bias per cell of distance of each head, `heads` values in (0, 1).

    A power of two n gives 2^(-8 i / n), i = 1..n. Another number takes those of the next lower
    power of two, then every other one of the next higher, from the first.
    """
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / lower) for i in range(lower)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / lower) for i in range(heads - lower)]
    return slopes


def _cells_of(positions_px: Tensor, config: TitanConfig, case: int) -> Tensor:
    """Return the cells `[n, 2]` int64 of one case's tiles, from 0 on both axes."""
    steps = (positions_px.double() - positions_px.double().amin(0)) / config.cell_px
    if not bool((steps < _MAX_CELLS_PER_AXIS).all()):  # catches nan as well
        raise InputError(
            f"positions_px must be finite and span fewer than {_MAX_CELLS_PER_AXIS} cells of "
            f"{config.cell_px} px, got up to {positions_px.max().item():.3g} in case {case}; "
            "check the unit of the coordinates, or extract the slide's features again"
        )
    return (steps + (0.5 if config.cell_rounding == "nearest" else _SLACK_CELLS)).floor().long()


def grid_features(
    tiles: Tensor, positions_px: Tensor, config: TitanConfig, case: int = 0
) -> tuple[Tensor, Tensor]:
    """Lay one case's tiles on the encoder's grid and keep the cells that hold something.

    Args:
        tiles: `[n, in_features]` tile features, n >= 1.
        positions_px: `[n, 2]` `(x, y)` of each tile's corner, in the unit of `config.cell_px`.
        config: Cell size, rounding and what a collision means.
        case: Number of the case, for messages.

    Returns:
        Features `[m, in_features]` and cells `[m, 2]` int64 of the foreground, m <= n, ordered by
        x, then y. A cell is foreground if any of its features is not zero.

    Raises:
        InputError: Two tiles share a cell and `on_collision` is `error`; positions are not finite
            or too far apart; every feature is zero.
    """
    cells = _cells_of(positions_px, config, case).to(tiles.device)
    key = cells[:, 0] * (cells[:, 1].amax() + 1) + cells[:, 1]
    occupied, slot = torch.unique(key, return_inverse=True)
    collisions = key.numel() - occupied.numel()
    if collisions and config.on_collision == "error":
        raise InputError(
            f"positions_px must put at most one tile in a cell of {config.cell_px} px, got "
            f"{collisions} collisions in case {case}; set cell_px to the side of a tile in the "
            "unit of the positions, cell_rounding='nearest' where tiles lie almost cell_px apart, "
            "or on_collision='sum' to add their features as the published model does"
        )
    features = tiles.new_zeros(occupied.numel(), tiles.shape[1]).index_add(0, slot, tiles)
    grid = torch.empty(occupied.numel(), 2, dtype=torch.int64, device=cells.device)
    grid[slot] = cells
    foreground = (features != 0).any(1)
    if not bool(foreground.any()):
        raise InputError(
            f"tiles must hold a feature other than zero, got none in case {case}; "
            "extract the slide's features again or leave the slide out"
        )
    return features[foreground], grid[foreground]


class _AlibiSelfAttention(nn.Module):
    """Multi-head self-attention of packed sequences under a 2-D ALiBi bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.impl = "auto"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: SlideTokens, slopes: Tensor) -> Tensor:
        """Map `[M, D]` to `[M, D]`; layout and cells come from `tokens`."""
        q, k, v = qkv_heads(self.qkv, x, self.heads, impl=self.impl)  # [M, H, d]
        if tokens.grid is None:
            raise ValueError("tokens must carry grid cells, got grid=None; make them with embed")
        out = alibi_attention(
            q,
            k,
            v,
            tokens.grid,
            slopes,
            offsets=tokens.offsets,
            num_prefix=tokens.num_prefix,
            impl=self.impl,
        )
        return linear(self.proj, out.flatten(1), impl=self.impl)


class _TitanBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TitanConfig, drop_path_p: float) -> None:
        super().__init__()
        self.drop_path_p = drop_path_p
        self.norm1 = nn.LayerNorm(config.width, eps=_TRUNK_EPS)
        self.attn = _AlibiSelfAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=_TRUNK_EPS)
        hidden = int(config.width * config.mlp_ratio)
        fc1, fc2 = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, tokens: SlideTokens, slopes: Tensor) -> SlideTokens:
        """Return the tokens after attention and MLP."""
        drop = (self.drop_path_p, self.training, tokens.offsets)
        with stage_range("titan.attention"):
            x = tokens.x + drop_path(self.attn(self.norm1(tokens.x), tokens, slopes), *drop)
        fc1, fc2 = self.mlp["fc1"], self.mlp["fc2"]
        with stage_range("titan.ffn"):
            branch = feed_forward(self.norm2, fc1, None, fc2, x, self.attn.impl)
            return tokens.with_x(x + drop_path(branch, *drop))


class AttentionalPooler(nn.Module):
    """Learned queries that attend to all tokens of a case, without residual."""

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=_POOLER_EPS)
        self.ln_k = nn.LayerNorm(width, eps=_POOLER_EPS)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Pool packed tokens `[M, D]`, prefix tokens included, to `[B, Q, D]`."""
        query, keys = self.ln_q(self.query)[None], self.ln_k(x)
        pooled = []
        for start, stop in pairwise(offsets.tolist()):
            of_case = keys[None, start:stop]
            pooled.append(self.attn(query, of_case, of_case, need_weights=False)[0])
        return torch.cat(pooled) if pooled else keys.new_empty(0, *self.query.shape)


class TitanEncoder(SlideEncoder):
    """TITAN's vision encoder, cut open for a Modal Adapter.

    The slide vector is that of the contrastive pooler. `proj`, by which TITAN multiplies it for
    its own slide embedding, and the captioning pooler `attn_pool` are held so that weights load
    strictly and come back whole; ModalTune applies neither.
    """

    def __init__(self, config: TitanConfig | None = None) -> None:
        super().__init__()
        config = config or TitanConfig()
        self.config = config
        self.impl = "auto"
        self.in_features, self.width, self.depth = config.in_features, config.width, config.depth
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.patch_embed = nn.ModuleList([nn.Linear(config.in_features, config.width)])
        last = max(config.depth - 1, 1)
        self.layers = nn.ModuleList(
            _TitanBlock(config, config.drop_path_rate * i / last) for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=_TRUNK_EPS)
        self.attn_pool = AttentionalPooler(config.width, config.pooler_heads, config.pooler_queries)
        self.attn_pool_contrastive = AttentionalPooler(config.width, config.pooler_heads, 1)
        self.proj = nn.Parameter(torch.empty(config.width, config.width))
        self._initialise()

    def _initialise(self) -> None:
        """Give a random backbone usable scales; loaded weights replace them all."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        pooler_queries = (self.attn_pool.query, self.attn_pool_contrastive.query)
        for parameter in (self.cls_token, self.proj, *pooler_queries):
            nn.init.trunc_normal_(parameter, std=0.02)

    @classmethod
    def from_safetensors(cls, path: str | Path, config: TitanConfig | None = None) -> TitanEncoder:
        """Build the encoder with the `vision_encoder.*` weights of a local file, as float32.

        Args:
            path: A safetensors file, or a folder that holds `model.safetensors`.
            config: Form of the model. Default: the published one.

        Raises:
            WeightsError: The file is absent, unreadable or not of this form; keys are named.
        """
        state = read_vision_encoder(Path(path))
        with torch.device("meta"):
            encoder = cls(config)
        encoder.load_published({name: tensor.float() for name, tensor in state.items()})
        return encoder

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load weights under their published names, `vision_encoder.` stripped; strict.

        Raises:
            WeightsError: Keys are missing or unexpected, or shapes differ.
        """
        check_state(state, {name: p.shape for name, p in self.published_state_dict().items()})
        renamed = {name.replace(_PUBLISHED_BLOCKS, _OUR_BLOCKS, 1): state[name] for name in state}
        self.load_state_dict(renamed, strict=True, assign=self.cls_token.is_meta)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Return all weights under their published names, without the `vision_encoder.` prefix."""
        state = self.state_dict()
        return {name.replace(_OUR_BLOCKS, _PUBLISHED_BLOCKS, 1): state[name] for name in state}

    @stage_range("embed")
    def embed(self, tiles: Tensor, positions_px: Tensor, offsets: Tensor) -> SlideTokens:
        """Lay the tiles of each case on its grid and embed the foreground cells behind a cls token.

        Args:
            tiles: `[N, in_features]` features of all cases, packed.
            positions_px: `[N, 2]` `(x, y)` of each tile's corner, in the unit of
                `config.cell_px`. Only positions relative to the case's smallest x and y matter.
            offsets: `[B + 1]` int64 on the CPU, rows of each case in `tiles`; no case is empty.

        Raises:
            InputError: Shapes do not fit, a case is empty or all zero, positions are not finite,
                or tiles collide in a cell (see `TitanConfig.on_collision`).
        """
        self._check_input(tiles, positions_px, offsets)
        features = tiles.to(self.cls_token.dtype)
        laid = [
            grid_features(features[a:b], positions_px[a:b], self.config, case)
            for case, (a, b) in enumerate(pairwise(offsets.tolist()))
        ]
        counts = [cells.shape[0] for _, cells in laid]
        packed = torch.cat([features for features, _ in laid])
        embedded = linear(self.patch_embed[0], packed, activation="gelu", impl=self.impl)
        cls_token = self.cls_token[0].to(embedded.dtype)
        rows = [part for own in embedded.split(counts) for part in (cls_token, own)]
        grid = [F.pad(cells, (0, 0, self.num_prefix, 0)) for _, cells in laid]
        ends = torch.tensor([0, *counts]).cumsum(0) + torch.arange(len(counts) + 1)
        return SlideTokens(torch.cat(rows), ends, self.num_prefix, torch.cat(grid))

    def _check_input(self, tiles: Tensor, positions_px: Tensor, offsets: Tensor) -> None:
        if tiles.dim() != 2 or tiles.shape[1] != self.in_features:
            raise InputError(
                f"tiles must be [N, {self.in_features}] features (CONCH v1.5 for TITAN), got "
                f"{list(tiles.shape)}; extract features with the encoder's own tile encoder"
            )
        if positions_px.shape != (tiles.shape[0], 2):
            raise InputError(
                f"positions_px must be [{tiles.shape[0]}, 2], one (x, y) per tile, got "
                f"{list(positions_px.shape)}; read features and coordinates from one file"
            )
        bounds = offsets.tolist()
        rising = len(bounds) > 1 and all(a < b for a, b in pairwise(bounds))
        if not rising or bounds[0] != 0 or bounds[-1] != tiles.shape[0]:
            raise InputError(
                f"offsets must rise from 0 to the number of tiles {tiles.shape[0]} with at least "
                f"one tile per case, got {bounds[:8]}; leave cases without tiles out"
            )

    def blocks(self, tokens: SlideTokens, first: int, last: int) -> SlideTokens:
        """Run blocks `first` to `last`, both inclusive, over cls and cell tokens."""
        if not 0 <= first <= last < self.depth:
            raise ValueError(f"blocks must lie in 0..{self.depth - 1}, got {first} to {last}")
        # Not a buffer: `.to(torch.bfloat16)` would round the slopes with the weights.
        slopes = torch.tensor(
            alibi_slopes(self.config.heads), dtype=torch.float64, device=tokens.x.device
        )
        for layer in self.layers[first : last + 1]:
            tokens = layer(tokens, slopes)
        return tokens

    def pool(self, tokens: SlideTokens) -> Tensor:
        """Return the contrastive pooler's vector of each case, `[B, width]`."""
        return self.attn_pool_contrastive(self.norm(tokens.x), tokens.offsets)[:, 0]
