"""Tile normalisation as plain tensor operations that every exporter knows, for one tile size.

The resize is two products with constant matrices, so a graph holds no resampling of its own whose
rounding a runtime could choose:

    y = (clamp(R clamp(x C^T)) - 255 mean) / (255 std)

with R `[p, h]` and C `[p, w]` the rows and columns that the centre crop keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.kernels.tile_norm.api import crop_window, resize_matrices


class TileInput(nn.Module):
    """`[n, h, w, 3]` uint8 to `[n, 3, p, p]` float32, as `normalize_tiles` does it.

    Args:
        spec: Statistics, resize, crop and interpolation.
        height: Height of every tile in px.
        width: Width of every tile in px.

    Raises:
        ValueError: The tiles are too small for the crop.
    """

    across: Tensor
    along: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, spec: EncoderSpec, height: int, width: int) -> None:
        super().__init__()
        top, left, rows, columns = crop_window(height, width, spec.resize_px, spec.input_px)
        self.top, self.left, self.side = top, left, spec.input_px
        self.is_resized = (rows, columns) != (height, width)
        if self.is_resized:
            across, along = resize_matrices(
                height,
                width,
                resize_px=spec.resize_px,
                crop_px=spec.input_px,
                interpolation=spec.interpolation,
            )
            self.register_buffer("across", across)  # [p, h]
            self.register_buffer("along", along.T.contiguous())  # [w, p]
        spread = torch.tensor(spec.std, dtype=torch.float64).view(1, 3, 1, 1)
        offset = -torch.tensor(spec.mean, dtype=torch.float64).view(1, 3, 1, 1) / spread
        self.register_buffer("scale", (1 / (255 * spread)).float())
        self.register_buffer("offset", offset.float())

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the network's input."""
        # Converted first: TensorRT computes nothing with bytes.
        x = tiles.to(torch.float32).permute(0, 3, 1, 2)
        if self.is_resized:
            x = torch.clamp(x @ self.along, 0, 255)
            x = torch.clamp(self.across @ x, 0, 255)
        else:
            bottom, right = self.top + self.side, self.left + self.side
            x = x[:, :, self.top : bottom, self.left : right]
        return x * self.scale + self.offset
