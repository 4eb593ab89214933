"""Gene mixer: the gene encoder of ModalTune alone, with heads on its mean token. Genes only."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from modaltune.baselines.baseline import Baseline, gene_values, keep
from modaltune.batch import CaseBatch
from modaltune.modalities import GeneConfig, PathwayEncoder


class GeneMixerSettings(GeneConfig):
    """Shape of the gene mixer; the defaults are ModalTune's published gene encoder."""

    out_width: int = Field(256, gt=0, description="width of a gene token and of the embedding")


class GeneMixer(Baseline):
    """Pathway networks, MLP-Mixer, compression to gene tokens, normalised mean.

    Args:
        gene_index: `[nnz]` int64 genes of all pathways in the expression vector.
        offsets: `[P + 1]` int64 first membership of each pathway.
        settings: Its shape.

    Source: METHOD 3.4; MLP-Mixer (Tolstikhin et al., NeurIPS 2021).
    """

    def __init__(
        self, gene_index: Tensor, offsets: Tensor, settings: GeneMixerSettings | None = None
    ) -> None:
        super().__init__()
        settings = settings or GeneMixerSettings()
        self.width = settings.out_width
        self.gene_width = int(gene_index.max()) + 1
        self.encoder = PathwayEncoder(gene_index, offsets, settings.out_width, settings)
        # Tokens start at a hundredth of unit size; ModalTune's head normalises them, too.
        self.norm = nn.LayerNorm(settings.out_width)

    def tokens(self, batch: CaseBatch) -> Tensor:
        """Return gene tokens `[B, tokens, d]`; zeros for a case without genes."""
        values, present = gene_values(batch, self.norm.weight, self.gene_width or 0)
        return keep(self.encoder(values), present)

    def forward(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[B, d]`; the bias of the norm for a case without genes."""
        return self.norm(self.tokens(batch).mean(dim=1))
