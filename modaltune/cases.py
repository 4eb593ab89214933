"""One case: its slides laid side by side, its modalities, and several of them as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.config import PositionConvention
from modaltune.engine.store import TileFeatures, read_features
from modaltune.errors import CohortError, FeatureFileError, InputError
from modaltune.preprocessing import Preprocessing
from modaltune.targets import Targets

Rows = npt.NDArray[np.int64]

SLIDE_GAP_PX = 1500  # between slides of one case, as published


@dataclass(frozen=True)
class Case:
    """Everything known of one patient; what is missing is simply not there.

    Attributes:
        case_id: The patient.
        slides: Tile features of the slides, in order; none for a case without images.
        values: Inputs of further modalities by name, without a batch axis: `genes` `[M]`,
            `clinical` `[F]`, and whatever else a model was given.
        kept: Rising rows of each slide that are used, None for all; all unless given.
    """

    case_id: str
    slides: tuple[TileFeatures, ...] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    kept: tuple[Rows | None, ...] = ()


def scale_positions(slide: TileFeatures, convention: PositionConvention) -> Tensor:
    """Return tile corners `[n, 2]` float64 in the px that the slide encoder's grid counts.

    Under `reference` these are level-0 px, as published. Under `scaled` they are px at the target
    mpp, so that a 20x and a 40x scan of the same tissue get the same positions. Level-0 corners are
    rounded to whole px, so a grid is put back exactly: dividing a corner by the tile size alone
    would push about half the tiles of a slide of 0.2527 mpp into a neighbour's cell. Some producers
    round the step of the grid instead of its corners; such a grid is recognised, too.

    Raises:
        FeatureFileError: The file does not say how large a tile is at level 0.
    """
    coords = torch.from_numpy(np.asarray(slide.coords, dtype=np.float64))
    if convention == "reference" or len(slide) == 0:
        return coords
    if slide.target_mpp and slide.base_mpp:
        scale = slide.base_mpp / slide.target_mpp
    elif slide.tile_px and slide.level0_tile_px:
        scale = slide.tile_px / slide.level0_tile_px
    else:
        raise FeatureFileError(
            f"features of slide {slide.slide} must say their mpp, or the tile size in px and at "
            "level 0, to scale positions, got neither; fill them with dataclasses.replace("
            "features, base_mpp=..., target_mpp=...), or use position_convention='reference'"
        )
    step_px = (slide.tile_px or 0) - slide.overlap_px
    if slide.tile_px and step_px > 0:
        steps = [step_px / scale]
        steps += [slide.level0_tile_px * step_px / slide.tile_px] if slide.level0_tile_px else []
        for level0_step in steps:
            index = torch.round(coords / level0_step)
            if bool(((index * level0_step - coords).abs() <= 0.5 + 1e-6).all()):
                return index * step_px
    return (coords + 0.5) * scale  # the middle of a level-0 px: rounding never crosses a cell


def place_slides(
    slides: Sequence[TileFeatures],
    convention: PositionConvention,
    kept: Sequence[Rows | None] = (),
) -> tuple[Tensor, Tensor]:
    """Lay the slides of one case below each other on one plane.

    Under `scaled` every slide starts below all before it. Under `reference` the published rule
    holds: slide i + 1 is shifted by the largest raw y of slide i plus 1,500 px, not cumulative, so
    third and later slides may overlap earlier ones. Where a slide lies does not depend on which of
    its rows are kept.

    Returns:
        Features `[N, D]` float32 and positions `[N, 2]` float64 `(x, y)`.
    """
    chosen = [
        (slide, rows, len(slide) if rows is None else len(rows))
        for slide, rows in zip(slides, kept or [None] * len(slides), strict=True)
        if len(slide)
    ]
    if not chosen:
        return torch.zeros(0, 0), torch.zeros(0, 2, dtype=torch.float64)
    widths = {slide.width for slide, _, _ in chosen}
    if len(widths) > 1:
        raise FeatureFileError(
            f"slides of one case must have features of one width, got {sorted(widths)} for "
            f"{', '.join(s.slide for s in slides)}; embed them with the same tile encoder"
        )
    tiles = torch.empty(sum(count for _, _, count in chosen), widths.pop())
    positions, shift, at = [], 0.0, 0
    for slide, rows, count in chosen:
        # The only copy of tiles that are mapped from disk.
        tiles[at : at + count].numpy()[:] = slide.features if rows is None else slide.features[rows]
        at += count
        own = scale_positions(slide, convention)
        used = own if rows is None else own[torch.from_numpy(rows)]
        positions.append(used + torch.tensor([0.0, shift], dtype=torch.float64))
        below = float(own[:, 1].max()) + SLIDE_GAP_PX
        shift = below if convention == "reference" else shift + below
    return tiles, torch.cat(positions)


def pack_cases(
    cases: Sequence[Case], convention: PositionConvention, in_features: int
) -> CaseBatch:
    """Pack cases of any length and with any modality missing into one batch.

    Raises:
        InputError: A case holds nothing at all, or widths differ between cases.
    """
    tiles, positions, counts = [], [], [0]
    for case in cases:
        if not case.values and not any(len(slide) for slide in case.slides):
            raise InputError(
                f"case {case.case_id} must have tiles, genes or another modality, got none; leave "
                "it out"
            )
        features, where = place_slides(case.slides, convention, case.kept)
        counts.append(features.shape[0])
        if features.shape[0]:
            if features.shape[1] != in_features:
                raise FeatureFileError(
                    f"tile features of case {case.case_id} must have width {in_features} for this "
                    f"model, got {features.shape[1]}; embed its slides with the model's encoder"
                )
            tiles.append(features)
            positions.append(where)
    names = dict.fromkeys(name for case in cases for name in case.values)
    values, present = {}, {}
    for name in names:
        own = [case.values.get(name) for case in cases]
        shape = next(v.shape for v in own if v is not None)
        for case, value in zip(cases, own, strict=True):
            if value is not None and value.shape != shape:
                raise InputError(
                    f"{name} of case {case.case_id} must have shape {list(shape)}, as of the cases "
                    f"before it, got {list(value.shape)}; preprocess all cases in the same way"
                )
        values[name] = torch.stack([v if v is not None else torch.zeros(shape) for v in own])
        present[name] = torch.tensor([v is not None for v in own])
    return CaseBatch(
        torch.cat(tiles) if tiles else torch.zeros(0, in_features),
        torch.cat(positions) if positions else torch.zeros(0, 2, dtype=torch.float64),
        torch.tensor(counts).cumsum(0),
        values,
        present,
        tuple(case.case_id for case in cases),
    )


@dataclass(frozen=True)
class SlideReading:
    """What a feature file does not say of itself (see `modaltune.engine.store.read_features`).

    Attributes:
        base_mpp: Microns per level-0 px, where known from elsewhere.
        target_mpp: Microns per px of the tiles; taken where the file does not say it.
        encoder: Which features to take where the file holds several.
    """

    base_mpp: float | None = None
    target_mpp: float | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class Cohort:
    """The cases of a study as they lie on disk, joined by case id, never by row.

    Attributes:
        slides: Feature files by case; a case without images has none.
        expression: Case x gene table, or None.
        clinical: Rows of `read_clinical` by case, or None.
        reading: How to read those feature files that need telling.
    """

    slides: Mapping[str, tuple[Path, ...]]
    expression: pd.DataFrame | None = None
    clinical: pd.DataFrame | None = None
    reading: Mapping[Path, SlideReading] = field(default_factory=dict)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Every case that has a slide, expression or a clinical row, sorted."""
        ids = {case for case, files in self.slides.items() if files}
        for table in (self.expression, self.clinical):
            ids |= set() if table is None else set(map(str, table.index))
        return tuple(sorted(ids))

    def read_slides(self, case_id: str) -> tuple[TileFeatures, ...]:
        """Read the tile features of one case, verified."""
        return tuple(self.read_slide(path) for path in self.slides.get(case_id, ()))

    def read_slide(self, path: Path) -> TileFeatures:
        """Read the tile features of one file, verified, told what the file does not say."""
        told = self.reading.get(path, SlideReading())
        slide = read_features(path, base_mpp=told.base_mpp, encoder=told.encoder)
        return replace(slide, target_mpp=slide.target_mpp or told.target_mpp)

    def rows(self, table: pd.DataFrame | None, case_ids: Iterable[str]) -> pd.DataFrame | None:
        """Return the rows of those cases that a table has, or None when it has none of them.

        Raises:
            CohortError: The table has two rows of one case.
        """
        if table is None:
            return None
        table = table.set_axis(table.index.map(str), axis=0)
        twice = sorted(set(table.index[table.index.duplicated()]))
        if twice:
            raise CohortError(
                f"tables must have one row per case, got several for {len(twice)} case(s), such as "
                f"{', '.join(twice[:5])}; keep one of each"
            )
        wanted = [case for case in case_ids if case in table.index]
        return table.loc[wanted] if wanted else None


