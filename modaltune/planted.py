"""A planted cohort of tile features and genes, in which neither modality suffices.

Every case has two grades and two activities, standard normal. A *grade* shows in the tiles of one
pattern (5 % of the tiles), an *activity* in the genes of one pathway (of 30). With the defaults,
for the grade g and the activity a of the class (correlation -0.3), and those of the risk likewise:

    class 1 with probability sigmoid(9 (g + a + 0.5 g a))
    log hazard = 2.5 (g + a + 0.5 g a), Weibull times of median 40 months, uniform censoring

The best predictor that knows a modality exactly reaches a balanced accuracy of about 0.71 and a
c-index of 0.72; both together 0.95 and 0.91 (`modaltune.planted_truth.bayes_scores`).

Tiles are vectors of width 32: the prototype of a tissue or of a pattern (orthogonal, length 3), for
pattern tiles the grade times 1.5 along a direction of its own, a shift of the whole slide (0.1 per
feature), and noise (0.7 per feature). Genes are loadings (0.5 to 1) times the activity of their
pathway, six background factors that run through all of them (loadings of 0.2), and noise (0.5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from modaltune.cases import Cohort
from modaltune.cases_folder import CasesContent, CasesFolder, write_cases_folder
from modaltune.clinical import COLUMNS
from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.store import TileFeatures, feature_recipe, write_features
from modaltune.errors import InputError
from modaltune.pathways import PathwayTable
from modaltune.planted_truth import Outcomes, Truth, bayes_scores, draw_latents, draw_outcomes
from modaltune.splits import Split

#: Diagnosis of class 0 and 1, as it goes into the label sentences.
DIAGNOSES = ("infiltrating duct carcinoma", "lobular carcinoma")
#: Pathways whose activity makes class and risk.
CLASS_PATHWAY, RISK_PATHWAY = 0, 1
ENCODER = "planted"
TILE_PX, MPP = 256, 0.5
PATTERNS = ("class_grade", "risk_grade")


class PlantedConfig(BaseModel):
    """Size and noise of a planted cohort; everything follows from these values and the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_train: int = Field(200, gt=0, description="training cases, validation included")
    num_val: int = Field(0, ge=0, description="of the training cases, set aside for validation")
    num_test: int = Field(400, gt=0, description="test cases")
    min_tiles: int = Field(300, gt=0, description="tiles of a case, at least")
    max_tiles: int = Field(1500, gt=0, description="tiles of a case, at most")
    tile_width: int = Field(32, ge=12, description="width of the tile features")
    tissues: int = Field(4, gt=0, description="kinds of tissue beside the two patterns")
    pattern_share: float = Field(0.05, gt=0, lt=0.5, description="tiles of each pattern")
    prototype: float = Field(3.0, gt=0, description="length of a tissue's mean vector")
    grade_gain: float = Field(1.5, gt=0, description="shift of pattern tiles per unit of grade")
    slide_noise: float = Field(0.1, ge=0, description="shift of all tiles of a case")
    tile_noise: float = Field(0.7, ge=0, description="of every tile and feature")
    pathways: int = Field(30, gt=1, description="pathways")
    genes_per_pathway: int = Field(10, gt=0, description="genes of a pathway alone")
    shared_genes: int = Field(2, ge=0, description="genes a pathway lists beside its own")
    factors: int = Field(6, ge=0, description="background factors behind all genes")
    factor_loading: float = Field(0.2, ge=0, description="spread of a gene's loading on each")
    gene_noise: float = Field(0.5, ge=0, description="of every gene")
    truth: Truth = Truth()
    shuffle_labels: bool = Field(
        False, description="deal the labels out anew within each part of the split"
    )
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class MemoryCohort(Cohort):
    """A cohort whose tile features are in memory.

    Attributes:
        features: Tile features by case.
    """

    features: Mapping[str, tuple[TileFeatures, ...]] = field(default_factory=dict)

    def read_slides(self, case_id: str) -> tuple[TileFeatures, ...]:
        """Return the tile features of one case."""
        return tuple(self.features.get(case_id, ()))


