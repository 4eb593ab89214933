"""Passes of the trunk: shared, packed and separate give the same numbers where they should."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modaltune.batch import CaseBatch
from modaltune.config import SETTINGS, ModalTuneConfig
from modaltune.errors import InputError
from modaltune.modalities import Modality
from modaltune.model import ModalTune
from modaltune.reference_config import config_from_reference


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
ROUNDING = 1e-13  # a few hundred float64 operations


def shared(**changes: Any) -> Any:
    return options(task_trunk="shared", **changes)


def ragged_batch(o: Any) -> CaseBatch:
    """Four cases of other lengths, three of which miss something."""
    cases = [one_case(o, seed=10 + i, tiles=n) for i, n in enumerate((21, 1, 33, 8))]
    cases[1] = without(cases[1], "genes")
    cases[2] = without(cases[2], "tiles coords")
    cases[3] = without(cases[3], "clinical")
    batch: CaseBatch = batch_of(o, cases)
    return batch


def gradients(model: ModalTune) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    scale = max(float(g.norm()) for g in want.values())
    for name, grad in want.items():
        assert float((got[name] - grad).norm()) <= ROUNDING * scale, name


@pytest.mark.parametrize("name", GRID)
def test_a_shared_trunk_is_what_the_method_says(name: str) -> None:
    o = shared(**GRID[name])
    state, case = ref.random_state(o), one_case(o)
    with torch.no_grad():
        got = build(o, state)(batch_of(o, [case]))
    assert_close(got[0], expected(state, o, case))


@pytest.mark.parametrize("missing", ["tiles", "genes", "clinical", "genes clinical"])
@pytest.mark.parametrize("name", ["published", "cat cls clinical", "three ranges"])
def test_a_shared_trunk_with_missing_modalities(name: str, missing: str) -> None:
    o = shared(**GRID[name])
    state = ref.random_state(o, seed=4)
    case = without(one_case(o, seed=5), missing)
    with torch.no_grad():
        got = build(o, state)(batch_of(o, [case]))
    assert_close(got[0], expected(state, o, case))


@pytest.mark.parametrize(
    "name", ["published", "cat cls clinical", "late start, gap", "global pool"]
)
def test_a_batch_on_a_shared_trunk_equals_its_cases(name: str) -> None:
    o = shared(**GRID[name])
    model = build(o, ref.random_state(o, seed=8))
    cases = [one_case(o, seed=10 + i, tiles=n) for i, n in enumerate((21, 1, 33, 8))]
    cases[1] = without(cases[1], "genes")
    cases[2] = without(cases[2], "tiles coords")
    with torch.no_grad():
        together = model(batch_of(o, cases))
        alone = torch.cat([model(batch_of(o, [case])) for case in cases])
    assert bool(torch.isfinite(together).all())
    assert_close(together, alone, ROUNDING)


@pytest.mark.parametrize("name", ["published", "cat cls clinical", "sum cls clinical"])
def test_an_output_does_not_depend_on_what_else_is_asked_for(name: str) -> None:
    o = shared(**GRID[name])
    model = build(o, ref.random_state(o, seed=1))
    batch = ragged_batch(o)
    with torch.no_grad():
        every = model(batch)
        for tasks in ([0], [1], [2], [2, 0], [1, 1], [0, 2, 1]):
            assert_close(model(batch, tasks), every[:, tasks], ROUNDING)
    assert not torch.allclose(every[:, 0], every[:, 1])


def test_no_output_moves_with_the_prompt_of_another_task() -> None:
    o = shared()
    model = build(o, ref.random_state(o, seed=1))
    model(ragged_batch(options(clinical=False)))[:, 1].square().sum().backward()
    prompts: Any = model.task_prompts
    of_task = prompts.embed.weight.grad.norm(dim=0)
    assert (of_task > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["published", "cat cls clinical", "full width cat"])
def test_one_shared_pass_has_the_gradient_of_separate_passes_under_its_masks(name: str) -> None:
    o = shared(**GRID[name])
    model = build(o, ref.random_state(o, seed=2))
    batch = ragged_batch(o)
    weight = torch.randn(4, 3, o["output_dim"], dtype=torch.float64)
    (model(batch) * weight).sum().backward()
    together = gradients(model)
    for k in range(3):
        (model(batch, [k]) * weight[:, k : k + 1]).sum().backward()
    assert_same_gradients(gradients(model), together)


def test_gradients_of_a_shared_trunk_against_the_oracle() -> None:
    o = shared(clinical=True)
    state, case = ref.random_state(o, seed=2), one_case(o, seed=3)
    model = build(o, state)
    model(batch_of(o, [case]))[0].square().sum().backward()
    positions = model.modal_positions.grad
    leaf = state["gene_pe"].clone().requires_grad_()
    expected({**state, "gene_pe": leaf}, o, case).square().sum().backward()
    assert positions is not None
    assert leaf.grad is not None
    assert_close(positions, leaf.grad)


def test_a_shared_trunk_is_another_model_than_a_separate_one() -> None:
    o = options()
    model, batch = build(o, ref.random_state(o)), batch_of(o, [one_case(o)])
    with torch.no_grad():
        separate = model(batch)
        model.adjust(task_trunk="shared")
        assert not torch.allclose(model(batch), separate)
        for module in (block.injector for block in model.adapter.interactions()):
            module.gamma.zero_()
        model.adapter.self_attention = nn.ModuleList()
        once = model(batch)
        model.adjust(task_trunk="separate")
        # Where no token is attended to, there is nothing to hide.
        assert_close(model(batch), once, ROUNDING)


class Panel(Modality):
    num_tokens = 2

    def __init__(self, proteins: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(proteins, self.num_tokens * width)

    def forward(self, values: Tensor) -> Tensor:
        return self.embed(values).unflatten(-1, (self.num_tokens, -1))


# "shared" as an id would be taken for the mark of that name.
@pytest.mark.parametrize("trunk", ["shared", "separate"], ids=["one for all", "one each"])
def test_further_modalities_on_every_form_of_the_trunk(trunk: str) -> None:
    torch.manual_seed(0)
    base = config_from_reference(options(token_agg="cat"))
    config = ModalTuneConfig(**{**dict(base), "genes": None, "task_trunk": trunk})
    model = ModalTune(config, extra_modalities={"proteins": Panel(9, 16)})
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.double().eval()
    case = one_case(options())
    own = {"proteins": torch.randn(2, 9).double()}
    batch = CaseBatch(
        torch.cat([case["tiles"], case["tiles"][:5]]),
        torch.cat([case["coords"], case["coords"][:5]]),
        torch.tensor([0, 21, 26]),
        own,
        {"proteins": torch.tensor([False, True])},
    )
    with torch.no_grad():
        model.adjust(task_packing="always")
        together = model(batch)
        model.adjust(task_packing="never")
        alone = torch.cat([model(batch, [k]) for k in range(3)], dim=1)
    assert_close(together, alone, ROUNDING)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("name", ["published", "cat cls clinical", "late start, gap", "full width"])
def test_packed_passes_equal_separate_ones(name: str) -> None:
    o = options(**GRID[name])
    model = build(o, ref.random_state(o, seed=8))
    batch = ragged_batch(o)
    model.adjust(task_packing="always")
    with torch.no_grad():
        packed, some = model(batch), model(batch, [2, 1])
        model.adjust(task_packing="never")
        separate = model(batch)
    assert_close(packed, separate, ROUNDING)
    assert_close(some, separate[:, [2, 1]], ROUNDING)


def test_how_often_the_trunk_runs() -> None:
    o = options()
    model, batch = build(o, ref.random_state(o)), batch_of(o, [one_case(o)])
    rows: list[int] = []
    encoder: Any = model.slide_encoder
    encoder.layers[0].register_forward_hook(lambda _, __, out: rows.append(out.x.shape[0]))
    runs = {}
    for settings in (
        {"task_packing": "never"},
        {"task_packing": "always"},
        {"task_packing": "auto"},
        {"task_trunk": "shared"},
    ):
        rows.clear()
        model.adjust(**settings)
        with torch.no_grad():
            model(batch)
        runs[str(settings)] = list(rows)
    assert list(runs.values()) == [[22] * 3, [66], [66], [22]]
    rows.clear()
    model.adjust(task_trunk="separate", task_packing="always")
    model(batch)
    assert rows == [22] * 3, "with gradients the activations of one pass live at a time"


def test_settings_change_and_shapes_do_not() -> None:
    o = options()
    model = build(o, ref.random_state(o))
    model.adjust(task_trunk="shared", recompute="layer")
    assert (model.config.task_trunk, model.config.recompute) == ("shared", "layer")
    assert model.config.model_dump() == ModalTuneConfig(**dict(model.config)).model_dump()
    with pytest.raises(InputError, match=rf"settings must be among {SETTINGS[0]}.*got tasks, tsk"):
        model.adjust(tsk=1, tasks=("a",))
    with pytest.raises(InputError, match=r"values of the configuration.*task_trunk: Input should"):
        model.adjust(task_trunk="both")
    model.train()
    assert model.slide_encoder.training
    model.adjust(trunk_dropout=False)
    assert model.training
    assert not model.slide_encoder.training


@pytest.mark.parametrize("packing", ["never", "always"])
@pytest.mark.parametrize("name", ["published", "cat cls clinical", "late start, gap", "full width"])
def test_the_first_injector_is_shared_by_separate_passes(
    name: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = options(**GRID[name])
    model = build(o, ref.random_state(o, seed=8))
    model.adjust(task_packing=packing)
    first = model.adapter.interactions()[0].injector
    calls = {"forward": 0, "for_tasks": 0}
    for method in calls:
        own = getattr(first, method)

        def counted(*args: Any, own: Any = own, method: str = method) -> Any:
            calls[method] += 1
            return own(*args)

        monkeypatch.setattr(first, method, counted)
    batch = ragged_batch(o)
    with torch.no_grad():
        together = model(batch)
        assert calls == {"forward": 0, "for_tasks": 1}
        alone = torch.cat([model(batch, [k]) for k in range(3)], dim=1)
    assert calls == {"forward": 3, "for_tasks": 1}
    assert_close(together, alone, ROUNDING)
    model(batch)  # each pass has its own graph
    assert calls == {"forward": 6, "for_tasks": 1}
