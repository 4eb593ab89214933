"""The gene scaler against scikit-learn, and a proof that nothing but training rows enters it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import StandardScaler

from modaltune.errors import CohortError, InputError
from modaltune.gene_scaler import GeneScaler
from modaltune.omics import GeneScaler as ReExported


def frame(rows: int, seed: int, genes: str = "ABCDE") -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(2.0, 3.0, (rows, len(genes))).astype(np.float32)
    index = pd.Index([f"case{seed}-{k}" for k in range(rows)], name="case_id")
    return pd.DataFrame(values, index=index, columns=list(genes))


def test_scaling_equals_clipping_then_scikit_learn() -> None:
    train, test = frame(400, 1), frame(50, 2)
    train.iloc[0, 0], test.iloc[0, 1] = 36_893.0, -1e6
    scaler = GeneScaler.fit(train, clip_quantiles=(0.01, 0.99))
    low, high = train.astype(float).quantile(0.01), train.astype(float).quantile(0.99)
    oracle = StandardScaler().fit(train.astype(float).clip(low, high, axis=1))
    for table in (train, test):
        expected = oracle.transform(table.astype(float).clip(low, high, axis=1))
        scaled = scaler.transform(table)
        np.testing.assert_allclose(scaled.to_numpy(), expected, rtol=1e-6, atol=1e-6)
        assert scaled.dtypes.unique().tolist() == [np.float32]
        assert scaled.index.equals(table.index)
    assert scaler.transform(train)["A"].abs().max() < 5
    plain = GeneScaler.fit(test, clip_quantiles=None)
    expected = StandardScaler().fit_transform(test.astype(float))
    np.testing.assert_allclose(plain.transform(test).to_numpy(), expected, rtol=1e-5, atol=1e-6)


def test_default_clipping_is_at_a_tenth_of_a_percent() -> None:
    train = pd.DataFrame({"G": np.arange(1001.0)}, index=[str(k) for k in range(1001)])
    scaler = GeneScaler.fit(train)
    assert (scaler.low[0], scaler.high[0]) == pytest.approx((1.0, 999.0))


def test_changing_test_rows_changes_neither_scaler_nor_other_cases() -> None:
    cohort = pd.concat([frame(60, 1), frame(40, 2)])
    train_ids, test_ids = cohort.index[:60], cohort.index[60:]
    scaler = GeneScaler.fit(cohort.loc[train_ids])
    changed = cohort.copy()
    changed.loc[test_ids] = 1e4
    again = GeneScaler.fit(changed.loc[train_ids])
    assert again.to_dict() == scaler.to_dict()
    before, after = scaler.transform(cohort), scaler.transform(changed)
    pd.testing.assert_frame_equal(before.loc[train_ids], after.loc[train_ids])
    one_row = cohort.loc[[test_ids[3]]]
    pd.testing.assert_frame_equal(scaler.transform(one_row), before.loc[[test_ids[3]]])
    # The opposite must be seen, or the comparison above proves nothing.
    changed.loc[train_ids[0]] = 1e4
    assert GeneScaler.fit(changed.loc[train_ids]).to_dict() != scaler.to_dict()


def test_genes_are_matched_by_name_whatever_their_order() -> None:
    train, table = frame(30, 1), frame(5, 2, "ZEDCBA")
    scaler = GeneScaler.fit(train)
    direct = scaler.transform(table[list("ABCDE")])
    pd.testing.assert_frame_equal(scaler.transform(table), direct)
    assert list(direct.columns) == list("ABCDE")


def test_missing_genes_follow_the_policy() -> None:
    scaler = GeneScaler.fit(frame(30, 1))
    table = frame(5, 2, "EDA")
    with pytest.raises(CohortError, match=r"2 missing \(B, C\), 0 repeated \(none\)"):
        scaler.transform(table)
    filled = scaler.transform(table, missing_genes="mean")
    assert (filled[["B", "C"]] == 0).all(axis=None)
    full = table.assign(B=np.float32(0), C=np.float32(0))
    pd.testing.assert_frame_equal(filled[["A", "D", "E"]], scaler.transform(full)[["A", "D", "E"]])
    with pytest.raises(CohortError, match=r"1 repeated \(A\)"):
        scaler.transform(frame(5, 2, "ABCDEA"))
    assert scaler.transform(frame(5, 2, "ABCDEZZ")).shape == (5, 5)


def test_constant_genes_become_zero_not_nan() -> None:
    train = frame(30, 1)
    train["C"] = np.float32(0.1)
    scaler = GeneScaler.fit(train)
    assert scaler.std[2] == 1.0
    other = frame(5, 2)
    assert (scaler.transform(other)["C"] == 0).all()
    assert np.isfinite(scaler.transform(other).to_numpy()).all()


def test_gaps_are_refused_or_become_the_training_mean() -> None:
    train = frame(30, 1)
    train.iloc[3, 1] = np.nan
    with pytest.raises(CohortError, match=r"1 genes of 1 cases \(case1-3\).*nan_policy='mean'"):
        GeneScaler.fit(train)
    scaler = GeneScaler.fit(train, clip_quantiles=None, nan_policy="mean")
    assert scaler.mean[1] == pytest.approx(train["B"].astype(float).mean())
    assert scaler.std[1] == pytest.approx(train["B"].astype(float).std(ddof=0))
    scaled = scaler.transform(train)
    assert scaled.iloc[3, 1] == 0
    assert np.isfinite(scaled.to_numpy()).all()
    with pytest.raises(CohortError, match="known value"):
        GeneScaler.fit(train.assign(A=np.nan), nan_policy="mean")
    strict = GeneScaler.fit(frame(30, 1))
    with pytest.raises(CohortError, match="NaN or infinity in 1 genes of 1 cases"):
        strict.transform(train)
    with pytest.raises(CohortError, match="NaN or infinity"):
        scaler.transform(train.assign(A=np.float32(np.inf)))


@pytest.mark.parametrize("clip", [(0.001, 0.999), (0.0, 1.0), None])
def test_state_survives_json(clip: tuple[float, float] | None) -> None:
    scaler = GeneScaler.fit(frame(30, 1), clip_quantiles=clip)
    text = json.dumps(scaler.to_dict(), allow_nan=False, sort_keys=True)
    back = GeneScaler.from_dict(json.loads(text))
    assert back.to_dict() == scaler.to_dict()
    table = frame(5, 2)
    pd.testing.assert_frame_equal(back.transform(table), scaler.transform(table))
    assert ReExported is GeneScaler


def test_invalid_options_and_empty_splits_are_refused() -> None:
    with pytest.raises(InputError, match="clip_quantiles must be two rising numbers"):
        GeneScaler.fit(frame(3, 1), clip_quantiles=(0.9, 0.1))
    with pytest.raises(InputError, match="nan_policy must be one of error, mean"):
        GeneScaler.fit(frame(3, 1), nan_policy="zero")  # type: ignore[arg-type]
    with pytest.raises(CohortError, match="got 0 cases"):
        GeneScaler.fit(frame(0, 1))
    with pytest.raises(CohortError, match="repeated: A"):
        GeneScaler.fit(frame(3, 1, "ABA"))
