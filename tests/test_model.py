"""The whole model against the literal oracle: every option, missing modalities, gradients."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.modalities import Modality
from modaltune.model import ModalTune
from modaltune.reference_config import config_from_reference
from modaltune.reference_import import (
    model_rules,
    model_to_reference,
    to_published,
)


def _load_cases() -> Any:
    # Under importlib mode test files can't import each other by name.
    path = Path(__file__).with_name("model_cases.py")
    spec = importlib.util.spec_from_file_location("model_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases_of = _load_cases()
ref, GRID = cases_of.ref, cases_of.GRID
options, build, one_case = cases_of.options, cases_of.build, cases_of.one_case
without, batch_of = cases_of.without, cases_of.batch_of
expected, assert_close = cases_of.expected, cases_of.assert_close
MISSING = ["tiles", "genes", "clinical", "genes clinical", "tiles genes", "tiles clinical"]


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_outputs_of_every_option(name: str, impl: str) -> None:
    o = options(**GRID[name])
    state = ref.random_state(o)
    model = build(o, state)
    model.set_impl(impl)
    case = one_case(o)
    with torch.no_grad():
        got = model(batch_of(o, [case]))
    assert_close(got[0], expected(state, o, case))


@pytest.mark.parametrize("name", GRID)
def test_gradients_of_every_option(name: str) -> None:
    o = options(**GRID[name])
    state = ref.random_state(o, seed=2)
    model, case = build(o, state), one_case(o, seed=3)
    weight = torch.randn(o["multi_task"], o["output_dim"], dtype=torch.float64)
    (model(batch_of(o, [case]))[0] * weight).sum().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    got = to_published(model_rules(model), mine)
    leaves = {n: t.clone().requires_grad_() for n, t in state.items()}
    (expected(leaves, o, case) * weight).sum().backward()
    frozen = ("cls_token", "patch_embed.", "encoder.", "norm.")
    tuned = {n: t.grad for n, t in leaves.items() if not n.startswith(frozen)}
    # Without tiles in the head (no cls, no pool) every tuned tensor still takes part.
    assert set(got) == {n for n, g in tuned.items() if g is not None}
    scale = max(float(g.norm()) for g in tuned.values() if g is not None)
    for tensor, value in got.items():
        want = tuned[tensor]
        assert want is not None
        assert float((value - want).norm()) <= 1e-10 * scale, tensor


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("name", ["published", "cat cls clinical", "three ranges", "global pool"])
def test_missing_modalities(name: str, missing: str) -> None:
    o = options(**GRID[name])
    state = ref.random_state(o, seed=4)
    full = one_case(o, seed=5)
    case = without(full, missing)
    if set(case) & {"tiles", "genes", "clinical"}:
        with torch.no_grad():
            got = build(o, state)(batch_of(o, [case]))[0]
        assert_close(got, expected(state, o, case))
    else:
        with pytest.raises(InputError, match="case 0 must have tiles or a modality of the model"):
            build(o, state)(batch_of(o, [case]))


def test_image_only_without_any_modal_token() -> None:
    o = options(multi_task=1, token_agg="cat")
    state = ref.random_state(o, seed=6)
    case = without(one_case(o, seed=7), "genes")
    with torch.no_grad():
        got = build(o, state)(batch_of(o, [case]))[0]
    assert_close(got, expected(state, o, case))


@pytest.mark.parametrize(
    "name", ["published", "cat cls clinical", "late start, gap", "global pool"]
)
def test_a_batch_equals_its_cases_and_gaps_do_not_leak(name: str) -> None:
    o = options(**GRID[name])
    state = ref.random_state(o, seed=8)
    model = build(o, state)
    cases = [one_case(o, seed=10 + i, tiles=n) for i, n in enumerate((21, 1, 33, 8))]
    cases[1] = without(cases[1], "genes")
    cases[2] = without(cases[2], "tiles coords")
    cases[3] = without(cases[3], "clinical")
    with torch.no_grad():
        together = model(batch_of(o, cases))
        alone = torch.cat([model(batch_of(o, [case])) for case in cases])
        reordered = model(batch_of(o, cases[::-1])).flip(0)
    assert bool(torch.isfinite(together).all())
    assert_close(together, alone, 1e-12)
    assert_close(reordered, alone, 1e-12)
    for b, case in enumerate(cases):
        assert_close(together[b], expected(state, o, case))


def test_an_absent_modality_gets_no_gradient() -> None:
    o = options(clinical=True)
    model = build(o, ref.random_state(o))
    case = without(one_case(o), "genes")
    other = without(one_case(o, seed=2), "genes tiles coords")
    model(batch_of(o, [case, other])).square().sum().backward()
    genes = [p.grad for p in model.modalities["genes"].parameters() if p.grad is not None]
    assert all(float(g.abs().max()) == 0 for g in genes)
    model(batch_of(o, [case, one_case(o, seed=3)])).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert bool(torch.isfinite(p.grad).all()), name


def test_all_task_prompts_in_one_call_equal_separate_calls() -> None:
    o = options()
    model = build(o, ref.random_state(o))
    batch = batch_of(o, [one_case(o), one_case(o, seed=2, tiles=4)])
    with torch.no_grad():
        together, chosen = model(batch), model(batch, [2, 0])  # few rows: one packed pass
        model.adjust(task_packing="never")
        alone, picked = model(batch), model(batch, [2, 0])
        separate = torch.cat([model(batch, [k]) for k in range(3)], dim=1)
    assert together.shape == (2, 3, o["output_dim"])
    assert_close(alone, separate, 1e-13)  # the first injector is shared: it rounds otherwise
    assert_close(picked, separate[:, [2, 0]], 1e-13)
    assert_close(together, separate, 1e-13)
    assert_close(chosen, picked, 1e-13)
    assert not torch.allclose(together[:, 0], together[:, 1])


@pytest.mark.parametrize("tasks", [[], [3], [-1], [0, 7]])
def test_unknown_tasks_are_refused(tasks: list[int]) -> None:
    o = options()
    model = build(o, ref.random_state(o))
    with pytest.raises(InputError, match=r"tasks must be indices in 0\.\.2 of general.*got"):
        model(batch_of(o, [one_case(o)]), tasks)


def test_layers_outside_the_ranges_are_never_run() -> None:
    o = options(interaction_indexes=[[1, 1], [3, 3]])
    state = ref.random_state(o)
    case = one_case(o)
    with torch.no_grad():
        before = build(o, state)(batch_of(o, [case]))
        for name in state:
            if re.match(r"encoder\.layers\.[24]\.|encoder\.layer_norm|norm\.", name):
                state[name] = torch.full_like(state[name], torch.nan)
        after = build(o, state)(batch_of(o, [case]))
        state["encoder.layers.0.ffn.fc2.bias"] += 1  # before the first range: is run
        moved = build(o, state)(batch_of(o, [case]))
    assert torch.equal(before, after)
    assert not torch.allclose(before, moved)


def test_only_the_trunk_is_frozen() -> None:
    model = build(options(clinical=True), ref.random_state(options(clinical=True)))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"slide_encoder.{n}" for n, _ in model.slide_encoder.named_parameters()}
    assert len(model.trainable_parameters()) == len(list(model.parameters())) - len(frozen)


def test_a_tile_past_the_grid_names_its_case() -> None:
    o = options()
    model = build(o, ref.random_state(o))
    cases = [one_case(o, seed=s, tiles=3) for s in (1, 2, 3)]
    cases[1]["coords"][2, 0] = 256.0 * o["slide_ngrids"]
    named = CaseBatch(**{**vars(batch_of(o, cases)), "case_ids": ("A-1", "B-2", "C-3")})
    with pytest.raises(InputError, match=r"^case B-2: tile positions .*grid of 12 x 12 cells"):
        model(named)


class ProteinPanel(Modality):
    """The example of the docs: a further modality is these few lines."""

    num_tokens = 2

    def __init__(self, proteins: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(proteins, self.num_tokens * width)

    def forward(self, values: Tensor) -> Tensor:
        return self.embed(values).unflatten(-1, (self.num_tokens, -1))


def with_proteins(token_agg: str) -> ModalTune:
    torch.manual_seed(0)
    base = config_from_reference(options(token_agg=token_agg))
    config = ModalTuneConfig(**{**dict(base), "genes": None})
    model = ModalTune(config, extra_modalities={"proteins": ProteinPanel(9, 16)})
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("token_agg", ["sum", "cat"])
def test_a_further_modality_plugs_in(token_agg: str) -> None:
    model = with_proteins(token_agg)
    assert model.modal_positions.shape == (1 + 2, 16)
    assert model.head_norm.weight.numel() == (16 * 3 if token_agg == "cat" else 16)
    case = one_case(options())
    image = CaseBatch(case["tiles"], case["coords"], torch.tensor([0, 21]))
    values = torch.randn(2, 9).double()

    def run(row: Tensor, present: bool = True) -> Tensor:
        own = {"proteins": row[None]}, {"proteins": torch.tensor([present])}
        return model(CaseBatch(image.tiles, image.positions_px, image.offsets, *own))

    first, second = run(values[0]), run(values[1])
    assert not torch.allclose(first, second)
    assert torch.equal(run(values[0], present=False), model(image))
    first.sum().backward()
    assert all(p.grad is not None for p in model.modalities.parameters())


@pytest.mark.parametrize("name", ["task", "slide", "genes", "clinical"])
def test_names_of_our_own_slots_are_taken(name: str) -> None:
    config = ModalTuneConfig(**{**dict(config_from_reference(options())), "genes": None})
    with pytest.raises(InputError, match=rf"extra_modalities must have names other than.*{name}"):
        ModalTune(config, extra_modalities={name: ProteinPanel(9, 16)})


def test_genes_need_their_pathways() -> None:
    with pytest.raises(InputError, match="gene_index and gene_offsets must be given"):
        ModalTune(config_from_reference(options()))


def test_the_oracle_and_the_import_agree_on_every_name_and_shape() -> None:
    for changes in GRID.values():
        o = options(**changes)
        state = ref.random_state(o)
        back = model_to_reference(build(o, state))
        assert {n: tuple(t.shape) for n, t in back.items()} == ref.published_shapes(o)
        assert all(torch.equal(back[n], state[n]) for n in state)
