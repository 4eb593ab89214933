"""Fitting everything beside the weights: genes, clinical encoders, survival bins, tile recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import pandas as pd

from modaltune.cases import Cohort
from modaltune.clinical_encoder import ClinicalEncoder, Preset, Unseen
from modaltune.errors import CohortError
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import SurvivalBins
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.splits import Split
from modaltune.tables import check_choice

#: On which cases: those of the training part, or as published, on all parts together.
FittedOn = Literal["train", "published"]


class FittableCases(Protocol):
    """What is fitted on: a cases folder, or several put together."""

    @property
    def cohort(self) -> Cohort:
        """Feature files, expression and clinical rows by case."""

    @property
    def pathways(self) -> PathwayTable | None:
        """The pathways, or None."""


def fit_preprocessing(
    cases: FittableCases,
    split: Split,
    *,
    fitted_on: FittedOn = "train",
    use_genes: bool = True,
    use_slides: bool = True,
    clinical: Preset | None = None,
    clip_quantiles: tuple[float, float] | None = (0.001, 0.999),
    gene_gaps: Literal["error", "mean"] = "error",
    empty_pathways: Literal["drop", "error"] = "drop",
    unseen: Unseen = "own_code",
    stage_in_targets: bool = True,
) -> Preprocessing:
    """Fit on a split's training cases all that turns records into a model's inputs and targets.

    Nothing is read of validation and test cases, so no value of theirs can change anything fitted.
    `fitted_on="published"` is for comparison with the published figures only: genes are scaled by
    the whole expression table, and clinical encoders and survival bins know all parts of the split.

    Args:
        cases: The cohort.
        split: Its parts.
        fitted_on: "train" or "published".
        use_genes: Fit the gene scaler, if there are expression and pathways.
        use_slides: Take the tile recipe from the slides of the cases fitted on, if there are any.
        clinical: Which clinical inputs; None for none.
        clip_quantiles: Of the gene scaler; None for no clipping, as published.
        gene_gaps: "error", or "mean" to fill gaps of expression by the training mean.
        empty_pathways: Whether a pathway without a measured gene is dropped or an error.
        unseen: What the clinical encoder does with categories that only other cases have.
        stage_in_targets: Whether the stage is among the target sentences, which with the published
            clinical inputs is worth a warning.

    Returns:
        What was fitted; a part is None where it was not asked for, or where nothing is known.

    Raises:
        CohortError: There is no case to fit on, or values break a rule.
        InputError: An option is unknown.

    Source: REQUIREMENTS 31, 37, 38; METHOD 4.8, 4.13, 4.14.
    """
    check_choice("fitted_on", fitted_on, get_args(FittedOn))
    fitted = split.train if fitted_on == "train" else split.case_ids
    if not fitted:
        raise CohortError(
            "split must have training cases to fit on, got none; build the cases folder with a "
            "training part"
        )
    cohort = cases.cohort
    rows = cohort.rows(cohort.clinical, fitted)
    genes = cohort.rows(cohort.expression, fitted) if fitted_on == "train" else cohort.expression
    pathways, scaler, encoder = None, None, None
    if use_genes and genes is not None and cases.pathways is not None:
        pathways = PathwayIndex.build(cases.pathways, genes.columns, empty_pathways)
        scaler = GeneScaler.fit(genes[list(pathways.genes)], clip_quantiles, gene_gaps)
    if clinical is not None and rows is not None:
        encoder = ClinicalEncoder.fit(
            rows, clinical, unseen=unseen, stage_in_targets=stage_in_targets
        )
    return Preprocessing(
        tiles=tile_recipe(cohort, fitted) if use_slides else None,
        pathways=pathways,
        genes=scaler,
        clinical=encoder,
        survival=None if rows is None else fit_bins(rows),
    )


def fit_bins(clinical: pd.DataFrame) -> SurvivalBins | None:
    """Cut survival times at the quartiles of these cases, None where no time is known."""
    months = clinical["survival_months"].astype(float)
    return SurvivalBins.fit(months) if months.notna().any() else None


def tile_recipe(cohort: Cohort, case_ids: Sequence[str]) -> TileRecipe | None:
    """Return how the tile features were made, read off the first slide of these cases, or None.

    Slides of another kind are refused where they are read (`Preprocessing.tiles`).
    """
    for case in case_ids:
        for path in cohort.slides.get(case, ()):
            return TileRecipe.of(cohort.read_slide(path))
    return None
