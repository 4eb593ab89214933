"""ModalTune and its rivals on the planted cohort: who finds what is in the image and the genes.

Every model trains on the same cases, with settings that were chosen on other planted cohorts
(seeds 0 and 1000); none is chosen on the reported one. Rivals predict with their own heads;
ModalTune, which sees no label but sentences, with the published probes on the embedding of its
diagnosis and survival prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from modaltune.baselines import SupervisedLearner, make_baseline
from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.benchmarks.kernel_timing import MIB, peak_bytes
from modaltune.benchmarks.planted_scores import (
    METRICS,
    Predictions,
    differences,
    interval,
    scores,
)
from modaltune.cases import PreparedCases, prepare_cases
from modaltune.config import DIAGNOSIS, SURVIVAL
from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.errors import InputError
from modaltune.gene_scaler import GeneScaler
from modaltune.labels import TASK_ROWS, SurvivalBins, label_cohort
from modaltune.learner import Learner, ModalTuneLearner, embed_all
from modaltune.model import ModalTune
from modaltune.model_start import start_at_unit_gain
from modaltune.pathways import PathwayIndex
from modaltune.planted import PlantedCohort, PlantedConfig, plant
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.probes import fit_cox, fit_logistic
from modaltune.run_config import RunConfig, load_run_config
from modaltune.targets import Targets, TextProjector
from modaltune.text_encoders import SentenceBook, load_text_encoder
from modaltune.train import fit
from modaltune.train_cases import label_targets
from modaltune.train_config import TrainConfig

CSV_NAME, SCORES_NAME = "planted.csv", "planted_scores.csv"
DIFFERENCES_NAME = "planted_differences.csv"
BATCH = 25  # cases embedded at once
COX_PENALTY = 0.1

OTHER_TILES = ("inputs.tile_limit=every_epoch", "inputs.max_tiles=128")
#: What ModalTune sets beside its `small` preset, whose encoder is random: features as large as the
#: positions; the published extra extractors and two interactions, so that some head of some
#: extractor starts near a pattern of 5 % of the tiles; other tiles in each epoch.
SETTINGS = (
    *OTHER_TILES,
    "model.feature_gain=1.0",
    "model.slide_encoder.depth=2",
    "model.adapter.interactions=[[0, 0], [1, 1]]",
    "model.adapter.use_extra_extractors=true",
    "model.adapter.heads=12",
    "model.adapter.bottleneck=1.0",
    "training.lr=3e-3",
)

RIVALS: dict[str, dict[str, Any]] = {
    "abmil": {"width": 64, "attention_width": 32},
    "pathway_mlp": {"token_width": 8, "width": 32},
    "gene_mixer": {"width": 32, "depth": 1, "tokens": 8, "out_width": 64},
    "mcat": {"width": 64, "heads": 4, "hidden": 64, "layers": 1, "dropout": 0.1},
    "late_fusion": {
        "image": {"width": 64, "attention_width": 32},
        "genes": {"token_width": 8, "width": 32},
    },
}
# Peak learning rates: a width of 64 bears more than the papers' hundreds do.
RATES = {"abmil": 3e-3, "pathway_mlp": 3e-3, "gene_mixer": 1e-3, "mcat": 5e-4, "late_fusion": 3e-3}
TRUNKS = {"modaltune": "separate", "modaltune_shared": "shared"}
MODELS = (*TRUNKS, *RIVALS)
#: Models that see other tiles in each epoch, and more epochs; the others did no better by it.
DRAWN = (*TRUNKS, "abmil", "mcat")
EPOCHS, DRAWN_EPOCHS = 20, 40


@dataclass(frozen=True)
class Study:
    """A planted cohort, prepared: everything fitted on the training cases.

    Attributes:
        planted: The cohort.
        preprocessing: Genes and tiles.
        train, test: Cases with their targets.
        train_targets, test_targets: The same targets.
    """

    planted: PlantedCohort
    preprocessing: Preprocessing
    train: PreparedCases
    test: PreparedCases
    train_targets: Targets
    test_targets: Targets

    @property
    def pathways(self) -> PathwayIndex:
        """Genes of each pathway."""
        if self.preprocessing.pathways is None:
            raise InputError("a planted study must have genes, got none; use make_study")
        return self.preprocessing.pathways

    @property
    def tile_width(self) -> int:
        """Width of the tile features."""
        return self.planted.config.tile_width


def make_study(config: PlantedConfig, model: RunConfig) -> Study:
    """Plant a cohort and fit what stands beside the weights on its training cases."""
    planted = plant(config)
    learned, judged = [*planted.split.train, *planted.split.val], list(planted.split.test)
    labels = planted.clinical.loc[learned]
    genes = planted.cohort.expression
    if genes is None:
        raise InputError("a planted cohort must have genes, got none; use plant()")
    preprocessing = Preprocessing(
        tiles=TileRecipe(config.tile_width),
        pathways=PathwayIndex.build(planted.pathways, genes.columns),
        genes=GeneScaler.fit(genes.loc[learned]),
        survival=SurvivalBins.fit(labels["survival_months"]),
    )
    book = SentenceBook(load_text_encoder())
    sentences = label_cohort(labels, preprocessing.survival)
    text = torch.stack([book.encode(list(sentences[case])) for case in learned])
    projector = TextProjector(book.width, model.model.out_features, seed=model.text.projector_seed)
    unit = projector.project(text)[:, list(TASK_ROWS)]
    parts = []
    for ids, rows in ((learned, unit), (judged, None)):
        targets = label_targets(planted.clinical.loc[ids], rows)
        cases = prepare_cases(planted.cohort, ids, preprocessing)
        convention, draw = model.model.position_convention, model.inputs.limit.drawn
        made = PreparedCases(cases, targets, convention, config.tile_width, draw)
        parts.append((made, targets))
    (train, train_targets), (test, test_targets) = parts
    return Study(planted, preprocessing, train, test, train_targets, test_targets)


def make_modaltune(study: Study, config: RunConfig, trunk: str) -> ModalTune:
    """Return a ModalTune of the small preset with a random backbone, started at unit gain."""
    shape = config.model.model_shape(clinical_features=0, has_genes=True)
    encoder = shape.slide_encoder.model_copy(update={"in_features": study.tile_width})
    shape = shape.model_copy(update={"slide_encoder": encoder, "task_trunk": trunk})
    model = ModalTune(shape, gene_index=study.pathways.indices, gene_offsets=study.pathways.offsets)
    some = study.train.batch(range(min(40, len(study.train))))
    start_at_unit_gain(model, some.tiles, config.model.feature_gain)
    return model


def train_model(study: Study, name: str, config: RunConfig) -> tuple[Predictions, dict[str, Any]]:
    """Train one model and predict the test cases.

    Returns:
        Predictions, and what it cost.
    """
    recipe: TrainConfig = config.training
    torch.manual_seed(recipe.seed)
    learner: Learner
    if name in TRUNKS:
        learner = ModalTuneLearner(make_modaltune(study, config, TRUNKS[name]), recipe)
    else:
        recipe = recipe.model_copy(update={"lr": RATES[name]})
        baseline = make_baseline(
            name, tile_width=study.tile_width, pathways=study.pathways, settings=RIVALS[name]
        )
        learner = SupervisedLearner.for_training(
            baseline, study.train_targets, cases_per_batch=recipe.cases_per_step
        )
    began = time.perf_counter()
    used = peak_bytes(lambda: lambda: fit(learner, study.train, recipe), torch.device("cpu"))
    seconds = time.perf_counter() - began
    if isinstance(learner, SupervisedLearner):
        found = _from_heads(study, learner)
    else:
        found = _from_probes(study, learner, config.model.tasks)
    return found, {
        "parameters": sum(p.numel() for p in learner.trainable_parameters()),
        "lr": recipe.lr,
        "epochs": recipe.epochs,
        "seconds": round(seconds, 1),
        "seconds_per_epoch": round(seconds / recipe.epochs, 2),
        "training_mib": round(used / MIB),
    }


def _from_heads(study: Study, learner: SupervisedLearner) -> Predictions:
    """Predict with the heads of a rival."""
    ones, risks = [], []
    for start in range(0, len(study.test), BATCH):
        rows = range(start, min(start + BATCH, len(study.test)))
        found = learner.predict(study.test.batch(rows))
        if found.probabilities is None or found.risk is None:
            raise InputError("a rival must have both heads; give classes and survival")
        ones.append(found.probabilities[:, 1])
        risks.append(found.risk)
    return Predictions(torch.cat(ones).double().numpy(), torch.cat(risks).double().numpy())


def _from_probes(study: Study, learner: Learner, tasks: Sequence[str]) -> Predictions:
    """Predict with the published probes, fitted on the embeddings of the training cases."""

    def embed(cases: PreparedCases) -> npt.NDArray[np.float64]:
        return embed_all(learner, cases, range(len(cases)), BATCH).double().numpy()

    seen, unseen = embed(study.train), embed(study.test)
    labels = study.train_targets
    what, when = tasks.index(DIAGNOSIS), tasks.index(SURVIVAL)
    logistic = fit_logistic(seen[:, what], labels.classes.numpy())
    durations, events = labels.durations.numpy(), labels.events.numpy()
    cox = fit_cox(seen[:, when], durations, events, COX_PENALTY)
    return Predictions(
        logistic.predict_proba(unseen[:, what])[:, 1],
        np.log(cox.partial_hazard(unseen[:, when])),
    )


def run_config(
    name: str, seed: int = 0, epochs: int | None = None, sets: Sequence[str] = ()
) -> RunConfig:
    """Return the configuration of a model's run: the small preset, its settings, what is given.

    Args:
        name: Of the model.
        seed: Of weights, order, dropout and tiles.
        epochs: Instead of the model's own.
        sets: Further `key.sub=value`.
    """
    epochs = epochs or (DRAWN_EPOCHS if name in DRAWN else EPOCHS)
    own = [*OTHER_TILES] if name in DRAWN else ["inputs.tile_limit=all"]
    own += SETTINGS if name in TRUNKS else ()
    own += [f"training.seed={seed}", f"inputs.tile_seed={seed}", f"training.epochs={epochs}"]
    own += [f"training.warmup_epochs={min(2, epochs - 1)}"]
    return load_run_config(preset="small", sets=[*own, *sets])


def train_job(
    name: str,
    seed: int,
    epochs: int | None,
    planted: PlantedConfig,
    sets: Sequence[str],
    threads: int,
) -> tuple[Predictions, dict[str, Any]]:
    """Train and score one model in a process of its own, whose memory is then the model's.

    Returns:
        Predictions, and the part of its row that this process knows.
    """
    torch.set_num_threads(threads)
    config = run_config(name, seed, epochs, sets)
    study = make_study(planted, config)
    predictions, cost = train_model(study, name, config)
    row = {"device": f"{cpu_model()}, {threads} threads", "torch": torch.__version__, **cost}
    for metric in METRICS:
        ends = interval(metric, study.test_targets, [predictions])
        row |= {f"{metric}{end}": round(value, 4) for end, value in ends.items()}
    return predictions, row


def planted_config(options: argparse.Namespace) -> PlantedConfig:
    """Return the cohort asked for.

    Raises:
        InputError: A field of `--plant` does not exist or can't have the value.
    """
    given: dict[str, Any] = {"seed": options.cohort_seed, "shuffle_labels": options.shuffled}
    given |= dict(one.partition("=")[::2] for one in options.plant)
    try:
        return PlantedConfig.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise InputError(
            f"--plant must set fields of PlantedConfig, got {faults}; see docs/planted.md"
        ) from error


def run(options: argparse.Namespace) -> dict[tuple[str, int], Predictions]:
    """Train what is asked for and not yet in the folder of predictions; return all of it."""
    key = _key(options)
    planted = planted_config(options)
    wanted = [(name, seed) for seed in options.seeds for name in options.models]
    paths = {(name, seed): options.out / f"{name}-{seed}.json" for name, seed in wanted}
    missing = [job for job in wanted if not paths[job].is_file()]
    folder = results_folder(options.results)
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = {
            pool.submit(train_job, *job, options.epochs, planted, options.set, options.threads): job
            for job in missing
        }
        for done in as_completed(running):
            (name, seed), (predictions, known) = running[done], done.result()
            row = {
                "time": timestamp(),
                "commit": commit_id(),
                "model": name,
                "seed": seed,
                **key,
                **known,
            }
            write_json_atomic(paths[name, seed], predictions.state(key))
            if folder is not None:
                append_row(folder / CSV_NAME, row)
            print(json.dumps(row), flush=True)
    return {job: Predictions.read(paths[job], key) for job in wanted}


def _key(options: argparse.Namespace) -> dict[str, Any]:
    """Return what predictions of one folder have in common."""
    return {
        "cohort_seed": options.cohort_seed,
        "shuffled": options.shuffled,
        "settings": " ".join(
            [
                *([f"epochs={options.epochs}"] if options.epochs else []),
                *options.set,
                *options.plant,
            ]
        ),
    }


def compare(
    found: Mapping[tuple[str, int], Predictions], options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Return rows by file: means over seeds by metric and model, and ModalTune minus each rival."""
    planted = plant(planted_config(options))
    targets = label_targets(planted.clinical.loc[list(planted.split.test)], None)
    common = {"time": timestamp(), "commit": commit_id(), **_key(options)}
    rows = {
        SCORES_NAME: scores(found, targets),
        DIFFERENCES_NAME: differences(found, targets, list(TRUNKS)),
    }
    return {name: [{**common, **row} for row in found] for name, found in rows.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.planted",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=int, help="instead of each model's own")
    parser.add_argument("--cohort-seed", type=int, default=1, help="of the planted cohort")
    parser.add_argument("--shuffled", action="store_true", help="with the labels dealt out anew")
    parser.add_argument("--set", action="append", default=[], help="key=value over SETTINGS")
    parser.add_argument("--plant", action="append", default=[], help="key=value of the cohort")
    parser.add_argument("--workers", type=int, default=2, help="models trained at once")
    parser.add_argument("--threads", type=int, default=1, help="of torch, per model")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("planted-predictions"),
        help="folder of predictions; models and seeds found there are not trained again",
    )
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        folder = results_folder(options.results)
        for name, rows in compare(run(options), options).items():
            for row in rows:
                if folder is not None:
                    append_row(folder / name, row)
                print(json.dumps(row), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
