"""Training, validation and test cases: new splits, and those of a file."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from modaltune.errors import CohortError, InputError
from modaltune.tables import check_choice, is_missing, name_few, open_text, read_header, repeated

Part = Literal["train", "val", "test"]
Stratify = Literal["class+event", "class", "event", "none"]
Unclassified = Literal["split", "train"]

PARTS: tuple[Part, ...] = get_args(Part)
SPLITS_FORMAT = "modaltune.splits"

_KIND = "a readable split (splits.json of a cases folder, or a CSV with case_id and split)"
# The tissue source site of a TCGA barcode: TCGA-<site>-<patient>.
_TCGA_CASE = re.compile(r"TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4}")
_PART_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val",
               "validation": "val", "test": "test", "testing": "test"}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Which cases are learned from, chosen by, and judged on; no case is in two parts.

    Attributes:
        train, val, test: Case ids, sorted; a part may be empty.
    """

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, tuple(sorted(map(str, getattr(self, part)))))
        twice = repeated(self.case_ids)
        if twice:
            raise CohortError(
                f"a split must hold every case once, got {len(twice)} in two places: "
                f"{name_few(twice)}; leave each in one part"
            )

    @property
    def case_ids(self) -> tuple[str, ...]:
        """All cases, part after part."""
        return (*self.train, *self.val, *self.test)

    @property
    def parts(self) -> dict[Part, tuple[str, ...]]:
        """Part to its cases."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def restrict(self, case_ids: Collection[str]) -> Split:
        """Return the split without the cases that are not among `case_ids`."""
        kept = set(case_ids)
        return Split(*(tuple(c for c in cases if c in kept) for cases in self.parts.values()))

    def to_dict(self) -> dict[str, list[str]]:
        """Return the split as JSON values."""
        return {part: list(cases) for part, cases in self.parts.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Split:
        """Rebuild a split from `to_dict`."""
        return cls(*(tuple(state.get(part, ())) for part in PARTS))


def source_site(case_id: str) -> str | None:
    """Return the tissue source site of a TCGA barcode (TCGA-A1-0001: A1), None for other ids."""
    match = _TCGA_CASE.fullmatch(case_id[:12])
    return None if match is None else match["site"]


def make_splits(
    clinical: pd.DataFrame,
    *,
    folds: int = 1,
    test_share: float = 0.2,
    val_share: float = 0.15,
    stratify: Stratify = "class+event",
    by_site: bool = False,
    unclassified: Unclassified = "split",
    seed: int = 0,
) -> tuple[Split, ...]:
    """Split cases at random; the same cases and seed give the same split in any order of rows.

    A stratum with too few cases to be spread is joined with the others of its class, and what is
    still too small with the other small ones; so are strata that are more than a part has cases.
    The published split is `stratify="class"`, `unclassified="train"`.

    Args:
        clinical: One row per case, index `case_id`; `primary_class` (-1: not classified) and
            `event` are read where present.
        folds: 1 for one split; k for k splits whose test parts cover every case once.
        test_share: Share of the cases in the test part of a single split.
        val_share: Share of the others in the validation part; 0 for none.
        stratify: What every part holds in the same proportions.
        by_site: No source site (of the TCGA barcode) is in two parts of a split.
        unclassified: "train" puts cases without a class into training, as published.
        seed: Of every random choice.

    Raises:
        CohortError: There are too few cases, or ids without a site under `by_site`.
        InputError: An option is invalid.

    Source: METHOD 4.12; scikit-learn's splitters.
    """
    check_choice("stratify", stratify, get_args(Stratify))
    check_choice("unclassified", unclassified, get_args(Unclassified))
    if folds < 1 or not 0 < test_share < 1 or not 0 <= val_share < 1:
        raise InputError(
            f"folds must be >= 1, test_share in 0..1 and val_share in 0..<1, got {folds}, "
            f"{test_share} and {val_share}; 0.2 and 0.15 are published"
        )
    table = _split_table(clinical, stratify, by_site)
    always_train: tuple[str, ...] = ()
    if unclassified == "train":
        is_out = table["class"] == "-1"
        always_train, table = tuple(table.index[is_out]), table[~is_out]
    splits = []
    for rest, test in _outer(table, folds, test_share, seed):
        train, val = (rest, table.iloc[:0])
        if val_share:
            train, val = _divide(rest, val_share, seed)
        splits.append(Split((*train.index, *always_train), tuple(val.index), tuple(test.index)))
    return tuple(splits)


def _split_table(clinical: pd.DataFrame, stratify: Stratify, by_site: bool) -> pd.DataFrame:
    """Return what splitting looks at, a row per case, sorted by case id."""
    ids = [str(case) for case in clinical.index]
    if repeated(ids):
        raise CohortError(
            f"clinical must have one row per case, got several for {name_few(repeated(ids))}; "
            "merge them"
        )
    classes = clinical.get("primary_class", pd.Series(-1, clinical.index)).fillna(-1).astype(int)
    events = clinical.get("event", pd.Series(np.nan, clinical.index)).astype(float)
    table = pd.DataFrame(
        {"class": classes.astype(str).to_numpy(), "event": events.astype(str).to_numpy()},
        index=pd.Index(ids, name="case_id"),
    ).sort_index()
    both = table["class"] + "/" + table["event"]
    by = {"class+event": both, "class": table["class"], "event": table["event"]}
    table["stratum"] = by.get(stratify, pd.Series("all", table.index))
    table["group"] = [source_site(case) if by_site else case for case in table.index]
    without = list(table.index[table["group"].isna()])
    if without:
        raise CohortError(
            f"case ids must be TCGA barcodes to split by source site, got {len(without)} others: "
            f"{name_few(without)}; split by a file instead (case_id, split)"
        )
    return table


def _outer(
    table: pd.DataFrame, folds: int, test_share: float, seed: int
) -> Iterable[tuple[pd.DataFrame, pd.DataFrame]]:
    """Give (rest, test) once, or fold by fold."""
    if folds == 1:
        return [_divide(table, test_share, seed)]
    return [(table.iloc[rest], table.iloc[test]) for rest, test in _folds(table, folds, seed)]


def _divide(table: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut a share off, in strata; whole groups where groups are larger than a case."""
    if table["group"].is_unique:
        # Every stratum needs a place in the smaller part.
        places = int(min(share, 1 - share) * len(table))
        strata = _large_enough(table, 2, places)
        rest, cut = _refusing_too_few(
            lambda: train_test_split(table, test_size=share, stratify=strata, random_state=seed)
        )
        return rest, cut
    # One of equal folds is the smaller part, whichever that is.
    rest, cut = next(iter(_folds(table, max(2, round(1 / min(share, 1 - share))), seed)))
    if share > 0.5:
        rest, cut = cut, rest
    return table.iloc[rest], table.iloc[cut]


