"""Backward pass by pass, and computed again: the gradients and the draws stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.adapter import AdapterConfig
from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.learner import ModalTuneLearner
from modaltune.memory_probe import count_memory
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.recompute import LEVELS, again
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig
from modaltune.testing_training import accumulate_gradients
from modaltune.train import TrainConfig

WIDTH, TILES = 16, 6
LONGNET = LongNetConfig(in_features=TILES, width=WIDTH, depth=4, heads=4, ffn_width=24)
TITAN = TitanConfig(
    in_features=TILES, width=WIDTH, depth=4, heads=4, pooler_heads=2, pooler_queries=2, cell_px=256
)
CONFIG = ModalTuneConfig(
    slide_encoder=LONGNET,
    adapter=AdapterConfig(heads=2, interactions=((0, 1), (2, 3)), drop_path_rate=0.4),
    genes=GeneConfig(width=8, depth=1, tokens=3),
    clinical_features=2,
    out_features=10,
)


def small(**changes: Any) -> ModalTune:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update=changes)
    model = ModalTune(config, gene_index=torch.arange(5), gene_offsets=torch.tensor([0, 2, 5]))
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3 if "norm" not in name else 1.0)
    return model.double().train()


def batch_of(*tiles: int) -> tuple[CaseBatch, Tensor]:
    g = torch.Generator().manual_seed(1)
    count, cases = sum(tiles), len(tiles)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    cells = torch.cat([torch.arange(n) for n in tiles])
    batch = CaseBatch(
        draw(count, TILES),
        torch.stack([cells % 4, cells // 4], dim=1) * 256,
        torch.tensor([0, *tiles]).cumsum(0),
        {"genes": draw(cases, 5), "clinical": draw(cases, 2)},
        {"genes": torch.arange(cases) != 1},
    )
    return batch, F.normalize(draw(cases, 3, 10), dim=-1)


def gradients(
    model: ModalTune, recipe: TrainConfig, seed: int = 3
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    batch, targets = batch_of(9, 0, 14)
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    outputs, loss = accumulate_gradients(model, batch, targets, recipe)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs, loss, found


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-14)
    assert set(got[2]) == set(want[2])
    scale = max(float(g.norm()) for g in want[2].values())
    for name, grad in want[2].items():
        assert float((got[2][name] - grad).norm()) <= 1e-13 * scale, name


@pytest.mark.parametrize("dropout", ["parity", "shared"])
@pytest.mark.parametrize("trunk", ["separate", "shared"], ids=["one each", "one for all"])
@pytest.mark.parametrize("trunk_dropout", [False, True])
def test_backward_pass_by_pass_is_the_joint_gradient(
    trunk: str, dropout: str, trunk_dropout: bool
) -> None:
    model = small(task_trunk=trunk, task_dropout=dropout, trunk_dropout=trunk_dropout)
    joint = gradients(model, TrainConfig(task_backward="joint"))
    assert_same(gradients(model, TrainConfig(task_backward="sequential")), joint)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(joint[2])
    other = gradients(model, TrainConfig(), seed=4)
    assert not torch.allclose(other[0], joint[0]), "dropout is on"


@pytest.mark.parametrize("level", ["layer", "interaction"])
@pytest.mark.parametrize("encoder", [LONGNET, TITAN], ids=["longnet", "titan"])
@pytest.mark.parametrize("trunk", ["separate", "shared"], ids=["one each", "one for all"])
def test_what_is_computed_again_draws_the_same_dropout(
    trunk: str, encoder: Any, level: str
) -> None:
    if isinstance(encoder, TitanConfig):
        encoder = encoder.model_copy(update={"drop_path_rate": 0.5})
    model = small(slide_encoder=encoder, task_trunk=trunk)
    kept = gradients(model, TrainConfig())
    model.adjust(recompute=level)
    assert_same(gradients(model, TrainConfig()), kept)
    # The random state after a step is where it would be.
    torch.manual_seed(5)
    accumulate_gradients(model, *batch_of(4), TrainConfig())
    after = torch.rand(1)
    model.adjust(recompute="none")
    torch.manual_seed(5)
    accumulate_gradients(model, *batch_of(4), TrainConfig())
    assert torch.equal(torch.rand(1), after)


def runs_of(register: Any) -> list[None]:
    """Register a hook that adds to the list returned whenever it is called."""
    seen: list[None] = []
    register(lambda *_: seen.append(None))
    return seen


def test_how_often_a_block_runs() -> None:
    runs = {}
    for level in LEVELS:
        model = small(recompute=level, task_trunk="shared")
        encoder: Any = model.slide_encoder
        seen = runs_of(encoder.layers[0].register_forward_pre_hook)
        accumulate_gradients(model, *batch_of(9), TrainConfig())
        runs[level] = len(seen)
    assert runs == {"none": 1, "layer": 2, "interaction": 3}


def test_modalities_are_encoded_and_pulled_back_as_often_as_their_dropout_is_drawn() -> None:
    for mode, draws in (("parity", 3), ("shared", 1)):
        model = small(task_dropout=mode)
        genes: Any = model.modalities["genes"]
        forward = runs_of(genes.register_forward_pre_hook)
        back = runs_of(genes.encoder.compress.register_full_backward_hook)
        accumulate_gradients(model, *batch_of(9), TrainConfig())
        assert (len(forward), len(back)) == (draws, draws), mode


def test_the_loss_is_that_of_all_tasks_at_once() -> None:
    model = small().eval()
    batch, targets = batch_of(9, 3)
    recipe = TrainConfig(temperature=0.5, loss_factor=3.0)
    with torch.no_grad():
        outputs = model(batch)
        loss = ModalTuneLearner(model, recipe).loss(outputs, targets)
    found = accumulate_gradients(model, batch, targets, recipe)
    torch.testing.assert_close(found[0], outputs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1], loss, rtol=1e-12, atol=1e-14)
    assert not found[0].requires_grad
    assert not found[1].requires_grad


@pytest.mark.parametrize("backward", ["joint", "sequential"])
def test_a_loss_that_is_not_finite_leaves_no_gradient(backward: Any) -> None:
    model = small()
    batch, targets = batch_of(9)
    targets[0, 2] = torch.nan  # the last task: two passes were pulled back before
    with pytest.raises(InputError, match="loss must be finite, got nan"):
        accumulate_gradients(model, batch, targets, TrainConfig(task_backward=backward))
    assert all(p.grad is None for p in model.parameters())


def test_less_is_held_the_more_is_computed_again() -> None:
    batch, targets = batch_of(300)
    # So many blocks that what they keep outweighs what one of them needs at work.
    deep: dict[str, Any] = {
        "slide_encoder": LONGNET.model_copy(update={"depth": 24}),
        "adapter": CONFIG.adapter.model_copy(update={"interactions": ((0, 11), (12, 23))}),
    }
    peaks = {}
    for name, settings, backward in (
        ("joint", {}, "joint"),
        ("sequential", {}, "sequential"),
        ("layer", {"recompute": "layer"}, "sequential"),
        ("interaction", {"recompute": "interaction"}, "sequential"),
        ("one for all", {"task_trunk": "shared"}, "sequential"),
    ):
        model = small(**deep, **settings)
        recipe = TrainConfig(task_backward=backward)  # type: ignore[arg-type]
        accumulate_gradients(model, batch, targets, recipe)
        _, counted = count_memory(
            lambda model=model, recipe=recipe: accumulate_gradients(model, batch, targets, recipe),
            torch.device("cpu"),
        )
        peaks[name] = counted.peak
    # Three passes at once, or one; an activation of one block, or of four.
    assert peaks["joint"] > 2.5 * peaks["sequential"]
    assert peaks["sequential"] > 1.8 * peaks["layer"]
    assert peaks["layer"] > 1.05 * peaks["interaction"]
    assert peaks["one for all"] == pytest.approx(peaks["sequential"], rel=0.05)


def test_three_tasks_on_a_shared_trunk_need_the_memory_of_one() -> None:
    batch, _ = batch_of(300)
    model = small(task_trunk="shared").eval()
    peaks = []
    with torch.no_grad():
        for tasks in ([0], [0, 1, 2]):
            _, counted = count_memory(lambda tasks=tasks: model(batch, tasks), torch.device("cpu"))
            peaks.append(counted.peak)
    assert peaks[1] <= 1.02 * peaks[0]


def test_without_gradients_nothing_is_computed_again() -> None:
    calls: list[int] = []

    def run(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert again(True, run, x).grad_fn is None
    assert len(calls) == 1
    again(False, run, x).sum().backward()
    assert len(calls) == 2
    again(True, run, x).sum().backward()
    assert len(calls) == 4
