"""Heads and losses on an embedding: class, discrete hazard, Cox. Fitted parts see training only."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modaltune.errors import InputError
from modaltune.probes import as_survival, fit_cox

SurvivalKind = Literal["hazard", "cox"]
Ties = Literal["efron", "breslow"]

MIN_EVENTS_PER_BATCH = 2


def class_loss(logits: Tensor, classes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy over cases, a scalar; a case of class -1 counts as 0.

    The mean is over all B cases, so that batches of any mix add up to the same gradient.

    Args:
        logits: `[B, C]`.
        classes: `[B]` int64, -1 = not classified.
        weights: `[C]` weight of each class, or None.
    """
    total = F.cross_entropy(logits, classes, weights, ignore_index=-1, reduction="sum")
    return total / len(classes)


def hazard_loss(logits: Tensor, bins: Tensor, events: Tensor) -> Tensor:
    """Return the mean negative log likelihood of discrete survival times, a scalar.

        h = sigmoid(logits)
        died in bin k:      -log h_k - sum_{j < k} log(1 - h_j)
        censored in bin k:  -sum_{j <= k} log(1 - h_j)

    The mean is over all B cases; one of unknown follow-up counts as 0.

    Args:
        logits: `[B, K]`.
        bins: `[B]` int64 in 0..K - 1, -1 = unknown.
        events: `[B]` 1 died, 0 censored, NaN = unknown.

    Source: Zadeh and Schmid, "Bias in Cross-Entropy-Based Training of Deep Survival Networks"
        (2020); Gensheimer and Narasimhan, "A scalable discrete-time survival model" (2019).
    """
    known = (bins >= 0) & ~events.isnan()
    z, k, died = logits[known], bins[known].unsqueeze(1), events[known] == 1
    stays = F.logsigmoid(-z)  # log(1 - h)
    survived = stays.cumsum(dim=1).gather(1, k).squeeze(1)
    log_hazard = F.logsigmoid(z).gather(1, k).squeeze(1)
    instead = log_hazard - stays.gather(1, k).squeeze(1)
    likelihood = survived + torch.where(died, instead, torch.zeros_like(instead))
    return -likelihood.sum() / len(bins)


