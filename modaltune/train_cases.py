"""Cases folders as what the training loop reads: pooled, limited in tiles, read from disk."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.cases import Case, Cohort, SlideReading, modality_values, pack_cases
from modaltune.cases_folder import CasesFolder
from modaltune.config import PositionConvention
from modaltune.engine.store import open_features
from modaltune.engine.tile_features import TileFeatures
from modaltune.errors import CohortError
from modaltune.fitting import fit_preprocessing
from modaltune.pathways import PathwayTable
from modaltune.preprocessing import Preprocessing
from modaltune.run_config import InputsSection
from modaltune.splits import Split
from modaltune.tables import name_few
from modaltune.targets import Targets
from modaltune.tile_limit import TileLimit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PooledCases:
    """One cases folder, or several as one cohort.

    Attributes:
        cohort: Slides, expression (genes that all folders have) and clinical rows.
        pathways: Of the folders, or None.
        split: The union of the folders' splits.
        site: Case to the number of its folder.
        sources: Path, SHA-256 and fold of each folder.
    """

    cohort: Cohort
    pathways: PathwayTable | None
    split: Split
    site: Mapping[str, int]
    sources: tuple[dict[str, Any], ...]

    @property
    def clinical(self) -> pd.DataFrame:
        """A row per case."""
        if self.cohort.clinical is None:
            raise CohortError("cases must have clinical rows, got none; build the cases folder")
        return self.cohort.clinical


def pool_cases(folders: Sequence[CasesFolder], fold: int = 0) -> PooledCases:
    """Put cases folders together.

    Raises:
        CohortError: There is none, a case is in two, they share no gene, or their pathways differ.
    """
    if not folders:
        raise CohortError(
            "cases.folders must name at least one cases folder, got none; build one with: "
            "modaltune cases build"
        )
    site: dict[str, int] = {}
    slides: dict[str, tuple[Path, ...]] = {}
    reading: dict[Path, SlideReading] = {}
    for number, folder in enumerate(folders):
        twice = [case for case in folder.case_ids if case in site]
        if twice:
            raise CohortError(
                f"cases must be in one of the cases folders, got {len(twice)} in several: "
                f"{name_few(twice)}; leave out one of the folders"
            )
        site |= dict.fromkeys(folder.case_ids, number)
        slides |= folder.cohort.slides
        reading |= folder.cohort.reading
    tables = [f.pathways for f in folders if f.pathways is not None]
    if any(table != tables[0] for table in tables):
        raise CohortError(
            "pathways must be the same in all cases folders, got others; build them from one file"
        )
    splits = [folder.split(fold) for folder in folders]
    union = Split(*(sum((s.parts[p] for s in splits), ()) for p in splits[0].parts))
    clinical = pd.concat([folder.clinical for folder in folders])
    cohort = Cohort(slides, _shared_genes(folders), clinical, reading)
    sources = [
        {"path": str(f.path.resolve()), "sha256": f.sha256, "fold": fold} for f in folders
    ]  # found again from any working directory
    return PooledCases(cohort, tables[0] if tables else None, union, site, tuple(sources))


def _shared_genes(folders: Sequence[CasesFolder]) -> pd.DataFrame | None:
    """Return the expression of all folders over the genes that every one of them has."""
    tables = [folder.expression for folder in folders if folder.expression is not None]
    if not tables:
        return None
    genes = [g for g in tables[0].columns if all(g in table.columns for table in tables[1:])]
    if not genes:
        raise CohortError("cases folders must share genes, got none in common; map their symbols")
    lost = len({g for table in tables for g in table.columns}) - len(genes)
    if lost:
        logger.warning("%d genes are not in every cases folder and are left out", lost)
    return pd.concat([table[genes] for table in tables])


def fit_inputs(
    pooled: PooledCases,
    inputs: InputsSection,
    *,
    stage_in_targets: bool = True,
    learner: str = "modaltune",
) -> Preprocessing:
    """Fit what stands beside the weights, and miss nothing that was asked for.

    Args:
        pooled: All cases and their split.
        inputs: Which inputs there are, and the policies.
        stage_in_targets: Whether a target sentence holds the stage, worth a warning beside it as
            an input (REQUIREMENTS 37).
        learner: What is trained; a baseline can't leave an input out.

    Raises:
        CohortError: An input asked for is in none of the cases fitted on.
    """
    fitted = fit_preprocessing(
        pooled,
        pooled.split,
        fitted_on=inputs.fit_on,
        use_genes=inputs.genes,
        use_slides=inputs.image,
        clinical=None if inputs.clinical == "none" else inputs.clinical,
        clip_quantiles=inputs.clip_quantiles,
        gene_gaps=inputs.gene_gaps,
        empty_pathways=inputs.empty_pathways,
        unseen=inputs.unseen_categories,
        stage_in_targets=stage_in_targets,
    )
    for name, found, needs, build in (
        ("genes", fitted.pathways, "expression and pathways", "both"),
        ("image", fitted.tiles, "feature files", "--features"),
    ):
        if getattr(inputs, name) and found is None:
            who, instead = f"inputs.{name}", f"set inputs.{name} = false"
            if learner != "modaltune":
                who, instead = f"learner.kind = {learner}", "choose another learner.kind"
            raise CohortError(
                f"{who} needs {needs} of training cases, got none; build the cases folder with "
                f"{build}, or {instead}"
            )
    return fitted


def open_mapped(cohort: Cohort, path: Path) -> TileFeatures:
    """Open a feature file: ours mapped from disk, another's read."""
    return cohort.read_slide(path) if path in cohort.reading else open_features(path)


