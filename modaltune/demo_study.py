"""The demo's study: small models tuned fold by fold, with image, genes or both, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from modaltune.adapter import AdapterConfig
from modaltune.cases import Case, Cohort, PreparedCases, prepare_cases
from modaltune.checkpoint import Run
from modaltune.clinical_encoder import ClinicalEncoder
from modaltune.config import SURVIVAL, ModalTuneConfig
from modaltune.engine.store import open_features
from modaltune.evaluate import balanced_accuracy, bootstrap_interval, harrell_c_index
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import TASK_ROWS, SurvivalBins, label_cohort
from modaltune.learner import ModalTuneLearner
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.model_start import start_at_unit_gain
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.probes import fit_cox, fit_logistic
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.targets import TextProjector
from modaltune.text_encoders import SentenceBook, load_text_encoder
from modaltune.train import TrainConfig, embed_cases, fit

Floats = npt.NDArray[np.float64]
Inputs = Literal["image + genes", "image only", "genes only"]
BOTH: Inputs = "image + genes"
VARIANTS: tuple[Inputs, ...] = (BOTH, "image only", "genes only")
COX_PENALTY = 1.0  # forty training cases, dozens of features


@dataclass(frozen=True)
class StudyData:
    """A cohort with labels, and what is the same in every fold."""

    cohort: Cohort
    clinical: pd.DataFrame
    pathways: PathwayTable
    text: SentenceBook
    seed: int

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Every labelled case, in the order of all results."""
        return tuple(map(str, self.clinical.index))

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """Subtype of each case."""
        return self.clinical["primary_class"].to_numpy(np.int64)


@dataclass(frozen=True)
class VariantResult:
    """Out-of-fold predictions of one choice of inputs, and how good they are.

    Attributes:
        probability: `[n]` of class 1.
        risk: `[n]` log partial hazard.
        balanced_accuracy: Value and 95 % interval over patients.
        c_index: Likewise (Harrell).
        unpredictable: Cases without the modality; they get the training prior.
    """

    probability: Floats
    risk: Floats
    balanced_accuracy: tuple[float, float, float]
    c_index: tuple[float, float, float]
    unpredictable: int


@dataclass(frozen=True)
class StudyResult:
    """All variants on the same cases and folds."""

    case_ids: tuple[str, ...]
    classes: npt.NDArray[np.int64]
    durations: Floats
    events: Floats
    modalities: dict[str, list[bool]]
    variants: dict[str, VariantResult]

    @property
    def margin(self) -> float:
        """Balanced accuracy of both inputs minus the better one alone."""
        alone = [v.balanced_accuracy[0] for name, v in self.variants.items() if name != BOTH]
        return self.variants[BOTH].balanced_accuracy[0] - max(alone)


def load_study(cohort: Cohort, pathways: PathwayTable, seed: int) -> StudyData:
    """Put together what the study needs; the text encoder is the offline one."""
    if cohort.clinical is None:
        raise ValueError("a study needs clinical rows with labels")
    return StudyData(cohort, cohort.clinical, pathways, SentenceBook(load_text_encoder()), seed)