def cox_loss(risk: Tensor, durations: Tensor, events: Tensor, ties: Ties = "efron") -> Tensor:
    """Return the negative Cox partial log likelihood over the number of cases, a scalar.

    Cases of unknown follow-up are left out of every risk set. A batch without a death, or with one
    followed-up case alone, says nothing and gives 0.

    Args:
        risk: `[B]` log hazard.
        durations: `[B]` months, NaN = unknown.
        events: `[B]` 1 died, 0 censored, NaN = unknown.
        ties: How deaths at the same time are handled.

    Source: Cox (1972); Efron (1977); Breslow (1974); computed by torchsurv.
    """
    from torchsurv.loss.cox import neg_partial_log_likelihood

    known = ~(durations.isnan() | events.isnan())
    died = events[known] == 1
    if int(known.sum()) < 2 or not bool(died.any()):
        return risk.sum() * 0.0
    # A case censored at the time of a death was at risk: it comes after that death in every order.
    _, order = torch.unique(durations[known], return_inverse=True)
    time = (2 * order + (~died).long()).to(risk.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ties in")
        total = neg_partial_log_likelihood(risk[known], died, time, ties, reduction="sum")
    return total / len(risk)


def fit_times(durations: Tensor, events: Tensor, bins: int) -> Tensor:
    """Return where the survival bins of training cases end, `[bins]` rising float64 months.

    Inner ends are quantiles of the times of death, so that every bin has as many deaths; the last
    is the longest follow-up.

    Args:
        durations: `[n]` months of training cases, NaN = unknown.
        events: `[n]` 1 died, 0 censored, NaN = unknown.
        bins: Number of bins, at least 2.

    Raises:
        InputError: Fewer than two bins, or too few different times of death for them.
    """
    if bins < 2:
        raise InputError(f"bins must be at least 2, got {bins}; the usual number is 4")
    time, died = as_survival(durations.double().cpu().numpy(), events.double().cpu().numpy())
    followed = time[~np.isnan(time) & ~np.isnan(died)]
    deaths = time[~np.isnan(time) & (died == 1)]
    inner = np.quantile(deaths, np.arange(1, bins) / bins) if len(deaths) else np.empty(0)
    ends = np.append(inner, followed.max() if len(followed) else math.nan)
    if len(ends) != bins or not (np.diff(ends) > 0).all():
        raise InputError(
            f"durations must hold enough times of death to cut {bins} bins, got {len(deaths)} "
            f"deaths at {len(np.unique(deaths))} times; set fewer bins (learner.bins), or leave "
            "survival out (learner.survival = none)"
        )
    return torch.from_numpy(ends)


class SurvivalHead(nn.Module):
    """Reads follow-up off an embedding.

    Attributes:
        times: `[K]` float64 months at which `survival` is given.
    """

    times: Tensor

    def __init__(self, width: int, outputs: int, times: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.register_buffer("times", times.double())

    def forward(self, embedding: Tensor) -> Tensor:
        """Return raw outputs `[B, ...]` of embeddings `[B, d]`."""
        return self.linear(embedding)

    @abstractmethod
    def loss(self, outputs: Tensor, durations: Tensor, events: Tensor) -> Tensor:
        """Return the mean loss over cases of raw outputs; unknown follow-up (NaN) counts as 0."""

    @abstractmethod
    def risk(self, outputs: Tensor) -> Tensor:
        """Return `[B]`, higher for cases that should die sooner."""

    @abstractmethod
    def survival(self, outputs: Tensor) -> Tensor | None:
        """Return the probability `[B, K]` to live beyond each of `times`; None if not fitted."""


class HazardHead(SurvivalHead):
    """Hazard of each bin of survival time.

    Args:
        width: Width d of the embedding.
        times: `[K]` ends of the bins, from `fit_times` on training cases.
    """

    def __init__(self, width: int, times: Tensor) -> None:
        super().__init__(width, len(times), times)

    def bins(self, durations: Tensor) -> Tensor:
        """Return the bin `[B]` of times `[B]`, its left end included; -1 for NaN."""
        inner = self.times[:-1].to(durations.device)
        found = torch.bucketize(durations.double(), inner, right=True)
        return torch.where(durations.isnan(), -1, found)

    def loss(self, outputs: Tensor, durations: Tensor, events: Tensor) -> Tensor:
        """See `hazard_loss`."""
        return hazard_loss(outputs, self.bins(durations), events)

    def risk(self, outputs: Tensor) -> Tensor:
        """Return minus the expected number of bins survived, `[B]`."""
        return -self.survival(outputs).sum(dim=1)

    def survival(self, outputs: Tensor) -> Tensor:
        """Return `[B, K]`, the product of `1 - h` up to each bin."""
        return F.logsigmoid(-outputs).cumsum(dim=1).exp()


class CoxHead(SurvivalHead):
    """Log hazard relative to a baseline that is fitted after training.

    Args:
        width: Width d of the embedding.
        times: `[K]` months at which survival is given.
        ties: How deaths at the same time are handled.
    """

    baseline: Tensor
    scale: Tensor

    def __init__(self, width: int, times: Tensor, ties: Ties = "efron") -> None:
        super().__init__(width, 1, times)
        self.ties = ties
        self.register_buffer("baseline", torch.full_like(self.times, math.nan))
        self.register_buffer("scale", torch.tensor([1.0, 0.0], dtype=torch.float64))

    def loss(self, outputs: Tensor, durations: Tensor, events: Tensor) -> Tensor:
        """See `cox_loss`."""
        return cox_loss(self.risk(outputs), durations, events, self.ties)

    def risk(self, outputs: Tensor) -> Tensor:
        """Return log hazards `[B]`."""
        return outputs.squeeze(1)

    def fit_baseline(self, risk: Tensor, durations: Tensor, events: Tensor) -> None:
        """Fit Breslow's baseline, and the slope of the risk, on training cases (lifelines).

        Args:
            risk: `[n]` of the trained head.
            durations: `[n]` months, NaN = unknown.
            events: `[n]` 1 died, 0 censored, NaN = unknown.

        Raises:
            ProbeError: No death, or the risk does not vary.
        """
        given = [t.detach().double().cpu().numpy() for t in (risk, durations, events)]
        fitter = fit_cox(given[0][:, None], given[1], given[2], penalizer=0.0).fitter
        at_times = fitter.predict_survival_function(
            fitter._norm_mean.to_frame().T, times=self.times.cpu().numpy()
        )
        self.baseline.copy_(torch.from_numpy(at_times.to_numpy()[:, 0].copy()))
        slope, centre = float(fitter.params_.iloc[0]), float(fitter._norm_mean.iloc[0])
        self.scale.copy_(torch.tensor([slope, centre]))

    def survival(self, outputs: Tensor) -> Tensor | None:
        """Return `[B, K]` survival, None before `fit_baseline`."""
        if bool(self.baseline.isnan().any()):
            return None
        relative = self.scale[0] * (self.risk(outputs).double() - self.scale[1])
        return self.baseline ** relative.exp().unsqueeze(1)


def make_survival_head(
    kind: SurvivalKind,
    width: int,
    durations: Tensor,
    events: Tensor,
    *,
    bins: int = 4,
    cases_per_batch: int = 1,
    ties: Ties = "efron",
) -> HazardHead | CoxHead:
    """Return a survival head whose fitted parts come from the training cases given.

    Args:
        kind: `hazard` or `cox`.
        width: Width d of the embedding.
        durations: `[n]` months of training cases, NaN = unknown.
        events: `[n]` 1 died, 0 censored, NaN = unknown.
        bins: Bins of survival time.
        cases_per_batch: Cases that are pulled back together; a Cox batch compares them.
        ties: How the Cox head handles deaths at the same time.

    Raises:
        InputError: Too few deaths, or a Cox batch expects fewer than two of them.
    """
    times = fit_times(durations, events, bins)
    if kind == "hazard":
        return HazardHead(width, times)
    if kind != "cox":
        raise InputError(f"survival must be 'hazard' or 'cox', got {kind!r}; choose one of them")
    share = float((events == 1).double().mean())
    if (expected := share * cases_per_batch) < MIN_EVENTS_PER_BATCH:
        raise InputError(
            f"cases_per_step must bring {MIN_EVENTS_PER_BATCH} deaths per batch on average for a "
            f"Cox loss, which compares cases, got {expected:.2g} ({cases_per_batch} cases of which "
            f"{share:.0%} died); raise it to {math.ceil(MIN_EVENTS_PER_BATCH / share)} times "
            "accumulation times processes, or use survival='hazard'"
        )
    return CoxHead(width, times, ties)
