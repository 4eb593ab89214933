"""Linear probe: a frozen slide encoder, read off by linear models. Image only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modaltune.baselines.baseline import Baseline
from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.probes import CoxProbe, Floats, LogisticProbe, fit_cox, fit_logistic
from modaltune.slide_encoders.protocol import SlideEncoder


class LinearProbeSettings(BaseModel):
    """What the probe reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: Literal["slide", "mean", "both"] = Field(
        "both", description="the slide vector, the mean of the tile features, or one after another"
    )


class LinearProbe(Baseline):
    """The slide vector of a frozen encoder and the mean tile; nothing in it is trained.

    `fit_probes` reads it off with the published probes. Under the common loop its heads are
    trained by gradient instead, still linear.

    Args:
        tile_width: Width of the tile features.
        slide_encoder: Encoder with its weights, frozen here; None to read the mean tile alone.
        settings: What it reads.

    Raises:
        InputError: The slide vector is asked for without an encoder, or widths differ.

    Source: the linear-probe rows of ModalTune (Ramanathan et al., ICCV 2025); METHOD 4.4.
    """

    def __init__(
        self,
        tile_width: int,
        slide_encoder: SlideEncoder | None = None,
        settings: LinearProbeSettings | None = None,
    ) -> None:
        super().__init__()
        self.features = (settings or LinearProbeSettings()).features
        self.tile_width, self.width = tile_width, 0
        if self.features != "slide":
            self.width += tile_width
        self.slide_encoder: SlideEncoder | None = None
        if self.features != "mean":
            if slide_encoder is None or slide_encoder.in_features != tile_width:
                got = "none" if slide_encoder is None else f"one of {slide_encoder.in_features}"
                raise InputError(
                    f"slide_encoder must be given and read tiles of width {tile_width} to probe "
                    f"slide vectors, got {got}; pass the encoder, or features='mean'"
                )
            self.slide_encoder = slide_encoder.requires_grad_(False).eval()
            self.width += slide_encoder.width

    def train(self, mode: bool = True) -> LinearProbe:
        """Set training mode; the frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.slide_encoder is not None:
            self.slide_encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, batch: CaseBatch) -> Tensor:
        """Return `[B, d]`: slide vector, mean tile; zeros for a case without tiles."""
        parts = (
            [] if self.slide_encoder is None else [self._slide_vectors(self.slide_encoder, batch)]
        )
        if self.features != "slide":
            rows = [batch.tiles[a:b] for a, b in pairwise(batch.offsets.tolist())]
            empty = batch.tiles.new_zeros(self.tile_width or 0)
            parts.append(torch.stack([own.mean(0) if len(own) else empty for own in rows]))
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=1)

    @staticmethod
    def _slide_vectors(encoder: SlideEncoder, batch: CaseBatch) -> Tensor:
        weight = next(encoder.parameters())
        vectors = weight.new_zeros(batch.num_cases, encoder.width)
        filled = batch.offsets.diff() > 0
        if not bool(filled.any()):
            return vectors
        bounds = torch.cat([batch.offsets[:1], batch.offsets[1:][filled]])
        tokens = encoder.embed(batch.tiles.to(weight.dtype), batch.positions_px, bounds)
        pooled = encoder.pool(encoder.blocks(tokens, 0, encoder.depth - 1))
        return vectors.index_copy(0, filled.nonzero().squeeze(1).to(vectors.device), pooled)


@dataclass(frozen=True)
class FittedProbes:
    """The published probes on frozen features.

    Attributes:
        logistic: Class probe, None where it was not asked for.
        cox: Risk probe, None where it was not asked for.
    """

    logistic: LogisticProbe | None
    cox: CoxProbe | None


def embed_batches(baseline: Baseline, batches: Iterable[CaseBatch]) -> Floats:
    """Return the embeddings `[n, d]` float64 of batches, one after another, in evaluation mode."""
    was_training = baseline.training
    baseline.eval()
    with torch.inference_mode():
        parts = [baseline(batch).double().cpu().numpy() for batch in batches]
    baseline.train(was_training)
    return np.concatenate(parts) if parts else np.zeros((0, baseline.width))


def fit_probes(
    features: ArrayLike,
    classes: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    events: ArrayLike | None = None,
    *,
    penalizer: float = 0.1,
) -> FittedProbes:
    """Fit the published probes on embeddings of the training cases.

    Args:
        features: `[n, d]` from `embed_batches`.
        classes: `[n]` int, -1 = not classified; None for no class probe.
        durations: `[n]` months, NaN = unknown; None for no risk probe.
        events: `[n]`, 1 = died.
        penalizer: L2 penalty of the Cox model.

    Raises:
        InputError: See `modaltune.probes`.
    """
    cox = None
    if durations is not None and events is not None:
        cox = fit_cox(features, durations, events, penalizer)
    return FittedProbes(None if classes is None else fit_logistic(features, classes), cox)