@dataclass(frozen=True)
class PlantedCohort:
    """A planted cohort and what was planted.

    Attributes:
        config: What it was made from.
        cohort: Tiles, expression and clinical rows (`modaltune.clinical.COLUMNS`) by case.
        pathways: The gene sets.
        split: Training, validation and test cases.
        latents: Hidden values by case, columns `modaltune.planted_truth.LATENTS`.
        pattern: Kind of every tile of a case: -1 tissue, 0 pattern of the class, 1 of the risk.
    """

    config: PlantedConfig
    cohort: Cohort
    pathways: PathwayTable
    split: Split
    latents: pd.DataFrame
    pattern: Mapping[str, npt.NDArray[np.int64]]

    @property
    def clinical(self) -> pd.DataFrame:
        """Clinical rows by case, with class, months and event."""
        if self.cohort.clinical is None:
            raise InputError("a planted cohort must have clinical rows, got none; use plant()")
        return self.cohort.clinical

    def facts(self) -> dict[str, Any]:
        """Return what was planted, and the best scores on the test cases, as JSON values.

        With shuffled labels the scores are what the hidden values would give by chance.
        """
        rows = self.clinical.loc[list(self.split.test)]
        outcomes = Outcomes(
            rows["primary_class"].to_numpy(np.int64),
            rows["survival_months"].to_numpy(np.float64),
            rows["event"].to_numpy(np.float64),
        )
        latents = self.latents.loc[list(self.split.test)]
        best = bayes_scores(self.config.truth, latents, outcomes)
        return {
            "config": self.config.model_dump(mode="json"),
            "class_pathway": self.pathways.names[CLASS_PATHWAY],
            "risk_pathway": self.pathways.names[RISK_PATHWAY],
            "genes": 0 if self.cohort.expression is None else self.cohort.expression.shape[1],
            "tiles": int(sum(map(len, self.pattern.values()))),
            "best_test_scores": {seen: score._asdict() for seen, score in best.items()},
        }

    def write(self, folder: str | Path) -> CasesFolder:
        """Write feature files, a cases folder and `planted.json` below a new folder.

        Returns:
            The cases folder, `<folder>/cases`.

        Raises:
            CohortError: `<folder>/cases` exists.
            DiskFullError: There is no room.
        """
        root = Path(folder)
        features = root / f"features_{ENCODER}"
        features.mkdir(parents=True, exist_ok=True)
        rows = []
        for case in self.cohort.case_ids:
            for slide in self.cohort.read_slides(case):
                name = f"{slide.slide}.h5"
                write_features(features / name, slide)
                rows.append(
                    {
                        "case_id": case,
                        "slide": slide.slide,
                        "root": str(features.resolve()),
                        "features": name,
                        "producer": slide.producer,
                        "encoder": slide.encoder,
                        "tiles": len(slide),
                        "width": slide.width,
                        "base_mpp": slide.base_mpp,
                        "target_mpp": slide.target_mpp,
                    }
                )
        facts = self.facts()
        content = CasesContent(
            clinical=self.clinical,
            expression=self.cohort.expression,
            pathways=self.pathways,
            slides=pd.DataFrame(rows),
            splits=(self.split,),
            facts={"sources": {}, "planted": facts},
            report=facts,
            report_md=f"# A planted cohort\n\n```json\n{json.dumps(facts, indent=1)}\n```\n",
        )
        write_json_atomic(root / "planted.json", facts)
        return write_cases_folder(root / "cases", content)


def plant(config: PlantedConfig | None = None) -> PlantedCohort:
    """Make a planted cohort; the same configuration gives the same bits.

    Raises:
        InputError: Sizes contradict each other.
    """
    config = config or PlantedConfig()
    _check(config)
    streams = np.random.SeedSequence(config.seed).spawn(6)
    rng_latents, rng_labels, rng_genes, rng_clinic, rng_shuffle = map(
        np.random.default_rng, streams[:5]
    )
    count = config.num_train + config.num_test
    ids = [f"PLANTED-{number:04d}" for number in range(count)]
    latents = draw_latents(config.truth, count, rng_latents).set_index(
        pd.Index(ids, name="case_id")
    )
    outcomes = draw_outcomes(config.truth, latents, rng_labels)
    learned = config.num_train - config.num_val
    parts = np.split(np.arange(count), [learned, config.num_train])
    if config.shuffle_labels:
        dealt = np.concatenate([rng_shuffle.permutation(part) for part in parts])
        outcomes = Outcomes(*(values[dealt] for values in outcomes))
    pathways, expression = _genes(config, latents, rng_genes)
    features, pattern = {}, {}
    basis = _basis(config, np.random.default_rng(streams[5]))
    hidden: list[dict[Any, Any]] = latents.to_dict(orient="records")
    for case, own, stream in zip(ids, hidden, streams[5].spawn(count), strict=True):
        slide, kinds = _slide(config, case, own, basis, np.random.default_rng(stream))
        features[case], pattern[case] = (slide,), kinds
    clinical = _clinical(ids, outcomes, rng_clinic)
    split = Split(*(tuple(ids[i] for i in part) for part in parts))
    cohort = MemoryCohort({}, expression, clinical, features=features)
    return PlantedCohort(config, cohort, pathways, split, latents, pattern)


def _check(config: PlantedConfig) -> None:
    if config.num_val >= config.num_train:
        raise InputError(
            f"num_val must be below num_train ({config.num_train}), got {config.num_val}; "
            "validation cases are taken from the training cases"
        )
    if config.max_tiles < config.min_tiles:
        raise InputError(
            f"max_tiles must be at least min_tiles ({config.min_tiles}), got {config.max_tiles}; "
            "swap them"
        )
    if config.min_tiles < len(PATTERNS):
        raise InputError(
            f"min_tiles must be at least {len(PATTERNS)}, a tile of each pattern, got "
            f"{config.min_tiles}; give every case more tiles"
        )
    others = (config.pathways - 1) * config.genes_per_pathway
    if config.shared_genes > others:
        raise InputError(
            f"shared_genes must be at most the genes of the other pathways ({others}), got "
            f"{config.shared_genes}; share fewer"
        )
    if (needed := config.tissues + 2 * len(PATTERNS)) > config.tile_width:
        raise InputError(
            f"tile_width must be at least {needed}, a direction for each tissue, pattern and "
            f"grade, got {config.tile_width}; widen the tiles or plant fewer tissues"
        )


