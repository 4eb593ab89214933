"""A small cohort of embeddings for tests, whose labels and follow-up can be read off them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from modaltune.evaluation import EmbeddedCases
from modaltune.splits import Split

TASKS = ("general", "diagnosis", "survival")


def embedded_study(
    n: int = 160, sites: tuple[str, ...] = ("breast",), seed: int = 0
) -> tuple[EmbeddedCases, Split]:
    """Return embeddings of n cases and their split.

    The class follows from the prompt "diagnosis", follow-up from "survival", the site from all
    three; some classes and times are missing.

    Args:
        n: Cases.
        sites: Cancer sites.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    ids = [f"P{k:03d}" for k in range(n)]
    x = rng.normal(size=(n, 3, 6))
    death, leaving = rng.exponential(40 * np.exp(-x[:, 2, 1])), rng.uniform(5, 120, n)
    clinical = pd.DataFrame(
        {
            "primary_class": (x[:, 1, 0] + 0.5 * rng.normal(size=n) > 0).astype(int),
            "survival_months": np.ceil(np.minimum(death, leaving)),
            "event": (death <= leaving).astype(float),
            "site": rng.choice(sites, n),
        },
        index=ids,
    )
    for number, site in enumerate(sites):
        x[clinical["site"] == site, :, 4] += 3 * number
    clinical.iloc[::13, 0] = -1
    clinical.iloc[4::17, 1] = np.nan
    order = rng.permutation(ids)
    split = Split(tuple(order[: n // 2]), tuple(order[n // 2 : 5 * n // 8]),
                  tuple(order[5 * n // 8 :]))  # fmt: skip
    return EmbeddedCases(tuple(ids), x, TASKS, clinical), split


def one_row(table: pd.DataFrame, **where: str) -> Any:
    """Return the only row of a table whose columns have these values."""
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]
