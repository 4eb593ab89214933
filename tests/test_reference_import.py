"""The published layout: every name, shape and flag; to the bit both ways; errors that name keys.

What the layout means is checked against the oracle in tests/test_model.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modaltune.adapter import AdapterConfig
from modaltune.config import ModalTuneConfig
from modaltune.errors import CheckpointError
from modaltune.modalities import GeneConfig, Modality
from modaltune.model import ModalTune
from modaltune.reference_import import (
    from_published,
    model_from_reference,
    model_rules,
    model_to_reference,
    to_published,
)
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig

SMALL = ModalTuneConfig(
    slide_encoder=LongNetConfig(in_features=3, width=8, depth=2, heads=2, ffn_width=8),
    adapter=AdapterConfig(heads=2, interactions=((0, 0), (1, 1))),
    genes=GeneConfig(width=4, depth=1, tokens=2),
    clinical_features=2,
    out_features=5,
)


def small(**changes: object) -> ModalTune:
    config = SMALL.model_copy(update=changes)
    model = ModalTune(config, gene_index=torch.arange(4), gene_offsets=torch.tensor([0, 1, 4]))
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def listed(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the list of published names: flag and shape by name."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        row[1]: (row[0], tuple(int(n) for n in row[2].strip("[]").split(",") if n.strip()))
        for row in rows
        if len(row) == 4
    }


@pytest.mark.shared
def test_the_published_model_has_every_name_shape_and_flag(shared_dir: Path) -> None:
    want = listed(shared_dir / "golden" / "reference_state_keys_gigapath.txt")
    assert len(want) == 1791
    sizes = [want[f"gene_encoder.gene_networks.{i}.0.0.weight"][1][1] for i in range(331)]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    index = torch.arange(sum(sizes))
    with torch.device("meta"):
        model = ModalTune(ModalTuneConfig(), gene_index=index, gene_offsets=offsets)
        flags = {
            name: torch.ones_like(p) if p.requires_grad else torch.zeros_like(p)
            for name, p in model.named_parameters()
        }
    published = to_published(model_rules(model), flags)
    assert {n: tuple(t.shape) for n, t in published.items()} == {n: s for n, (_, s) in want.items()}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for rule in model_rules(model):
        flag = {"frozen" if name in frozen else "trainable" for name in rule.ours}
        assert {want[name][0] for name in rule.published} == flag
    # METHOD 7.
    assert sum(p.numel() for p in model.trainable_parameters()) == 33_524_890
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 86_330_880


def test_every_tensor_of_ours_has_exactly_one_rule() -> None:
    model = small(prompt_agg="cls")
    rules = model_rules(model)
    ours = [name for rule in rules for name in rule.ours]
    assert sorted(ours) == sorted(model.state_dict())
    published = [name for rule in rules for name in rule.published]
    assert len(published) == len(set(published))


@pytest.mark.parametrize("bottleneck", [0.5, None])
def test_both_ways_to_the_bit(bottleneck: float | None) -> None:
    adapter = SMALL.adapter.model_copy(update={"bottleneck": bottleneck})
    source, target = small(adapter=adapter), small(adapter=adapter)
    state = {name: t.clone() for name, t in model_to_reference(source).items()}
    model_from_reference(target, state)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    again = model_to_reference(target)
    assert list(again) == list(state)
    for name, tensor in state.items():
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name], tensor), name


def test_gradients_move_by_the_same_rules() -> None:
    model = small()
    grads = {n: torch.full_like(p, i) for i, (n, p) in enumerate(model.named_parameters())}
    moved = to_published(model_rules(model), grads)
    assert moved["final_norm.bias"].unique().tolist() == [
        list(dict(model.named_parameters())).index("head_norm.bias")
    ]
    del grads["modal_positions"]
    assert "gene_pe" not in to_published(model_rules(model), grads)


def test_all_that_does_not_fit_is_named_and_nothing_is_loaded() -> None:
    model = small()
    state = {name: t.clone() for name, t in model_to_reference(model).items()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    del state["gene_pe"], state["gene_encoder.gene_networks.1.1.0.bias"]
    state["final_norm.weights"] = torch.ones(8)
    state["interactions.1.injector.gamma"] = torch.ones(9)
    state["gene_encoder.gene_networks.0.0.0.weight"] = torch.ones(4, 2)
    with pytest.raises(CheckpointError) as caught:
        model_from_reference(model, state, "there.pt")
    message = str(caught.value)
    for part in (
        "there.pt must hold the published layout",
        "missing: gene_encoder.gene_networks.1.1.0.bias, gene_pe;",
        "unexpected: final_norm.weights;",
        "interactions.1.injector.gamma [9] instead of [8]",
        "gene_encoder.gene_networks.0.0.0.weight [4, 2] instead of [4, 1]",
    ):
        assert part in message
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_every_single_missing_or_transposed_tensor_is_noticed() -> None:
    model = small()
    own, rules = model.state_dict(), model_rules(model)
    state = model_to_reference(model)
    for name, tensor in state.items():
        rest: dict[str, Tensor] = {n: t for n, t in state.items() if n != name}
        with pytest.raises(CheckpointError, match=f"missing: {name}"):
            from_published(rules, rest, own, "x")
        wrong = {**state, name: tensor.unsqueeze(0)}
        with pytest.raises(CheckpointError, match=f"of another shape: {name} "):
            from_published(rules, wrong, own, "x")


def test_long_lists_of_keys_are_cut() -> None:
    model = small()
    with pytest.raises(CheckpointError, match=r"missing: clinical_mlp.0.bias, .* and \d+ more"):
        model_from_reference(model, {})


def test_what_the_published_layout_cannot_hold_is_refused() -> None:
    titan = TitanConfig(width=8, depth=2, heads=2, in_features=3, pooler_heads=2, pooler_queries=2)
    with pytest.raises(CheckpointError, match="must hold a LongNet slide encoder, got Titan"):
        model_to_reference(small(slide_encoder=titan))

    class Panel(Modality):
        num_tokens = 1

        def forward(self, values: Tensor) -> Tensor:
            return values[:, None]

    model = ModalTune(SMALL.model_copy(update={"genes": None}), extra_modalities={"panel": Panel()})
    with pytest.raises(CheckpointError, match=r"can't hold further modalities, got \['panel'\]"):
        model_to_reference(model)
