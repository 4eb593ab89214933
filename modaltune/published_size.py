"""A model of published size with random weights, and cases for it: to measure, plan and profile.

Speed and memory depend on sizes, not on values, and the published weights are gated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.model import ModalTune

# The published table: 331 pathways of 1 to 199 genes, 9,745 memberships of 4,999 genes.
PATHWAYS, MEMBERSHIPS, GENES, LARGEST = 331, 9745, 4999, 199
TILE_PX = 256


def pathway_sizes() -> list[int]:
    """Return 331 fixed sizes from 1 to 199 genes that sum to 9,745, many small and few large."""
    sizes = [1 + int((LARGEST - 1) * (i / (PATHWAYS - 1)) ** 6) for i in range(PATHWAYS)]
    for i in range(MEMBERSHIPS - sum(sizes)):
        sizes[i] += 1
    return sizes


def pathway_layout() -> tuple[Tensor, Tensor]:
    """Return gene indices `[9745]` and offsets `[332]` in which every gene occurs."""
    # 2,503 and 4,999 have no common divisor: no gene twice in a pathway, none left out.
    index = torch.arange(MEMBERSHIPS) * 2503 % GENES
    return index, torch.tensor([0, *pathway_sizes()]).cumsum(0)


def published_size_model(config: ModalTuneConfig | None = None) -> ModalTune:
    """Return a model with random weights: of published size, or of another configuration."""
    gene_index, gene_offsets = pathway_layout()
    return ModalTune(config or ModalTuneConfig(), gene_index=gene_index, gene_offsets=gene_offsets)


def random_cases(model: ModalTune, tiles: int, cases: int = 1, seed: int = 0) -> CaseBatch:
    """Return cases of normal tile features on a square of the grid, on the CPU, every modality.

    Args:
        model: Names the widths. Modalities of somebody's own are left out: nobody knows their form.
        tiles: Tiles of each case.
        cases: Number of cases.
        seed: Of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    cell = torch.arange(tiles, device="cpu")
    side = math.isqrt(tiles) + 1
    encoder = model.config.slide_encoder
    position = torch.stack([cell % side, cell // side], dim=1) * encoder.cell_px
    width = model.slide_encoder.in_features
    tile_features = torch.randn(tiles * cases, width, generator=generator, device="cpu")
    return CaseBatch(
        tiles=tile_features,
        positions_px=position.repeat(cases, 1),
        offsets=torch.arange(cases + 1, device="cpu") * tiles,
        modalities={
            name: torch.randn(cases, module.in_features, generator=generator, device="cpu")
            for name, module in model.each_modality().items()
            if module.in_features is not None
        },
    )
