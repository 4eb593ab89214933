"""Which pictures an evaluation gets, drawn from its predictions and tables."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from modaltune.classification_metrics import auprc, auroc, reliability
from modaltune.evaluation import EmbeddedCases, Evaluation, Place
from modaltune.evaluation_plots import (
    ForestPanel,
    Ranked,
    calibration_figure,
    embedding_figure,
    forest_figure,
    kaplan_meier_figure,
    precision_recall_figure,
    roc_figure,
    save_figure,
)
from modaltune.fitted_probes import POOLED, classes_of, site_names
from modaltune.plots import NotDrawableError
from modaltune.splits import Split

logger = logging.getLogger(__name__)

FOREST = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "c_index": "c-index (Harrell)",
    "uno_c_index": "c-index (Uno)",
}


def draw_evaluation(
    folder: str | Path,
    evaluation: Evaluation,
    scores: pd.DataFrame,
    *,
    cases: EmbeddedCases | None = None,
    split: Split | None = None,
    part: str = "test",
    class_names: Sequence[str] = (),
) -> list[Path]:
    """Write all pictures of one part of the split as PNG and SVG.

    Args:
        folder: Where to.
        evaluation: What was scored.
        scores: Its table.
        cases, split: For the picture of the embeddings.
        part: Part of the split that is shown.
        class_names: By class number; "class 0" and so on where they end.

    Returns:
        The files; a picture whose data cannot carry it is left out, and the log says why.
    """
    written: list[Path] = []
    for name, draw in _pictures(evaluation, scores, part, class_names):
        written += _draw(folder, name, draw)
    if cases is not None and split is not None:
        for name, draw in _embeddings(cases, split, part, class_names):
            written += _draw(folder, name, draw)
    return written


def draw_forest(
    folder: str | Path, scores: pd.DataFrame, part: str, title: str, *, name: str
) -> list[Path]:
    """Write a forest picture of the main metrics of one part of a table of scores."""
    return _draw(folder, name, lambda: _forest(scores, part, title))


def _draw(folder: str | Path, name: str, draw: Callable[[], Figure]) -> list[Path]:
    try:
        return save_figure(draw(), folder, re.sub(r"[^\w.-]+", "-", name))
    except NotDrawableError as error:
        logger.info("%s is not drawn: %s", name, error)
        return []


def _pictures(
    evaluation: Evaluation, scores: pd.DataFrame, part: str, class_names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    places = [p for p in evaluation.scorers if p.split == part and p in evaluation.predictions]
    for scope in dict.fromkeys(p.scope for p in places if p.kind == "class"):
        own = [p for p in places if p.scope == scope and p.kind == "class"]
        labels = evaluation.predictions[own[0]].labels
        is_binary = labels is not None and len(labels) == 2
        # Three classes have three curves: then every prompt gets a picture of its own.
        for chosen in [own] if is_binary else [[p] for p in own]:
            yield from _rankings(evaluation, scores, chosen, class_names)
    for place in places:
        title = f"{evaluation.name}: {place.task} prompt, {part} cases" + (
            "" if place.scope == POOLED else f", {place.scope}"
        )
        end = f"{part}_{place.task}_{place.scope}"
        if place.kind == "class":
            draw = partial(_calibration, evaluation, place, title, class_names)
            yield f"calibration_{end}", draw
        if place in evaluation.groups:
            groups = evaluation.groups[place]
            yield f"kaplan_meier_{end}", partial(kaplan_meier_figure, groups, title)
    title = f"{evaluation.name}: {part} cases, 95 % bootstrap intervals"
    yield f"forest_{part}", lambda: _forest(scores, part, title)


def _rankings(
    evaluation: Evaluation, scores: pd.DataFrame, places: Sequence[Place], names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield both ranking pictures of some places of one scope."""
    part, task, scope, _ = places[0]
    labels = evaluation.predictions[places[0]].labels
    is_binary = labels is not None and len(labels) == 2
    title = f"{evaluation.name}: {part} cases" + ("" if scope == POOLED else f", {scope}")
    title += "" if is_binary else f", {task} prompt"
    end = f"{part}_{scope}" if is_binary else f"{part}_{task}_{scope}"
    interval = " (95 % interval)" if is_binary else ", one against the others"

    def roc() -> Figure:
        curves = [c for p in places for c in _ranked(evaluation, scores, p, "auroc", names)]
        return roc_figure(curves, title, f"area under the curve{interval}")

    def precision_recall() -> Figure:
        curves = [c for p in places for c in _ranked(evaluation, scores, p, "auprc", names)]
        return precision_recall_figure(curves, title, f"average precision{interval}")

    yield f"roc_{end}", roc
    yield f"precision_recall_{end}", precision_recall


