"""The gate before any runtime: its features of a probe batch against those of eager PyTorch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.errors import InputError

# Least cosine of a tile's features with those of eager PyTorch in float32. bfloat16 has 8 bits.
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.995}
PROBE_TILES = 4


class GateError(InputError):
    """A runtime gives other features than eager PyTorch."""


@dataclass(frozen=True)
class Agreement:
    """How two sets of features agree.

    Attributes:
        cosine: Least cosine of a tile's two feature vectors.
        relative_error: Largest length of a tile's difference over the length of its reference.
        max_abs: Largest difference of a feature.
    """

    cosine: float
    relative_error: float
    max_abs: float

    def passes(self, precision: str) -> bool:
        """Whether features computed in `precision` are good enough.

        The cosine is blind to a factor; the bound on the relative error is the chord that belongs
        to the least cosine, so a factor counts as much as a turn.
        """
        least = MIN_COSINE[precision]
        return self.cosine >= least and self.relative_error <= math.sqrt(2 * (1 - least))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def measure_agreement(got: Tensor, want: Tensor) -> Agreement:
    """Compare features `[n, width]` with a reference of the same shape, n > 0; NaN is a miss."""
    a, b = got.double(), want.double()
    cosine = float(F.cosine_similarity(a, b, dim=1, eps=1e-300).min())
    error = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)
    finite = bool(torch.isfinite(a).all())
    return Agreement(
        cosine=cosine if finite else -1.0,
        relative_error=float(error.max()) if finite else math.inf,
        max_abs=float((a - b).abs().max()) if finite else math.inf,
    )


def probe_tiles(count: int, height: int, width: int) -> Tensor:
    """Return `[count, height, width, 3]` uint8 tiles like stained tissue, always the same.

    Eosin pink with haematoxylin spots at several scales and a little grain; every second tile has a
    white edge, as at the border of a section. White noise would leave most channels asleep.
    """
    generator = torch.Generator().manual_seed(0)

    def field(cells: int) -> Tensor:
        coarse = torch.randn((count, 1, cells, cells), generator=generator)
        return F.interpolate(coarse, size=(height, width), mode="bicubic").squeeze(1)

    stain = torch.sigmoid(field(5) + 2 * field(24) + field(60) - 0.5)[..., None]
    eosin = torch.tensor([226.0, 160.0, 198.0])
    haematoxylin = torch.tensor([92.0, 62.0, 140.0])
    rgb = eosin + stain * (haematoxylin - eosin)
    rgb = rgb + 6 * torch.randn(rgb.shape, generator=generator)
    rgb[1::2, :, : width // 5] = 242.0
    return rgb.clamp(0, 255).to(torch.uint8)


def check_gate(encoder: TileEncoder, reference: Tensor, tiles: Tensor) -> Agreement:
    """Hold a runtime against eager PyTorch before it is trusted.

    Args:
        encoder: The runtime.
        reference: `[n, width]` features of `tiles` by eager PyTorch in float32.
        tiles: `[n, h, w, 3]` uint8, n > 0.

    Raises:
        GateError: The features differ too much; the figures are in the message.
        InputError: They are not finite, or of another width.
    """
    found = measure_agreement(encoder.encode(tiles), reference)
    if not found.passes(encoder.precision):
        raise GateError(
            f"--runtime {encoder.runtime} must give {encoder.name}'s features with cosine >= "
            f"{MIN_COSINE[encoder.precision]} to eager PyTorch in {encoder.precision}, got "
            f"{found.cosine:.6f} (relative error {found.relative_error:.2g}) on a probe batch; use "
            "--runtime torch, or let it fall back with --runtime-fallback"
        )
    return found
