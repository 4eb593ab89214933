"""A synthetic cohort with a planted signal: slides, expression, clinical rows, and the truth.

The data is SYNTHETIC: gene symbols, sites and diagnoses are real words, and nothing else is real.
Subtype and risk need the image and the genes together; `modaltune.synthetic_plan` says how.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modaltune import synthetic_plan as plan
from modaltune.engine.pyramid import write_pyramid
from modaltune.errors import CohortError
from modaltune.synthetic_tissue import LARGE_SHAPES, SMALL_SHAPES, TissuePainter, sample_stain

logger = logging.getLogger(__name__)

SLIDE_MPP = 0.5
TILE_PX = 256
MIN_CASES = 8
TWO_SLIDE_SHARE = 0.15
MISSING_SHARE = 0.06
CLINICAL_COLUMNS = (
    "case_id",
    "age",
    "sex",
    "site",
    "diagnosis",
    "stage",
    "t",
    "n",
    "m",
    "survival_months",
    "event",
    "primary_class",
)
NOTICE = (
    "SYNTHETIC: drawn slides and random numbers, no patient is behind them. Real gene symbols, "
    "sites and diagnoses are used as names only."
)


@dataclass(frozen=True)
class SyntheticCase:
    """One case as planned and written.

    Attributes:
        case_id: such as `SYN-001`.
        slide_ids: its slides, none where the image is missing.
        discohesive: planned share of discohesive growth in its slides, 0-1.
        activity: of the planted pathways, g.
        primary_class: 0 or 1, as in `clinical.csv`.
        has_expression: it has a row in `expression.csv`.
        has_clinical: its row in `clinical.csv` has age, sex and site.
    """

    case_id: str
    slide_ids: tuple[str, ...]
    discohesive: float
    activity: float
    primary_class: int
    has_expression: bool
    has_clinical: bool


@dataclass(frozen=True)
class SyntheticCohort:
    """Where a cohort lies and what it holds.

    Attributes:
        root: folder of all files.
        seed: it was made with.
        cases: in the order of the tables.
    """

    root: Path
    seed: int
    cases: tuple[SyntheticCase, ...]

    @property
    def slides(self) -> tuple[Path, ...]:
        """Slide files, in the order of the manifest."""
        return tuple(self.root / _slide_path(s) for case in self.cases for s in case.slide_ids)

    @property
    def manifest(self) -> Path:
        """Slides and their cases: columns slide (relative to this file), case_id, mpp (empty)."""
        return self.root / "manifest.csv"

    @property
    def expression(self) -> Path:
        """Cases x genes, log2(TPM + 1)-like."""
        return self.root / "expression.csv"

    @property
    def pathways(self) -> Path:
        """Gene sets, some of them planted, as GMT."""
        return self.root / "pathways.gmt"

    @property
    def clinical(self) -> Path:
        """Clinical inputs and outcomes, a row for every case."""
        return self.root / "clinical.csv"

    @property
    def truth(self) -> Path:
        """What was planted, as JSON."""
        return self.root / "truth.json"


def write_cohort(
    out: Path,
    *,
    cases: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SyntheticCohort:
    """Write a synthetic cohort, whole or not at all.

    The same arguments give the same tables byte by byte and the same pixels. About 15 % of the
    cases have two slides; 6 % have no slide, 6 % no expression row and 6 % no clinical inputs (age,
    sex, site; the outcomes stay), each of these a different case.

    Args:
        out: folder to make; it must not exist or be empty.
        cases: how many, at least `MIN_CASES`.
        seed: of everything, at least 0.
        on_progress: called as (slides done, slides in all) before the first and after each slide.

    Returns:
        The cohort.

    Raises:
        CohortError: an argument breaks its rule, or the folder holds something.
    """
    _check(out, cases, seed)
    rng = np.random.default_rng([seed, 0])
    latents = plan.sample_latents(cases, rng)
    outcomes = plan.sample_outcomes(latents, rng)
    rows = plan.sample_clinical(cases, rng)
    genes, expression = plan.sample_expression(latents.activity, rng)
    people = _plan_cases(latents, rng)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        (work / "slides").mkdir(parents=True)
        tiles = _write_slides(work, people, seed, on_progress)
        _write_manifest(work, people)
        _write_expression(work, people, genes, expression)
        _write_pathways(work)
        _write_clinical(work, people, rows, outcomes)
        _write_truth(work, people, latents, outcomes, tiles, seed)
        work.replace(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    logger.info("wrote a synthetic cohort of %d cases and %d slides to %s", cases, len(tiles), out)
    return SyntheticCohort(root=out, seed=seed, cases=people)


def _check(out: Path, cases: int, seed: int) -> None:
    if cases < MIN_CASES:
        raise CohortError(f"cases must be at least {MIN_CASES}, got {cases}; 64 is usual")
    if seed < 0:
        raise CohortError(f"seed must be at least 0, got {seed}")
    if out.exists() and not out.is_dir():
        raise CohortError(f"out must be a folder, got the file {out}; name another")
    if out.is_dir() and any(out.iterdir()):
        raise CohortError(f"out must be a new or empty folder, got {out}; name another or empty it")


def _plan_cases(latents: plan.Latents, rng: np.random.Generator) -> tuple[SyntheticCase, ...]:
    """Say which cases lack what and which have two slides: groups that do not overlap."""
    cases = len(latents.subtype)
    digits = max(3, len(str(cases)))
    missing = max(1, round(MISSING_SHARE * cases))
    order = _alternate(latents.subtype, rng)
    no_slide, no_expression, no_clinical, rest = np.split(
        order, [missing, 2 * missing, 3 * missing]
    )
    two_slides = set(rest[: max(1, round(TWO_SLIDE_SHARE * cases))].tolist())
    people = []
    for i in range(cases):
        case_id = f"SYN-{i + 1:0{digits}d}"
        count = 0 if i in no_slide else 2 if i in two_slides else 1
        people.append(
            SyntheticCase(
                case_id=case_id,
                slide_ids=tuple(f"{case_id}-{letter}" for letter in "AB"[:count]),
                discohesive=float(latents.discohesive[i]),
                activity=float(latents.activity[i]),
                primary_class=int(latents.subtype[i]),
                has_expression=i not in no_expression,
                has_clinical=i not in no_clinical,
            )
        )
    return tuple(people)


def _alternate(classes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """All cases in random order, the classes taking turns: any stretch holds both alike."""
    order = rng.permutation(len(classes))
    turn = np.empty(len(classes), np.int64)
    for label in (0, 1):
        members = classes[order] == label
        turn[members] = np.arange(members.sum())
    return order[np.argsort(turn, kind="stable")]


def _slide_path(slide_id: str) -> str:
    return f"slides/{slide_id}.tiff"


def _write_slides(
    root: Path,
    people: Sequence[SyntheticCase],
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, list[dict[str, float]]]:
    """Draw and write every slide; returns what was drawn in each tile, by slide."""
    painter = TissuePainter(seed, tile_px=TILE_PX)
    jobs = [
        (number, slide, letter, person)
        for number, person in enumerate(people)
        for letter, slide in enumerate(person.slide_ids)
    ]
    tiles: dict[str, list[dict[str, float]]] = {}
    if on_progress is not None:
        on_progress(0, len(jobs))
    for number, slide, letter, person in jobs:
        # A source of randomness for each slide: a slide does not depend on those before it.
        rng = np.random.default_rng([seed, 1, number, letter])
        shapes = LARGE_SHAPES if len(person.slide_ids) == 1 else SMALL_SHAPES
        shape = shapes[rng.integers(len(shapes))]
        drawn = painter.draw(person.discohesive, shape, sample_stain(rng), rng)
        write_pyramid(
            root / _slide_path(slide),
            drawn.rgb,
            mpp=SLIDE_MPP,
            levels=2,
            tile_px=TILE_PX,
            compression="deflate",
        )
        tiles[slide] = [
            {"x": int(x), "y": int(y), "discohesive": round(float(share), 4)}
            for (x, y), share in zip(drawn.coords, drawn.discohesive_share, strict=True)
        ]
        if on_progress is not None:
            on_progress(len(tiles), len(jobs))
    return tiles


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_manifest(root: Path, people: Sequence[SyntheticCase]) -> None:
    rows = [(_slide_path(s), person.case_id, "") for person in people for s in person.slide_ids]
    _write_table(root / "manifest.csv", ("slide", "case_id", "mpp"), rows)


def _write_expression(
    root: Path, people: Sequence[SyntheticCase], genes: Sequence[str], values: NDArray[np.float64]
) -> None:
    rows = [
        (person.case_id, *(f"{value:.4f}" for value in values[i]))
        for i, person in enumerate(people)
        if person.has_expression
    ]
    _write_table(root / "expression.csv", ("case_id", *genes), rows)


def _write_pathways(root: Path) -> None:
    lines = [
        "\t".join((name, "synthetic cohort: not a published gene set", *members)) + "\n"
        for name, members in plan.PATHWAYS.items()
    ]
    (root / "pathways.gmt").write_text("".join(lines), encoding="utf-8", newline="\n")


def _write_clinical(
    root: Path,
    people: Sequence[SyntheticCase],
    rows: Sequence[dict[str, str]],
    outcomes: plan.Outcomes,
) -> None:
    table = []
    for i, (person, row) in enumerate(zip(people, rows, strict=True)):
        record: dict[str, object] = {
            **row,
            "case_id": person.case_id,
            "age": int(outcomes.age[i]),
            "diagnosis": plan.DIAGNOSES[person.primary_class],
            "survival_months": f"{outcomes.survival_months[i]:.1f}",
            "event": int(outcomes.event[i]),
            "primary_class": person.primary_class,
        }
        if not person.has_clinical:
            record |= {"age": "", "sex": "", "site": ""}
        table.append([record[column] for column in CLINICAL_COLUMNS])
    _write_table(root / "clinical.csv", CLINICAL_COLUMNS, table)


def _write_truth(
    root: Path,
    people: Sequence[SyntheticCase],
    latents: plan.Latents,
    outcomes: plan.Outcomes,
    tiles: dict[str, list[dict[str, float]]],
    seed: int,
) -> None:
    records = [
        {
            "case_id": person.case_id,
            "morphology": round(float(latents.morphology[i]), 6),
            "discohesive_share": round(person.discohesive, 6),
            "pathway_activity": round(person.activity, 6),
            "primary_class": person.primary_class,
            "label_changed": bool(latents.is_changed[i]),
            "log_hazard": round(float(outcomes.log_hazard[i]), 6),
            "has_slide": bool(person.slide_ids),
            "has_expression": person.has_expression,
            "has_clinical": person.has_clinical,
            "slides": {slide: tiles[slide] for slide in person.slide_ids},
        }
        for i, person in enumerate(people)
    ]
    truth = {"notice": NOTICE, "seed": seed, **_describe_planting(), "cases": records}
    text = json.dumps(truth, indent=1, ensure_ascii=False) + "\n"
    (root / "truth.json").write_text(text, encoding="utf-8", newline="\n")


def _describe_planting() -> dict[str, Any]:
    """How subtype, risk and survival were made, with every coefficient."""
    return {
        "image": {
            "discohesive_share": "0.5 + morphology / (2 * latent_max), of the area of all tiles",
            "latent_max": plan.LATENT_MAX,
            "mpp": SLIDE_MPP,
            "tile_px": TILE_PX,
        },
        "genes": {"planted_pathways": list(plan.PLANTED_PATHWAYS)},
        "subtype": {
            "rule": "class 1 where morphology + pathway_activity > 0, then some labels changed",
            "morphology": "(score + contrast) / 2",
            "pathway_activity": "(score - contrast) / 2",
            "score_size": [plan.SCORE_LOW, plan.SCORE_HIGH],
            "contrast_half_width": plan.CONTRAST_HALF_WIDTH,
            "changed_labels": plan.CHANGED_LABELS,
            "balanced_accuracy_of_the_best_rule": {
                "image_only": plan.ALONE_BALANCED_ACCURACY,
                "genes_only": plan.ALONE_BALANCED_ACCURACY,
                "image_and_genes": plan.TOGETHER_BALANCED_ACCURACY,
                "of": "complete cases of a large cohort",
            },
        },
        "risk": {
            "log_hazard": "sum of coefficient * value; survival is Weibull, proportional hazards",
            "morphology": plan.RISK_MORPHOLOGY,
            "pathway_activity": plan.RISK_ACTIVITY,
            "age_per_year_over_65": plan.RISK_AGE_PER_YEAR,
            "weibull_shape": plan.WEIBULL_SHAPE,
            "weibull_scale_months": plan.WEIBULL_SCALE_MONTHS,
            "censored_share": plan.CENSORED_SHARE,
        },
        "nothing_planted_in": ["sex", "all other pathways"],
        "the_same_in_every_case": ["site", "stage", "t", "n", "m"],
    }
