"""Evaluation of frozen embeddings: probes fitted on train, scored on validation and test.

Per task prompt there is a logistic and a Cox probe; a run of several sites also has them per site,
and a classifier of the site. Predictions that a model makes itself enter the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from modaltune.errors import CohortError, InputError
from modaltune.fitted_probes import POOLED, FittedProbes, ScopeProbes, fit_probes, site_names
from modaltune.predictions import Predictions, predict_sites, predict_with
from modaltune.probes import ProbeError, as_survival
from modaltune.result_rows import mean_over
from modaltune.scorers import Scorer, class_scorer, survival_scorer
from modaltune.splits import Split
from modaltune.survival_groups import RiskGroups, risk_groups
from modaltune.survival_metrics import SurvivalReference
from modaltune.tables import name_few, repeated

Kind = Literal["class", "survival", "site"]
DIRECT = "direct"  # in place of a task prompt: what a model predicts itself
EMBEDDING = "embedding"  # likewise: what probes read off a model that has no prompts
MEAN_OF_SITES = "mean of sites"


class Place(NamedTuple):
    """Where a score belongs: part of the split, task prompt, scope, and what is predicted."""

    split: str
    task: str
    scope: str
    kind: Kind


@dataclass(frozen=True)
class EmbeddedCases:
    """Embeddings of a cohort with what is known of its cases.

    Attributes:
        case_ids: n patients, each once.
        embeddings: `[n, T, d]`.
        tasks: T names of the prompts.
        clinical: Rows by case id, columns `primary_class`, `survival_months`, `event` and
            optionally `site`; any cases, in any order.

    Raises:
        InputError: Shapes do not fit, or a case is repeated.
        CohortError: A column is missing, or a label breaks a rule.
    """

    case_ids: tuple[str, ...]
    embeddings: NDArray[Any]
    tasks: tuple[str, ...]
    clinical: pd.DataFrame

    def __post_init__(self) -> None:
        object.__setattr__(self, "case_ids", tuple(map(str, self.case_ids)))
        shape = np.shape(self.embeddings)
        if len(shape) != 3 or shape[:2] != (len(self.case_ids), len(self.tasks)):
            raise InputError(
                f"embeddings must have shape [{len(self.case_ids)}, {len(self.tasks)}, d], got "
                f"{list(shape)}; give a row per case and a column per task prompt"
            )
        if twice := repeated(self.case_ids):
            raise InputError(
                f"case_ids must name each case once, got several rows for {name_few(twice)}; "
                "embed the slides of a case together"
            )
        object.__setattr__(self, "clinical", check_labels(self.clinical))

    def take(self, case_ids: Sequence[str]) -> NDArray[Any]:
        """Return the embeddings of some cases, joined by id."""
        place = {case: row for row, case in enumerate(self.case_ids)}
        rows = np.array([place[case] for case in case_ids], dtype=np.int64)
        return np.asarray(self.embeddings)[rows]

    def usable(self, case_ids: Sequence[str]) -> list[str]:
        """Return those cases that have an embedding and a label row."""
        known = set(self.case_ids) & set(self.clinical.index)
        return [case for case in case_ids if case in known]


@dataclass(frozen=True)
class Evaluation:
    """Everything scored, before it is resampled.

    Attributes:
        name: Of the run.
        fitted: The probes; None for direct predictions.
        labels: Clinical rows by case id.
        predictions: By place.
        scorers: By place.
        groups: Risk groups by the training median, by place of kind "survival".
        missing: Part of the split -> its cases without embedding or prediction.
    """

    name: str
    fitted: FittedProbes | None
    labels: pd.DataFrame
    predictions: Mapping[Place, Predictions]
    scorers: Mapping[Place, Scorer]
    groups: Mapping[Place, RiskGroups]
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def beside(self, other: Evaluation) -> Evaluation:
        """Return one evaluation with the places of both, and the probes of the other."""
        return replace(
            other,
            predictions={**self.predictions, **other.predictions},
            scorers={**self.scorers, **other.scorers},
            groups={**self.groups, **other.groups},
        )


def check_labels(clinical: pd.DataFrame) -> pd.DataFrame:
    """Return clinical rows with text ids, checked.

    Raises:
        CohortError: A column is missing, a case repeated, or a value breaks a rule.
    """
    needed = ("primary_class", "survival_months", "event")
    table = clinical.set_axis(clinical.index.map(str), axis=0)
    missing = [name for name in needed if name not in table]
    if missing or table.index.has_duplicates:
        raise CohortError(
            f"clinical must have a row per case with {', '.join(needed)}, got none of "
            f"{', '.join(missing) or 'several rows of a case'}; read it with read_clinical"
        )
    as_survival(table["survival_months"].to_numpy(float), table["event"].to_numpy(float))
    return table


def fit_on(cases: EmbeddedCases, train: Sequence[str], *, penalizer: float = 0.1,
           info: Mapping[str, Any] | None = None) -> FittedProbes:  # fmt: skip
    """Fit all probes on training cases: the only place that looks at labels to fit.

    Raises:
        CohortError: No training case has an embedding.
    """
    ids = cases.usable(train)
    if not ids:
        raise CohortError(
            f"train must hold cases with embeddings, got none of {len(train)}; embed the training "
            "cases, too"
        )
    about = {"train_cases": len(ids), "train_cases_without_embedding": len(train) - len(ids)}
    return fit_probes(
        cases.take(ids),
        cases.tasks,
        cases.clinical.loc[ids],
        followed=cases.clinical.loc[[case for case in train if case in cases.clinical.index]],
        penalizer=penalizer,
        info={**about, **(info or {})},
    )


def evaluate_cases(
    cases: EmbeddedCases,
    split: Split,
    *,
    name: str = "run",
    fitted: FittedProbes | None = None,
    penalizer: float = 0.1,
    parts: Sequence[Literal["train", "val", "test"]] = ("val", "test"),
) -> Evaluation:
    """Fit probes on the training cases and score them on the others.

    Args:
        cases: Embeddings and labels.
        split: Which cases are which.
        name: Of the run, in tables.
        fitted: Probes to use as they are instead, such as those of another cohort.
        penalizer: Of the Cox probe.
        parts: What is scored.

    Raises:
        InputError: The probes are of other task prompts, or nothing can be fitted.
    """
    probes = fit_on(cases, split.train, penalizer=penalizer) if fitted is None else fitted
    if probes.tasks != cases.tasks:
        raise InputError(
            f"fitted must be probes of the task prompts {', '.join(cases.tasks)}, got "
            f"{', '.join(probes.tasks)}; evaluate with the run they belong to"
        )
    collected = _Collected(cases.clinical)
    site = dict(zip(cases.clinical.index, site_names(cases.clinical), strict=True))
    embedded = set(cases.case_ids)
    if probes.sites:
        collected.foreign = {c for c, name in site.items() if name and name not in probes.sites}
    for part in parts:
        asked = split.parts[part]
        ids = [case for case in asked if case in embedded]
        collected.missing[part] = tuple(sorted(set(asked) - set(ids)))
        for task in cases.tasks:
            for scope in probes.scopes:
                wanted = [c for c in asked if scope in (POOLED, site.get(c))]
                own = [c for c in ids if scope in (POOLED, site.get(c))]
                if not wanted:
                    continue
                said = predict_with(probes, own, cases.take(own), task, scope)
                collected.add(part, task, scope, said, wanted, probes.probes[task, scope])
            _add_sites(collected, probes, cases, part, task, (ids, asked))
    return collected.finish(name, probes)


def _add_sites(
    collected: _Collected,
    probes: FittedProbes,
    cases: EmbeddedCases,
    part: str,
    task: str,
    ids: tuple[Sequence[str], Sequence[str]],
) -> None:
    """Add the site classifier and the means over sites of a pan-cancer run."""
    if task not in probes.site_probes:
        return
    embedded, asked = ids
    said = predict_sites(probes, embedded, cases.take(embedded), task)
    numbers = {name: k for k, name in enumerate(probes.sites)}
    names = pd.Series(site_names(cases.clinical), index=cases.clinical.index)
    labels = pd.DataFrame({"primary_class": names.map(numbers).fillna(-1).astype(np.int64)})
    place = Place(part, task, POOLED, "site")
    collected.predictions[place] = said
    scorer = class_scorer(said, labels, asked)
    if scorer is not None:
        collected.scorers[place] = scorer
    collected.add_means(part, task, probes.sites)


def evaluate_predictions(
    predictions: Predictions,
    labels: pd.DataFrame,
    split: Split,
    *,
    name: str,
    parts: Sequence[Literal["val", "test"]] = ("val", "test"),
    sites: Sequence[str] = (),
    fitted: Mapping[str, ScopeProbes] | None = None,
) -> Evaluation:
    """Score what a model predicts itself, in the tables that embeddings get.

    Args:
        predictions: Of any cases.
        labels: Rows by case id.
        split: Which cases are which. Survival metrics are weighted by its training cases; risk
            groups are cut at the median risk predicted for them, and left out where there are no
            such predictions.
        name: Of the run.
        parts: What is scored.
        sites: Cancer sites that the model was trained on, by column `site`; a class of another one
            means other diagnoses and is left out. Of several, classes and survival are scored per
            site and in their mean, and all together survival alone. Empty: not known.
        fitted: Cut and weights to use instead by scope, such as those of another cohort.
    """
    labels = check_labels(labels)
    predicted, given = set(predictions.case_ids), fitted or {}
    site = dict(zip(labels.index, site_names(labels), strict=True))
    collected = _Collected(labels)
    if sites:
        collected.foreign = {case for case, own in site.items() if own and own not in sites}
    each = tuple(sorted(sites)) if len(sites) > 1 else ()
    for part in parts:
        collected.missing[part] = tuple(sorted(set(split.parts[part]) - predicted))
        for scope in (POOLED, *each):
            asked = [c for c in split.parts[part] if scope in (POOLED, site.get(c))]
            train = [c for c in split.train if scope in (POOLED, site.get(c))]
            if scope != POOLED and not asked:
                continue
            said = predictions.take([case for case in asked if case in predicted])
            if scope == POOLED and each:
                said = replace(said, labels=None, probabilities=None)
            known = given.get(scope) or _direct_scope(predictions, labels, train)
            collected.add(part, DIRECT, scope, said, asked, known)
        collected.add_means(part, DIRECT, each)
    return collected.finish(name, None)


def _direct_scope(
    predictions: Predictions, labels: pd.DataFrame, train: Sequence[str]
) -> ScopeProbes:
    """Return what survival metrics and risk groups of direct predictions need, from training."""
    if predictions.risk is None:
        return ScopeProbes(None, None, None, None)
    rows = labels.loc[[case for case in train if case in labels.index]]
    try:
        reference = SurvivalReference.fit(rows["survival_months"], rows["event"])
    except ProbeError:
        reference = None  # the scorer's rows then hold Harrell's index alone
    predicted = set(predictions.case_ids)
    known = np.asarray(predictions.take([c for c in rows.index if c in predicted]).risk, float)
    known = known[~np.isnan(known)]
    return ScopeProbes(None, None, float(np.median(known)) if len(known) else None, reference)


class _Collected:
    """Predictions, scorers and risk groups while they are put together."""

    def __init__(self, labels: pd.DataFrame) -> None:
        self.labels = labels
        self.predictions: dict[Place, Predictions] = {}
        self.scorers: dict[Place, Scorer] = {}
        self.groups: dict[Place, RiskGroups] = {}
        self.missing: dict[str, tuple[str, ...]] = {}
        self.foreign: set[str] = set()

    def add(
        self,
        part: str,
        task: str,
        scope: str,
        said: Predictions,
        asked: Sequence[str],
        probes: ScopeProbes,
    ) -> None:
        """Score one set of predictions, as far as it goes."""
        found: dict[Kind, Scorer | None] = {
            "class": class_scorer(said, self.labels, asked, self.foreign),
            "survival": survival_scorer(said, self.labels, probes.reference, asked),
        }
        for kind, scorer in found.items():
            if scorer is None:
                continue
            place = Place(part, task, scope, kind)
            self.predictions[place], self.scorers[place] = said, scorer
            if kind == "survival" and probes.risk_cut is not None and scorer.case_ids:
                rows = self.labels.loc[list(scorer.case_ids)]
                risk: ArrayLike = np.asarray(said.take(scorer.case_ids).risk)
                self.groups[place] = risk_groups(
                    rows["survival_months"], rows["event"], risk, probes.risk_cut
                )

    def add_means(self, part: str, task: str, sites: Sequence[str]) -> None:
        """Score the mean over sites, where every site that has a score has cases."""
        kinds: tuple[Kind, ...] = ("class", "survival")
        for kind in kinds:
            places = [Place(part, task, site, kind) for site in sites]
            each = [self.scorers[p] for p in places if p in self.scorers]
            if each and all(s.case_ids for s in each):
                self.scorers[Place(part, task, MEAN_OF_SITES, kind)] = mean_over(each)

    def finish(self, name: str, fitted: FittedProbes | None) -> Evaluation:
        """Return the evaluation."""
        return Evaluation(
            name, fitted, self.labels, self.predictions, self.scorers, self.groups, self.missing
        )
