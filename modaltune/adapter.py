"""The Modal Adapter: injectors and extractors between the blocks of a frozen slide encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from modaltune.bottleneck import BottleneckAttention
from modaltune.errors import InputError
from modaltune.kernels import extract, inject, inject_tasks
from modaltune.kernels.ranges import stage_range
from modaltune.recompute import again
from modaltune.slide_encoders.protocol import SlideEncoder, SlideTokens
from modaltune.stochastic import drop_path


class AdapterConfig(BaseModel):
    """Shape of a Modal Adapter; the defaults are the published Prov-GigaPath configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(12, gt=0, description="attention heads of injectors and extractors")
    bottleneck: float | None = Field(
        0.25, description="inner width as a share of D; None for full width without FFN"
    )
    interactions: tuple[tuple[int, int], ...] = Field(
        ((0, 3), (4, 7), (8, 11)), description="first and last encoder block of each interaction"
    )
    use_extra_extractors: bool = Field(True, description="two more extractors after the last")
    use_self_attention: bool = Field(True, description="modal tokens attend to each other")
    drop_path_rate: float = Field(0.1, ge=0, lt=1, description="on extractor FFNs, in training")

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        flat = [block for pair in self.interactions for block in pair]
        if not flat or flat != sorted(flat) or flat[0] < 0:
            raise ValueError(f"interactions must be rising block ranges, got {self.interactions}")
        if any(
            a[1] >= b[0] for a, b in zip(self.interactions, self.interactions[1:], strict=False)
        ):
            raise ValueError(f"interactions must not overlap, got {self.interactions}")
        if self.bottleneck is not None and not 0 < self.bottleneck <= 1:
            raise ValueError(f"bottleneck must lie in (0, 1] or be None, got {self.bottleneck}")
        return self


