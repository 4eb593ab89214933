"""Clinical rows as numbers for the model, fitted on the training split."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modaltune.errors import CohortError, InputError
from modaltune.labels import clean_code
from modaltune.tables import check_choice, is_missing, name_few

logger = logging.getLogger(__name__)

Preset = Literal["default", "published"]
Unseen = Literal["own_code", "error"]

#: Fields behind the features of each preset.
PRESETS: dict[str, tuple[str, ...]] = {
    "default": ("age", "sex", "site"),
    "published": ("age", "stage", "t", "n", "m"),
}

# How scikit-learn's LabelEncoder met missing values in the published code: as a class of its own.
_MISSING_CLASS = "Nan"
_MAX_AGE_YEARS = 130


def check_age(value: object, case_id: object) -> float:
    """Return an age in years, NaN where missing.

    Raises:
        InputError: The value is no number of years in 0..130; names the case.
    """
    if is_missing(value):
        return math.nan
    try:
        years = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        years = math.nan
    if not 0 <= years <= _MAX_AGE_YEARS:
        raise InputError(
            f"age of case {case_id} must be years in 0..{_MAX_AGE_YEARS}, got {value!r}; convert "
            "it to years, or leave the cell empty"
        )
    return years


class ClinicalFeatures(NamedTuple):
    """Clinical input of `n` cases.

    Attributes:
        values: `[n, F]` float32, never NaN.
        missing: `[n, fields]` bool, fields in the order of `PRESETS[preset]`: what was not known
            and has been filled in.
        case_ids: The case of each row.
    """

    values: Tensor
    missing: Tensor
    case_ids: tuple[str, ...]

    @property
    def absent(self) -> Tensor:
        """`[n]` bool: cases of which nothing is known, to be masked as without a record."""
        return self.missing.all(dim=1)


@dataclass(frozen=True)
class ClinicalEncoder:
    """Turns clinical rows into numbers, as fitted on the training split; saved with the model.

    * `default`: standardised age; one-hot sex and site, each with a last column for what is
      missing or was not seen in training. A missing age becomes the training mean, 0.
    * `published`, for comparison only, since stage, T, N and M are in the target sentences, too:
      age / training maximum, then alphabetical codes 0, 1, ... of cleaned stage, T, N and M, where
      missing is a class if training had it. A missing age becomes the training mean (published:
      NaN). What was not seen in training gets a code of its own, one past the last.

    Attributes:
        preset: "default" or "published".
        age_center, age_scale, age_fill: The age feature is `(age - center) / scale`; `fill` is
            the age in years taken for a missing one.
        categories: Field to its training categories, sorted.
        unseen: "own_code" as above, or "error" for a known category not seen in training.
    """

    preset: Preset
    age_center: float
    age_scale: float
    age_fill: float
    categories: dict[str, tuple[str, ...]]
    unseen: Unseen = "own_code"

    @classmethod
    def fit(
        cls,
        train: pd.DataFrame,
        preset: Preset = "default",
        *,
        unseen: Unseen = "own_code",
        stage_in_targets: bool = True,
    ) -> ClinicalEncoder:
        """Fit on the training cases, and on nothing else.

        Args:
            train: Training rows of `read_clinical`; an absent column counts as missing.
            preset: Which fields are used.
            unseen: Policy for categories that only later tables have.
            stage_in_targets: Whether sentences with the stage are among the targets; with the
                published preset that is worth a warning.

        Raises:
            CohortError: There is no training case.
            InputError: An option is unknown.

        Source: METHOD 4.13; REQUIREMENTS 31, 37.
        """
        check_choice("preset", preset, get_args(Preset))
        check_choice("unseen", unseen, get_args(Unseen))
        if len(train) == 0:
            raise CohortError("train must hold at least one case, got none; check the split")
        if preset == "published" and stage_in_targets:
            logger.warning(
                "the published clinical inputs (stage, T, N, M) are also in the target sentences: "
                "they leak the label; the preset 'default' does not"
            )
        ages = _ages(train)
        ages = ages[~np.isnan(ages)]
        mean = float(ages.mean()) if len(ages) else 0.0
        if preset == "published":
            center, scale = 0.0, float(ages.max()) if len(ages) else 1.0
        else:
            center, scale = mean, float(ages.std()) if len(ages) else 1.0
        return cls(
            preset=preset,
            age_center=center,
            age_scale=scale or 1.0,
            age_fill=mean,
            categories={
                field: tuple(sorted({c for c in _classes(train, field, preset) if c is not None}))
                for field in PRESETS[preset][1:]
            },
            unseen=unseen,
        )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the `F` features."""
        if self.preset == "published":
            return PRESETS["published"]
        return (
            "age",
            *(
                f"{field}={category}"
                for field, categories in self.categories.items()
                for category in (*categories, "other or missing")
            ),
        )

    def transform(self, table: pd.DataFrame) -> ClinicalFeatures:
        """Encode the rows of any clinical table.

        Args:
            table: Rows of `read_clinical`; absent columns count as missing.

        Raises:
            InputError: An age is invalid, or a category unseen under the policy "error".
        """
        cases = tuple(map(str, table.index))
        ages = _ages(table)
        filled = np.where(np.isnan(ages), self.age_fill, ages)
        columns: list[np.ndarray[Any, Any]] = [
            ((filled - self.age_center) / self.age_scale).reshape(-1, 1)
        ]
        missing = [np.isnan(ages)]
        for field, categories in self.categories.items():
            codes = self._codes(table, field, cases)
            missing.append(np.array([is_missing(v) for v in _column(table, field)], dtype=bool))
            if self.preset == "published":
                columns.append(codes.reshape(-1, 1))
            else:
                columns.append(np.eye(len(categories) + 1)[codes])
        return ClinicalFeatures(
            values=torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32)),
            missing=torch.from_numpy(np.stack(missing, axis=1)),
            case_ids=cases,
        )

    def _codes(
        self, table: pd.DataFrame, field: str, cases: tuple[str, ...]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number the categories of a field, `[n]` int64; one past the last for all others."""
        categories = self.categories[field]
        place = {category: code for code, category in enumerate(categories)}
        classes = _classes(table, field, self.preset)
        unseen = {
            f"{value} ({case})": None
            for value, case in zip(classes, cases, strict=True)
            if value not in place and value not in (None, _MISSING_CLASS)
        }
        if unseen and self.unseen == "error":
            raise InputError(
                f"{field} must be one of the training categories {', '.join(categories)}, got "
                f"{name_few(unseen)}; use unseen='own_code'"
            )
        codes = [len(place) if value is None else place.get(value, len(place)) for value in classes]
        return np.array(codes, dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Return the encoder as JSON values."""
        return {
            "preset": self.preset,
            "age_center": self.age_center,
            "age_scale": self.age_scale,
            "age_fill": self.age_fill,
            "categories": {field: list(names) for field, names in self.categories.items()},
            "unseen": self.unseen,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ClinicalEncoder:
        """Rebuild an encoder from `to_dict`."""
        # In the order of the preset, not of the file: the features follow it.
        fields = PRESETS[state["preset"]][1:]
        categories = {field: tuple(state["categories"][field]) for field in fields}
        return cls(**{**state, "categories": categories})


def _ages(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the ages of a table in years, `[n]` with NaN for missing."""
    values = zip(table.index, _column(table, "age"), strict=True)
    return np.array([check_age(age, case) for case, age in values], dtype=np.float64)


def _column(table: pd.DataFrame, field: str) -> list[Any]:
    """Return a column's values, all missing where the column is absent."""
    return list(table[field]) if field in table.columns else [None] * len(table)


def _classes(table: pd.DataFrame, field: str, preset: Preset) -> list[str | None]:
    """Return the category of each row: cleaned codes for the published preset, text otherwise."""
    values = _column(table, field)
    if preset == "published":
        return [clean_code(field, value) or _MISSING_CLASS for value in values]
    return [None if is_missing(value) else str(value) for value in values]
