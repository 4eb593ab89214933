"""Clinical encoding against scikit-learn's LabelEncoder, and fitted on training rows only."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import LabelEncoder

from modaltune.clinical import read_clinical
from modaltune.clinical_encoder import PRESETS, ClinicalEncoder, check_age
from modaltune.errors import CohortError, InputError

TRAIN = pd.DataFrame(
    {
        "age": [40.0, 60.0, np.nan, 80.0],
        "sex": ["female", "male", "female", None],
        "site": ["lung", "breast", "lung", "lung"],
        "stage": ["Stage IIA", None, "Stage X", "Stage I"],
        "t": ["T2b", "Tis", "T1", "T4d"],
        "n": ["N0 (i-)", "N1mi", None, "NX"],
        "m": ["cM0 (i+)", "M1", "MX", "M0"],
    },
    index=pd.Index(["a", "b", "c", "d"], name="case_id"),
)


def test_default_preset_is_standardised_age_and_one_hot() -> None:
    encoder = ClinicalEncoder.fit(TRAIN)
    assert encoder.feature_names == (
        *("age", "sex=female", "sex=male", "sex=other or missing"),
        *("site=breast", "site=lung", "site=other or missing"),
    )
    features = encoder.transform(TRAIN)
    deviation = np.std([40.0, 60.0, 80.0])
    expected = [
        [-20 / deviation, 1, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 1, 0],
        [20 / deviation, 0, 0, 1, 0, 1, 0],
    ]
    torch.testing.assert_close(features.values, torch.tensor(expected, dtype=torch.float32))
    assert features.case_ids == ("a", "b", "c", "d")
    assert features.missing.tolist() == [
        [False, False, False],
        [False, False, False],
        [True, False, False],
        [False, True, False],
    ]
    assert not features.absent.any()


def test_published_preset_equals_label_encoders_over_training_codes() -> None:
    encoder = ClinicalEncoder.fit(TRAIN, "published", stage_in_targets=False)
    values = encoder.transform(TRAIN).values
    assert encoder.feature_names == ("age", "stage", "t", "n", "m")
    assert values[:, 0].tolist() == pytest.approx([0.5, 0.75, 60 / 80, 1.0])
    cleaned = {
        "stage": ["Stage II", "Nan", "Stage X", "Stage I"],
        "t": ["T2", "T0", "T1", "T4"],
        "n": ["N0", "N1", "Nan", "NX"],
        "m": ["M0", "M1", "MX", "M0"],
    }
    for column, (field, codes) in enumerate(cleaned.items(), start=1):
        assert PRESETS["published"][column] == field
        assert values[:, column].tolist() == LabelEncoder().fit_transform(codes).tolist()


def test_unseen_categories_get_a_code_of_their_own_or_an_error() -> None:
    new = pd.DataFrame(
        {
            "age": [50.0, 50.0],
            "sex": ["female", "intersex"],
            "site": ["kidney", "lung"],
            "stage": ["Stage IV", "Stage I"],
            "m": ["M0", None],
        },
        index=["x", "y"],
    )
    values = ClinicalEncoder.fit(TRAIN).transform(new).values
    assert values[:, 1:].tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 1, 0]]
    published = ClinicalEncoder.fit(TRAIN, "published").transform(new)
    # Training had stages Nan, I, II, X and nodes N0, N1, NX, Nan, but never a missing T or M.
    assert published.values[:, 1:].tolist() == [[4, 4, 3, 0], [1, 4, 3, 3]]
    assert published.missing[0].tolist() == [False, False, True, True, False]
    strict = ClinicalEncoder.fit(TRAIN, unseen="error")
    message = r"site must be one of the training categories breast, lung, got kidney \(x\)"
    with pytest.raises(InputError, match=message):
        strict.transform(new.assign(sex="male"))


def test_a_case_without_any_record_is_marked_absent() -> None:
    table = pd.concat([TRAIN, pd.DataFrame(index=["z"])])
    features = ClinicalEncoder.fit(TRAIN).transform(table)
    assert features.absent.tolist() == [False] * 4 + [True]
    assert features.values[4].tolist() == [0, 0, 0, 1, 0, 0, 1]
    nothing = ClinicalEncoder.fit(pd.DataFrame(index=["p", "q"])).transform(TRAIN)
    assert torch.isfinite(nothing.values).all()


@pytest.mark.parametrize("preset", ["default", "published"])
def test_only_training_rows_enter(preset: str) -> None:
    test = TRAIN.set_axis(["e", "f", "g", "h"], axis=0)
    cohort = pd.concat([TRAIN, test])
    changed = cohort.copy()
    changed.loc[test.index, ["age", "site", "stage"]] = [99.0, "uterus", "Stage IV"]
    first = ClinicalEncoder.fit(cohort.loc[TRAIN.index], preset)  # type: ignore[arg-type]
    second = ClinicalEncoder.fit(changed.loc[TRAIN.index], preset)  # type: ignore[arg-type]
    assert first == second
    before, after = first.transform(cohort).values, second.transform(changed).values
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])


@pytest.mark.parametrize("preset", ["default", "published"])
def test_state_survives_sorted_json(preset: str) -> None:
    encoder = ClinicalEncoder.fit(TRAIN, preset)  # type: ignore[arg-type]
    text = json.dumps(encoder.to_dict(), allow_nan=False, sort_keys=True)
    back = ClinicalEncoder.from_dict(json.loads(text))
    assert back == encoder
    assert back.feature_names == encoder.feature_names
    assert torch.equal(back.transform(TRAIN).values, encoder.transform(TRAIN).values)


def test_the_published_preset_warns_of_the_leak(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ClinicalEncoder.fit(TRAIN)
        ClinicalEncoder.fit(TRAIN, "published", stage_in_targets=False)
        assert not caplog.records
        ClinicalEncoder.fit(TRAIN, "published")
    assert "leak the label" in caplog.text


def test_bad_options_and_values_are_refused() -> None:
    with pytest.raises(InputError, match="preset must be one of default, published, got 'five'"):
        ClinicalEncoder.fit(TRAIN, "five")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unseen must be one of own_code, error"):
        ClinicalEncoder.fit(TRAIN, unseen="drop")  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="at least one case"):
        ClinicalEncoder.fit(TRAIN.iloc[:0])
    with pytest.raises(InputError, match=r"age of case b must be years in 0\.\.130, got -1"):
        check_age(-1, "b")
    with pytest.raises(InputError, match="age of case a"):
        ClinicalEncoder.fit(TRAIN.assign(age="old"))


@pytest.mark.shared
def test_real_cohort_equals_label_encoders(shared_dir: Path) -> None:
    train = read_clinical(shared_dir / "data" / "tcga" / "splits" / "brca_train.json.gz")
    features = ClinicalEncoder.fit(train, "published", stage_in_targets=False).transform(train)
    np.testing.assert_allclose(features.values[:, 0], train["age"] / train["age"].max(), rtol=1e-6)
    # Spelt out in regular expressions for what occurs in this cohort, apart from our cleaning.
    groups = {"stage": r"Stage [IVX]+", "t": r"T[0-4X]", "n": r"N[0-3X]", "m": r"M[01X]"}
    for column, (field, pattern) in enumerate(groups.items(), start=1):
        codes = train[field].str.extract(f"({pattern})")[0].fillna("Nan")
        expected = LabelEncoder().fit_transform(codes.to_numpy(dtype=str))
        assert features.values[:, column].tolist() == expected.tolist()
