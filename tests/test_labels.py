"""Label sentences and survival bins, against sentences and quartiles written out by hand."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modaltune.clinical import read_clinical
from modaltune.errors import CohortError, InputError
from modaltune.labels import (
    ROWS,
    TASK_ROWS,
    LabelSentences,
    SurvivalBins,
    clean_code,
    label_cohort,
    label_sentences,
)

BINS = SurvivalBins(edges=(-1e-6, 14.4, 27.9, 56.9, 282.7), num_cases=749)
FULL = {
    "case_id": "TCGA-AA-0001",
    "site": "breast",
    "diagnosis": "infiltrating duct carcinoma",
    "stage": "Stage IIB",
    "t": "T2",
    "n": "N1a",
    "m": "cM0 (i+)",
    "survival_months": 30.0,
    "event": 1,
}
S = "Overall stage: stage two;"
T = "Tumor stage status: tumor stage two;"
N = "Lymph node status: node stage one;"
M = "Distant metastasis status: no metastasis detected;"
V = "Survival status: The patient died between 28 and 57 months"


def test_full_record_gives_the_published_sentences() -> None:
    sentences = label_sentences(FULL, BINS)
    assert sentences.general == (
        "Cancer location: breast; Cancer diagnosis: infiltrating duct carcinoma; "
        f"{S} {T} {N} {M} {V}"
    )
    assert sentences.diagnosis == (
        "Cancer location: breast; Cancer diagnosis: infiltrating duct carcinoma;"
    )
    assert sentences.stage == f"Cancer location: breast; {S} {T} {N} {M}"
    assert sentences.survival == f"Cancer location: breast; {S} {T} {N} {M} {V}"
    assert tuple(sentences) == tuple(getattr(sentences, row) for row in ROWS)
    assert [ROWS[row] for row in TASK_ROWS] == ["general", "diagnosis", "survival"]


def test_missing_parts_leave_their_spaces() -> None:
    gaps = {**FULL, "diagnosis": None, "t": float("nan"), "survival_months": None}
    sentences = label_sentences(gaps, BINS)
    assert sentences.general == f"Cancer location: breast;  {S}  {N} {M} "
    assert sentences.diagnosis == "Cancer location: breast; "
    assert sentences.stage == f"Cancer location: breast; {S}  {N} {M}"
    assert sentences.survival == f"Cancer location: breast; {S}  {N} {M} "
    # Seven slots make six spaces, two slots one, five slots four, six slots five.
    assert label_sentences({}, BINS) == LabelSentences(" " * 6, " ", " " * 4, " " * 5)


def test_survival_needs_time_status_and_bins() -> None:
    assert label_sentences({**FULL, "event": 0, "survival_months": 3}, BINS).survival.endswith(
        "Survival status: The patient was censored before 14 months"
    )
    assert label_sentences({**FULL, "event": None}, BINS).survival.endswith(f"{M} ")
    assert label_sentences(FULL, None).survival.endswith(f"{M} ")


@pytest.mark.parametrize(
    ("field", "raw", "cleaned"),
    [
        ("stage", "Stage IIIC", "Stage III"),
        ("stage", "Stage X", "Stage X"),
        ("stage", "IVA", "Stage IV"),
        ("stage", "Stage IIc", "Stage II"),
        ("t", "T4d", "T4"),
        ("t", "Tis", "T0"),
        ("t", "T1mi", "T1"),
        ("t", "T1a1", "T11"),
        ("n", "N0 (i-)", "N0"),
        ("n", "N0 (mol+)", "N0"),
        ("n", "N1mi", "N1"),
        ("m", "cM0 (i+)", "M0"),
        ("m", "M1b", "M1"),
        ("t", None, None),
        ("n", "'--", None),
    ],
)
def test_codes_are_cleaned_as_published(field: str, raw: str | None, cleaned: str | None) -> None:
    assert clean_code(field, raw) == cleaned


@pytest.mark.parametrize(
    ("field", "codes"),
    [
        ("stage", ["I", "II", "III", "IV", "X"]),
        ("t", ["T0", "T1", "T2", "T3", "T4", "TX"]),
        ("n", ["N0", "N1", "N2", "N3", "NX"]),
        ("m", ["M0", "M1", "MX"]),
    ],
)
def test_every_code_has_its_own_words(field: str, codes: list[str]) -> None:
    texts = {label_sentences({field: code}, None).stage for code in codes}
    assert len(texts) == len(codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": "T7"}, r"^t of case TCGA-AA-0001 must be one of T0, T1, .* TX .* got 'T7'"),
        ({"stage": "Stage 0"}, r"^stage of case TCGA-AA-0001 must be one of Stage I, .*'Stage 0'"),
        ({"n": 1}, r"^n of case TCGA-AA-0001 must be one of N0, N1, N2, N3, NX .* got 1"),
        ({"survival_months": -0.5}, r"^survival_months of case TCGA-AA-0001 .* got -0.5"),
        ({"survival_months": "soon"}, r"^survival_months of case TCGA-AA-0001 .* got 'soon'"),
        ({"event": 2}, r"^event of case TCGA-AA-0001 must be 0 .* or 1 .* got 2"),
        ({"event": "Dead"}, r"^event of case TCGA-AA-0001 .* got 'Dead'"),
    ],
)
def test_bad_values_name_case_field_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_sentences({**FULL, **change}, BINS)


def test_bins_are_quartiles_with_margins_and_rounded_texts() -> None:
    bins = SurvivalBins.fit([10.0, 0.0, 20.0, 30.0, float("nan"), 40.4])
    assert bins.num_cases == 5
    assert bins.edges == pytest.approx((-1e-6, 10.0, 20.0, 30.0, 40.4 + 1e-6), abs=1e-12)
    assert [bins.index(t) for t in (0.0, 9.99, 10.0, 19.0, 20.0, 30.0, 40.4)] == [
        *(0, 0, 1, 1, 2, 3, 3)
    ]
    assert [bins.text(k) for k in range(4)] == [
        "before 10 months",
        "between 10 and 20 months",
        "between 20 and 30 months",
        "between 30 and 40 months",
    ]
    assert SurvivalBins.from_dict(json.loads(json.dumps(bins.to_dict()))) == bins


def test_times_outside_the_training_range_fall_into_the_outer_bins() -> None:
    bins = SurvivalBins.fit([5.0, 6.0, 7.0, 8.0])
    assert (bins.index(0.0), bins.index(1e6)) == (0, 3)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="months must be"):
            bins.index(wrong)


@given(st.lists(st.floats(0, 400), min_size=4, max_size=30), st.floats(0, 400))
def test_bin_index_agrees_with_torch_bucketize(durations: list[float], months: float) -> None:
    bins = SurvivalBins.fit(durations)
    lower = torch.tensor(bins.edges[:4], dtype=torch.float64)
    expected = int(torch.bucketize(torch.tensor(months, dtype=torch.float64), lower, right=True))
    assert bins.index(months) == max(expected - 1, 0)


def test_slides_of_a_case_count_once_and_errors_name_the_case() -> None:
    values = pd.Series([1.0, 2.0, 3.0, 4.0, 100.0], index=list("abcde"))
    repeated = pd.concat([values, values["e":], values["e":]])
    assert SurvivalBins.fit(repeated) == SurvivalBins.fit(values)
    assert SurvivalBins.fit(repeated.to_numpy(), list(repeated.index)) == SurvivalBins.fit(values)
    with pytest.raises(CohortError, match=r"case e must agree, got 100\.0 and 7\.0"):
        SurvivalBins.fit([*values, 7.0], [*values.index, "e"])
    with pytest.raises(InputError, match=r"survival_months of case b must .* got -2"):
        SurvivalBins.fit([1.0, -2.0], ["a", "b"])
    with pytest.raises(CohortError, match="at least one known survival time"):
        SurvivalBins.fit([float("nan")])
    with pytest.raises(InputError, match=r"one id per duration \(2\), got 1"):
        SurvivalBins.fit([1.0, 2.0], ["a"])
    with pytest.raises(InputError, match="edges must be 5 finite, non-decreasing"):
        SurvivalBins(edges=(0.0, 2.0, 1.0, 3.0, 4.0), num_cases=1)


def test_cohort_keeps_ids_and_warns_of_unknown_sites(caplog: pytest.LogCaptureFixture) -> None:
    table = pd.DataFrame(
        {"site": ["breast", "prostate", None], "event": [1.0, np.nan, 0.0]},
        index=pd.Index(["a", "b", "c"], name="case_id"),
    )
    with caplog.at_level(logging.WARNING):
        cohort = label_cohort(table, None)
    assert list(cohort) == ["a", "b", "c"]
    assert cohort["b"].diagnosis == "Cancer location: prostate; "
    assert "prostate" in caplog.text
    assert "breast" not in caplog.text
    with pytest.raises(InputError, match="m of case b"):
        label_cohort(table.assign(m=["M0", "M9", "M1"]), None)


@pytest.mark.shared
@pytest.mark.parametrize("cancer", ["brca", "blca", "coadread"])
def test_published_splits_have_a_sentence_for_every_case(shared_dir: Path, cancer: str) -> None:
    folder = shared_dir / "data" / "tcga" / "splits"
    train = read_clinical(folder / f"{cancer}_train.json.gz")
    bins = SurvivalBins.fit(train["survival_months"])
    quartiles = train["survival_months"].quantile([0.25, 0.5, 0.75])
    assert bins.edges[1:4] == pytest.approx(quartiles.to_numpy())
    for split in ("train", "val", "test"):
        table = read_clinical(folder / f"{cancer}_{split}.json.gz")
        cohort = label_cohort(table, bins)
        assert len(cohort) == len(table)
        pattern = r"The patient (died|was censored) (before \d+|between \d+ and \d+) months$"
        assert all(re.search(pattern, rows.survival) for rows in cohort.values())
