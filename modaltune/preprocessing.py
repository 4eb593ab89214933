"""Everything fitted beside the weights, saved with the model: genes, clinic, tiles, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modaltune.clinical_encoder import ClinicalEncoder
from modaltune.engine.tile_features import TileFeatures
from modaltune.errors import CohortError, FeatureFileError
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import SurvivalBins
from modaltune.pathways import PathwayIndex


@dataclass(frozen=True)
class TileRecipe:
    """The tile features a model was tuned on; features of another kind are refused.

    Attributes:
        width: Feature width D.
        encoder: Name of the tile encoder, None if unknown (an imported checkpoint).
        encoder_sha256: Hash of its weights, None if unknown.
        target_mpp: Microns per pixel of the tiles.
        tile_px: Side of a tile at `target_mpp`.
    """

    width: int
    encoder: str | None = None
    encoder_sha256: str | None = None
    target_mpp: float | None = None
    tile_px: int | None = None

    @classmethod
    def of(cls, features: TileFeatures) -> TileRecipe:
        """Return the recipe of a feature file."""
        return cls(
            features.width,
            features.encoder,
            features.encoder_sha256,
            features.target_mpp,
            features.tile_px,
        )

    def check(self, features: TileFeatures) -> None:
        """Raise FeatureFileError where features were made in another way than the model's."""
        own = TileRecipe.of(features)
        for name in ("width", "encoder_sha256", "target_mpp", "tile_px"):
            want, got = getattr(self, name), getattr(own, name)
            if want is not None and got is not None and want != got:
                raise FeatureFileError(
                    f"features of slide {features.slide} must have {name} {want}, as the model "
                    f"was tuned on, got {got}; embed the slide again with tile encoder "
                    f"{self.encoder or 'of the model'} at {self.target_mpp or 'its'} mpp"
                )


@dataclass(frozen=True)
class Preprocessing:
    """What turns the records of a case into the model's inputs; fitted on the training split only.

    Attributes:
        tiles: The tile features expected; None for a model that never saw any.
        pathways: Genes and pathways; None for a model without genes.
        genes: Clipping and scaling; None when values come standardised (imported checkpoints).
        clinical: Encoder of clinical rows; None for a model without.
        survival: Bins of the label sentences; None when no survival was known.
    """

    tiles: TileRecipe | None = None
    pathways: PathwayIndex | None = None
    genes: GeneScaler | None = None
    clinical: ClinicalEncoder | None = None
    survival: SurvivalBins | None = None

    def gene_values(self, table: pd.DataFrame) -> Tensor:
        """Return standardised expression `[N, M]` float32 of a case x gene table.

        Raises:
            CohortError: The model has no genes, a gene is missing, or a value is not finite.
        """
        if self.pathways is None:
            raise CohortError(
                "genes must be left out: the model was tuned without them; pass none, or use a "
                "model tuned with genes"
            )
        if self.genes is not None:
            table = self.genes.transform(table)
        missing = [gene for gene in self.pathways.genes if gene not in table.columns]
        if missing:
            raise CohortError(
                f"genes must include all {len(self.pathways.genes)} that the model reads, got "
                f"{len(missing)} missing, such as {', '.join(missing[:5])}; give them, or map "
                "their names to the model's symbols"
            )
        values = torch.from_numpy(table[list(self.pathways.genes)].to_numpy("float32", copy=True))
        bad = ~torch.isfinite(values).all(dim=1)
        if bool(bad.any()):
            cases = [str(case) for case, is_bad in zip(table.index, bad, strict=True) if is_bad]
            raise CohortError(
                f"genes must be finite, got NaN or infinity for case(s) {', '.join(cases[:5])}; "
                "impute them, or leave those cases' genes out"
            )
        return values

    def clinical_values(self, table: pd.DataFrame) -> tuple[Tensor, Tensor]:
        """Return clinical features `[N, F]` float32 and `[N]` bool, True where anything is known.

        Raises:
            CohortError: The model has no clinical input.
        """
        if self.clinical is None:
            raise CohortError(
                "clinical values must be left out: the model was tuned without them; pass none, "
                "or use a model tuned with clinical input"
            )
        features = self.clinical.transform(table)
        return features.values, ~features.absent

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        fitted = {
            "pathways": self.pathways,
            "genes": self.genes,
            "clinical": self.clinical,
            "survival": self.survival,
        }
        state: dict[str, Any] = {k: None if v is None else v.to_dict() for k, v in fitted.items()}
        state["tiles"] = None if self.tiles is None else vars(self.tiles)
        return state

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`."""

        def rebuild(name: str, kind: Any) -> Any:
            return None if state.get(name) is None else kind.from_dict(state[name])

        return cls(
            tiles=None if state.get("tiles") is None else TileRecipe(**state["tiles"]),
            pathways=rebuild("pathways", PathwayIndex),
            genes=rebuild("genes", GeneScaler),
            clinical=rebuild("clinical", ClinicalEncoder),
            survival=rebuild("survival", SurvivalBins),
        )
