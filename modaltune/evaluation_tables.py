"""Result tables of evaluations, as data frames and as CSV, Markdown and JSON files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from modaltune.engine.atomic import atomic_path, write_json_atomic
from modaltune.errors import InputError
from modaltune.evaluation import DIRECT, Evaluation, Place
from modaltune.model_comparison import paired_tests
from modaltune.predictions import predictions_table
from modaltune.result_rows import BootstrapOptions, ScoreRow, difference_rows, score_rows
from modaltune.tables import name_few

logger = logging.getLogger(__name__)

SCORE_COLUMNS = (
    "run", "split", "task", "scope", "kind", "metric", "value", "low", "high", "n", "events",
    "left_out", "redrawn", "note",
)  # fmt: skip
HEADLINES = ("balanced_accuracy", "auroc", "auprc", "brier", "c_index", "uno_c_index", "mean_auc",
             "integrated_brier")  # fmt: skip
_CLASS_KINDS = ("class", "site")


def score_table(evaluation: Evaluation, options: BootstrapOptions) -> pd.DataFrame:
    """Return a row per split, task prompt, scope and metric (`SCORE_COLUMNS`)."""
    rows = []
    for place, scorer in evaluation.scorers.items():
        found = [*score_rows([scorer], options), *_group_rows(evaluation, place)]
        rows += [_flat(evaluation.name, place, row) for row in found]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def seeds_table(
    evaluations: Sequence[Evaluation], options: BootstrapOptions, name: str
) -> pd.DataFrame:
    """Return the means over runs that differ by their seed, with spread and each run's value.

    What not every run scores has no mean; a warning names it.

    Args:
        evaluations: One per seed.
        options: Of the interval of the mean, over patients.
        name: What the rows are called.

    Returns:
        `SCORE_COLUMNS`, then `seeds`, `sd`, `min`, `max` and `values`.

    Raises:
        InputError: Fewer than two runs, or they were not scored alike.
    """
    if len(evaluations) < 2:
        raise InputError(
            f"evaluations must be two or more seeds, got {len(evaluations)}; give several runs"
        )
    _tell_left_out(evaluations)
    rows = []
    for place in evaluations[0].scorers:
        if any(place not in e.scorers for e in evaluations):
            continue
        scorers = [e.scorers[place] for e in evaluations]
        for row in score_rows(scorers, options):
            rows.append(
                {
                    **_flat(name, place, row),
                    "seeds": len(row.seeds),
                    "sd": row.spread,
                    "min": min(row.seeds),
                    "max": max(row.seeds),
                    "values": " ".join(f"{value:.4f}" for value in row.seeds),
                }
            )
    return pd.DataFrame(rows)


def _tell_left_out(evaluations: Sequence[Evaluation]) -> None:
    """Warn of places and metrics that have no mean, since not every run has them."""
    found: dict[tuple[Place, str], int] = {}
    for evaluation in evaluations:
        for place, scorer in evaluation.scorers.items():
            for name in scorer.names:
                found[place, name] = found.get((place, name), 0) + 1
    few = [" ".join((*p, name)) for (p, name), n in found.items() if n < len(evaluations)]
    if few:
        logger.warning(
            "no mean over seeds of %d scores that not every run has: %s", len(few), name_few(few)
        )


def comparison_table(
    first: Sequence[Evaluation], second: Sequence[Evaluation], options: BootstrapOptions
) -> pd.DataFrame:
    """Return first minus second on the patients of both, per split, task prompt and metric.

    Direct predictions of either side are compared with every task prompt of the other.

    Args:
        first, second: Runs; several of one side are seeds, whose means are compared.
        options: Of the paired bootstrap; its seed and size also serve the permutation tests.

    Raises:
        InputError: The runs of a side are not seeds of one recipe.
    """
    _check_seeds(first)
    _check_seeds(second)
    rows = []
    for place, other in _pairs(first[0].scorers, second[0].scorers):
        one = [e.scorers[place] for e in first]
        two = [e.scorers[other] for e in second]
        tests: Mapping[str, Mapping[str, float]] = {}
        if len(first) == len(second) == 1 and options.resamples and place in first[0].predictions:
            tests = _tests(first[0], second[0], (place, other), options)
        for row in difference_rows(one, two, options):
            rows.append(
                {
                    "first": first[0].name,
                    "second": second[0].name,
                    **(other if place.task == DIRECT else place)._asdict(),
                    "metric": row.metric,
                    "first_value": row.first,
                    "second_value": row.second,
                    "difference": row.difference,
                    "low": row.low,
                    "high": row.high,
                    "p_bootstrap": row.p_value,
                    "p_delong": tests.get(row.metric, {}).get("delong", math.nan),
                    "p_permutation": tests.get(row.metric, {}).get("permutation", math.nan),
                    "n": row.n,
                    "unpaired": row.unpaired,
                    "seeds": f"{len(first)} and {len(second)}",
                    "redrawn": row.redrawn,
                    "note": row.note,
                }
            )
    return pd.DataFrame(rows)


def _check_seeds(side: Sequence[Evaluation]) -> None:
    """Refuse runs whose mean would be over different things."""
    if any(set(e.scorers) != set(side[0].scorers) for e in side):
        names = ", ".join(e.name for e in side)
        raise InputError(
            f"runs of one side must be seeds of one recipe, got {names}, scored in different "
            "places; give --compare once for each"
        )


def _pairs(first: Iterable[Place], second: Collection[Place]) -> Iterator[tuple[Place, Place]]:
    """Yield the places to compare: the same one, or direct predictions with any task prompt."""
    for place in first:
        if place in second:
            yield place, place
        elif (direct := place._replace(task=DIRECT)) in second:
            yield place, direct
        elif place.task == DIRECT:
            for other in second:
                if place == other._replace(task=DIRECT):
                    yield place, other


def _tests(
    first: Evaluation, second: Evaluation, places: tuple[Place, Place], options: BootstrapOptions
) -> Mapping[str, Mapping[str, float]]:
    place, other = places
    if place.kind == "site":
        return {}
    return paired_tests(
        first.predictions[place].take(first.scorers[place].case_ids),
        second.predictions[other].take(second.scorers[other].case_ids),
        first.labels,
        permutations=options.resamples,
        seed=options.seed,
    )


def all_predictions(evaluation: Evaluation) -> pd.DataFrame:
    """Return the predictions of all places as one table: split, task, scope, case and values."""
    tables = []
    for place in evaluation.predictions:
        twin = place._replace(kind="class")
        if place.kind == "site" or (place.kind == "survival" and twin in evaluation.predictions):
            continue
        table = predictions_table(evaluation.predictions[place])
        for column, value in zip(("scope", "task", "split"), place[2::-1], strict=True):
            table.insert(0, column, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def fit_table(evaluation: Evaluation) -> pd.DataFrame:
    """Return how the probes' fits went: cases, deaths, penalty, convergence, what was said."""
    rows: list[dict[str, Any]] = []
    if evaluation.fitted is None:
        return pd.DataFrame(rows)
    for (task, scope), own in evaluation.fitted.probes.items():
        row: dict[str, Any] = {"task": task, "scope": scope}
        if own.logistic is not None:
            row["logistic_cases"] = own.logistic.num_cases
            row["classes"] = " ".join(map(str, own.logistic.labels))
            row["logistic_converged"] = own.logistic.converged
        if own.cox is not None:
            row |= {"cox_cases": own.cox.num_cases, "cox_deaths": own.cox.num_events}
            row |= {"cox_penalizer": own.cox.penalizer, "cox_converged": own.cox.converged}
            row["risk_cut"] = own.risk_cut
        row["notes"] = "; ".join(own.notes)
        rows.append(row)
    return pd.DataFrame(rows)


