"""Prov-GigaPath's slide encoder: LongNet over tile features, frozen, without its position table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modaltune.errors import InputError, WeightsError
from modaltune.kernels import dilated_attention, embed_positions
from modaltune.kernels.ranges import stage_range
from modaltune.slide_encoders.frozen_layers import feed_forward, linear, qkv_heads
from modaltune.slide_encoders.protocol import SlideEncoder, SlideTokens
from modaltune.stochastic import drop_path


def published_segments(max_slide_px: int = 262_144, tile_px: int = 256) -> tuple[int, ...]:
    """Return the published segment lengths: five powers of two between 1,024 and all tiles.

    Args:
        max_slide_px: Largest slide side the encoder was trained for, in level-0 px.
        tile_px: Tile side in px.
    """
    last = int(math.log2((max_slide_px // tile_px) ** 2))
    steps = [10.0 + i * (last - 10.0) / 4 for i in range(5)]
    return tuple(int(2.0**s) for s in steps)


class LongNetConfig(BaseModel):
    """Shape of a LongNet slide encoder; the defaults are Prov-GigaPath's published model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["longnet"] = Field("longnet", description="kind of slide encoder")
    in_features: int = Field(1536, gt=0, description="tile feature width")
    width: int = Field(768, gt=0, description="token width D; a multiple of 4 and of heads")
    depth: int = Field(12, gt=0, description="number of layers")
    heads: int = Field(16, gt=0, description="attention heads")
    ffn_width: int = Field(3072, gt=0, description="inner width of the FFN")
    grid_cells: int = Field(1000, gt=0, description="cells of the position grid per axis")
    cell_px: int = Field(256, gt=0, description="side of a grid cell, px of the tile positions")
    segment_lengths: tuple[int, ...] = Field(
        published_segments(), description="tiles of a segment, per branch of dilated attention"
    )
    dilation_ratios: tuple[int, ...] = Field(
        (1, 2, 4, 8, 16), description="every how manieth tile of a segment, per branch"
    )
    wrap_positions: bool = Field(
        False, description="published quirk: a second coordinate past the grid wraps around"
    )
    dropout: float = Field(0.25, ge=0, lt=1, description="after attention and FFN, in training")
    drop_path_rate: float = Field(0.1, ge=0, lt=1, description="at the last layer, in training")

    @model_validator(mode="after")
    def _check(self) -> LongNetConfig:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of 4 and of heads, got {self.width}")
        if len(self.segment_lengths) != len(self.dilation_ratios):
            raise ValueError("segment_lengths and dilation_ratios must have equal length")
        return self


