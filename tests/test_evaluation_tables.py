"""Tables of evaluations: comparisons, means over seeds, fits, and what they look like."""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from modaltune.console_tables import comparison_tables, headline_tables
from modaltune.errors import InputError
from modaltune.evaluation import (
    MEAN_OF_SITES,
    EmbeddedCases,
    Evaluation,
    Place,
    evaluate_cases,
    evaluate_predictions,
)
from modaltune.evaluation_tables import (
    comparison_table,
    fit_table,
    headline_table,
    json_rows,
    markdown,
    score_table,
    seeds_table,
    write_table,
)
from modaltune.fitted_probes import POOLED
from modaltune.result_rows import BootstrapOptions
from modaltune.splits import Split
from modaltune.testing_embeddings import TASKS, embedded_study, one_row

POINTS = BootstrapOptions(resamples=0)
FAST = BootstrapOptions(resamples=8)


@pytest.fixture(scope="module")
def study() -> tuple[EmbeddedCases, Split, Evaluation]:
    cases, split = embedded_study()
    return cases, split, evaluate_cases(cases, split, name="mine")


def test_comparison_and_seeds(study: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases, split, found = study
    noise = np.random.default_rng(9).normal(size=cases.embeddings.shape)
    worse = [
        evaluate_cases(replace(cases, embeddings=cases.embeddings + k * noise), split, name=f"n{k}")
        for k in (3, 4, 5)
    ]
    table = comparison_table([found], worse[:1], FAST)
    row = one_row(table, split="test", task="survival", metric="c_index")
    assert row["difference"] == pytest.approx(row["first_value"] - row["second_value"])
    assert row["low"] > 0
    assert row["p_permutation"] < 0.3
    many = comparison_table([found], worse, FAST)
    assert set(many["seeds"]) == {"1 and 3"}
    seeds = seeds_table(worse, FAST, "noisy")
    row = one_row(seeds, split="test", task="survival", metric="c_index")
    each = [
        one_row(score_table(e, POINTS), split="test", task="survival", metric="c_index")["value"]
        for e in worse
    ]
    assert row["value"] == pytest.approx(np.mean(each))
    assert row["sd"] == pytest.approx(np.std(each, ddof=1))
    assert "±" in headline_table(seeds)["c_index"][2]
    paths = write_table(tmp_path, "seeds", seeds)
    assert [p.name for p in paths] == ["seeds.csv", "seeds.md", "seeds.json"]
    again = pd.read_csv(paths[0])
    np.testing.assert_allclose(again["value"], seeds["value"])
    assert json.loads(paths[2].read_text()) == json_rows(seeds)
    assert paths[1].read_text().count("\n") == len(seeds) + 2
    place = Place("test", "survival", POOLED, "survival")
    others = {p: scorer for p, scorer in worse[2].scorers.items() if p != place}
    with caplog.at_level(logging.WARNING):
        fewer = seeds_table([*worse[:2], replace(worse[2], scorers=others)], FAST, "noisy")
    assert len(fewer) == len(seeds) - len(worse[2].scorers[place].names)
    assert "test survival pooled survival c_index" in caplog.text
    with pytest.raises(InputError, match="two or more seeds, got 1"):
        seeds_table(worse[:1], FAST, "x")


def test_fits_say_how_they_went(study: Any) -> None:
    fits = fit_table(study[2])
    assert list(fits["task"]) == list(TASKS)
    assert fits["cox_converged"].all()
    assert set(fits["cox_penalizer"]) == {0.1}
    assert (fits["cox_deaths"] < fits["cox_cases"]).all()


def test_markdown_is_a_table() -> None:
    table = pd.DataFrame({"a|b": ["x|y", "z"], "n": [1, 2], "v": [0.00001, float("nan")]})
    lines = markdown(table).splitlines()
    assert lines[0] == "| a|b | n | v |"
    assert lines[1] == "|---|---:|---:|"
    assert lines[2] == "| x\\|y | 1 | 1e-05 |"
    assert lines[3] == "| z | 2 |  |"


def test_runs_of_one_side_are_seeds_of_one_recipe(study: Any) -> None:
    cases, split, found = study
    direct = evaluate_predictions(
        found.predictions[Place("test", "diagnosis", POOLED, "class")], cases.clinical, split,
        name="rival", parts=("test",),
    )  # fmt: skip
    for sides in (([found, direct], [found]), ([found], [direct, found])):
        with pytest.raises(InputError, match=r"must be seeds of one recipe, got .*rival"):
            comparison_table(*sides, POINTS)


def test_means_over_sites_with_other_months_are_not_compared() -> None:
    cases, split = embedded_study(n=240, sites=("breast", "kidney"))
    months = cases.clinical.loc[list(split.train), "survival_months"]
    late = set(months[months > months.quantile(0.7)].index)
    late &= set(cases.clinical.index[cases.clinical["site"] == "kidney"])
    kept = [case for case in cases.case_ids if case not in late]
    some = EmbeddedCases(tuple(kept), cases.take(kept), TASKS, cases.clinical)
    pair = [
        evaluate_cases(c, split, name=n, parts=("test",))
        for c, n in ((cases, "all"), (some, "few"))
    ]
    table = comparison_table(pair[:1], pair[1:], FAST)
    found = {
        scope: one_row(table, task="survival", scope=scope, metric="integrated_brier")
        for scope in ("breast", "kidney", MEAN_OF_SITES)
    }
    assert np.isfinite(found["breast"]["difference"])
    for scope in ("kidney", MEAN_OF_SITES):
        assert np.isnan(found[scope]["difference"])
        assert "over different months: not compared" in found[scope]["note"]
    drawn = list(comparison_tables(table))
    titles = [str(one.title) for one in drawn]
    assert titles[0] == "all minus few: test cases, seeds 1 and 1"
    assert f"all minus few, {MEAN_OF_SITES}: test cases, seeds 1 and 1" in titles
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(drawn[titles.index("all minus few, kidney: test cases, seeds 1 and 1")])
    lines = {
        line.split("│")[1].strip(): line
        for line in console.export_text().splitlines()
        if line.startswith("│")
    }
    assert lines["integrated brier"].count("not compared") == len(TASKS)
    assert re.search(
        r"[+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\), p [01]\.\d{3}", lines["c index"]
    )
    console.print(*headline_tables(headline_table(score_table(pair[0], POINTS))))
    assert re.search(r"n class +│ \d+ ", console.export_text())