def modality_values(
    cohort: Cohort, case_ids: Sequence[str], preprocessing: Preprocessing
) -> dict[str, dict[str, Tensor]]:
    """Return the inputs beside the slides of cases, by case and modality, through what was fitted.

    Rows of one modality are views of one contiguous matrix. Cases without it have no entry there.

    Raises:
        CohortError: Values break a rule.
    """
    values: dict[str, dict[str, Tensor]] = {case: {} for case in case_ids}
    genes = cohort.rows(cohort.expression, case_ids)
    if preprocessing.pathways is not None and genes is not None:
        for case, row in zip(genes.index, preprocessing.gene_values(genes), strict=True):
            values[str(case)]["genes"] = row
    clinical = cohort.rows(cohort.clinical, case_ids)
    if preprocessing.clinical is not None and clinical is not None:
        rows, is_known = preprocessing.clinical_values(clinical)
        for case, row, has in zip(clinical.index, rows, is_known.tolist(), strict=True):
            if has:
                values[str(case)]["clinical"] = row
    return values


def prepare_cases(
    cohort: Cohort, case_ids: Sequence[str], preprocessing: Preprocessing
) -> list[Case]:
    """Read and preprocess cases: features from disk, genes and clinic through what was fitted.

    Modalities that the preprocessing does not know are left out. Cases come in the order asked for.

    Raises:
        CohortError: A case is unknown, or its values break a rule.
    """
    known = set(cohort.case_ids)
    unknown = [case for case in case_ids if case not in known]
    if unknown:
        raise CohortError(
            f"cases must be in the cohort, got {len(unknown)} unknown, such as "
            f"{', '.join(unknown[:5])}; check the ids of manifest and tables"
        )
    values = modality_values(cohort, case_ids, preprocessing)
    prepared = []
    for case in case_ids:
        slides = cohort.read_slides(case) if preprocessing.tiles is not None else ()
        for slide in slides:
            if preprocessing.tiles is not None:
                preprocessing.tiles.check(slide)
        prepared.append(Case(case, slides, values[case]))
    return prepared