class LongNetLayer(nn.Module):
    """One pre-norm layer: dilated attention and FFN, each with a LayerNorm inside (sub-LN)."""

    def __init__(self, config: LongNetConfig, drop_path_p: float) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.drop_path_p = drop_path_p
        self.impl = "auto"
        self.attn_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_inner_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.ffn_width)
        self.ffn_inner_norm = nn.LayerNorm(config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, width)

    def attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return merged dilated attention `[M, D]` of normed rows, before the inner norm."""
        q, k, v = qkv_heads(self.qkv, x, self.config.heads, impl=self.impl)
        out = dilated_attention(
            q,
            k,
            v,
            segment_lengths=self.config.segment_lengths,
            dilation_ratios=self.config.dilation_ratios,
            offsets=offsets,
            impl=self.impl,
        )
        return out.flatten(1)

    def _attention(self, tokens: SlideTokens) -> Tensor:
        attended = self.attend(self.attn_norm(tokens.x), tokens.offsets)
        return linear(self.out_proj, self.attn_inner_norm(attended), impl=self.impl)

    def _ffn(self, x: Tensor) -> Tensor:
        return feed_forward(self.ffn_norm, self.fc1, self.ffn_inner_norm, self.fc2, x, self.impl)

    def forward(self, tokens: SlideTokens) -> SlideTokens:
        """Run the layer on packed tokens."""
        p = self.config.dropout
        with stage_range("longnet.attention"):
            branch = F.dropout(self._attention(tokens), p, self.training)
            x = tokens.x + drop_path(branch, self.drop_path_p, self.training, tokens.offsets)
        with stage_range("longnet.ffn"):
            branch = F.dropout(self._ffn(x), p, self.training)
            x = x + drop_path(branch, self.drop_path_p, self.training, tokens.offsets)
        return tokens.with_x(x)


class LongNet(SlideEncoder):
    """LongNet with sin-cos grid positions; the slide vector is the cls token.

    `layer_norm` and `norm` belong to the published weights and are never applied by a Modal
    Adapter; they are kept so that a checkpoint goes out as it came in.

    Source: Prov-GigaPath (Xu et al., Nature 2024), LongNet (Ding et al., 2023).
    """

    # Weights are read from memory once for all tasks; beyond this, activations leave the cache.
    packed_rows_cpu = 4096

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.width, self.depth = config.in_features, config.width, config.depth
        self.impl = "auto"
        self.patch_embed = nn.Linear(config.in_features, config.width)
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        step = config.drop_path_rate / max(config.depth - 1, 1)
        self.layers = nn.ModuleList(LongNetLayer(config, step * i) for i in range(config.depth))
        self.layer_norm = nn.LayerNorm(config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def cells(self, positions_px: Tensor) -> Tensor:
        """Return the grid cells `[N, 2]` int64 of tile corners `[N, 2]` in px.

        Raises:
            InputError: A tile lies outside the grid (or past its last row, where it may wrap).
        """
        n = self.config.grid_cells
        cell = torch.div(positions_px, self.config.cell_px, rounding_mode="floor").long()
        if self.config.wrap_positions:
            index = cell[:, 0] * n + cell[:, 1]
            cell = torch.stack([index.div(n, rounding_mode="floor"), index % n], dim=1)
            bad = (index < 0) | (index >= n * n)
        else:
            bad = ((cell < 0) | (cell >= n)).any(dim=1)
        if bool(bad.any()):
            worst = positions_px[bad][0].tolist()
            raise InputError(
                f"tile positions must lie within the encoder's grid of {n} x {n} cells of "
                f"{self.config.cell_px} px, got {int(bad.sum())} outside, the first at {worst}; "
                "check the slide's mpp and, for cases of many slides, their number"
            )
        return cell

    def embed(self, tiles: Tensor, positions_px: Tensor, offsets: Tensor) -> SlideTokens:
        """See `SlideEncoder.embed`."""
        with stage_range("embed"):
            x = embed_positions(
                linear(self.patch_embed, tiles, impl=self.impl),
                self.cells(positions_px),
                self.cls_token,
                offsets=offsets,
                impl=self.impl,
            )
            x = F.dropout(x, self.config.dropout, self.training)
        return SlideTokens(x, offsets + torch.arange(offsets.numel(), device=offsets.device))

    def blocks(self, tokens: SlideTokens, first: int, last: int) -> SlideTokens:
        """See `SlideEncoder.blocks`."""
        for layer in self.layers[first : last + 1]:
            tokens = layer(tokens)
        return tokens

    def pool(self, tokens: SlideTokens) -> Tensor:
        """Return the cls token of each case, `[B, D]`."""
        return tokens.x[tokens.offsets[:-1].to(tokens.x.device)]

    def load_published(self, path: Path) -> None:
        """Load `slide_encoder.pth` of Prov-GigaPath (state under `model`).

        Raises:
            WeightsError: The file is unreadable, or keys or shapes do not fit this architecture.
        """
        from modaltune.reference_import import encoder_from_reference

        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise WeightsError(
                f"slide encoder weights {path} must be a torch file of plain tensors, got: {error}"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("model"), dict):
            state = state["model"]
        named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
        if not named or not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(
                f"slide encoder weights {path} must hold tensors by name, under 'model' or bare, "
                "got something else; give the published slide_encoder.pth"
            )
        encoder_from_reference(self, state, source=str(path))
