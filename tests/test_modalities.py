"""Modality encoders alone: pathways, cls token, clinic, prompts. Numbers: tests/test_model.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from modaltune.modalities import (
    ClinicalModality,
    GeneConfig,
    GeneModality,
    MixerBlock,
    PathwayEncoder,
    PathwayNetworks,
    TaskPrompts,
)

# Three pathways over four genes; gene 2 is in all of them, gene 0 in two.
INDEX = torch.tensor([2, 0, 2, 3, 1, 0, 2])
OFFSETS = torch.tensor([0, 2, 3, 7])
CONFIG = GeneConfig(width=6, depth=2, tokens=3)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_every_pathway_reads_its_own_genes(impl: str) -> None:
    networks = PathwayNetworks(INDEX, OFFSETS, 6).double()
    networks.impl = impl
    for p in networks.parameters():
        nn.init.normal_(p)
    genes = draw(2, 4)
    out = networks(genes, 0.0)
    for p, members in enumerate(([2, 0], [2], [3, 1, 0, 2])):
        first = int(OFFSETS[p])
        for b in range(2):
            hidden = networks.bias1[p].clone()
            for i, gene in enumerate(members):
                hidden = hidden + genes[b, gene] * networks.weight1[first + i]
            want = F.elu(networks.weight2[p] @ F.elu(hidden) + networks.bias2[p])
            torch.testing.assert_close(out[b, p], want, rtol=0, atol=1e-12)


def test_a_gene_outside_a_pathway_does_not_move_it() -> None:
    networks = PathwayNetworks(INDEX, OFFSETS, 6).double()
    genes = draw(1, 4)
    changed = genes.clone()
    changed[0, 0] += 1
    same = (networks(genes, 0.0) == networks(changed, 0.0)).all(dim=2)[0]
    assert same.tolist() == [False, True, False]


def test_dropout_acts_in_training_only() -> None:
    encoder = PathwayEncoder(INDEX, OFFSETS, 8, CONFIG).double()
    genes = draw(1, 4)
    encoder.eval()
    assert torch.equal(encoder(genes), encoder(genes))
    encoder.train()
    assert not torch.equal(encoder(genes), encoder(genes))
    block = MixerBlock(3, CONFIG).double()
    x = draw(1, 3, 6)
    assert not torch.equal(block(x), block(x))
    networks = encoder.networks
    assert not torch.equal(networks(genes, 0.25), networks(genes, 0.25))


def test_alpha_dropout_follows_the_published_rate() -> None:
    # Dropped values all become one negative number: their share is the rate.
    networks = PathwayNetworks(torch.arange(1), torch.tensor([0, 1]), 500)
    torch.manual_seed(0)
    out = networks(torch.zeros(20, 1), 0.25).flatten()
    _, counts = out.unique(return_counts=True)
    assert 0.23 < float(counts.max()) / out.numel() < 0.27


@pytest.mark.parametrize("use_cls", [False, True])
def test_the_gene_slot_is_the_mean_or_the_cls_token(use_cls: bool) -> None:
    module = GeneModality(INDEX, OFFSETS, 8, CONFIG, use_cls).double().eval()
    assert module.num_tokens == 3 + use_cls
    assert module.in_features == 4
    tokens = module(draw(2, 4))
    assert tokens.shape == (2, module.num_tokens, 8)
    if use_cls:
        assert module.cls_token is not None
        assert torch.equal(tokens[:, 0], module.cls_token.expand(2, -1))
        assert torch.equal(module.summarise(tokens), tokens[:, 0])
    else:
        torch.testing.assert_close(
            module.summarise(tokens), (tokens[:, 0] + tokens[:, 1] + tokens[:, 2]) / 3
        )


def test_a_clinical_record_is_one_token() -> None:
    module = ClinicalModality(3, 8).double()
    values = draw(2, 3)
    hidden = torch.relu(values @ module.linear1.weight.T + module.linear1.bias)
    want = F.layer_norm(hidden @ module.linear2.weight.T + module.linear2.bias, (8,))
    torch.testing.assert_close(module(values), want[:, None], rtol=0, atol=1e-12)
    assert (module.num_tokens, module.in_features, module.linear1.out_features) == (1, 3, 4)


def test_a_task_prompt_is_the_normed_map_of_its_one_hot() -> None:
    prompts = TaskPrompts(3, 8).double()
    nn.init.normal_(prompts.embed.bias)
    for task in range(3):
        onehot = F.one_hot(torch.tensor(task), 3).double()
        want = F.layer_norm(prompts.embed(onehot), (8,))
        torch.testing.assert_close(prompts([task]), want[None], rtol=0, atol=1e-12)


def test_initial_weights_are_the_published_draw() -> None:
    torch.manual_seed(0)
    offsets = torch.arange(0, 401, 20)
    encoder = PathwayEncoder(torch.arange(400), offsets, 64, GeneConfig(width=64, depth=1))
    block = encoder.blocks()[0]
    drawn = {
        "networks": (encoder.networks.weight1, encoder.networks.weight2),
        "project": (encoder.project.weight, encoder.compress.weight),
        "channels": (block.channel_in.weight, block.channel_out.weight),
        "clinic": (ClinicalModality(50, 64).linear1.weight,),
        "tasks": (TaskPrompts(50, 64).embed.weight,),
    }
    for name, weights in drawn.items():
        for weight in weights:  # METHOD 7: trunc_normal(0.02)
            assert 0.017 < float(weight.std()) < 0.023, name
    for bias in (encoder.project.bias, block.channel_in.bias, encoder.networks.bias1):
        assert float(bias.abs().max()) == 0
    # Token mixing keeps torch's own draw of a 1x1 convolution: uniform within 1 / sqrt(fan_in).
    for layer, fan in ((block.token_in, 20), (block.token_out, 10)):
        assert 0.9 / math.sqrt(fan) < float(layer.weight.abs().max()) <= 1 / math.sqrt(fan)
        assert float(layer.bias.abs().max()) > 0


def test_hidden_widths_are_rounded_down_as_published() -> None:
    block = MixerBlock(331, GeneConfig())
    assert (block.token_in.out_features, block.channel_in.out_features) == (165, 128)


@pytest.mark.parametrize("bad", [{"width": 0}, {"dropout": 1.0}, {"depth": -1}, {"wdith": 3}])
def test_contradicting_shapes_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        GeneConfig(**bad)  # type: ignore[arg-type]