def _group_rows(evaluation: Evaluation, place: Place) -> list[ScoreRow]:
    """Return the log-rank test between risk groups as one more row."""
    if place not in evaluation.groups:
        return []
    groups, scorer = evaluation.groups[place], evaluation.scorers[place]
    sizes = ", ".join(
        f"{len(c.durations)} {name}" for name, c in zip(groups.names, groups.curves, strict=True)
    )
    note = f"log-rank, {sizes}; cut at the training median {groups.cut:.3f}"
    if math.isnan(groups.p_value):
        note += ": undefined, one group or no death"
    return [
        ScoreRow(
            "log_rank_p", groups.p_value, math.nan, math.nan, len(scorer.case_ids),
            scorer.num_events, scorer.left_out, 0, note,
        )
    ]  # fmt: skip


def _flat(name: str, place: Place, row: ScoreRow) -> dict[str, Any]:
    left_out = "; ".join(f"{why}: {count}" for why, count in sorted(row.left_out.items()))
    return {
        "run": name, **place._asdict(), "metric": row.metric, "value": row.value, "low": row.low,
        "high": row.high, "n": row.n, "events": row.events, "left_out": left_out,
        "redrawn": row.redrawn, "note": row.note,
    }  # fmt: skip


def headline_table(scores: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Return the main metrics of one split, a row per run, task and scope, as "0.81 (0.74-0.87)".

    Args:
        scores: Of `score_table` or `seeds_table`.
        split: The part shown.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    chosen = scores[(scores["split"] == split) & scores["metric"].isin(HEADLINES)]
    for record in chosen.to_dict(orient="records"):
        if record["kind"] == "site" and record["metric"] != "balanced_accuracy":
            continue
        key = (record["run"], record["task"], record["scope"])
        row = rows.setdefault(key, dict(zip(("run", "task", "scope"), key, strict=True)))
        kind = "class" if record["kind"] in _CLASS_KINDS else "survival"
        if record["kind"] != "site":
            row[f"n {kind}"] = record["n"]
        name = "site_balanced_accuracy" if record["kind"] == "site" else record["metric"]
        row[name] = _cell(record)
    order = [*("run", "task", "scope"), "n class", *HEADLINES[:4], "n survival", *HEADLINES[4:]]
    table = pd.DataFrame(rows.values())
    columns = [c for c in (*order, "site_balanced_accuracy") if c in table]
    for name in [c for c in columns if c.startswith("n ")]:
        table[name] = table[name].astype("Int64")  # counts, missing ones among them
    return table[columns].astype(object).where(table[columns].notna(), "")


def _cell(record: Mapping[Any, Any]) -> str:
    if math.isnan(record["value"]):
        return "undefined"
    text = f"{record['value']:.3f}"
    if not math.isnan(record.get("sd", math.nan)):
        text += f" ± {record['sd']:.3f}"
    if not math.isnan(record["low"]):
        text += f" ({record['low']:.3f}–{record['high']:.3f})"
    return text


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """Return a table as Markdown; numbers rounded, missing ones empty."""

    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, float):
            if value.is_integer():
                return f"{value:g}"
            return f"{value:.{digits}f}" if abs(value) >= 10**-digits else f"{value:.0e}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    is_number = [pd.api.types.is_numeric_dtype(table[name]) for name in table]
    lines = ["| " + " | ".join(map(str, table.columns)) + " |"]
    lines.append("|" + "|".join("---:" if number else "---" for number in is_number) + "|")
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(map(text, row)) + " |")
    return "\n".join(lines) + "\n"


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table as strict JSON values; NaN becomes None."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return rows


def write_table(folder: Path, name: str, table: pd.DataFrame) -> list[Path]:
    """Write a table as `<name>.csv`, `.md` and `.json`; return the paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("csv", "md", "json")]
    with atomic_path(paths[0]) as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(paths[1]) as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    write_json_atomic(paths[2], json_rows(table))
    return paths
