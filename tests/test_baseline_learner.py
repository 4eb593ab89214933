"""Baselines under the learner's interface: gradients that add up, predictions, short trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modaltune.baselines import (
    BASELINES,
    Baseline,
    SupervisedLearner,
    make_baseline,
    make_survival_head,
)
from modaltune.baselines.heads import SurvivalKind
from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.learner import Learner
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig
from modaltune.targets import Targets
from modaltune.testing import normal, pack_offsets
from modaltune.train import TrainConfig, fit

TILE_WIDTH, GENES, CASES = 8, 12, 24
INDEX, OFFSETS = torch.arange(GENES), torch.tensor([0, 4, 8, 12])
SMALL = {
    "linear_probe": {},
    "abmil": {"width": 16, "attention_width": 8},
    "pathway_mlp": {"token_width": 8, "width": 16},
    "gene_mixer": {"width": 16, "depth": 1, "tokens": 4, "out_width": 16},
    "mcat": {"width": 16, "heads": 2, "hidden": 16, "layers": 1},
    "late_fusion": {"image": {"width": 16}, "genes": {"token_width": 8, "width": 16}},
}


def make(name: str) -> Baseline:
    torch.manual_seed(0)
    encoder = LongNetConfig(
        in_features=TILE_WIDTH,
        width=8,
        depth=1,
        heads=2,
        ffn_width=16,
        segment_lengths=(64,),
        dilation_ratios=(1,),
    )
    return make_baseline(
        name,
        tile_width=TILE_WIDTH,
        pathways=(INDEX, OFFSETS),
        slide_encoder=LongNet(encoder),
        settings=SMALL[name],
    )


def planted() -> tuple[CaseBatch, Targets]:
    """Class 1 has another morphology in a third of its tiles, raised genes, and dies sooner."""
    classes = torch.arange(CASES) % 2
    counts = [9 + b % 4 for b in range(CASES)]
    tiles = normal(0, sum(counts), TILE_WIDTH, dtype=torch.float32)
    for case, start in zip(classes.tolist(), pack_offsets(counts)[:-1].tolist(), strict=True):
        tiles[start : start + 3, 0] += 4
        tiles[start : start + 3, 1] += 8 * case - 4
    genes = normal(1, CASES, GENES, dtype=torch.float32)
    genes[:, :4] += 2.0 * classes[:, None] - 1
    where = torch.stack([torch.arange(sum(counts)) % 16, torch.arange(sum(counts)) // 16], 1) * 256
    durations = 40.0 - 25 * classes + normal(2, CASES, dtype=torch.float32)
    events = (torch.arange(CASES) % 3 > 0).float()
    batch = CaseBatch(tiles, where, pack_offsets(counts), {"genes": genes})
    return batch, Targets(None, classes, durations, events)


def part(batch: CaseBatch, targets: Targets, rows: range) -> tuple[CaseBatch, Targets]:
    bounds = batch.offsets[rows.start : rows.stop + 1]
    span = slice(int(bounds[0]), int(bounds[-1]))
    genes = {"genes": batch.modalities["genes"][rows.start : rows.stop]}
    own = CaseBatch(batch.tiles[span], batch.positions_px[span], bounds - bounds[0], genes)
    return own, targets.rows(rows)


def backward(loss: Tensor) -> None:
    loss.backward()


def test_a_supervised_learner_is_a_learner() -> None:
    batch, targets = planted()
    learner: Learner = SupervisedLearner.for_training(make("abmil"), targets)
    loss = learner.accumulate(batch, targets, backward)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert all(p.grad is not None for p in learner.trainable_parameters())
    embedded = learner.embed(batch)
    assert embedded.shape == (CASES, 1, 16)
    assert embedded.dtype == torch.float32


@pytest.mark.parametrize("name", BASELINES)
def test_gradients_of_parts_add_up_to_that_of_the_whole(name: str) -> None:
    """Hazards and classes add over cases; unlabelled cases are in the mean of both."""
    batch, targets = planted()
    targets.classes[3], targets.durations[4], targets.events[5] = -1, math.nan, math.nan
    learner = SupervisedLearner.for_training(make(name), targets, balanced=True)
    learner.model.eval()  # no dropout
    whole = learner.accumulate(batch, targets, backward)
    want = [p.grad for p in learner.trainable_parameters()]
    learner.model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for start in (0, 8, 16):
        rows = range(start, start + 8)
        total += learner.accumulate(
            *part(batch, targets, rows), lambda loss: backward(loss * 8 / CASES)
        ) * (8 / CASES)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    for p, grad in zip(learner.trainable_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("survival", ["hazard", "cox"])
@pytest.mark.parametrize("name", BASELINES)
def test_mixed_precision_stays_near_float32(name: str, survival: SurvivalKind) -> None:
    batch, targets = planted()
    learner = SupervisedLearner.for_training(
        make(name), targets, survival=survival, cases_per_batch=CASES
    )
    learner.model.eval()  # no dropout
    exact = float(learner.accumulate(batch, targets, backward))
    learner.model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = float(learner.accumulate(batch, targets, backward))
    assert mixed == pytest.approx(exact, rel=0.05)  # 8 bits, a dozen layers
    grads = [p.grad for p in learner.trainable_parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("name", BASELINES)
def test_the_loop_tunes_it_and_leaves_what_is_frozen(name: str) -> None:
    batch, targets = planted()

    class Cases:
        def __len__(self) -> int:
            return CASES

        def for_epoch(self, epoch: int) -> Cases:
            return self

        def batch(self, indices: Sequence[int]) -> CaseBatch:
            return part(batch, targets, range(indices[0], indices[0] + 1))[0]

        def targets(self, indices: Sequence[int]) -> Targets:
            return targets.rows(indices)

    learner = SupervisedLearner.for_training(make(name), targets)
    tuned = {id(p) for p in learner.trainable_parameters()}
    before = [(p, p.detach().clone()) for p in learner.model.parameters()]
    log = fit(learner, Cases(), TrainConfig(epochs=2, lr=1e-2, warmup_epochs=0))
    assert log[1].loss < log[0].loss
    for parameter, value in before:
        if id(parameter) not in tuned:
            assert torch.equal(parameter, value)
    assert not learner.model.training


@pytest.mark.parametrize("name", BASELINES)
def test_training_learns_a_separable_label_and_its_survival(name: str) -> None:
    batch, targets = planted()
    learner = SupervisedLearner.for_training(make(name), targets)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(learner.trainable_parameters(), lr=0.02)
    learner.model.train()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(float(learner.accumulate(batch, targets, backward)))
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    predicted = learner.predict(batch)
    assert predicted.probabilities is not None
    assert predicted.risk is not None
    assert predicted.survival is not None
    right = (predicted.probabilities.argmax(1) == targets.classes).float().mean()
    assert float(right) >= 0.95
    ones = targets.classes == 1
    assert float(predicted.risk[ones].median()) > float(predicted.risk[~ones].median())
    assert predicted.survival.shape == (CASES, 4)


def test_cox_learns_and_predicts_curves_once_its_baseline_is_fitted() -> None:
    batch, targets = planted()
    learner = SupervisedLearner.for_training(
        make("pathway_mlp"), targets, survival="cox", cases_per_batch=CASES
    )
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(learner.trainable_parameters(), lr=0.02)
    first = last = math.nan
    for step in range(40):
        optimizer.zero_grad()
        last = float(learner.accumulate(batch, targets, backward))
        first = last if step == 0 else first
        optimizer.step()
    assert last < 0.8 * first
    before = learner.predict(batch)
    assert before.risk is not None
    assert before.survival is None
    learner.fit_baseline(before.risk, targets)
    after = learner.predict(batch)
    assert after.survival is not None
    assert bool((after.survival.diff(dim=1) <= 0).all())
    restored = SupervisedLearner.for_training(
        make("pathway_mlp"), targets, survival="cox", cases_per_batch=CASES
    )
    restored.model.load_state_dict(learner.model.state_dict())
    again = restored.predict(batch)
    assert again.survival is not None
    torch.testing.assert_close(again.survival, after.survival, rtol=0, atol=0)


def test_balanced_weights_are_inverse_frequencies() -> None:
    targets = Targets(
        None,
        torch.tensor([0, 0, 0, 1, -1]),
        torch.full((5,), math.nan),
        torch.full((5,), math.nan),
    )
    learner = SupervisedLearner.for_training(make("abmil"), targets, survival=None, balanced=True)
    assert learner.class_weights is not None
    torch.testing.assert_close(learner.class_weights, torch.tensor([4 / 6, 4 / 2]))
    predicted = learner.predict(planted()[0])
    assert predicted.risk is None
    assert predicted.times is None


def test_one_class_alone_makes_no_class_head() -> None:
    batch, targets = planted()
    for only in (0, 1, -1):
        told = replace(targets, classes=torch.full_like(targets.classes, only))
        learner = SupervisedLearner.for_training(make("abmil"), told, balanced=True)
        assert learner.predict(batch).probabilities is None
        with pytest.raises(InputError, match=r"class head .* or a survival head, got"):
            SupervisedLearner.for_training(make("abmil"), told, survival=None)


def test_a_model_without_any_head_is_refused() -> None:
    with pytest.raises(InputError, match=r"class head .* or a survival head, got 1 classes"):
        SupervisedLearner(make("abmil"), num_classes=1)


def test_a_batch_that_does_not_fit_names_the_case() -> None:
    batch, targets = planted()
    learner = SupervisedLearner.for_training(make("abmil"), targets)
    batch.tiles[0, 0] = math.nan
    with pytest.raises(InputError, match=r"tile features must be finite.*case 0"):
        learner.accumulate(batch, targets, backward)


def test_one_survival_head_alone_is_enough() -> None:
    _, targets = planted()
    head = make_survival_head("hazard", 16, targets.durations, targets.events, bins=3)
    learner = SupervisedLearner(make("abmil"), survival=head)
    predicted = learner.predict(planted()[0])
    assert predicted.probabilities is None
    assert predicted.survival is not None
    assert predicted.survival.shape == (CASES, 3)
