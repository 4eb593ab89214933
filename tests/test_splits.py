"""Splits: strata, sites, folds, any order of rows, and the files they come from."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modaltune.errors import CohortError, InputError
from modaltune.splits import (
    Split,
    count_by_class,
    make_splits,
    read_splits,
    source_site,
    splits_state,
)


def clinic(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    sites = [f"{a}{b}" for a, b in itertools.product("ABCDE", "12345")]
    ids = [f"TCGA-{sites[rng.integers(25)]}-{k:04d}" for k in range(n)]
    return pd.DataFrame(
        {"primary_class": rng.choice([0, 0, 0, 1, -1], n), "event": rng.choice([0.0, 1.0], n)},
        index=pd.Index(ids, name="case_id"),
    )


def test_one_split_has_the_shares_and_strata_asked_for() -> None:
    table = clinic()
    (split,) = make_splits(table, test_share=0.2, val_share=0.25)
    assert (len(split.train), len(split.val), len(split.test)) == (120, 40, 40)
    assert set(split.case_ids) == set(table.index)
    for column in ("primary_class", "event"):
        whole = table[column].value_counts(normalize=True)
        for cases in split.parts.values():
            part = table.loc[list(cases), column].value_counts(normalize=True)
            assert (part - whole).abs().max() < 0.03
    assert sum(count_by_class(split, table)["train"].values()) == 120
    assert list(count_by_class(split, table)["train"]) == ["0", "1", "-1"]


@pytest.mark.parametrize("options", [{}, {"folds": 4}, {"by_site": True}, {"stratify": "none"}])
def test_neither_order_of_rows_nor_repetition_changes_a_split(options: dict[str, object]) -> None:
    table = clinic()
    first = make_splits(table, **options)  # type: ignore[arg-type]
    assert first == make_splits(table.sample(frac=1, random_state=3), **options)  # type: ignore[arg-type]
    assert first != make_splits(table, seed=1, **options)  # type: ignore[arg-type]


def test_folds_test_every_case_once() -> None:
    table = clinic()
    splits = make_splits(table, folds=5, val_share=0)
    tested = Counter(case for split in splits for case in split.test)
    assert set(tested.values()) == {1}
    assert set(tested) == set(table.index)
    assert all(not split.val and len(split.train) == 160 for split in splits)


@pytest.mark.parametrize("folds", [1, 4])
def test_no_site_is_in_two_parts(folds: int) -> None:
    table = clinic()
    for split in make_splits(table, folds=folds, by_site=True):
        sites = [{source_site(case) for case in cases} for cases in split.parts.values()]
        assert all(sites)
        assert not any(a & b for a, b in itertools.combinations(sites, 2))
    shared = make_splits(table)[0]
    assert {source_site(c) for c in shared.train} & {source_site(c) for c in shared.test}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_shares_are_kept_by_site_too(share: float) -> None:
    table = clinic(400)
    (split,) = make_splits(table, by_site=True, test_share=share, val_share=0)
    assert len(split.test) / len(table) == pytest.approx(share, abs=0.08)


def test_unclassified_cases_go_to_training_as_published() -> None:
    table = clinic()
    (split,) = make_splits(table, stratify="class", unclassified="train")
    classes = table["primary_class"]
    assert not any(classes[case] == -1 for case in (*split.val, *split.test))
    assert sum(classes[case] == -1 for case in split.train) == (classes == -1).sum()


def test_rare_strata_are_joined_not_refused() -> None:
    table = clinic(40)
    table["primary_class"] = [7, 8, 9, *[0] * 37]
    for folds in (1, 3):
        assert len(make_splits(table, folds=folds)) == folds
    (split,) = make_splits(table.drop(columns=["event", "primary_class"]))
    assert len(split.test) == 8


def test_too_few_cases_and_wrong_options_are_refused() -> None:
    with pytest.raises(CohortError, match="must be enough for the split asked for"):
        make_splits(clinic(3), folds=5)
    with pytest.raises(InputError, match="test_share"):
        make_splits(clinic(), test_share=1.0)
    with pytest.raises(InputError, match="stratify must be one of"):
        make_splits(clinic(), stratify="stage")  # type: ignore[arg-type]
    other = clinic(20).set_axis([f"P{k}" for k in range(20)], axis=0)
    with pytest.raises(CohortError, match=r"must be TCGA barcodes.*got 20 others: P0"):
        make_splits(other, by_site=True)
    with pytest.raises(CohortError, match="one row per case"):
        make_splits(pd.concat([clinic(20), clinic(20)]))


def test_a_split_holds_every_case_once() -> None:
    with pytest.raises(CohortError, match="1 in two places: b"):
        Split(("a", "b"), ("b",))
    split = Split(("c", "a"), ("b",))
    assert split.train == ("a", "c")
    assert split.restrict(["a", "b", "x"]) == Split(("a",), ("b",))


def test_splits_come_back_from_json_and_csv(tmp_path: Path) -> None:
    splits = make_splits(clinic(), folds=3)
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits_state(splits)))
    assert read_splits(path) == splits
    rows = [
        (case, part.upper(), fold)
        for fold, split in enumerate(splits)
        for part, cases in split.parts.items()
        for case in cases
    ]
    table = pd.DataFrame(rows, columns=["case_id", "split", "fold"]).sample(frac=1, random_state=0)
    table.to_csv(tmp_path / "splits.tsv", sep="\t", index=False)
    assert read_splits(tmp_path / "splits.tsv") == splits
    table[table["fold"] == 0].drop(columns="fold").to_csv(tmp_path / "one.csv", index=False)
    assert read_splits(tmp_path / "one.csv") == splits[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case_id,part\na,train\n", "must have the columns case_id and split"),
        ("case_id,split\na,train\nb,holdout\n", "line 3 must be a case, train, val or test"),
        ("case_id,split,fold\na,train,1\n", r"number its folds 0, 1, ..., got \[1\]"),
        ("case_id,split\na,train\na,test\n", "every case once, got 1 in two places: a"),
    ],
)
def test_files_that_break_a_rule_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(content)
    with pytest.raises(CohortError, match=message):
        read_splits(path)
    for other in ('{"data": []}', '{"format": "modaltune.splits"}'):
        (tmp_path / "split.json").write_text(other)
        with pytest.raises(CohortError, match="another JSON"):
            read_splits(tmp_path / "split.json")
