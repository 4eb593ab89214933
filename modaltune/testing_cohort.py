"""A small study on disk for tests: a cases folder with features, genes, labels, and a random run.

Every case has genes, most have a slide; class and risk follow from one gene each, so that probes
on a random model have something to find.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from modaltune.adapter import AdapterConfig
from modaltune.cases_folder import CasesContent, CasesFolder, write_cases_folder
from modaltune.cases_join import SlideTable, assign_slides, empty_clinical
from modaltune.checkpoint import Run, save_run
from modaltune.config import ModalTuneConfig
from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.cohort import SlideItem
from modaltune.engine.feature_index import index_features
from modaltune.fitting import fit_preprocessing
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.pathways import PathwayTable
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.splits import Split
from modaltune.testing_features import small_features

GENES = tuple(f"G{k}" for k in range(6))
TASKS = ("general", "diagnosis", "survival")
FEATURE_WIDTH = 4


def small_cohort(
    folder: Path,
    *,
    seed: int = 0,
    cases: int = 90,
    sites: tuple[str, ...] = ("breast",),
    prefix: str = "P",
) -> CasesFolder:
    """Write a cases folder: `cases` patients, some without class, follow-up, slide or both."""
    rng = np.random.default_rng(seed)
    ids = [f"{prefix}{number:03d}" for number in range(cases)]
    genes = pd.DataFrame(rng.normal(size=(cases, len(GENES))), ids, list(GENES), dtype="float32")
    clinical = empty_clinical(ids)
    signal = genes["G0"] + 0.4 * rng.normal(size=cases)
    clinical["primary_class"] = (signal > 0.3).astype(int)
    death = rng.exponential(50 * np.exp(-1.2 * genes["G1"]))
    leaving = rng.uniform(10, 140, cases)
    clinical["survival_months"] = np.ceil(np.minimum(death, leaving)).astype(float)
    clinical["event"] = (death <= leaving).astype(float)
    clinical["site"] = rng.choice(sites, cases)
    clinical.loc[ids[3::20], "primary_class"] = -1
    clinical.loc[ids[7::20], ["survival_months", "event"]] = np.nan
    order = list(rng.permutation(ids))
    train, val, test = np.split(np.array(order), [int(0.55 * cases), int(0.7 * cases)])
    slides = _slides(folder.parent / f"{folder.name}-features", ids[::2])
    content = CasesContent(
        clinical=clinical,
        expression=genes.drop(index=ids[::15]),
        pathways=PathwayTable(("p", "q"), (GENES[:3], GENES[2:])),
        slides=slides,
        splits=[Split(tuple(train), tuple(val), tuple(test))],
    )
    return write_cases_folder(folder, content)


def _slides(folder: Path, cases: list[str]) -> pd.DataFrame:
    """Write a slide's features per case and return their rows of `slides.parquet`."""
    for case in cases:
        name = f"{case}-S"
        item = SlideItem(Path(name), name, case, None)
        small_features(folder / f"{name}.h5", item, width=FEATURE_WIDTH)
    files = [(folder, file) for file in index_features(folder).files]
    told = SlideTable({f"{case}-S": case for case in cases}, {})
    return assign_slides(files, None, told, lambda reason, slides: None)


def small_run(folder: Path, cases: CasesFolder, *, seed: int = 0) -> Path:
    """Write a run folder of a tiny random model whose inputs were fitted on the training cases."""
    split = cases.split()
    ready = fit_preprocessing(cases, split)
    pathways = ready.pathways
    config = ModalTuneConfig(
        slide_encoder=LongNetConfig(
            in_features=FEATURE_WIDTH, width=16, depth=2, heads=2, ffn_width=16
        ),
        adapter=AdapterConfig(heads=2, interactions=((0, 0), (1, 1))),
        genes=GeneConfig(width=8, depth=1, tokens=4),
        tasks=TASKS,
        out_features=12,
        random_backbone=True,
    )
    torch.manual_seed(seed)
    model = ModalTune(
        config,
        gene_index=None if pathways is None else pathways.indices,
        gene_offsets=None if pathways is None else pathways.offsets,
    )
    info = {"cases": [{"path": str(cases.path), "sha256": cases.sha256, "fold": 0}], "seed": seed}
    save_run(folder, Run(model.eval(), ready, info=info))
    write_json_atomic(folder / "split.json", split.to_dict())
    return folder