def _folds(table: pd.DataFrame, folds: int, seed: int) -> Sequence[tuple[Any, Any]]:
    """Return positions (rest, cut) of each fold."""
    strata = _large_enough(table, folds)
    groups = None if table["group"].is_unique else table["group"]
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
    return _refusing_too_few(lambda: list(splitter.split(table, strata, groups)))


def _refusing_too_few(cut: Callable[[], Any]) -> Any:
    """Run a splitter of scikit-learn, whose refusals are about too few cases or groups."""
    try:
        return cut()
    except ValueError as error:
        raise CohortError(
            f"cases must be enough for the split asked for, got: {error}; ask for fewer folds, "
            "larger shares, or stratify='none'"
        ) from error


def _large_enough(table: pd.DataFrame, least: int, most_strata: int | None = None) -> pd.Series:
    """Join strata of fewer than `least` cases with those most like them, or all of too many."""
    strata = table["stratum"].copy()
    for broader in (table["class"], pd.Series("few", table.index)):
        small = strata.map(strata.value_counts()) < least
        strata[small] = broader[small]
        if most_strata is not None and strata.nunique() > most_strata:
            strata = broader.copy()
    small = strata.map(strata.value_counts()) < least
    strata[small] = strata.mode().iloc[0] if len(strata) else "few"
    return strata


def read_splits(path: str | Path) -> tuple[Split, ...]:
    """Read splits: `splits.json` of a cases folder, or a CSV.

    A CSV (also TSV, .gz, .zip) has the columns `case_id` and `split` (train, val or test) and, for
    several folds, `fold` (0, 1, ...).

    Raises:
        CohortError: The file is damaged, or a row breaks a rule; names file and line.
    """
    path = Path(path)
    with open_text(path, _KIND) as text:
        if ".json" in (suffix.lower() for suffix in path.suffixes):
            state = json.load(text)
            is_ours = isinstance(state, dict) and state.get("format") == SPLITS_FORMAT
            if not is_ours or not isinstance(state.get("folds"), list):
                raise CohortError(
                    f"{path} must be {_KIND}, got another JSON; the published layout is read as "
                    "three files, train, validation and test"
                )
            return tuple(Split.from_dict(fold) for fold in state["folds"])
        return _from_rows(text, path)


def splits_state(splits: Sequence[Split]) -> dict[str, Any]:
    """Return splits as the JSON that `read_splits` reads."""
    return {"format": SPLITS_FORMAT, "folds": [split.to_dict() for split in splits]}


def _from_rows(text: TextIO, path: Path) -> tuple[Split, ...]:
    """Read rows of case, part and fold."""
    header, delimiter = read_header(text, path)
    if not {"case_id", "split"} <= set(header):
        raise CohortError(
            f"{path} must have the columns case_id and split, got {name_few(header)}; rename them"
        )
    folds: dict[int, dict[str, list[str]]] = {}
    for number, row in enumerate(csv.reader(text, delimiter=delimiter), start=2):
        if not any(map(str.strip, row)):
            continue
        cells = dict(itertools.zip_longest(header, row, fillvalue=""))
        part = _PART_WORDS.get(str(cells["split"]).strip().lower())
        case, fold = str(cells["case_id"]).strip(), str(cells.get("fold") or "0").strip()
        if is_missing(case) or part is None or not fold.isdecimal():
            raise CohortError(
                f"{path}, line {number} must be a case, train, val or test, and a fold number, got "
                f"{case!r}, {cells['split']!r} and {fold!r}; correct it"
            )
        folds.setdefault(int(fold), {}).setdefault(part, []).append(case)
    if sorted(folds) != list(range(len(folds))) or not folds:
        raise CohortError(
            f"{path} must number its folds 0, 1, ..., got {sorted(folds) or 'none'}; renumber them"
        )
    return tuple(Split.from_dict(folds[number]) for number in sorted(folds))


def count_by_class(split: Split, clinical: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count the cases of each part by class: `{"train": {"0": 506, "1": 130, "-1": 113}, ...}`."""
    classes = clinical["primary_class"]
    counts: dict[str, dict[str, int]] = {}
    for part, cases in split.parts.items():
        found = Counter(int(classes[case]) for case in cases)
        counts[part] = {str(k): found[k] for k in sorted(found, key=lambda c: (c < 0, c))}
    return counts
