"""The training loop: same bits twice, what moves and what does not, schedule, refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modaltune.adapter import AdapterConfig
from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.learner import ModalTuneLearner, Targets
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.train import TrainConfig, embed_cases, fit, make_optimizer, train_step

CONFIG = ModalTuneConfig(
    slide_encoder=LongNetConfig(in_features=6, width=16, depth=2, heads=4, ffn_width=16),
    adapter=AdapterConfig(heads=2, interactions=((0, 0), (1, 1))),
    genes=GeneConfig(width=8, depth=1, tokens=3),
    tasks=("general", "survival"),
    out_features=10,
    trunk_dropout=False,
)
FAST = TrainConfig(epochs=6, lr=5e-3, warmup_epochs=1)


def small(**changes: object) -> ModalTune:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update=changes)
    return ModalTune(config, gene_index=torch.arange(5), gene_offsets=torch.tensor([0, 2, 5]))


class Cases:
    """Eight cases whose genes say which of two targets they have."""

    def __init__(self, count: int = 8) -> None:
        g = torch.Generator().manual_seed(1)
        self.tiles = [torch.randn(3 + i, 6, generator=g) for i in range(count)]
        self.genes = torch.randn(count, 5, generator=g)
        self.genes[:, 0] = torch.arange(count) % 2 * 4.0 - 2
        sides = F.normalize(torch.randn(2, 2, 10, generator=g), dim=-1)
        self.rows = sides[torch.arange(count) % 2]
        self.seen: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.tiles)

    def for_epoch(self, epoch: int) -> Cases:
        return self

    def batch(self, indices: Sequence[int]) -> CaseBatch:
        self.seen.append(list(indices))
        tiles = [self.tiles[i] for i in indices]
        offsets = torch.tensor([0, *map(len, tiles)]).cumsum(0)
        where = torch.cat([torch.arange(len(t))[:, None].expand(-1, 2) * 256.0 for t in tiles])
        genes = self.genes[list(indices)]
        names = tuple(f"P{i}" for i in indices)
        return CaseBatch(torch.cat(tiles), where, offsets, {"genes": genes}, {}, names)

    def targets(self, indices: Sequence[int]) -> Targets:
        return Targets.of_text(self.rows[list(indices)])

    def part(self, indices: Sequence[int]) -> tuple[CaseBatch, Targets]:
        return self.batch(indices), self.targets(indices)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_two_runs_give_the_same_bits() -> None:
    first, second = small(trunk_dropout=True), small(trunk_dropout=True)
    recipe = FAST.model_copy(update={"epochs": 2})
    logs = [fit(ModalTuneLearner(first), Cases(4), recipe)]
    torch.manual_seed(99)  # what came before must not matter
    logs.append(fit(ModalTuneLearner(second), Cases(4), recipe))
    assert logs[0] == logs[1]
    assert all(torch.equal(a, state(second)[n]) for n, a in state(first).items())
    other = fit(
        ModalTuneLearner(small(trunk_dropout=True)), Cases(4), recipe.model_copy(update={"seed": 1})
    )
    assert [e.loss for e in other] != [e.loss for e in logs[0]]


def test_the_loss_falls_and_the_trunk_stays() -> None:
    model, cases = small(), Cases()
    before = state(model)
    log = fit(ModalTuneLearner(model), cases, FAST)
    assert [entry.epoch for entry in log] == list(range(6))
    assert all(entry.cases == 8 for entry in log)
    assert log[-1].loss < 0.5 * log[0].loss
    after = state(model)
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same == name.startswith("slide_encoder."), name
    assert not model.training


def test_every_epoch_sees_every_case_once_in_another_order() -> None:
    cases = Cases()
    fit(
        ModalTuneLearner(small()), cases, FAST.model_copy(update={"epochs": 2, "cases_per_step": 3})
    )
    assert [len(step) for step in cases.seen] == [3, 3, 2] * 2
    first, second = (list(chain.from_iterable(s)) for s in (cases.seen[:3], cases.seen[3:]))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_steps_are_counted() -> None:
    steps: list[tuple[int, int]] = []
    recipe = FAST.model_copy(update={"epochs": 2, "cases_per_step": 3})
    fit(
        ModalTuneLearner(small()),
        Cases(),
        recipe,
        on_step=lambda done, of: steps.append((done, of)),
    )
    assert steps == [(i, 6) for i in range(1, 7)]


def test_the_published_schedule_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    recipe = TrainConfig(epochs=13, lr=1e-3)
    log = fit(ModalTuneLearner(small()), Cases(1), recipe)
    # METHOD 4.3: a line from lr/20 to lr at epoch 10, lr again at 11, then half a cosine.
    want = [1e-3 / 20 * (1 + 19 * e / 10) for e in range(11)] + [1e-3, 1e-3 * 0.75]
    assert rates == pytest.approx(want, rel=1e-12)
    assert [entry.lr for entry in log] == rates


def test_the_optimiser_holds_exactly_what_is_tuned() -> None:
    model = small()
    optimizer = make_optimizer(ModalTuneLearner(model), TrainConfig())
    (group,) = optimizer.param_groups
    held = {id(p) for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in held) == (not name.startswith("slide_encoder.")), name
    assert len(group["params"]) == len(held)
    assert (group["lr"], group["weight_decay"]) == (1e-4, 5e-4)
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


def test_the_loss_is_the_mean_over_cases() -> None:
    model, cases = small().eval(), Cases()
    recipe = TrainConfig(temperature=0.5, loss_factor=3.0)
    rows = cases.rows[:4]
    with torch.no_grad():
        outputs = model(cases.batch(range(4)))
        loss = ModalTuneLearner(model, recipe).loss(outputs, rows)
    # METHOD 3.10, row by row.
    total = 0.0
    for b in range(4):
        for k in range(2):
            p = torch.softmax(rows[b, k].double() / 0.5, 0)
            z = outputs[b, k].double()
            q = torch.softmax(z / z.norm() / 0.5, 0)
            total += 3.0 * 0.25 * float((p * (p / q).log()).sum())
    assert float(loss) == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("trunk_dropout", [False, True])
def test_the_trunk_drops_only_when_asked(trunk_dropout: bool) -> None:
    model = small(trunk_dropout=trunk_dropout)
    model.train()
    assert model.training
    assert all(m.training == trunk_dropout for m in model.slide_encoder.modules())
    assert model.adapter.training
    batch = Cases().batch([0])
    with torch.no_grad():
        trunks = [model.embed_tiles(batch)[0] for _ in range(2)]
    assert trunks[0] is not None
    assert trunks[1] is not None
    assert torch.equal(trunks[0].x, trunks[1].x) == (not trunk_dropout)
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(("mode", "draws"), [("parity", 2), ("shared", 1)])
def test_modality_dropout_is_drawn_per_task_or_once(mode: str, draws: int) -> None:
    model = small(task_dropout=mode).train()
    seen: list[Tensor] = []
    model.modalities["genes"].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(Cases().batch([0]))
    assert len(seen) == draws
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model, cases = small(), Cases()
    cases.rows = cases.rows.clone()
    cases.rows[3, 0, 0] = torch.nan
    before = state(model)
    learner = ModalTuneLearner(model)
    optimizer = make_optimizer(learner, TrainConfig())
    with pytest.raises(InputError, match=r"loss must be finite, got nan on case\(s\) P2, P3;"):
        train_step(learner, optimizer, [cases.part([2, 3])])
    assert all(torch.equal(t, before[n]) for n, t in state(model).items())


def test_a_step_uses_the_gradient_of_its_own_cases_only() -> None:
    model, cases = small().eval(), Cases()
    learner = ModalTuneLearner(model)
    optimizer = make_optimizer(learner, TrainConfig())
    for i in range(2):
        train_step(learner, optimizer, [cases.part([i])])
    before = copy.deepcopy(model)
    train_step(learner, optimizer, [cases.part([2])])
    before.zero_grad()
    ModalTuneLearner(before).loss(before(cases.batch([2])), cases.rows[2:3]).backward()
    for (name, got), (_, want) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        if got.grad is not None:
            assert want.grad is not None
            torch.testing.assert_close(got.grad, want.grad, msg=name)


def test_no_cases_is_an_error() -> None:
    with pytest.raises(InputError, match="training cases must not be empty"):
        fit(ModalTuneLearner(small()), Cases(0), FAST)


def test_embedding_is_deterministic_and_leaves_the_mode_alone() -> None:
    model, cases = small(trunk_dropout=True).train(), Cases()
    one = embed_cases(model, cases, [5, 0, 3])
    assert model.training
    many = embed_cases(model, cases, [5, 0, 3], cases_per_batch=2)
    assert one.shape == (3, 2, 10)
    torch.testing.assert_close(one, many, rtol=0, atol=1e-5)
    only = embed_cases(copy.deepcopy(model).eval(), cases, [0], tasks=[1])
    torch.testing.assert_close(only[:, 0], one[1:2, 1], rtol=0, atol=1e-6)
    assert embed_cases(model, cases, []).shape == (0, 2, 10)
