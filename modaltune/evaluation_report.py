"""`report.md` of an evaluation: what was done, the main figures, differences, fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from modaltune.cases_folder import CasesFolder
from modaltune.evaluation_tables import HEADLINES, headline_table, markdown


def class_names(folders: Sequence[CasesFolder]) -> tuple[str, ...]:
    """Return the names of the classes, as far as the one cases folder knows them."""
    groups = folders[0].description.get("classes", {}).get("names", {})
    if len(groups) != 1 or len(folders) > 1:
        return ()
    (names,) = groups.values()
    count = 1 + max(map(int, names), default=-1)
    return tuple(str(names.get(str(k), f"class {k}")) for k in range(count))


def report_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Return what is to be known of the runs before their figures, a sentence each.

    Args:
        summary: With `runs`: the name of each, `random_backbone` and `fit_on` (tables of
            predictions have neither).
    """
    runs = summary["runs"]
    random = [run["name"] for run in runs if run.get("random_backbone")]
    published = [run["name"] for run in runs if run.get("fit_on", "train") != "train"]

    def of(names: Sequence[str]) -> str:
        return "this model" if len(runs) == 1 else ", ".join(names)

    found = []
    if random:
        found.append(f"The slide encoder of {of(random)} is random, not pretrained.")
    if published:
        found.append(f"Scalers and survival bins of {of(published)} saw validation and test cases.")
    return found


def report_markdown(
    summary: Mapping[str, Any], scores: pd.DataFrame, fits: pd.DataFrame, comparison: pd.DataFrame
) -> str:
    """Return the report as Markdown: what was done, headlines, comparisons, fits."""
    parts = ", ".join(f"{count} {part}" for part, count in summary["split"].items())
    lines = [
        f"# {summary['run']} on {summary['cases']}",
        "",
        f"Cases: {parts}. Probes: "
        + ("those saved with the run." if summary["probes"] == "run" else "fitted on train.")
        + f" Intervals: 95 %, {summary['bootstrap']['resamples']} bootstrap resamples of patients.",
        "",
    ]
    for warning in report_warnings(summary):
        lines += [f"**{warning}**", ""]
    for part, cases in summary["without_embedding"].items():
        if cases:
            lines += [f"{len(cases)} {part} cases hold nothing that the run reads.", ""]
    for part in ("test", "val"):
        table = headline_table(scores, part)
        if not table.empty:
            lines += [f"## {'Test' if part == 'test' else 'Validation'} cases", "", markdown(table)]
    if not comparison.empty:
        shown = comparison[comparison["metric"].isin(HEADLINES) & (comparison["split"] == "test")]
        lines += ["## Differences, first minus second, test cases", "", markdown(shown)]
    lines += ["## Fits of the probes", "", markdown(fits)]
    return "\n".join(lines)
