"""Rows of result tables: scores with intervals, differences with tests, spread over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modaltune.probes import Floats, Ints
from modaltune.resampling import Resamples, bootstrap, difference, mean_score
from modaltune.scorers import Scorer

LEAST_SEEDS = 3  # below, a spread says little, and the row says so


@dataclass(frozen=True)
class BootstrapOptions:
    """How patients are resampled.

    Attributes:
        resamples: Per interval; 0 for no intervals.
        seed: Of the draws.
        stratified: Draw within classes, and within dead and censored.
    """

    resamples: int = 1000
    seed: int = 0
    stratified: bool = False


@dataclass(frozen=True)
class ScoreRow:
    """One metric.

    Attributes:
        metric: Its name.
        value: NaN where undefined; `note` says why.
        low, high: 95 % bootstrap interval over patients; NaN if none.
        n: Cases scored.
        events: Deaths among them, or cases outside the first class.
        left_out: Reason -> cases not scored.
        redrawn: Resamples drawn again because the metrics were undefined in them.
        note: What a reader has to know.
        seeds: `[s]` values of the runs that `value` is the mean of; empty for one run.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    events: int
    left_out: Mapping[str, int]
    redrawn: int
    note: str
    seeds: tuple[float, ...] = ()

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); NaN for one run."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else float("nan")


@dataclass(frozen=True)
class DifferenceRow:
    """One metric of two runs (or sets of runs) on the same patients.

    Attributes:
        metric: Its name.
        first, second: Values.
        difference: First minus second.
        low, high: Paired 95 % bootstrap interval of the difference.
        p_value: Two-sided, of the paired bootstrap.
        n: Patients that both score.
        unpaired: Patients that only one of them scores, left out.
        redrawn, note: As of `ScoreRow`.
    """

    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    n: int
    unpaired: int
    redrawn: int
    note: str


def score_rows(scorers: Sequence[Scorer], options: BootstrapOptions) -> list[ScoreRow]:
    """Return a row per metric: of one run, or the mean over runs of several seeds.

    Args:
        scorers: One per seed; metrics that not all of them have are left out, and so are patients
            that not all of them score, who are counted. Brier scores that were integrated over
            different months have no mean.
        options: Of the intervals.
    """
    names = _shared_names(scorers)
    scorers, left_out = _aligned([_only(s, names) for s in scorers])
    first, count = scorers[0], len(scorers[0].case_ids)
    every = np.arange(count)
    each = np.array([s.score(every) if count else np.full(len(names), np.nan) for s in scorers])
    draws = _draw(scorers, [], options)
    low, high = _ends(draws, len(names))
    means = each.mean(0)
    rows = []
    for k, name in enumerate(names):
        notes = [_notes_of(scorers, name)]
        if _is_of_other_months(scorers, name):
            means[k] = low[k] = high[k] = np.nan
            notes.append("over different months: no mean")
        if 1 < len(scorers) < LEAST_SEEDS:
            notes.append(f"{len(scorers)} seeds; at least {LEAST_SEEDS} are needed for a spread")
        notes.append(_draw_note(draws))
        rows.append(
            ScoreRow(
                name,
                float(means[k]),
                float(low[k]),
                float(high[k]),
                count,
                first.num_events,
                left_out,
                0 if draws is None else draws.redrawn,
                "; ".join(note for note in notes if note),
                tuple(each[:, k].tolist()) if len(scorers) > 1 else (),
            )
        )
    return rows


def difference_rows(
    first: Sequence[Scorer], second: Sequence[Scorer], options: BootstrapOptions
) -> list[DifferenceRow]:
    """Return a row per metric that all have: first minus second, on the patients of both.

    Brier scores that were integrated over different months have no difference.

    Args:
        first, second: Scorers of one run each, or of several seeds, whose mean is compared.
        options: Of the paired bootstrap.
    """
    shared = _shared_names((*first, *second))
    aligned, left_out = _aligned([_only(s, shared) for s in (*first, *second)])
    one, two = aligned[: len(first)], aligned[len(first) :]
    unpaired = left_out.get("not scored by every run", 0)
    count = len(one[0].case_ids)
    if not count or not shared:
        return []
    every = np.arange(count)
    values = [np.mean([s.score(every) for s in side], axis=0) for side in (one, two)]
    draws = _draw(one, two, options)
    p_values = np.full(len(shared), np.nan) if draws is None else draws.p_values()
    told = np.array([values[0] - values[1], *_ends(draws, len(shared)), p_values])
    notes = [[_both_notes(*(_notes_of(s, n) for s in (one, two))), _draw_note(draws)]
             for n in shared]  # fmt: skip
    for k, name in enumerate(shared):
        if _is_of_other_months(aligned, name):
            told[:, k] = np.nan
            notes[k].append("over different months: not compared")
    return [
        DifferenceRow(
            name,
            float(values[0][k]),
            float(values[1][k]),
            float(told[0, k]),
            float(told[1, k]),
            float(told[2, k]),
            float(told[3, k]),
            count,
            unpaired,
            0 if draws is None else draws.redrawn,
            "; ".join(note for note in notes[k] if note),
        )
        for k, name in enumerate(shared)
    ]


def _is_of_other_months(scorers: Sequence[Scorer], name: str) -> bool:
    """Whether Brier scores were integrated over different months, which their notes tell."""
    return name == "integrated_brier" and len({s.note(name) for s in scorers}) > 1