def _ranked(
    evaluation: Evaluation,
    scores: pd.DataFrame,
    place: Place,
    metric: str,
    class_names: Sequence[str],
) -> Iterator[Ranked]:
    """Return one curve of a task prompt, or one per class of more than two."""
    scorer, said = (
        evaluation.scorers[place],
        evaluation.predictions[place].take(evaluation.scorers[place].case_ids),
    )
    if said.probabilities is None or said.labels is None or not scorer.case_ids:
        return
    truth = classes_of(evaluation.labels.loc[list(scorer.case_ids)])
    if len(said.labels) == 2:
        area = _cell(scores, place, metric)
        yield Ranked(place.task, truth == said.labels[1], said.probabilities[:, 1], area)
        return
    measure = auroc if metric == "auroc" else auprc
    for column, label in enumerate(said.labels):
        positive, score = truth == label, said.probabilities[:, column]
        value = measure(positive, np.stack([1 - score, score], axis=1), (0, 1))
        yield Ranked(_class_name(int(label), class_names), positive, score, f"{value:.2f}")


def _calibration(
    evaluation: Evaluation, place: Place, title: str, class_names: Sequence[str]
) -> Figure:
    ids = evaluation.scorers[place].case_ids
    said = evaluation.predictions[place].take(ids)
    if said.probabilities is None or said.labels is None:
        raise NotDrawableError("no probabilities")
    truth = classes_of(evaluation.labels.loc[list(ids)])
    labels = [int(k) for k in said.labels]
    what = _class_name(labels[1], class_names) if len(labels) == 2 else "the likeliest class"
    return calibration_figure(reliability(truth, said.probabilities, labels), title, what)


def _forest(scores: pd.DataFrame, part: str, title: str) -> Figure:
    shown = scores[(scores["split"] == part) & (scores["kind"] != "site")]
    recalls = shown[shown["metric"].str.startswith("recall_")]
    shown = shown[shown["metric"].isin(list(FOREST))]
    if shown.empty:
        raise NotDrawableError("no main metric")
    many_runs, many_scopes = shown["run"].nunique() > 1, shown["scope"].nunique() > 1

    def row_name(run: str, task: str, scope: str) -> str:
        parts = [run] if many_runs else []
        return " · ".join([*parts, task, *([scope] if many_scopes else [])])

    keys = list(dict.fromkeys(zip(shown["run"], shown["task"], shown["scope"], strict=True)))
    found = {
        (row["run"], row["task"], row["scope"], row["metric"]): [
            row["value"],
            row["low"],
            row["high"],
        ]
        for row in shown.to_dict(orient="records")
    }
    classes = set(recalls.groupby(["run", "task", "scope"]).size())
    panels = []
    for metric, name in FOREST.items():
        chance: float | None = 0.5
        if metric == "balanced_accuracy":
            chance = 1 / classes.pop() if len(classes) == 1 else None
        values = [found.get((*key, metric), [np.nan] * 3) for key in keys]
        if metric in set(shown["metric"]):
            panels.append(ForestPanel(name, np.array(values, float), chance))
    return forest_figure([row_name(*key) for key in keys], panels, title)


def _embeddings(
    cases: EmbeddedCases, split: Split, part: str, class_names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    train, shown = cases.usable(split.train), cases.usable(split.parts[part])  # type: ignore[index]
    if not train or not shown:
        return
    rows = cases.clinical.loc[shown]
    site = site_names(rows)
    sites = sorted(set(site) - {""})
    if len(sites) > 1:
        groups, names = np.array([sites.index(s) if s else -1 for s in site]), sites
    else:
        groups = classes_of(rows)
        names = [_class_name(k, class_names) for k in range(int(groups.max(initial=-1)) + 1)]
    for column, task in enumerate(cases.tasks):
        behind, front = cases.take(train)[:, column], cases.take(shown)[:, column]
        title = f"embeddings, {task} prompt: {part} cases"
        yield (
            f"embeddings_{part}_{task}",
            partial(embedding_figure, behind, front, groups, names, title),
        )


def _class_name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if 0 <= label < len(class_names) else f"class {label}"


def _cell(scores: pd.DataFrame, place: Place, metric: str) -> str:
    row = scores[
        (scores["split"] == place.split)
        & (scores["task"] == place.task)
        & (scores["scope"] == place.scope)
        & (scores["kind"] == place.kind)
        & (scores["metric"] == metric)
    ].iloc[0]
    if np.isnan(row["value"]):
        return "undefined"
    ends = "" if np.isnan(row["low"]) else f" ({row['low']:.2f}–{row['high']:.2f})"
    return f"{row['value']:.2f}{ends}"
