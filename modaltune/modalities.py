"""Modalities beside the slide: each turns a case's record into a few modal tokens.

A further modality is a subclass of `Modality` that sets `num_tokens` and implements `forward`; it
is handed to `ModalTune(..., extra_modalities={"name": module})` and its values arrive in
`CaseBatch.modalities["name"]`. Everything else (positions, masks, head) follows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from modaltune.kernels import pathway_mlp


class Modality(nn.Module):
    """Turns the values of one modality into `num_tokens` tokens of width D per case.

    Cases without the modality come as zeros, and what `forward` makes of them is masked.
    """

    num_tokens: int
    in_features: int | None = None  # values expected per case, where that is a number to check

    @abstractmethod
    def forward(self, values: Tensor) -> Tensor:
        """Return tokens `[B, num_tokens, D]` of values `[B, ...]`."""

    def summarise(self, tokens: Tensor) -> Tensor:
        """Reduce this modality's tokens `[B, num_tokens, D]` to its slot `[B, D]` in the head."""
        return tokens.mean(dim=1)


class GeneConfig(BaseModel):
    """Shape of the pathway encoder; the defaults are the published configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(256, gt=0, description="width d of a pathway token")
    depth: int = Field(3, ge=0, description="mixer blocks")
    token_expansion: float = Field(0.5, gt=0, description="hidden share of P in token mixing")
    channel_expansion: float = Field(0.5, gt=0, description="hidden share of d in channel mixing")
    tokens: int = Field(64, gt=0, description="gene tokens after compression")
    dropout: float = Field(0.25, ge=0, lt=1, description="in training, mixer and networks alike")


class PathwayNetworks(nn.Module):
    """One two-layer self-normalising network per pathway, packed into four tensors.

    Attributes:
        gene_index: `[nnz]` int64, genes of all pathways in the contiguous expression vector.
        offsets: `[P + 1]` int64, first membership of each pathway.
    """

    gene_index: Tensor
    offsets: Tensor

    def __init__(self, gene_index: Tensor, offsets: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("gene_index", gene_index.to(torch.int64), persistent=False)
        self.register_buffer("offsets", offsets.to(torch.int64), persistent=False)
        pathways, members = offsets.numel() - 1, gene_index.numel()
        self.weight1 = nn.Parameter(torch.empty(members, width))
        self.bias1 = nn.Parameter(torch.zeros(pathways, width))
        self.weight2 = nn.Parameter(torch.empty(pathways, width, width))
        self.bias2 = nn.Parameter(torch.zeros(pathways, width))
        for weight in (self.weight1, self.weight2):
            nn.init.trunc_normal_(weight, std=0.02)
        self.impl = "auto"

    def forward(self, expression: Tensor, dropout_p: float) -> Tensor:
        """Return pathway tokens `[B, P, d]` of expression `[B, M]`.

        Dropout is seeded by torch's default generator.
        """
        seed = int(torch.randint(2**31, ())) if dropout_p > 0 else None
        return pathway_mlp(
            expression,
            self.gene_index,
            self.weight1,
            self.bias1,
            self.weight2,
            self.bias2,
            offsets=self.offsets.cpu(),
            dropout_p=dropout_p,
            seed=seed,
            impl=self.impl,
        )


class MixerBlock(nn.Module):
    """Token mixing across pathways, then channel mixing within each, both pre-norm residual.

    Source: MLP-Mixer (Tolstikhin et al., 2021).
    """

    def __init__(self, pathways: int, config: GeneConfig) -> None:
        super().__init__()
        hidden_tokens = int(pathways * config.token_expansion)
        hidden_width = int(config.width * config.channel_expansion)
        self.dropout = config.dropout
        self.token_norm = nn.LayerNorm(config.width)
        self.token_in = nn.Linear(pathways, hidden_tokens)
        self.token_out = nn.Linear(hidden_tokens, pathways)
        self.channel_norm = nn.LayerNorm(config.width)
        self.channel_in = nn.Linear(config.width, hidden_width)
        self.channel_out = nn.Linear(hidden_width, config.width)
        for layer in (self.channel_in, self.channel_out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, P, d]`."""
        p, on = self.dropout, self.training
        mixed = self.token_norm(x).transpose(1, 2)  # [B, d, P]
        mixed = F.dropout(F.gelu(self.token_in(mixed)), p, on)
        x = x + F.dropout(self.token_out(mixed), p, on).transpose(1, 2)
        mixed = F.dropout(F.gelu(self.channel_in(self.channel_norm(x))), p, on)
        return x + F.dropout(self.channel_out(mixed), p, on)


