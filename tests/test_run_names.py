"""Names of runs in tables and pictures: short, and never the same for two paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from modaltune.errors import InputError
from modaltune.run_names import check_distinct, names_of_runs

ROOT = Path("/t")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/run", "b/run", "c.parquet", "a/run"], ["a/run", "b/run", "c", "a/run"]),
        (["a/run", "a/run"], ["run", "run"]),
        (["s0/brca/run", "s1/brca/run", "x"], ["s0/brca/run", "s1/brca/run", "x"]),
        (["p.csv", "p.parquet"], ["p.csv", "p.parquet"]),
        (["p.csv", "p"], ["p.csv", "p"]),
        (["run", "a/run"], ["t/run", "a/run"]),
        (["/run", "/a/run"], ["run", "a/run"]),
    ],
)
def test_names_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert names_of_runs([ROOT / path for path in paths]) == names


def test_a_run_is_no_seed_of_itself() -> None:
    check_distinct([ROOT / "a", ROOT / "b"])
    with pytest.raises(InputError, match=r"seeds must be different runs, got .*/t/a more than"):
        check_distinct([ROOT / "a", ROOT / "b" / ".." / "a"])
