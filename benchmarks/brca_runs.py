"""What is trained for the benchmark of genes alone: ModalTune, the genes-only rivals, components.

Everything is kept in a folder: a run or a table of predictions that is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from modaltune.baselines import SupervisedLearner, make_baseline
from modaltune.cases_build import build_cases
from modaltune.cases_folder import DESCRIPTION, CasesFolder
from modaltune.cases_request import CasesRequest
from modaltune.checkpoint import DESCRIPTION as RUN
from modaltune.config import DIAGNOSIS, SURVIVAL
from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.errors import InputError
from modaltune.evaluation import EmbeddedCases
from modaltune.fitting import fit_preprocessing
from modaltune.predictions import Predictions, predictions_table, read_predictions
from modaltune.preprocessing import Preprocessing
from modaltune.run_config import RunConfig, load_run_config
from modaltune.splits import Split
from modaltune.train import fit
from modaltune.train_cases import PooledCases, StreamedCases, label_targets, pool_cases
from modaltune.train_config import TrainConfig
from modaltune.train_run import run_training

PRESET = "genes"
BATCH = 64  # cases embedded at once
TABLES = {"cbioportal": "tcga_{}_all_clean.csv.zip", "xena": "tcga_{}_rnaseq_xena.csv.gz"}


@dataclass(frozen=True)
class Rival:
    """A supervised rival: which baseline, its shape, and how it is trained.

    Attributes:
        name: One of `BASELINES`.
        settings: Of the baseline.
        training: Of the loop, over those of ModalTune's preset.
        survival: Head of survival.
        clip: Quantiles at which genes are clipped.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    survival: Any = "cox"
    clip: tuple[float, float] | None = (0.001, 0.999)

    def state(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return json.loads(json.dumps(vars(self)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Linear:
    """Logistic regression and Cox on principal components of the genes.

    Attributes:
        components: How many.
        clip: Quantiles at which genes are clipped.
    """

    components: int
    clip: tuple[float, float] | None = (0.001, 0.999)

    @property
    def name(self) -> str:
        """What its rows are called."""
        return f"linear, {self.components} components"


# Chosen by cross-validation inside training and validation cases: brca_choice.py.
CLASS_PROMPT, SURVIVAL_PROMPT = DIAGNOSIS, SURVIVAL
LINEAR = Linear(64, (0.05, 0.95))
ORIENTATION = Linear(32)
RIVALS = {
    rival.name: rival
    for rival in (
        Rival("pathway_mlp", {"token_width": 8, "width": 32, "dropout": 0.25}),
        Rival("gene_mixer", {"width": 32, "depth": 1, "tokens": 8, "out_width": 64}),
    )
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


def genes_config(cases: CasesFolder, folder: Path, seed: int, sets: Sequence[str]) -> RunConfig:
    """Return the configuration of one ModalTune run on genes alone."""
    config = load_run_config(preset=PRESET, sets=sets)
    return config.model_copy(
        update={
            "cases": config.cases.model_copy(update={"folders": (cases.path,)}),
            "training": config.training.model_copy(update={"seed": seed}),
            "output": config.output.model_copy(update={"folder": folder}),
        }
    )


def train_modaltune(cases: CasesFolder, folder: Path, seed: int, sets: Sequence[str]) -> Path:
    """Train one seed, or find it trained; return its run folder.

    Raises:
        InputError: The folder holds a run of other settings.
    """
    config = genes_config(cases, folder, seed, sets)
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


def fit_rival(
    rival: Rival, pooled: PooledCases, preprocessing: Preprocessing, split: Split, seed: int
) -> tuple[SupervisedLearner, StreamedCases]:
    """Train a rival on the training cases of a split; return it and these cases."""
    train = served(pooled, preprocessing, split.train)
    recipe = recipe_of(rival, seed)
    torch.manual_seed(seed)
    index = preprocessing.pathways
    if train.all_targets is None or index is None:
        raise InputError("cases must have genes and labels, got none; build the cases folder")
    learner = SupervisedLearner.for_training(
        make_baseline(rival.name, pathways=index, settings=rival.settings),
        train.all_targets,
        survival=rival.survival,
        cases_per_batch=recipe.cases_per_step,
    )
    fit(learner, train, recipe)
    return learner, train


def recipe_of(rival: Rival, seed: int) -> TrainConfig:
    """Return how a rival is trained."""
    base = load_run_config(preset=PRESET).training
    recipe = {k: v for k, v in base.model_dump().items() if k in TrainConfig.model_fields}
    return TrainConfig.model_validate({**recipe, **rival.training, "seed": seed})


def served(
    pooled: PooledCases, preprocessing: Preprocessing, case_ids: Sequence[str]
) -> StreamedCases:
    """Return cases with their labels as the loop reads them, genes alone."""
    targets = label_targets(pooled.clinical.loc[list(case_ids)], None)
    return StreamedCases(pooled, case_ids, preprocessing, targets, "scaled", 1)


def predict_rival(learner: SupervisedLearner, cases: StreamedCases) -> Predictions:
    """Return what a trained rival's heads say of cases."""
    probabilities, risks = [], []
    for start in range(0, len(cases), BATCH):
        said = learner.predict(cases.batch(range(start, min(start + BATCH, len(cases)))))
        if said.probabilities is None or said.risk is None:
            raise InputError("a rival must have both heads, got one; give classes and survival")
        probabilities.append(said.probabilities)
        risks.append(said.risk)
    classes = torch.cat(probabilities).double().numpy()
    # Rounded in float32, rows miss a sum of 1 by more than the tables allow.
    classes /= classes.sum(axis=1, keepdims=True)
    risk = torch.cat(risks).double().numpy()
    return Predictions(cases.case_ids, np.arange(classes.shape[1]), classes, risk)


def rival_predictions(rival: Rival, cases: CasesFolder, folder: Path, seed: int) -> Predictions:
    """Train one seed of a rival and predict every case, or read what it said before.

    Raises:
        InputError: The folder holds predictions of other settings.
    """
    key = {**rival.state(), "seed": seed, "cases": cases.sha256}
    told, table = folder / "rival.json", folder / "predictions.parquet"
    if table.is_file():
        if (known := json.loads(told.read_text(encoding="utf-8"))) != key:
            raise InputError(
                f"{folder} must hold predictions of {key}, got {known}; give another --out"
            )
        return read_predictions(table)
    pooled = pool_cases([cases])
    split = pooled.split
    ready = fit_preprocessing(cases, split, use_slides=False, clip_quantiles=rival.clip)
    learner, _ = fit_rival(rival, pooled, ready, split, seed)
    said = predict_rival(learner, served(pooled, ready, split.case_ids))
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(told, key)
    with atomic_path(table) as temporary:
        predictions_table(said).to_parquet(temporary)
    return said


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
    genes = scaled_genes(cases, split or cases.split(), linear.clip)
    if source is None:
        learned = genes[genes.index.isin((split or cases.split()).train)]
    else:
        own = scaled_genes(source, source.split(), linear.clip)
        learned = own[own.index.isin(source.split().train)]
    model = PCA(linear.components, random_state=0).fit(learned.to_numpy())
    # A gene that the other cohort lacks is at its mean, 0.
    values = model.transform(genes.reindex(columns=learned.columns, fill_value=0.0).to_numpy())
    return EmbeddedCases(tuple(genes.index), values[:, None], ("genes",), cases.clinical)