class PathwayEncoder(nn.Module):
    """Expression to gene tokens: pathway networks, mixer, compression to a few tokens."""

    def __init__(self, gene_index: Tensor, offsets: Tensor, out_width: int, config: GeneConfig):
        super().__init__()
        pathways = offsets.numel() - 1
        self.config = config
        self.networks = PathwayNetworks(gene_index, offsets, config.width)
        self.mixer = nn.ModuleList(MixerBlock(pathways, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, out_width)
        self.compress = nn.Linear(pathways, config.tokens)
        for layer in (self.project, self.compress):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def blocks(self) -> list[MixerBlock]:
        """Return the mixer blocks, in order."""
        return [block for block in self.mixer if isinstance(block, MixerBlock)]

    def mix(self, pathway_tokens: Tensor) -> Tensor:
        """Mix `[B, P, d]` and project to `[B, P, D]`."""
        for block in self.blocks():
            pathway_tokens = block(pathway_tokens)
        return self.project(self.norm(pathway_tokens))

    def forward(self, expression: Tensor) -> Tensor:
        """Return gene tokens `[B, tokens, D]` of standardised expression `[B, M]`."""
        dropout_p = self.config.dropout if self.training else 0.0
        mixed = self.mix(self.networks(expression, dropout_p))
        return self.compress(mixed.transpose(1, 2)).transpose(1, 2)


class GeneModality(Modality):
    """Expression through pathways; the slot is the mean token, or a learned cls token in front."""

    def __init__(
        self, gene_index: Tensor, offsets: Tensor, width: int, config: GeneConfig, use_cls: bool
    ) -> None:
        super().__init__()
        self.encoder = PathwayEncoder(gene_index, offsets, width, config)
        self.cls_token = nn.Parameter(torch.empty(width)) if use_cls else None
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.num_tokens = config.tokens + int(use_cls)
        self.in_features = None if gene_index.is_meta else int(gene_index.max()) + 1

    def forward(self, values: Tensor) -> Tensor:
        """Return `[B, (1 +) tokens, D]` of standardised expression `[B, M]`."""
        tokens = self.encoder(values)
        if self.cls_token is None:
            return tokens
        return torch.cat([self.cls_token.expand(tokens.shape[0], 1, -1), tokens], dim=1)

    def summarise(self, tokens: Tensor) -> Tensor:
        """Return the cls token where there is one, else the mean."""
        return tokens.mean(dim=1) if self.cls_token is None else tokens[:, 0]


class ClinicalModality(Modality):
    """Clinical features (age, sex, site, or the published five) as one token."""

    num_tokens = 1

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.linear1 = nn.Linear(in_features, width // 2)
        self.linear2 = nn.Linear(width // 2, width)
        self.norm = nn.LayerNorm(width)
        for layer in (self.linear1, self.linear2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Return `[B, 1, D]` of features `[B, F]`."""
        return self.norm(self.linear2(F.relu(self.linear1(values)))).unsqueeze(1)


class TaskPrompts(nn.Module):
    """One token per task: a normalised row of a linear map of the one-hot task."""

    def __init__(self, tasks: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(tasks, width)
        self.norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.embed.bias)

    def forward(self, tasks: Sequence[int]) -> Tensor:
        """Return the prompts `[K, D]` of some tasks."""
        return self.norm(self.embed.weight.t()[list(tasks)] + self.embed.bias)
