"""Risk groups: the cut is the training's, curves and test are lifelines' and scikit-survival's."""

from __future__ import annotations

import numpy as np
import pytest
from sksurv.compare import compare_survival
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from modaltune.errors import InputError
from modaltune.survival_groups import group_of, kaplan_meier, risk_groups

rng = np.random.default_rng(4)
TIME, DIED = np.ceil(rng.exponential(30, 70)), (rng.random(70) < 0.7) * 1.0
RISK = -TIME + 25 * rng.normal(size=70)


def test_groups_by_the_cut() -> None:
    groups = risk_groups(TIME, DIED, RISK, -20.0)
    high = RISK > -20
    assert groups.names == ("low", "high")
    assert [len(c.durations) for c in groups.curves] == [(~high).sum(), high.sum()]
    want = compare_survival(Surv.from_arrays(DIED == 1, TIME), high)[1]
    assert groups.p_value == pytest.approx(want)
    assert group_of([1.0, np.nan, -30], -20.0) == ["high", "", "low"]
    assert group_of([-20.0], -20.0) == ["low"]  # at the cut


def test_curve_equals_scikit_survival() -> None:
    times, surviving, band = kaplan_meier_estimator(
        DIED == 1, TIME, conf_type="log-log", conf_level=0.95
    )
    curve = kaplan_meier(TIME, DIED)
    np.testing.assert_allclose(curve.surviving[1:], surviving)
    np.testing.assert_allclose(curve.times[1:], times)
    inner = (surviving > 0) & (surviving < 1)
    np.testing.assert_allclose(curve.low[1:][inner], band[0][inner], atol=1e-9)
    half = times[surviving <= 0.5][0]
    assert curve.median == half


def test_edges() -> None:
    nobody = risk_groups(TIME, np.zeros(70), RISK, -20.0)
    assert np.isnan(nobody.p_value)
    assert np.isinf(nobody.curves[0].median)
    with pytest.raises(InputError, match="must get known values of at least one case, got 0"):
        risk_groups([], [], [], 0.0)
    with pytest.raises(InputError, match="perhaps NaN"):
        risk_groups([1.0], [1.0], [np.nan], 0.0)