class Injector(nn.Module):
    """Tiles attend to modal tokens; a gate that starts at zero lets the answer in."""

    def __init__(self, width: int, heads: int, bottleneck: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.attn = BottleneckAttention(width, heads, bottleneck)
        self.gamma = nn.Parameter(torch.zeros(width))
        self.impl = "auto"

    @stage_range("injector")
    def forward(
        self, tokens: SlideTokens, modal: Tensor, positions: Tensor, key_mask: Tensor | None
    ) -> SlideTokens:
        """Return tokens with tiles updated; `modal` `[B, G, D]`, `positions` `[G, D]`.

        The positions go on keys and values alike, as published.
        """
        keys, values = self._project(modal, positions)
        return tokens.with_x(
            inject(tokens.x, keys, values, key_mask=key_mask, **self._arguments(tokens))
        )

    @stage_range("injector")
    def for_tasks(
        self,
        tokens: SlideTokens,
        modal: Tensor,
        positions: Tensor,
        prompts: Tensor,
        prompt_position: Tensor,
        key_mask: Tensor | None,
    ) -> Tensor:
        """Return what T tasks that share all but their prompt make of the same rows, `[T, N, D]`.

        Args:
            tokens: Rows of B cases.
            modal: `[B, G, D]` common modal tokens.
            positions: `[G, D]` their positions.
            prompts: `[T, D]` task tokens.
            prompt_position: `[D]` their position.
            key_mask: `[B, G]` bool over the common tokens; None for all.
        """
        keys, values = self._project(modal, positions)
        own = self._project(prompts, prompt_position)
        task_keys, task_values = (t.expand(modal.shape[0], -1, -1) for t in own)
        return inject_tasks(
            tokens.x,
            keys,
            values,
            task_keys,
            task_values,
            key_mask=key_mask,
            **self._arguments(tokens),
        )

    def _project(self, modal: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.norm_kv(modal) + positions
        return self.attn.key(kv), self.attn.value(kv)

    def _arguments(self, tokens: SlideTokens) -> dict[str, Any]:
        """Return what both forms of the kernel take beside tokens, keys and values."""
        query_weight, query_bias = self.attn.query_map()
        output_weight, output_bias = self.attn.output_map()
        return {
            "gamma": self.gamma,
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "query_weight": query_weight,
            "query_bias": query_bias,
            "output_weight": output_weight,
            "output_bias": output_bias,
            "num_heads": self.attn.heads,
            "offsets": tokens.offsets,
            "num_prefix": tokens.num_prefix,
            "eps": self.norm.eps,
            "impl": self.impl,
        }


class ExtractorFFN(nn.Module):
    """Pre-norm ReLU network D -> E -> D, without a residual of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        for layer in (self.linear1, self.linear2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., D]`."""
        return self.linear2(F.relu(self.linear1(self.norm(x))))


class Extractor(nn.Module):
    """Modal tokens attend to all tiles of their case, then pass an FFN."""

    def __init__(
        self, width: int, heads: int, bottleneck: float | None, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.attn = BottleneckAttention(width, heads, bottleneck)
        self.ffn = None if bottleneck is None else ExtractorFFN(width, int(width * bottleneck))
        self.drop_path_rate = drop_path_rate
        self.impl = "auto"

    @stage_range("extractor")
    def forward(self, modal: Tensor, positions: Tensor, tokens: SlideTokens) -> Tensor:
        """Return `[B, G, D]`: `2 c + attention`, then plus the FFN of that.

        The doubled `c` is the published residual inside plus the one outside.
        """
        queries = self.attn.project_queries(self.norm(modal) + positions)
        kv_weight, kv_bias = self.attn.kv_map()
        attended = extract(
            queries,
            tokens.x,
            norm_weight=self.norm_kv.weight,
            norm_bias=self.norm_kv.bias,
            kv_weight=kv_weight,
            kv_bias=kv_bias,
            num_heads=self.attn.heads,
            offsets=tokens.offsets,
            num_prefix=tokens.num_prefix,
            eps=self.norm_kv.eps,
            impl=self.impl,
        )
        modal = 2 * modal + self.attn.project_output(attended)
        if self.ffn is None:
            return modal
        return modal + drop_path(self.ffn(modal), self.drop_path_rate, self.training)


class PromptSelfAttention(nn.Module):
    """Modal tokens attend to each other; positions on queries and keys, not on values."""

    def __init__(self, width: int, heads: int, bottleneck: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = BottleneckAttention(width, heads, bottleneck)

    @stage_range("self_attention")
    def forward(self, modal: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return `[B, G, D]`; `mask` `[B, G, G]` is True where a query may see a key.

        A token that may see nothing keeps its value.
        """
        normed = self.norm(modal)
        placed = normed + positions
        q, k, v = (
            t.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)
            for t in (
                self.attn.project_queries(placed),
                self.attn.key(placed),
                self.attn.value(normed),
            )
        )
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v)
            return modal + self.attn.project_output(out.transpose(1, 2).flatten(2))
        seen = mask.any(dim=-1)
        # A row without keys would be NaN: let it see everything, and throw the answer away.
        out = F.scaled_dot_product_attention(q, k, v, (mask | ~seen.unsqueeze(-1)).unsqueeze(1))
        update = self.attn.project_output(out.transpose(1, 2).flatten(2))
        return modal + torch.where(seen.unsqueeze(-1), update, torch.zeros_like(update))


class InteractionBlock(nn.Module):
    """Injector, a range of encoder blocks, extractor (and extra extractors on the last one)."""

    def __init__(
        self, width: int, config: AdapterConfig, first: int, last: int, extra: int
    ) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.injector = Injector(width, config.heads, config.bottleneck)
        self.extractor = self._extractor(width, config)
        self.extra_extractors = nn.ModuleList(self._extractor(width, config) for _ in range(extra))

    @staticmethod
    def _extractor(width: int, config: AdapterConfig) -> Extractor:
        return Extractor(width, config.heads, config.bottleneck, config.drop_path_rate)

    def extractors(self) -> list[Extractor]:
        """Return the extractor and the extra ones, in order."""
        every = (self.extractor, *self.extra_extractors)
        return [module for module in every if isinstance(module, Extractor)]

    def forward(
        self,
        encoder: SlideEncoder,
        tokens: SlideTokens,
        modal: Tensor,
        positions: Tensor,
        key_mask: Tensor | None,
        recompute: str = "none",
        injected: bool = False,
    ) -> tuple[SlideTokens, Tensor]:
        """Return tile tokens after the blocks and modal tokens `[B, G, D]` after extraction.

        `recompute` says what the backward pass computes again: `none`, `layer` (the inside of the
        injector, every block and every extractor) or `interaction` (that, and all between).
        With `injected` the tokens have passed the injector already.
        """
        # Without the rows: who keeps the layout does not keep them.
        layout = tokens.with_x(tokens.x.new_empty(0))
        run = partial(self._interact, encoder, layout, key_mask, recompute != "none", injected)
        x, modal = again(recompute == "interaction", run, tokens.x, modal, positions)
        return tokens.with_x(x), modal

    def _interact(
        self,
        encoder: SlideEncoder,
        layout: SlideTokens,
        key_mask: Tensor | None,
        parts: bool,
        injected: bool,
        x: Tensor,
        modal: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run the interaction on rows `[M, D]`; with `parts` each part is computed again."""
        if not injected:
            x = again(parts, partial(self._inject, layout, key_mask), x, modal, positions)
        alone = [(n, n) for n in range(self.first, self.last + 1)]
        for first, last in alone if parts else [(self.first, self.last)]:
            x = again(parts, partial(self._run_blocks, encoder, layout, first, last), x)
        for extractor in self.extractors():
            modal = again(parts, partial(self._extract, extractor, layout), x, modal, positions)
        return x, modal

    def _inject(
        self,
        layout: SlideTokens,
        key_mask: Tensor | None,
        x: Tensor,
        modal: Tensor,
        positions: Tensor,
    ) -> Tensor:
        return self.injector(layout.with_x(x), modal, positions, key_mask).x

    @staticmethod
    def _run_blocks(
        encoder: SlideEncoder, layout: SlideTokens, first: int, last: int, x: Tensor
    ) -> Tensor:
        return encoder.blocks(layout.with_x(x), first, last).x

    @staticmethod
    def _extract(
        extractor: Extractor, layout: SlideTokens, x: Tensor, modal: Tensor, positions: Tensor
    ) -> Tensor:
        return extractor(modal, positions, layout.with_x(x))


class ModalAdapter(nn.Module):
    """All interactions of a slide encoder with the modal tokens."""

    def __init__(self, width: int, depth: int, config: AdapterConfig) -> None:
        super().__init__()
        if config.interactions[-1][1] >= depth:
            raise InputError(
                f"interactions must lie within the encoder's {depth} blocks, got "
                f"{config.interactions}; give ranges of its blocks"
            )
        ranges: Sequence[tuple[int, int]] = config.interactions
        extra = 2 if config.use_extra_extractors else 0
        self.blocks = nn.ModuleList(
            InteractionBlock(width, config, a, b, extra if n == len(ranges) - 1 else 0)
            for n, (a, b) in enumerate(ranges)
        )
        # Slot n stands before interaction n; the first has none, as published.
        self.self_attention = nn.ModuleList(
            PromptSelfAttention(width, config.heads, config.bottleneck)
            for _ in (ranges[1:] if config.use_self_attention else ())
        )

    def interactions(self) -> list[InteractionBlock]:
        """Return the interactions, in order."""
        return [block for block in self.blocks if isinstance(block, InteractionBlock)]

    def self_attentions(self) -> list[PromptSelfAttention]:
        """Return the self-attentions before interactions 1, 2, ..., or none."""
        return [m for m in self.self_attention if isinstance(m, PromptSelfAttention)]

    @property
    def first_block(self) -> int:
        """Index of the encoder block before which the first injector stands."""
        return self.interactions()[0].first

    def forward(
        self,
        encoder: SlideEncoder,
        tokens: SlideTokens | None,
        modal: Tensor,
        positions: Tensor,
        *,
        key_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        with_tiles: Tensor | None = None,
        recompute: str = "none",
        injected: bool = False,
    ) -> tuple[SlideTokens | None, Tensor]:
        """Run all interactions.

        Args:
            encoder: The frozen slide encoder whose blocks are run.
            tokens: Tile tokens of the cases that have tiles, before the first interaction; None
                when no case has any.
            modal: `[B, G, D]` modal tokens of all cases.
            positions: `[G, D]` learned positions of the modal tokens.
            key_mask: `[B, G]` bool, tokens that tiles may attend to; None for all.
            self_mask: `[B, G, G]` bool, which token may see which; None for all.
            with_tiles: `[C]` indices of the cases in `tokens`, or None when all have tiles. Cases
                without tiles skip injectors and extractors.
            recompute: What the backward pass computes again (see `InteractionBlock`).
            injected: The tokens have passed the first injector already.

        Returns:
            Tile tokens and modal tokens after the last interaction.
        """
        attentions = self.self_attentions()
        for n, block in enumerate(self.interactions()):
            if n > 0 and attentions:
                modal = attentions[n - 1](modal, positions, self_mask)
            if tokens is None:
                continue
            done = injected and n == 0
            if with_tiles is None:
                tokens, modal = block(encoder, tokens, modal, positions, key_mask, recompute, done)
                continue
            mask = None if key_mask is None else key_mask[with_tiles]
            seen = modal[with_tiles]
            tokens, updated = block(encoder, tokens, seen, positions, mask, recompute, done)
            modal = modal.index_copy(0, with_tiles, updated)
        return tokens, modal