class DemoStudy(BaseModel):
    """Settings of the demo's models and folds; the same for all three choices of inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int = Field(4, ge=2)
    members: int = Field(4, ge=1, description="models per fold, averaged")
    workers: int = Field(2, ge=1, description="processes that tune, one thread each")
    width: int = Field(96, gt=0, description="tokens of the random LongNet")
    out_features: int = Field(64, gt=0)
    feature_gain: float = Field(0.3, gt=0, description="size of embedded tiles at the start")
    training: TrainConfig = TrainConfig(
        epochs=20, lr=1e-3, warmup_epochs=2, weight_decay=0.01, cases_per_step=8
    )

    def evaluate(self, data: StudyData, step: Callable[[int, int], None]) -> StudyResult:
        """Tune and predict fold by fold; nothing is fitted on a case it predicts."""
        ids, classes = np.array(data.case_ids), data.classes
        splitter = StratifiedKFold(self.folds, shuffle=True, random_state=data.seed)
        folds = list(splitter.split(ids, classes))
        usable_by = {inputs: usable(data, inputs) for inputs in VARIANTS}
        jobs = [
            _Job(self, data, inputs, fold, member, ids[train[has[train]]], ids[test[has[test]]])
            for inputs, has in usable_by.items()
            for fold, (train, test) in enumerate(folds)
            for member in range(self.members)
        ]
        for job in jobs[:: self.members]:
            self._targets(data, job.train)  # so that other processes need no text encoder
        found: dict[tuple[Inputs, int], list[tuple[Floats, Floats]]] = {}
        step(0, len(jobs))
        for done, (job, answer) in enumerate(_run(jobs, self.workers), start=1):
            found.setdefault((job.inputs, job.fold), []).append(answer)
            step(done, len(jobs))
        variants: dict[str, VariantResult] = {}
        for inputs, has in usable_by.items():
            # A case without the only modality asked for: the training prior, and average risk.
            probability, risk = np.zeros(len(ids)), np.zeros(len(ids))
            for fold, (train, test) in enumerate(folds):
                probability[test] = classes[train].mean()
                asked = test[has[test]]
                probability[asked], risk[asked] = np.mean(found[inputs, fold], axis=0)
            variants[inputs] = _score(data, probability, risk, int((~has).sum()))
        return StudyResult(
            data.case_ids,
            classes,
            data.clinical["survival_months"].to_numpy(np.float64),
            data.clinical["event"].to_numpy(np.float64),
            _modalities(data),
            variants,
        )

    def predict(
        self,
        data: StudyData,
        inputs: Inputs,
        train: Sequence[str],
        held_out: Sequence[str],
        member: int,
    ) -> tuple[Floats, Floats]:
        """Return class-1 probability and log hazard of held-out cases from one tuned model.

        The subtype is read from all three prompts together, the risk from the survival prompt.
        """
        run = self.tune(data, inputs, train, member)
        cases = prepare_cases(data.cohort, [*train, *held_out], run.preprocessing)
        embedded = _embed(run, cases)
        first = len(train)
        labels = data.clinical.loc[list(train)]
        prompts = _scale(embedded.reshape(len(cases), -1), first)
        probe = fit_logistic(prompts[:first], labels["primary_class"])
        survival = _scale(embedded[:, run.model.config.tasks.index(SURVIVAL)], first)
        cox = fit_cox(survival[:first], labels["survival_months"], labels["event"], COX_PENALTY)
        return (
            probe.predict_proba(prompts[first:])[:, 1],
            np.log(cox.partial_hazard(survival[first:])),
        )

    def tune(self, data: StudyData, inputs: Inputs, train: Sequence[str], member: int = 0) -> Run:
        """Fit the preprocessing on `train` and tune a model on it."""
        seed = 1000 * data.seed + member
        torch.manual_seed(seed)
        prepared = self._preprocessing(data, inputs, train)
        pathways = prepared.pathways
        model = ModalTune(
            self._config(prepared),
            gene_index=None if pathways is None else pathways.indices,
            gene_offsets=None if pathways is None else pathways.offsets,
        )
        cases = prepare_cases(data.cohort, train, prepared)
        tiles = [
            torch.from_numpy(np.asarray(s.features)) for c in cases for s in c.slides if len(s)
        ]
        start_at_unit_gain(model, torch.cat(tiles) if tiles else None, self.feature_gain)
        projector = TextProjector(data.text.width, self.out_features, seed=seed)
        targets = projector.project(self._targets(data, train))[:, list(TASK_ROWS)]
        recipe = self.training.model_copy(update={"seed": seed})
        fit(ModalTuneLearner(model, recipe), self._packed(model, cases, targets), recipe)
        return Run(model.eval(), prepared, projector, {"inputs": inputs})

    def final_run(self, data: StudyData, info: Mapping[str, Any]) -> Run:
        """Tune on every labelled case, with all inputs: the run that the demo leaves behind."""
        run = self.tune(data, BOTH, data.case_ids)
        run.info.update(info)
        return run

    def _targets(self, data: StudyData, train: Sequence[str]) -> Tensor:
        """Return the embedded label sentences `[n, 4, text width]` of the training cases."""
        rows = data.clinical.loc[list(train)]
        sentences = label_cohort(rows, SurvivalBins.fit(rows["survival_months"]))
        return torch.stack([data.text.encode(list(sentences[case])) for case in train])

    def _packed(self, model: ModalTune, cases: Sequence[Case], targets: Tensor) -> PreparedCases:
        return PreparedCases(
            cases, targets, model.config.position_convention, model.slide_encoder.in_features
        )

    def _preprocessing(
        self, data: StudyData, inputs: Inputs, train: Sequence[str]
    ) -> Preprocessing:
        """Fit everything beside the weights, on the training cases only."""
        cohort = data.cohort
        labels = data.clinical.loc[list(train)]
        expression = cohort.rows(cohort.expression, train)
        genes, index = None, None
        if inputs != "image only" and expression is not None:
            index = PathwayIndex.build(data.pathways, expression.columns)
            genes = GeneScaler.fit(expression[list(index.genes)])
        first = next(files[0] for files in cohort.slides.values() if files)
        recipe = None if inputs == "genes only" else TileRecipe.of(open_features(first))
        return Preprocessing(
            tiles=recipe,
            pathways=index,
            genes=genes,
            clinical=ClinicalEncoder.fit(labels) if inputs == BOTH else None,
            survival=SurvivalBins.fit(labels["survival_months"]),
        )

    def _config(self, prepared: Preprocessing) -> ModalTuneConfig:
        clinical = prepared.clinical
        tiles = prepared.tiles
        return ModalTuneConfig(
            slide_encoder=LongNetConfig(
                in_features=1280 if tiles is None else tiles.width,
                width=self.width,
                depth=1,
                heads=4,
                ffn_width=2 * self.width,
                grid_cells=256,
                segment_lengths=(64,),
                dilation_ratios=(1,),
                dropout=0.0,
                drop_path_rate=0.0,
            ),
            adapter=AdapterConfig(
                heads=4, bottleneck=0.5, interactions=((0, 0),), use_extra_extractors=False
            ),
            genes=None
            if prepared.pathways is None
            else GeneConfig(width=32, depth=0, tokens=8, dropout=0.1),
            clinical_features=0 if clinical is None else len(clinical.feature_names),
            out_features=self.out_features,
            trunk_dropout=False,
            task_dropout="shared",
            random_backbone=True,
        )


@dataclass(frozen=True)
class _Job:
    """One model to tune and the held-out cases it predicts."""

    study: DemoStudy
    data: StudyData
    inputs: Inputs
    fold: int
    member: int
    train: Sequence[str]
    held_out: Sequence[str]


def _do(job: _Job) -> tuple[Floats, Floats]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small run slower on two
    try:
        return job.study.predict(job.data, job.inputs, job.train, job.held_out, job.member)
    finally:
        torch.set_num_threads(threads)


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[_Job, tuple[Floats, Floats]]]:
    """Do the jobs, in order, in this process or in several."""
    if workers == 1:
        yield from ((job, _do(job)) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(jobs, pool.map(_do, jobs), strict=True)


def usable(data: StudyData, inputs: Inputs) -> npt.NDArray[np.bool_]:
    """Return which cases have what a choice of inputs needs."""
    present = _modalities(data)
    image, genes = np.array(present["slide"]), np.array(present["genes"])
    if inputs == BOTH:
        return image | genes
    return image if inputs == "image only" else genes


def _modalities(data: StudyData) -> dict[str, list[bool]]:
    expression = data.cohort.expression
    known = set() if expression is None else set(map(str, expression.index))
    clinical = data.clinical[["age", "sex"]].notna().any(axis=1)
    return {
        "slide": [bool(data.cohort.slides.get(case)) for case in data.case_ids],
        "genes": [case in known for case in data.case_ids],
        "clinical": [bool(has) for has in clinical],
    }


def _embed(run: Run, cases: Sequence[Case]) -> Floats:
    width = run.model.slide_encoder.in_features
    packed = PreparedCases(cases, None, run.model.config.position_convention, width)
    return embed_cases(run.model, packed, range(len(cases)), 16).double().numpy()


def _scale(embedded: Floats, train: int) -> Floats:
    """Centre and scale by the first `train` rows: raw outputs share a large constant.

    One scale for all columns: the directions in which cases differ most keep their lead.
    """
    centred = embedded - embedded[:train].mean(0)
    return centred / (np.sqrt((centred[:train] ** 2).mean()) + 1e-12)


def _score(data: StudyData, probability: Floats, risk: Floats, unpredictable: int) -> VariantResult:
    durations, events = data.clinical["survival_months"], data.clinical["event"]

    def accuracy(classes: npt.ArrayLike, predicted: Floats) -> float:
        return balanced_accuracy(classes, predicted > 0.5)

    balanced = bootstrap_interval(accuracy, data.classes, probability, seed=data.seed)
    concordance = bootstrap_interval(harrell_c_index, durations, events, risk, seed=data.seed)
    return VariantResult(
        probability,
        risk,
        (accuracy(data.classes, probability), balanced.low, balanced.high),
        (harrell_c_index(durations, events, risk), concordance.low, concordance.high),
        unpredictable,
    )