class PreparedCases:
    """Prepared cases with the targets of their task prompts: what the training loop reads.

    Args:
        cases: In memory; tile features may be memory maps.
        targets: Of each case, or text rows `[n, T, out_features]` alone; None for cases that are
            only embedded.
        convention: How positions are counted.
        in_features: Tile feature width of the model.
        draw: Returns what training uses of a case in an epoch, such as
            `modaltune.tile_limit.TileLimit.drawn`; None for all of it.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        targets: Targets | Tensor | None,
        convention: PositionConvention,
        in_features: int,
        draw: Callable[[Case, int], Case] | None = None,
    ) -> None:
        if isinstance(targets, Tensor):
            targets = Targets.of_text(targets)
        if targets is not None and len(targets) != len(cases):
            raise CohortError(
                f"targets must have one row per case ({len(cases)}), got {len(targets)}"
            )
        self._cases, self._targets = list(cases), targets
        self._convention, self._in_features = convention, in_features
        self._draw = draw

    def __len__(self) -> int:
        return len(self._cases)

    def for_epoch(self, epoch: int) -> PreparedCases:
        """See `modaltune.learner.TrainingCases.for_epoch`."""
        if self._draw is None:
            return self
        drawn = [self._draw(case, epoch) for case in self._cases]
        return PreparedCases(drawn, self._targets, self._convention, self._in_features)

    def batch(self, indices: Sequence[int]) -> CaseBatch:
        """Return the packed tensors of some cases."""
        chosen = [self._cases[i] for i in indices]
        return pack_cases(chosen, self._convention, self._in_features)

    def targets(self, indices: Sequence[int]) -> Targets:
        """Return the targets of some cases.

        Raises:
            CohortError: These cases carry no targets.
        """
        if self._targets is None:
            raise CohortError("cases must carry targets to train on, got none; embed their labels")
        return self._targets.rows(indices)