def _notes_of(scorers: Sequence[Scorer], name: str) -> str:
    """Return the note of a metric, of one run or of several seeds."""
    said = list(dict.fromkeys(s.note(name) for s in scorers))
    return said[0] if len(said) == 1 else "seeds differ: " + " / ".join(n or "none" for n in said)


def _both_notes(first: str, second: str) -> str:
    """Return the notes of two runs."""
    return first if first == second else f"first: {first or 'none'}; second: {second or 'none'}"


def _draw_note(draws: Resamples | None) -> str:
    """Return why there is no interval, if one was asked for."""
    return "" if draws is None or draws.complete else "too few patients to resample"


def _draw(
    one: Sequence[Scorer], two: Sequence[Scorer], options: BootstrapOptions
) -> Resamples | None:
    """Resample the mean of a side, or the difference between two; None if nothing is asked."""
    count = len(one[0].case_ids)
    if not options.resamples or not count:
        return None
    score = mean_score([s.resampled for s in one])
    if two:
        score = difference(score, mean_score([s.resampled for s in two]))
    return bootstrap(
        score,
        count,
        strata=_strata(one[0], options.stratified),
        resamples=options.resamples,
        seed=options.seed,
    )


def _strata(scorer: Scorer, stratified: bool) -> Ints | None:
    """Return the strata `[n]` to draw within: sites, and if asked for classes or deaths in them."""
    if scorer.sites is None or not stratified:
        return scorer.strata if stratified else scorer.sites
    pairs = np.stack([scorer.sites, scorer.strata], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)


def _ends(draws: Resamples | None, width: int) -> tuple[Floats, Floats]:
    if draws is None:
        return np.full(width, np.nan), np.full(width, np.nan)
    return draws.interval()


def _shared_names(scorers: Sequence[Scorer]) -> list[str]:
    return [name for name in scorers[0].names if all(name in s.names for s in scorers)]


def _only(scorer: Scorer, names: Sequence[str]) -> Scorer:
    """Return a scorer of some of the metrics."""
    columns = [scorer.names.index(name) for name in names]
    return replace(
        scorer,
        names=tuple(names),
        score=lambda rows: scorer.score(rows)[columns],
        resampled=lambda counts: scorer.resampled(counts)[:, columns],
    )


def _aligned(scorers: Sequence[Scorer]) -> tuple[list[Scorer], dict[str, int]]:
    """Put scorers on the patients that all of them score, in one order, joined by id."""
    shared = set(scorers[0].case_ids).intersection(*(s.case_ids for s in scorers))
    left_out = dict(scorers[0].left_out)
    if all(s.case_ids == scorers[0].case_ids for s in scorers):
        return list(scorers), left_out
    order = [case for case in scorers[0].case_ids if case in shared]
    missing = len(set().union(*(s.case_ids for s in scorers)) - shared)
    if missing:
        left_out["not scored by every run"] = missing
    return [_reordered(s, order) for s in scorers], left_out


def _reordered(scorer: Scorer, order: Sequence[str]) -> Scorer:
    place = {case: row for row, case in enumerate(scorer.case_ids)}
    rows = np.array([place[case] for case in order], dtype=np.int64)

    def resampled(counts: Floats) -> Floats:
        every = np.zeros((len(counts), len(scorer.case_ids)))
        every[:, rows] = counts
        return scorer.resampled(every)

    return replace(
        scorer,
        case_ids=tuple(order),
        score=lambda drawn: scorer.score(rows[drawn]),
        resampled=resampled,
        strata=scorer.strata[rows],
        sites=None if scorer.sites is None else scorer.sites[rows],
        events=scorer.events[rows],
    )


def mean_over(scorers: Sequence[Scorer]) -> Scorer:
    """Return the mean over sites of the metrics that all have; resamples keep their sizes.

    Source:
        METHOD 4.7.
    """
    names = _shared_names(scorers)
    own = [_only(s, names) for s in scorers]
    ends = np.cumsum([0, *(len(s.case_ids) for s in own)])

    def score(rows: Ints) -> Floats:
        local = [rows[(rows >= a) & (rows < b)] - a for a, b in itertools.pairwise(ends)]
        return np.mean([s.score(r) for s, r in zip(own, local, strict=True)], axis=0)

    def resampled(counts: Floats) -> Floats:
        parts = [counts[:, a:b] for a, b in itertools.pairwise(ends)]
        return np.mean([s.resampled(part) for s, part in zip(own, parts, strict=True)], axis=0)

    left_out: dict[str, int] = {}
    for scorer in own:
        for why, count in scorer.left_out.items():
            left_out[why] = left_out.get(why, 0) + count
    return Scorer(
        tuple(names),
        tuple(case for s in own for case in s.case_ids),
        score,
        resampled,
        np.concatenate([s.strata for s in own]),
        np.concatenate([s.events for s in own]),
        left_out,
        {"": f"mean over {len(own)} sites"} | _months_of_sites(own),
        sites=np.repeat(np.arange(len(own)), np.diff(ends)),
    )


def _months_of_sites(scorers: Sequence[Scorer]) -> dict[str, str]:
    """Return over which months the sites' curves are scored: means over others don't compare."""
    told = {}
    for name in ("mean_auc", "integrated_brier"):
        if notes := list(dict.fromkeys(note for s in scorers if (note := s.notes.get(name)))):
            told[name] = " / ".join(notes)
    return told
