"""Losses against values worked out by hand and by lifelines; what heads fit and predict."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from torch import Tensor

from modaltune.baselines.heads import (
    CoxHead,
    HazardHead,
    class_loss,
    cox_loss,
    fit_times,
    hazard_loss,
    make_survival_head,
)
from modaltune.errors import InputError
from modaltune.testing import normal

NAN = math.nan


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_class_loss_counts_unclassified_cases_as_nothing() -> None:
    logits = doubles(0, 1, 2, 0, 5, 5).reshape(3, 2)
    classes = torch.tensor([1, 0, -1])
    want = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 3
    assert float(class_loss(logits, classes)) == pytest.approx(want, rel=1e-12)
    weighted = (3 * math.log(1 + math.exp(-1)) + 0.5 * math.log(1 + math.exp(-2))) / 3
    assert float(class_loss(logits, classes, doubles(0.5, 3))) == pytest.approx(weighted, rel=1e-12)
    assert float(class_loss(logits, torch.tensor([-1, -1, -1]))) == 0


def test_hazard_loss_is_the_likelihood_worked_out_by_hand() -> None:
    """Hazards 1/2, 1/4, 1/5; one death in bin 1, one censored in bin 1, one death in bin 0."""
    logits = doubles(0, -math.log(3), -math.log(4)).expand(5, 3)
    bins = torch.tensor([1, 1, 0, -1, 2])
    events = doubles(1, 0, 1, 1, NAN)
    want = -(math.log(1 / 2 * 1 / 4) + math.log(1 / 2 * 3 / 4) + math.log(1 / 2)) / 5
    assert float(hazard_loss(logits, bins, events)) == pytest.approx(want, rel=1e-12)


def test_hazard_loss_stays_finite_where_hazards_saturate() -> None:
    logits = doubles(400, -400, 400).reshape(1, 3).requires_grad_()
    loss = hazard_loss(logits, torch.tensor([1]), doubles(1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(800)
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_likelihood_of_all_outcomes_sums_to_one() -> None:
    """Dying in one of the bins, or outliving the last: the probabilities are a whole."""
    logits = normal(0, 1, 4).expand(5, 4)
    bins, events = torch.tensor([0, 1, 2, 3, 3]), doubles(1, 1, 1, 1, 0)
    each = [hazard_loss(logits[:1], bins[i : i + 1], events[i : i + 1]) for i in range(5)]
    assert sum(math.exp(-float(loss)) for loss in each) == pytest.approx(1, abs=1e-12)


def test_survival_is_the_product_of_what_hazards_leave() -> None:
    head = HazardHead(3, doubles(6, 12, 24, 60)).double()
    outputs = head(normal(0, 7, 3))
    survival, hazards = head.survival(outputs), torch.sigmoid(outputs)
    torch.testing.assert_close(survival, torch.cumprod(1 - hazards, dim=1), rtol=1e-12, atol=0)
    assert bool((survival.diff(dim=1) < 0).all())
    assert bool(((survival > 0) & (survival < 1)).all())
    torch.testing.assert_close(head.risk(outputs), -survival.sum(1), rtol=0, atol=0)


def test_a_time_falls_into_the_bin_it_begins() -> None:
    head = HazardHead(3, doubles(6, 12, 24, 60))
    bins = head.bins(doubles(0, 5.9, 6, 11, 12, 30, 24, 60, 99, NAN))
    assert bins.tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 3, -1]


def test_bins_end_at_quantiles_of_the_times_of_death() -> None:
    durations = doubles(*range(1, 12), 50, NAN, 7)
    events = doubles(*[1] * 11, 0, 1, NAN)
    times = fit_times(durations, events, 4)
    np.testing.assert_allclose(times.numpy(), [*np.quantile(range(1, 12), [0.25, 0.5, 0.75]), 50])


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("tied", [False, True])
def test_cox_loss_is_lifelines_partial_likelihood(tied: bool, ties: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 2))
    time = rng.exponential(10, 40).round(0 if tied else 6) + 1
    died = rng.integers(0, 2, 40)
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(time=time, died=died)
    fitter = CoxPHFitter().fit(frame, "time", "died")
    risk = torch.from_numpy(x @ fitter.params_.to_numpy())
    if tied and ties == "breslow":  # lifelines knows Efron's form only
        want = _breslow(risk.numpy(), time, died)
    else:
        want = fitter.log_likelihood_
    ours = cox_loss(risk, torch.from_numpy(time), torch.from_numpy(died).double(), ties)  # type: ignore[arg-type]
    # torchsurv sums in float32: 40 terms of half a rounding step each.
    assert -40 * float(ours) == pytest.approx(want, rel=40 * 2**-24)


def _breslow(risk: np.ndarray, time: np.ndarray, died: np.ndarray) -> float:
    at_risk = [np.log(np.exp(risk[time >= t]).sum()) for t in time]
    return float(((risk - np.array(at_risk)) * died).sum())


def test_a_case_censored_when_another_dies_was_at_risk() -> None:
    """Whatever the order of the rows: 1 death of 2 at risk costs log 2."""
    for died in (doubles(1, 0), doubles(0, 1)):
        loss = cox_loss(doubles(0.3, 0.3), doubles(5, 5), died)
        assert float(loss) == pytest.approx(math.log(2) / 2, rel=2**-23)


def test_cox_loss_leaves_unknown_follow_up_out() -> None:
    risk = normal(0, 6)
    durations, events = doubles(3, NAN, 5, 8, 2, 9), doubles(1, 1, 1, 0, NAN, 1)
    known = [0, 2, 3, 5]
    want = cox_loss(risk[known], durations[known], events[known]) * 4 / 6
    assert float(cox_loss(risk, durations, events)) == pytest.approx(float(want), rel=2**-23)


@pytest.mark.parametrize(
    ("durations", "events"),
    [(doubles(3, 5), doubles(0, 0)), (doubles(3, NAN), doubles(1, 1)), (doubles(4), doubles(1))],
)
def test_cox_loss_of_a_batch_that_says_nothing_is_zero_with_a_gradient(
    durations: Tensor, events: Tensor
) -> None:
    risk = normal(0, len(durations)).requires_grad_()
    loss = cox_loss(risk, durations, events)
    loss.backward()
    assert float(loss.detach()) == 0
    assert risk.grad is not None
    assert not bool(risk.grad.any())


def test_cox_survival_is_lifelines_breslow_curve() -> None:
    rng = np.random.default_rng(0)
    risk = rng.normal(size=60)
    durations, events = rng.exponential(20 * np.exp(-risk)), rng.integers(0, 2, 60)
    head = CoxHead(1, doubles(5, 10, 20)).double()
    outputs = torch.from_numpy(risk)[:, None]
    assert head.survival(outputs) is None
    head.fit_baseline(*(torch.from_numpy(v).double() for v in (risk, durations, events)))
    survival = head.survival(outputs)
    assert survival is not None
    frame = pd.DataFrame({"r": risk, "t": durations, "e": events})
    fitter = CoxPHFitter().fit(frame, "t", "e")
    want = fitter.predict_survival_function(frame[["r"]], times=[5, 10, 20]).to_numpy().T
    np.testing.assert_allclose(survival.detach().numpy(), want, rtol=1e-6)


def test_cox_needs_two_deaths_per_batch() -> None:
    durations, events = torch.arange(1.0, 41), (torch.arange(40) % 4 == 0).double()
    with pytest.raises(InputError, match=r"2 deaths per batch.*got 1 \(4 cases.*raise it to 8"):
        make_survival_head("cox", 3, durations, events, cases_per_batch=4)
    assert isinstance(make_survival_head("cox", 3, durations, events, cases_per_batch=8), CoxHead)
    assert isinstance(make_survival_head("hazard", 3, durations, events), HazardHead)


def test_too_few_deaths_for_the_bins_are_refused() -> None:
    durations, events = doubles(3, 4, 5, 6), doubles(1, 1, 0, 0)
    with pytest.raises(InputError, match="got 0 deaths at 0 times"):
        fit_times(durations, torch.zeros(4), 4)
    with pytest.raises(InputError, match="got 4 deaths at 1 times"):
        fit_times(doubles(3, 3, 3, 3), torch.ones(4), 2)
    with pytest.raises(InputError, match="bins must be at least 2, got 1"):
        fit_times(durations, events, 1)
    with pytest.raises(InputError, match="survival must be 'hazard' or 'cox'"):
        make_survival_head("aft", 3, durations, events, bins=2)  # type: ignore[arg-type]
