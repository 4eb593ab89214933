"""How long bootstrap intervals of all metrics take: counts of drawn cases against drawn rows.

    python -m modaltune.benchmarks.evaluate_speed [--cases 200 400] [--resamples 1000] [--json]

The plain form takes the drawn rows and calls the metrics of lifelines, torchsurv and scikit-learn,
resample by resample; it is timed on the first `--plain` resamples. Both draw the same patients, and
nothing is timed unless their numbers agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.errors import InputError

CSV_NAME = "evaluate_speed.csv"
LEAST_AGREEMENT = 1e-10


def made_up_scorers(cases: int, seed: int = 0) -> list[Any]:
    """Return a class scorer and a survival scorer of as many test cases, with skill."""
    import pandas as pd

    from modaltune.predictions import Predictions
    from modaltune.scorers import class_scorer, survival_scorer
    from modaltune.survival_metrics import SurvivalReference

    rng = np.random.default_rng(seed)
    count = 3 * cases  # two thirds are training cases, which only the censoring is learned from
    risk = rng.normal(size=count)
    death, leaving = rng.exponential(40 * np.exp(-risk)), rng.uniform(5, 90, count)
    table = {
        "primary_class": rng.integers(0, 2, count),
        "survival_months": np.round(np.minimum(death, leaving), 1),
        "event": (death <= leaving).astype(float),
    }
    labels = pd.DataFrame(table, index=[f"P{k}" for k in range(count)])
    own = 1 / (1 + np.exp(1 - 2 * labels["primary_class"] - rng.normal(size=count)))
    months = np.linspace(2, 60, 24)
    seen = risk + rng.normal(size=count)
    curves = np.exp(-np.outer(np.exp(seen), months / 40))
    said = Predictions(
        tuple(labels.index), np.array([0, 1]), np.stack([1 - own, own], 1), seen, curves, months
    )
    train, test = labels.iloc[cases:], list(labels.index[:cases])
    reference = SurvivalReference.fit(train["survival_months"], train["event"])
    scorers = [class_scorer(said, labels, test), survival_scorer(said, labels, reference, test)]
    return [scorer for scorer in scorers if scorer is not None]


def measure(cases: int, resamples: int, plain: int, repeats: int = 5) -> dict[str, Any]:
    """Bootstrap all metrics of made-up predictions in both forms and return how long each took.

    Args:
        cases: Test cases.
        resamples: Of the fast form.
        plain: Of the plain form, whose time is then scaled.
        repeats: Of the fast form; the median counts.

    Raises:
        InputError: The two forms differ: a wrong result is not timed.
    """
    from modaltune.resampling import bootstrap

    scorers = made_up_scorers(cases)
    counted_s = []
    for _ in range(repeats):
        begun = time.perf_counter()
        found = [bootstrap(s.resampled, cases, resamples=resamples).values for s in scorers]
        counted_s.append(time.perf_counter() - begun)
    rng = np.random.default_rng(0)
    drawn = [rng.choice(np.arange(cases), cases) for _ in range(plain)]
    begun = time.perf_counter()
    want = [np.array([scorer.score(rows) for rows in drawn]) for scorer in scorers]
    plain_s = (time.perf_counter() - begun) * resamples / plain
    gap = max(float(np.abs(one[:plain] - two).max()) for one, two in zip(found, want, strict=True))
    if not gap <= LEAST_AGREEMENT:
        raise InputError(f"counts must give the plain numbers before they are timed, got {gap:.1e}")
    return {
        "cases": cases,
        "deaths": scorers[1].num_events,
        "metrics": sum(len(scorer.names) for scorer in scorers),
        "resamples": resamples,
        "counts_s": round(statistics.median(counted_s), 6),
        "plain_s": round(plain_s, 4),
        "plain_timed": plain,
        "ratio": round(plain_s / statistics.median(counted_s), 1),
        "largest_difference": gap,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.evaluate_speed",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--cases", type=int, nargs="+", default=[200, 400])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--plain", type=int, default=60, help="resamples of the plain form")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        results = results_folder(options.results)
        for cases in options.cases:
            row = {
                "time": timestamp(),
                "commit": commit_id(),
                "device": f"{cpu_model()}, {os.cpu_count()} cores",
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
                **measure(cases, options.resamples, options.plain),
            }
            if results is not None:
                append_row(results / CSV_NAME, row)
            line = "{cases} cases, {resamples} resamples of {metrics} metrics: {counts_s} s, "
            line += "plain form {plain_s} s, {ratio} times"
            print(json.dumps(row) if options.json else line.format(**row))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
