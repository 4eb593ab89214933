"""A small cohort as a hospital would have it, written as raw files in any order of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modaltune.cases_request import CasesRequest
from modaltune.engine.cohort import SlideItem
from modaltune.testing_features import small_features

GENES = tuple(f"G{k:02d}" for k in range(12))
CASES = tuple(f"TCGA-{'ABCD'[k % 4]}{k % 3}-{k:04d}" for k in range(48))
#: Cases without expression, and without slides; the last case has neither.
NO_GENES, NO_SLIDES = (*CASES[3:6], CASES[-1]), (*CASES[8:11], CASES[-1])


def write_raw_cohort(folder: Path, *, order: int | None = None) -> CasesRequest:
    """Write GDC clinical, Xena expression, gene sets, slides with features, and what reads them.

    Args:
        folder: Where; features always lie in `features` beside it, so that two orders share them.
        order: Seed that shuffles the rows (and Xena's columns) of every file; None: as they come.

    Returns:
        The request that joins the cohort.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    _write(_clinical(rng), folder / "clinical.tsv", order)
    genes = _expression(rng)
    if order is not None:
        genes = genes.sample(frac=1, axis=1, random_state=order)
    _write(genes.rename_axis("sample").reset_index(), folder / "xena.tsv", order)
    pathways = pd.DataFrame(
        rng.random((len(GENES) + 1, 5)) < 0.4,
        index=pd.Index([*GENES, "ABSENT"], name="gene"),
        columns=[f"SET_{k}" for k in range(5)],
    ).astype(int)
    pathways.iloc[:2] = 1
    _write(pathways.reset_index(), folder / "pathways.csv", order, sep=",")
    slides = [(f"{case}-01Z-00-DX{n + 1}", case) for k, case in enumerate(CASES)
              for n in range(1 + k % 2) if case not in NO_SLIDES]  # fmt: skip
    table = pd.DataFrame(slides, columns=["slide", "case_id"])
    _write(table, folder / "slides.csv", order, sep=",")
    write_slides(folder.parent / "features", [*table["slide"], "TCGA-ZZ-9999-01Z-00-DX1"])
    return CasesRequest(
        clinical=(folder / "clinical.tsv",),
        expression=(folder / "xena.tsv",),
        pathways=folder / "pathways.csv",
        features=(folder.parent / "features",),
        slides=folder / "slides.csv",
        classes="published",
        gene_aliases="none",
    )


def write_slides(folder: Path, slides: Sequence[str]) -> None:
    """Write a feature file per slide, where there is none yet."""
    folder.mkdir(exist_ok=True)
    for slide in slides:
        path = folder / f"{slide}.h5"
        if not path.exists():
            small_features(path, SlideItem(path, slide, slide), tiles=3, width=4)


def _clinical(rng: np.random.Generator) -> pd.DataFrame:
    """Make GDC rows: one per treatment, deaths, gaps, one death without a date."""
    rows: list[dict[str, Any]] = []
    for k, case in enumerate(CASES):
        is_dead, days = bool(rng.random() < 0.4), int(rng.integers(30, 3000))
        shared = {
            "case_id": f"uuid-{k:03d}",
            "case_submitter_id": case,
            "project_id": "TCGA-BRCA",
            "vital_status": "Dead" if is_dead else "Alive",
            "days_to_death": days if is_dead and k != 1 else "'--",
            "days_to_last_follow_up": days if not is_dead or k == 1 else "'--",
            "gender": "male" if k % 9 == 0 else "female",
            "age_at_index": "'--" if k % 11 == 0 else int(rng.integers(30, 90)),
            "primary_diagnosis": (
                "Infiltrating duct carcinoma, NOS",
                "Lobular carcinoma, NOS",
                "Infiltrating duct carcinoma, NOS",
                "Mucinous adenocarcinoma",
            )[int(rng.integers(4))],
            "ajcc_pathologic_stage": ("Stage IA", "Stage IIB", "Stage 0", "'--")[k % 4],
            "ajcc_pathologic_t": ("T1", "T2a", "TX", "'--")[int(rng.integers(4))],
            "ajcc_pathologic_n": "N0",
            "ajcc_pathologic_m": "M0",
        }
        rows += [{**shared, "treatment_type": kind} for kind in ("Radiation", "Pharmaceutical")]
    rows[2]["vital_status"] = rows[3]["vital_status"] = "Dead"
    return pd.DataFrame(rows, dtype=object)


def _expression(rng: np.random.Generator) -> pd.DataFrame:
    """Make gene x sample: primary tumours, normal tissue, and a metastasis beside a primary."""
    cases = [case for case in CASES if case not in NO_GENES]
    samples = [f"{case}-01" for case in cases] + [f"{case}-11" for case in cases[:4]]
    samples += [f"{cases[0]}-06", "TCGA-ZZ-9999-01"]
    values = rng.normal(8, 2, (len(GENES) + 1, len(samples))).round(4)
    return pd.DataFrame(values, index=[*GENES, "UNUSED"], columns=samples)


def _write(table: pd.DataFrame, path: Path, order: int | None, sep: str = "\t") -> None:
    if order is not None:
        table = table.sample(frac=1, random_state=order)
    table.to_csv(path, sep=sep, index=False)