class StreamedCases:
    """Cases whose tiles are read from disk when a batch is asked for.

    Genes of all cases are one contiguous matrix. Feature files of our own stay mapped, so that
    only the rows used are read; others' are read each time. Use from one thread at a time.

    Args:
        pooled: All cases.
        case_ids: Those served, in order.
        preprocessing: Fitted.
        targets: Of the cases served, in order; None for cases that are only embedded.
        convention: How positions are counted.
        in_features: Tile feature width of the model.
        limit: Tiles per case.

    Attributes:
        case_ids: The cases that hold something the model reads, in order.
        without_inputs: The cases asked for that hold nothing.
    """

    def __init__(
        self,
        pooled: PooledCases,
        case_ids: Sequence[str],
        preprocessing: Preprocessing,
        targets: Targets | None,
        convention: PositionConvention,
        in_features: int,
        limit: TileLimit | None = None,
    ) -> None:
        cohort = pooled.cohort
        self._cohort, self._preprocessing = cohort, preprocessing
        self._convention, self._in_features = convention, in_features
        self._limit = limit or TileLimit()
        self._epoch: int | None = None
        self._values = modality_values(cohort, case_ids, preprocessing)
        # Opened once here to be checked, and again for each batch: a map held is a file held open.
        self._counts = {case: [len(s) for s in self._slides(case)] for case in case_ids}
        usable = [i for i, c in enumerate(case_ids) if self._values[c] or any(self._counts[c])]
        self.case_ids = tuple(case_ids[i] for i in usable)
        self.without_inputs = tuple(sorted(set(case_ids) - set(self.case_ids)))
        self.all_targets = None if targets is None else targets.rows(usable)

    def __len__(self) -> int:
        return len(self.case_ids)

    def _slides(self, case_id: str) -> tuple[TileFeatures, ...]:
        """Open the slides of a case; none for a model without images."""
        recipe = self._preprocessing.tiles
        if recipe is None:
            return ()
        paths = self._cohort.slides.get(case_id, ())
        opened = tuple(open_mapped(self._cohort, path) for path in paths)
        for slide in opened:
            recipe.check(slide)
        return opened

    def case(self, index: int) -> Case:
        """Return one case, its tiles not read yet where they are mapped."""
        name = self.case_ids[index]
        kept = self._limit.rows(name, self._counts[name], self._epoch)
        return Case(name, self._slides(name), self._values[name], kept)

    def for_epoch(self, epoch: int) -> StreamedCases:
        """See `modaltune.learner.TrainingCases.for_epoch`."""
        same = copy.copy(self)
        same._epoch = epoch
        return same

    def batch(self, indices: Sequence[int]) -> CaseBatch:
        """Return the packed tensors of some cases."""
        cases = [self.case(i) for i in indices]
        return pack_cases(cases, self._convention, self._in_features)

    def targets(self, indices: Sequence[int]) -> Targets:
        """Return the targets of some cases.

        Raises:
            CohortError: These cases carry none.
        """
        if self.all_targets is None:
            raise CohortError("cases must carry targets to train on, got none; embed their labels")
        return self.all_targets.rows(indices)

    @property
    def slide_counts(self) -> dict[str, int]:
        """Slides of each case."""
        return {name: len(self._counts[name]) for name in self.case_ids}

    @property
    def tiles_per_case(self) -> dict[str, int]:
        """Tiles of each case, before the limit."""
        return {name: sum(self._counts[name]) for name in self.case_ids}

    def some_tiles(self, index: int, limit: TileLimit) -> Tensor:
        """Return tile features `[n, in_features]` float32 of one case under another limit."""
        name = self.case_ids[index]
        kept = limit.rows(name, self._counts[name])
        slides = self._slides(name)
        own = kept or (None,) * len(slides)
        parts = [
            torch.from_numpy(np.array(s.features if r is None else s.features[r], np.float32))
            for s, r in zip(slides, own, strict=True)
        ]
        return torch.cat([torch.zeros(0, self._in_features), *parts])

    def tile_counts(self) -> dict[str, tuple[int, int]]:
        """Return tiles used and tiles there of each case over the limit."""
        found: dict[str, tuple[int, int]] = {}
        for name in self.case_ids:
            kept = self._limit.rows(name, self._counts[name], self._epoch)
            if kept:
                used = sum(len(rows) for rows in kept if rows is not None)
                found[name] = (used, sum(self._counts[name]))
        return found


def label_targets(clinical: pd.DataFrame, text: Tensor | None) -> Targets:
    """Return the targets of cases: text rows `[n, T, out]`, and labels by clinical row."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(clinical[name].to_numpy(np.float64, copy=True)).float()

    classes = clinical["primary_class"].fillna(-1).to_numpy(np.int64, copy=True)
    return Targets(text, torch.from_numpy(classes), column("survival_months"), column("event"))
