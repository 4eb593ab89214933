"""Survival metrics equal scikit-survival's on ties, censoring and the golden cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sksurv.metrics import (
    brier_score,
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
)
from sksurv.metrics import integrated_brier_score as sksurv_ibs
from sksurv.util import Surv

from modaltune.errors import InputError
from modaltune.evaluate import harrell_c_index
from modaltune.probes import ProbeError, fit_cox
from modaltune.survival_metrics import (
    SurvivalReference,
    brier_curve,
    dynamic_auc,
    integrated_brier_score,
    uno_c_index,
)

FLOAT32 = 1e-6  # torchsurv's curve of censoring is of float32


def _cohort(seed: int, n: int, *, tied: bool) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    death, leaving = rng.exponential(30 * np.exp(-risk)), rng.uniform(5, 90, n)
    died, time = death <= leaving, np.minimum(death, leaving)
    seen = risk + rng.normal(size=n)
    if tied:
        time, seen = np.ceil(time / 4) * 4, np.round(seen * 2) / 2
    return time, died.astype(float), seen


def _surv(time: Any, died: Any) -> Any:
    return Surv.from_arrays(died.astype(bool), time)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_survival(seed: int, tied: bool) -> None:
    train = _cohort(seed, 150, tied=tied)
    time, died, risk = _cohort(100 + seed, 90, tied=tied)
    reference = SurvivalReference.fit(train[0], train[1])
    kept = time < train[0].max()  # scikit-survival refuses follow-up beyond training
    time, died, risk = time[kept], died[kept], risk[kept]
    fitted, test = _surv(train[0], train[1]), _surv(time, died)
    want = concordance_index_censored(died.astype(bool), time, risk)[0]
    assert harrell_c_index(time, died, risk) == pytest.approx(want)
    want = concordance_index_ipcw(fitted, test, risk, tau=reference.tau)[0]
    assert uno_c_index(time, died, risk, reference) == pytest.approx(want, abs=FLOAT32)
    areas, mean = cumulative_dynamic_auc(fitted, test, risk, reference.auc_times)
    got, got_mean = dynamic_auc(time, died, risk, reference, reference.auc_times)
    np.testing.assert_allclose(got, areas, atol=FLOAT32)
    assert got_mean == pytest.approx(mean, abs=FLOAT32)
    at = reference.brier_times[reference.brier_times < time.max()]
    curves = np.exp(-np.outer(np.exp(risk), at / 40))
    np.testing.assert_allclose(
        brier_curve(time, died, curves, reference, at),
        brier_score(fitted, test, curves, at)[1],
        atol=FLOAT32,
    )
    assert integrated_brier_score(time, died, curves, reference, at) == pytest.approx(
        sksurv_ibs(fitted, test, curves, at), abs=FLOAT32
    )


@pytest.mark.shared
@pytest.mark.parametrize("name", ["case7_eval_binary", "case7_eval_3class"])
def test_golden_risks(shared_dir: Path, name: str) -> None:
    tensors = load_file(shared_dir / "golden" / f"{name}.safetensors")
    part = {
        split: (tensors[f"in/{split}.durations"], tensors[f"in/{split}.vital_status"])
        for split in ("train", "test")
    }
    known = {split: ~np.isnan(t) & ~np.isnan(e) for split, (t, e) in part.items()}
    train, test = ([a[known[s]].astype(float) for a in part[s]] for s in ("train", "test"))
    reference = SurvivalReference.fit(*train)
    inside = test[0] < train[0].max()
    test = [a[inside] for a in test]
    for task in range(tensors["in/x_train"].shape[1]):
        risk = np.log(tensors[f"out/{task}.cox_partial_hazard_test"].astype(float))[inside]
        fitted, seen = _surv(*train), _surv(*test)
        want = concordance_index_ipcw(fitted, seen, risk, tau=reference.tau)[0]
        assert uno_c_index(*test, risk, reference) == pytest.approx(want, abs=FLOAT32)
        at = reference.auc_times[reference.auc_times < test[0].max()]
        want = cumulative_dynamic_auc(fitted, seen, risk, at)[0]
        np.testing.assert_allclose(dynamic_auc(*test, risk, reference, at)[0], want, atol=FLOAT32)
        cox = fit_cox(tensors["in/x_train"][:, task], *part["train"])
        at = reference.brier_times[reference.brier_times < test[0].max()]
        x = tensors["in/x_test"][known["test"], task][inside]
        curves = cox.fitter.predict_survival_function(cox._frame(x), times=at).to_numpy().T
        assert integrated_brier_score(*test, curves, reference, at) == pytest.approx(
            sksurv_ibs(fitted, seen, curves, at), abs=FLOAT32
        )


def test_reference_is_truncated_where_training_ends() -> None:
    """Censoring eats the training cases: tau is the last time with 5 % of them uncensored."""
    time = np.arange(1.0, 41)
    died = np.zeros(40)
    died[5] = 1
    reference = SurvivalReference.fit(time, died)
    left = dict(zip(reference.times, reference.uncensored, strict=True))
    assert left[reference.tau] >= 0.05 > left[reference.tau + 1]
    assert reference.weights([0.5])[0] == 1
    assert reference.weights([40.0])[0] == 0
    # Deaths after tau change nothing: they are beyond what training can weigh.
    test, gone = np.array([3.0, 10, 20, 30, 39.5]), np.array([1.0, 0, 1, 0, 1])
    risk = np.array([1.0, 3, 2, 5, 4])
    other = np.where(test > reference.tau, 0.0, gone)
    assert uno_c_index(test, gone, risk, reference) == uno_c_index(test, other, risk, reference)


def test_reference_leaves_out_gaps_and_survives_json() -> None:
    time, died, _ = _cohort(0, 60, tied=True)
    gaps = np.concatenate([time, [5.0, np.nan]]), np.concatenate([died, [np.nan, 1]])
    reference = SurvivalReference.fit(*gaps)
    again = SurvivalReference.from_dict(SurvivalReference.fit(time, died).to_dict())
    for name, value in vars(reference).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_what_is_undefined_is_nan() -> None:
    reference = SurvivalReference.fit([1.0, 2, 3, 4], [1, 1, 0, 1])
    nobody = np.array([1.0, 2]), np.zeros(2), np.array([1.0, 0])
    assert np.isnan(uno_c_index(*nobody, reference))
    areas, mean = dynamic_auc(*nobody, reference, [1.5])
    assert np.isnan(areas).all()
    assert np.isnan(mean)
    alone = np.array([2.0]), np.ones(1), np.ones(1)
    assert np.isnan(uno_c_index(*alone, reference))
    # One case with a curve has a Brier score, if nothing to be compared with.
    half = integrated_brier_score(
        [2.0], [1], [[0.5, 0.5]], SurvivalReference.fit([3.0], [1]), [1, 1.5]
    )
    assert half == 0.25
    with pytest.raises(ProbeError, match="must hold a death"):
        SurvivalReference.fit([1.0, 2], [0, np.nan])
    with pytest.raises(InputError, match="must be known here, got NaN"):
        uno_c_index([1.0, np.nan], [1, 0], [0, 1], reference)
    with pytest.raises(InputError, match=r"survival must be finite and have shape \[2, 1\]"):
        brier_curve([1.0, 2], [1, 0], [[0.5], [np.nan]], reference, [1.5])
