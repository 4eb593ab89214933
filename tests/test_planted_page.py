"""docs/planted.md: its figures are those of the rows and of the planted truth."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from modaltune.benchmarks.planted import DIFFERENCES_NAME, SCORES_NAME
from modaltune.benchmarks.planted_plot import read_scores
from modaltune.planted_truth import Outcomes, Truth, bayes_scores, draw_latents, draw_outcomes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "planted.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_best_scores_are_computed() -> None:
    truth, rng = Truth(), np.random.default_rng(11)
    latents = draw_latents(truth, 20_000, rng)
    outcomes = draw_outcomes(truth, latents, rng)
    classes = bayes_scores(truth, latents, outcomes)
    few = Outcomes(*(values[:4000] for values in outcomes))
    risks = bayes_scores(truth, latents[:4000], few)
    for seen, words in (("image", "the image"), ("genes", "the genes"), ("both", "both")):
        (row,) = re.findall(rf"^\| {words} \|(.*)\|$", PAGE, re.MULTILINE)
        accuracy, c_index = (float(cell) for cell in row.split("|"))
        # Two standard errors of 20,000 cases, and of a c-index of 4,000; two digits are stated.
        assert classes[seen].balanced_accuracy == pytest.approx(accuracy, abs=0.007 + 0.005)
        assert risks[seen].c_index == pytest.approx(c_index, abs=0.012 + 0.005)


def cell(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def test_scores_and_differences_are_those_of_the_rows() -> None:
    rows = read_scores(RESULTS / SCORES_NAME, cohort_seed=1, shuffled=False)
    assert len({row["model"] for row in rows}) == 7
    with (RESULTS / DIFFERENCES_NAME).open(encoding="utf-8", newline="") as file:
        pairs = [row for row in csv.DictReader(file) if row["shuffled"] == "False"]
    for row in rows:
        line = next(x for x in PAGE.splitlines() if x.startswith(f"| `{row['model']}` |"))
        assert row["seeds"] == "3"
        assert cell(row["value"], row["value_low"], row["value_high"]) in line
    assert len(pairs) == 2 * (6 + 5)
    for pair in pairs:
        table = PAGE.split(f"| `{pair['model']}` minus the rival")[1]
        line = next(x for x in table.splitlines() if x.startswith(f"| `{pair['rival']}` |"))
        value, low, high = (float(pair[name]) for name in ("difference", "low", "high"))
        assert cell(value, low, high, sign="+") in line
