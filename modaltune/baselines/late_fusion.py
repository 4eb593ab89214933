"""Late fusion: ABMIL's embedding beside the pathway MLP's. Image and genes."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from modaltune.baselines.abmil import ABMIL, ABMILSettings
from modaltune.baselines.baseline import Baseline
from modaltune.baselines.pathway_mlp import PathwayMLP, PathwayMLPSettings
from modaltune.batch import CaseBatch


class LateFusionSettings(BaseModel):
    """Shapes of the two parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: ABMILSettings = ABMILSettings()
    genes: PathwayMLPSettings = PathwayMLPSettings()


class LateFusion(Baseline):
    """Concatenation of an image and a gene embedding that meet only in the heads.

    Args:
        tile_width: Width of the tile features.
        gene_index: `[nnz]` int64 genes of all pathways in the expression vector.
        offsets: `[P + 1]` int64 first membership of each pathway.
        settings: Shapes of its parts.

    Source: the "concat" rows of Chen et al., "Multimodal Co-Attention Transformer" (ICCV 2021).
    """

    def __init__(
        self,
        tile_width: int,
        gene_index: Tensor,
        offsets: Tensor,
        settings: LateFusionSettings | None = None,
    ) -> None:
        super().__init__()
        settings = settings or LateFusionSettings()
        self.image = ABMIL(tile_width, settings.image)
        self.genes = PathwayMLP(gene_index, offsets, settings.genes)
        self.width = self.image.width + self.genes.width
        self.tile_width, self.gene_width = tile_width, self.genes.gene_width

    def forward(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, d_image + d_genes]`; zeros in the place of what is missing."""
        return torch.cat([self.image(batch), self.genes(batch)], dim=1)
