"""What a slide encoder must offer so that a Modal Adapter can tune it: embed, blocks, pool."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SlideTokens:
    """Token sequences of several cases, packed row after row.

    Attributes:
        x: `[M, D]` tokens; each case holds `num_prefix` prefix tokens (cls), then its tiles.
        offsets: `[B + 1]` int64 on the CPU; case b owns rows `offsets[b]:offsets[b + 1]`.
        num_prefix: prefix tokens per case; injectors and extractors leave them alone.
        grid: `[M, 2]` positions in cells of the encoder's own grid, or None where the encoder
            needs positions in `embed` only. Prefix rows hold zeros.
    """

    x: Tensor
    offsets: Tensor
    num_prefix: int = 1
    grid: Tensor | None = None

    def with_x(self, x: Tensor) -> SlideTokens:
        """Return the same layout around other token values `[M, D]`."""
        return replace(self, x=x)

    @property
    def num_cases(self) -> int:
        """Number of cases B."""
        return self.offsets.numel() - 1

    def tile_rows(self) -> Tensor:
        """Return the indices `[M - B * num_prefix]` of all rows that are tiles."""
        keep = torch.ones(self.x.shape[0], dtype=torch.bool)
        for k in range(self.num_prefix):
            keep[self.offsets[:-1] + k] = False
        return keep.nonzero().squeeze(1).to(self.x.device)

    def tile_counts(self) -> Tensor:
        """Return the number of tiles of each case, `[B]` int64 on the CPU."""
        return self.offsets.diff() - self.num_prefix


class SlideEncoder(nn.Module):
    """A transformer over the tiles of a slide, cut open where a Modal Adapter enters.

    Subclasses set `in_features` (tile feature width), `width` (D), `depth` (number of blocks) and
    implement the three hooks. Every parameter is frozen by the model that owns the encoder.

    `packed_rows_cpu` is how many rows are faster as one pass than as one for each task prompt.
    """

    in_features: int
    width: int
    depth: int
    num_prefix: int = 1
    packed_rows_cpu: int = 1024

    @abstractmethod
    def embed(self, tiles: Tensor, positions_px: Tensor, offsets: Tensor) -> SlideTokens:
        """Turn tile features into packed tokens with positions and prefix tokens.

        Args:
            tiles: `[N, in_features]` features of all cases, packed.
            positions_px: `[N, 2]` `(x, y)` of each tile's corner in the encoder's pixels
                (level 0 under the `reference` position convention, target mpp under `scaled`).
            offsets: `[B + 1]` int64 on the CPU, rows of each case in `tiles`; no case is empty.

        Raises:
            InputError: A position lies outside the encoder's grid.
        """

    @abstractmethod
    def blocks(self, tokens: SlideTokens, first: int, last: int) -> SlideTokens:
        """Run blocks `first` to `last`, both inclusive, over prefix and tile tokens."""

    @abstractmethod
    def pool(self, tokens: SlideTokens) -> Tensor:
        """Reduce each case to one slide vector, `[B, width]`, as the encoder itself does."""
