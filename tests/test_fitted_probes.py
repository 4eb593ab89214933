"""Fitted probes: what they predict equals lifelines; on disk and back; nothing of pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from modaltune.errors import CheckpointError, InputError
from modaltune.fitted_probes import POOLED, FittedProbes, fit_probes
from modaltune.predictions import predict_sites, predict_with
from modaltune.probe_files import load_probes, save_probes
from modaltune.probes import fit_cox, fit_logistic

TASKS = ("general", "survival")


def _study(n: int = 90, sites: tuple[str, ...] = ("breast",)) -> tuple[Any, pd.DataFrame]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2, 5))
    death, leaving = rng.exponential(40 * np.exp(-x[:, 1, 0])), rng.uniform(5, 120, n)
    labels = pd.DataFrame(
        {
            "primary_class": (x[:, 0, 1] > 0.4).astype(int),
            "survival_months": np.ceil(np.minimum(death, leaving)),
            "event": (death <= leaving).astype(float),
            "site": rng.choice(sites, n),
        },
        index=[f"P{k}" for k in range(n)],
    )
    labels.iloc[:4, 0] = -1
    labels.iloc[5:8, 1] = np.nan
    known = (labels["site"] == "kidney") & (labels["primary_class"] >= 0)
    labels.loc[known, "primary_class"] += 1
    return x, labels


@pytest.fixture
def pan() -> FittedProbes:
    return fit_probes(*_reordered(("breast", "kidney")), info={"weights_sha256": "ab"})


def _reordered(sites: tuple[str, ...]) -> tuple[Any, tuple[str, ...], pd.DataFrame]:
    x, labels = _study(sites=sites)
    return x, TASKS, labels


def test_predictions_are_those_of_the_published_probes() -> None:
    x, labels = _study()
    fitted = fit_probes(x, TASKS, labels)
    new = np.random.default_rng(1).normal(size=(7, 2, 5))
    said = predict_with(fitted, list("abcdefg"), new, "survival", months=[6.0, 30])
    logistic = fit_logistic(x[:, 1], labels["primary_class"])
    cox = fit_cox(x[:, 1], labels["survival_months"], labels["event"])
    np.testing.assert_allclose(said.probabilities, logistic.predict_proba(new[:, 1]))
    np.testing.assert_allclose(said.risk, np.log(cox.partial_hazard(new[:, 1])), atol=1e-12)
    at = cox.fitter.baseline_cumulative_hazard_.index.to_numpy()
    own = fitted.probes["survival", POOLED]
    assert own.cox is not None
    want = cox.fitter.predict_survival_function(cox._frame(new[:, 1]), times=at).to_numpy().T
    np.testing.assert_allclose(own.cox.survival(new[:, 1], at), want, atol=1e-12)
    known = labels["survival_months"].notna().to_numpy()
    cut = np.median(np.log(cox.partial_hazard(x[known, 1])))
    assert own.risk_cut == pytest.approx(cut)


def test_survival_is_a_step_and_ends_with_the_follow_up() -> None:
    x, labels = _study()
    cox = fit_probes(x, TASKS, labels).probes["general", POOLED].cox
    assert cox is not None
    first, last = cox.times[0], cox.times[-1]
    got = cox.survival(x[:1, 0], [first / 2, cox.times[4], cox.times[4] + 0.4, last, last + 0.1])[0]
    assert got[0] == 1
    assert got[1] == got[2]
    assert np.isfinite(got[3])
    assert np.isnan(got[4])


def test_sites_have_probes_of_their_own(pan: FittedProbes) -> None:
    x, labels = _study(sites=("breast", "kidney"))
    assert pan.scopes == (POOLED, "breast", "kidney")
    assert pan.probes["general", POOLED].logistic is None
    kidney = pan.probes["general", "kidney"].logistic
    assert kidney is not None
    assert kidney.labels.tolist() == [1, 2]
    rows = (labels["site"] == "kidney").to_numpy()
    own = fit_logistic(x[rows, 0], labels["primary_class"][rows])
    np.testing.assert_array_equal(kidney.coef, own.coef)
    said = predict_sites(pan, list(labels.index), x, "general")
    assert said.probabilities is not None
    assert said.probabilities.shape == (90, 2)


def test_there_and_back(pan: FittedProbes, tmp_path: Path) -> None:
    save_probes(tmp_path, pan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probes.json", "probes.safetensors"]
    again = load_probes(tmp_path)
    assert (again.tasks, again.sites, again.info) == (pan.tasks, pan.sites, pan.info)
    new = np.random.default_rng(1).normal(size=(3, 2, 5))
    for task, scope in pan.probes:
        a, b = (predict_with(p, "abc", new, task, scope) for p in (pan, again))
        for name in ("labels", "probabilities", "risk", "survival", "months"):
            one, two = getattr(a, name), getattr(b, name)
            assert (one is None) == (two is None)
            if one is not None:
                np.testing.assert_array_equal(one, two)
        assert pan.probes[task, scope].risk_cut == again.probes[task, scope].risk_cut
        assert pan.probes[task, scope].notes == again.probes[task, scope].notes
    a, b = (predict_sites(p, "abc", new, "survival") for p in (pan, again))
    np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_damaged_probes_are_refused(pan: FittedProbes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got no fitted probes; fit them with"):
        load_probes(tmp_path)
    save_probes(tmp_path, pan)
    arrays = tmp_path / "probes.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(data)
    with pytest.raises(CheckpointError, match="must have the checksum"):
        load_probes(tmp_path)
    save_probes(tmp_path, pan)
    described = json.loads((tmp_path / "probes.json").read_text())
    (tmp_path / "probes.json").write_text(json.dumps({**described, "format_version": 99}))
    with pytest.raises(CheckpointError, match="update modaltune"):
        load_probes(tmp_path)
    del described["scopes"]
    (tmp_path / "probes.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="must describe fitted probes, got: KeyError"):
        load_probes(tmp_path)


def test_what_training_cannot_carry_is_noted() -> None:
    x, labels = _study()
    labels["primary_class"] = 0
    labels["event"] = 0.0
    own = fit_probes(x, TASKS, labels).probes["general", POOLED]
    assert (own.logistic, own.cox, own.reference, own.risk_cut) == (None, None, None, None)
    assert any("at least two classes" in note for note in own.notes)
    assert any("must have a death" in note for note in own.notes)


def test_wrong_shapes_and_names() -> None:
    x, labels = _study()
    fitted = fit_probes(x, TASKS, labels)
    with pytest.raises(InputError, match=r"shape \[n, 2\], a column|shape \[n, 2, d\]"):
        fit_probes(x[:, 0], TASKS, labels)
    with pytest.raises(InputError, match="task must be one of general, survival, got 'x'"):
        fitted.column("x")
    with pytest.raises(InputError, match="scope must be one of pooled, got 'liver'"):
        predict_with(fitted, ["a"], x[:1], "general", "liver")
    with pytest.raises(InputError, match="must have a site classifier"):
        predict_sites(fitted, ["a"], x[:1], "general")
