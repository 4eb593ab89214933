"""What is trained for the benchmark of genes alone: ModalTune, the genes-only rivals, components.

Everything is kept in a folder: a run that is there is not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from modaltune.cases_build import build_cases
from modaltune.cases_folder import DESCRIPTION, CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.checkpoint import DESCRIPTION as RUN
from modaltune.engine.errors import InputError
from modaltune.evaluation import EmbeddedCases
from modaltune.fitting import fit_preprocessing
from modaltune.run_config import RunConfig, load_run_config
from modaltune.splits import Split
from modaltune.train_run import run_training

PRESET = "genes"
OURS = "modaltune"
TABLES = {"cbioportal": "tcga_{}_all_clean.csv.zip", "xena": "tcga_{}_rnaseq_xena.csv.gz"}


@dataclass(frozen=True)
class Linear:
    """Logistic regression and Cox on principal components of the genes.

    Attributes:
        components: How many, or as many as the training cases allow.
        clip: Quantiles at which genes are clipped.
    """

    components: int
    clip: tuple[float, float] | None = (0.001, 0.999)

    @property
    def name(self) -> str:
        """What its rows are called."""
        return f"linear, {self.components} components"


# Chosen by cross-validation inside training and validation cases: brca_choice.py.
LINEAR = Linear(256, (0.05, 0.95))
ORIENTATION = Linear(32, LINEAR.clip)
CLASS_PROMPT = SURVIVAL_PROMPT = "general"
# Over the preset, which is ModalTune's.
SETTINGS: dict[str, tuple[str, ...]] = {
    OURS: (),
    "pathway_mlp": (
        "learner.kind=pathway_mlp",
        "learner.survival=cox",
        "learner.settings.token_width=8",
        "learner.settings.width=32",
        "learner.settings.dropout=0.25",
        "training.cases_per_step=32",
        "training.epochs=20",
        "training.validate_every=1000",
    ),
    "gene_mixer": (
        "learner.kind=gene_mixer",
        "learner.survival=cox",
        "learner.settings.width=64",
        "learner.settings.depth=0",
        "learner.settings.tokens=8",
        "learner.settings.dropout=0.1",
        "learner.settings.out_width=128",
        "training.cases_per_step=32",
        "training.epochs=20",
        "training.validate_every=1000",
    ),
}


def build(tcga: Path, out: Path, cohort: str, source: str) -> CasesFolder:
    """Build the cases folder of a cohort with its published split, or open it."""
    folder = out / f"{cohort}-{source}"
    if (folder / DESCRIPTION).is_file():
        return CasesFolder.open(folder)
    train, val, test = (
        tcga / "splits" / f"{cohort}_{part}.json.gz" for part in ("train", "val", "test")
    )
    request = CasesRequest(
        published_split=(train, val, test),
        clinical=(tcga / TABLES["cbioportal"].format(cohort),),
        expression=(tcga / TABLES[source].format(cohort),),
        pathways=tcga / "pathways_hallmark_reactome_331.csv.gz",
        duplicate_cases="first",
    )
    return build_cases(request, folder)


def config_of(name: str, cases: CasesFolder, seed: int, sets: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a model on genes alone.

    Args:
        name: One of `SETTINGS`.
        cases: Trained on.
        seed: Of the training.
        sets: `key=value` over the model's settings.
    """
    config = load_run_config(preset=PRESET, sets=[*SETTINGS[name], *sets])
    section = config.cases.model_copy(update={"folders": (cases.path,)})
    training = config.training.model_copy(update={"seed": seed})
    return config.model_copy(update={"cases": section, "training": training})


def train(name: str, cases: CasesFolder, folder: Path, seed: int, sets: Sequence[str] = ()) -> Path:
    """Train one seed of a model, or find it trained; return its run folder.

    Raises:
        InputError: The folder holds a run of other settings.
    """
    config = config_of(name, cases, seed, sets)
    output = config.output.model_copy(update={"folder": folder})
    config = config.model_copy(update={"output": output})
    if not (folder / RUN).is_file():
        run_training(config)
        return folder
    known = json.loads((folder / RUN).read_text(encoding="utf-8"))["info"]["run_config"]
    if other := config.differences(known):
        raise InputError(
            f"{folder} must hold a run of these settings, got others in {', '.join(other)}; give "
            "another --out"
        )
    return folder


def scaled_genes(
    cases: CasesFolder, split: Split, clip: tuple[float, float] | None
) -> pd.DataFrame:
    """Return standardised genes of all cases, case x gene float64; fitted on training cases."""
    genes = cases.expression
    if genes is None:
        raise InputError(
            "cases must have expression, got none; build them with an expression table"
        )
    fitted = fit_preprocessing(cases, split, use_slides=False, clip_quantiles=clip)
    names = () if fitted.pathways is None else fitted.pathways.genes
    values = fitted.gene_values(genes).numpy().astype(np.float64)
    return pd.DataFrame(values, genes.index, list(names))


def components_of(
    cases: CasesFolder,
    linear: Linear,
    split: Split | None = None,
    source: CasesFolder | None = None,
) -> EmbeddedCases:
    """Return principal components of standardised genes as an embedding.

    Args:
        cases: Embedded; its genes are scaled by its training cases.
        linear: How many components, and where genes are clipped.
        split: Of the cases; the first of the folder by default.
        source: Cohort whose training cases the components are fitted on; by default `cases`.
    """
    split = split or cases.split()
    genes = scaled_genes(cases, split, linear.clip)
    learned = genes[genes.index.isin(split.train)]
    if source is not None:
        own = scaled_genes(source, source.split(), linear.clip)
        learned = own[own.index.isin(source.split().train)]
    count = min(linear.components, len(learned) - 1, learned.shape[1])
    model = PCA(count, svd_solver="full").fit(learned.to_numpy())
    # A gene that the other cohort lacks is at its mean, 0.
    values = model.transform(genes.reindex(columns=learned.columns, fill_value=0.0).to_numpy())
    return EmbeddedCases(tuple(genes.index), values[:, None], ("genes",), cases.clinical)