def _basis(config: PlantedConfig, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return orthonormal rows: tissues, then prototype and grade direction of each pattern."""
    square = rng.standard_normal((config.tile_width, config.tile_width))
    return np.linalg.qr(square)[0][: config.tissues + 2 * len(PATTERNS)]


def _slide(
    config: PlantedConfig,
    case: str,
    latents: Mapping[str, float],
    basis: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> tuple[TileFeatures, npt.NDArray[np.int64]]:
    """Return the tiles of a case, and the kind of each (see `PlantedCohort.pattern`)."""
    count = int(rng.integers(config.min_tiles, config.max_tiles + 1))
    own = max(1, round(config.pattern_share * count))
    kinds = np.full(count, -1)
    for number, chosen in enumerate(np.split(rng.permutation(count)[: 2 * own], 2)):
        kinds[chosen] = number
    tissue = rng.choice(config.tissues, count, p=rng.dirichlet(np.full(config.tissues, 2.0)))
    means = config.prototype * basis[tissue]
    for number, latent in enumerate(PATTERNS):
        prototype, direction = basis[config.tissues + 2 * number :][:2]
        graded = config.grade_gain * latents[latent] * direction
        means[kinds == number] = config.prototype * prototype + graded
    means += config.slide_noise * rng.standard_normal(config.tile_width)
    noise = rng.standard_normal((count, config.tile_width), dtype=np.float32)
    features = means.astype(np.float32) + np.float32(config.tile_noise) * noise
    side = int(np.ceil(np.sqrt(1.3 * count)))
    cells = np.sort(rng.permutation(side * side)[:count])
    coords = np.stack([cells % side, cells // side], axis=1).astype(np.int64) * TILE_PX
    slide = TileFeatures(
        slide=case,
        features=features,
        coords=coords,
        tile_px=TILE_PX,
        level0_tile_px=TILE_PX,
        target_mpp=MPP,
        base_mpp=MPP,
        encoder=ENCODER,
        encoder_sha256="0" * 64,
        level0_size=(side * TILE_PX, side * TILE_PX),
        reader=ENCODER,
        recipe=feature_recipe(
            encoder=ENCODER, encoder_sha256="0" * 64, target_mpp=MPP, tile_px=TILE_PX
        ),
    )
    return slide, kinds


def _genes(
    config: PlantedConfig, latents: pd.DataFrame, rng: np.random.Generator
) -> tuple[PathwayTable, pd.DataFrame]:
    """Return the gene sets and the expression of every case."""
    cases, size = len(latents), config.genes_per_pathway
    activity = rng.standard_normal((cases, config.pathways))
    activity[:, CLASS_PATHWAY] = latents["class_activity"]
    activity[:, RISK_PATHWAY] = latents["risk_activity"]
    count = config.pathways * size
    names = [f"GENE{number:04d}" for number in range(count)]
    values = np.repeat(activity, size, axis=1) * rng.uniform(0.5, 1.0, count)
    loadings = config.factor_loading * rng.standard_normal((config.factors, count))
    values += rng.standard_normal((cases, config.factors)) @ loadings
    values += config.gene_noise * rng.standard_normal((cases, count))
    # Each gene on a level and a scale of its own, as log expression is.
    values = rng.uniform(2, 12, count) + rng.uniform(0.3, 2.0, count) * values
    sets = []
    for number in range(config.pathways):
        own = np.arange(number * size, (number + 1) * size)
        others = np.setdiff1d(np.arange(count), own)
        listed = [*own, *rng.choice(others, config.shared_genes, replace=False)]
        sets.append(tuple(names[gene] for gene in listed))
    table = PathwayTable(tuple(f"PATHWAY{n:02d}" for n in range(config.pathways)), tuple(sets))
    return table, pd.DataFrame(values.astype(np.float32), index=latents.index, columns=names)


def _clinical(ids: list[str], outcomes: Outcomes, rng: np.random.Generator) -> pd.DataFrame:
    """Return clinical rows; age and sex say nothing of the outcomes."""
    count = len(ids)
    rows: dict[str, Any] = dict.fromkeys(COLUMNS)
    rows |= {
        "project": "PLANTED",
        "site": "breast",
        "age": rng.integers(35, 86, count).astype(np.float64),
        "sex": rng.choice(["female", "male"], count),
        "diagnosis": [DIAGNOSES[label] for label in outcomes.classes],
        "survival_months": outcomes.months,
        "event": outcomes.events,
        "primary_class": outcomes.classes,
        "slides": [(case,) for case in ids],
    }
    index = pd.Index(ids, name="case_id")
    return pd.DataFrame(rows, index=index, columns=list(COLUMNS))
