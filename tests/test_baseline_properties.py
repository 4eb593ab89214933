"""The one property that defines each baseline, beside the rules that all of them keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from modaltune.baselines.abmil import ABMIL, ABMILSettings
from modaltune.baselines.gene_mixer import GeneMixer, GeneMixerSettings
from modaltune.baselines.late_fusion import LateFusion, LateFusionSettings
from modaltune.baselines.linear_probe import (
    LinearProbe,
    LinearProbeSettings,
    embed_batches,
    fit_probes,
)
from modaltune.baselines.mcat import MCAT, MCATSettings
from modaltune.baselines.pathway_mlp import PathwayMLP, PathwayMLPSettings, PathwaySNN
from modaltune.batch import CaseBatch
from modaltune.probes import fit_cox, fit_logistic
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig
from modaltune.testing import normal, pack_offsets

WIDTH, GENES = 6, 7
INDEX = torch.tensor([2, 0, 6, 3, 1, 0, 2, 4, 5])
OFFSETS = torch.tensor([0, 2, 5, 9])
COUNTS = (5, 1, 9)


def make_batch(tiles: Tensor | None = None, genes: Tensor | None = None) -> CaseBatch:
    tiles = normal(2, sum(COUNTS), WIDTH) if tiles is None else tiles
    positions = torch.stack([torch.arange(len(tiles)), torch.zeros(len(tiles))], 1) * 256.0
    genes = normal(1, len(COUNTS), GENES) if genes is None else genes
    return CaseBatch(tiles, positions, pack_offsets(COUNTS), {"genes": genes})


def test_abmil_attention_sums_to_one_per_case_and_pools_its_tiles() -> None:
    model = ABMIL(WIDTH, ABMILSettings(width=4, attention_width=3)).double().eval()
    batch = make_batch()
    attention = model.attention(batch)
    assert attention.shape == (15,)
    projected = torch.relu(model.project(batch.tiles))
    for b, (own, rows) in enumerate(
        zip(attention.split(COUNTS), projected.split(COUNTS), strict=True)
    ):
        assert float(own.detach().sum()) == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(model(batch)[b], own @ rows, rtol=0, atol=1e-12)


def test_abmil_is_the_formula_of_the_paper() -> None:
    model = ABMIL(WIDTH, ABMILSettings(width=4, attention_width=3)).double().eval()
    batch = make_batch()
    h = torch.relu(batch.tiles[:5] @ model.project.weight.T + model.project.bias)
    gated = torch.tanh(model.attend.value(h)) * torch.sigmoid(model.attend.gate(h))
    scores = model.attend.score(gated).squeeze(1)
    want = (scores.exp() / scores.exp().sum()) @ h
    torch.testing.assert_close(model(batch)[0], want, rtol=0, atol=1e-12)


def test_abmil_does_not_care_about_the_order_of_tiles() -> None:
    model = ABMIL(WIDTH, ABMILSettings(width=4, attention_width=3)).double().eval()
    batch = make_batch()
    order = torch.cat([torch.tensor([4, 2, 0, 1, 3]), torch.arange(14, 4, -1)])
    order[5], order[6:] = 5, torch.arange(14, 5, -1)
    shuffled = make_batch(batch.tiles[order])
    torch.testing.assert_close(model(shuffled), model(batch), rtol=0, atol=1e-12)


def test_snn_keeps_mean_and_variance_at_the_start() -> None:
    """Klambauer et al., theorem 1: (0, 1) is the fixed point of SELU under their initialisation."""
    torch.manual_seed(0)
    sizes = [20, 40, 60, 80] * 5
    index, offsets = torch.arange(sum(sizes)), pack_offsets(sizes)
    networks = PathwaySNN(index, offsets, 64, dropout=0.0)
    x = torch.randn(400, sum(sizes))
    for activations in (networks.first_layer(x), networks(x)):
        assert float(activations.detach().mean()) == pytest.approx(0, abs=0.05)
        assert float(activations.detach().var()) == pytest.approx(1, abs=0.1)
    joined = PathwayMLP(index, offsets, PathwayMLPSettings(token_width=64, dropout=0.0))
    out = joined(
        CaseBatch(torch.zeros(0, 1), torch.zeros(0, 2), pack_offsets([0] * 400), {"genes": x})
    )
    assert float(out.detach().mean()) == pytest.approx(0, abs=0.05)
    assert float(out.detach().var()) == pytest.approx(1, abs=0.1)


def test_snn_keeps_them_under_alpha_dropout() -> None:
    torch.manual_seed(0)
    sizes = [30] * 20
    networks = PathwaySNN(torch.arange(600), pack_offsets(sizes), 64, dropout=0.1).train()
    tokens = networks(torch.randn(400, 600)).detach()
    assert float(tokens.mean()) == pytest.approx(0, abs=0.05)
    assert float(tokens.var()) == pytest.approx(1, abs=0.1)


def test_snn_reads_the_genes_of_its_pathway_only() -> None:
    networks = PathwaySNN(INDEX, OFFSETS, 5, 0.0).double()
    torch.nn.init.normal_(networks.bias1)
    torch.nn.init.normal_(networks.bias2)
    genes = normal(1, 2, GENES)
    out = networks(genes)
    for p, members in enumerate(([2, 0], [6, 3, 1], [0, 2, 4, 5])):
        rows = slice(int(OFFSETS[p]), int(OFFSETS[p + 1]))
        for b in range(2):
            first = torch.selu(genes[b, members] @ networks.weight1[rows] + networks.bias1[p])
            want = torch.selu(networks.weight2[p] @ first + networks.bias2[p])
            torch.testing.assert_close(out[b, p], want, rtol=0, atol=1e-12)


def test_gene_mixer_is_the_normalised_mean_of_modaltunes_gene_tokens() -> None:
    torch.manual_seed(0)
    model = GeneMixer(INDEX, OFFSETS, GeneMixerSettings(width=8, tokens=3, out_width=9)).double()
    batch = make_batch()
    tokens = model.eval().encoder(batch.modalities["genes"])
    assert tokens.shape == (3, 3, 9)
    torch.testing.assert_close(model(batch), model.norm(tokens.mean(1)), rtol=0, atol=0)


def test_gene_mixer_lets_pathways_hear_each_other() -> None:
    """A gene of one pathway moves the mixed token of another; its own network it leaves alone."""
    torch.manual_seed(0)
    model = GeneMixer(INDEX, OFFSETS, GeneMixerSettings(width=8, tokens=3, out_width=9)).double()
    genes = normal(1, 1, GENES)
    changed = genes.clone()
    changed[0, 6] += 1  # pathway 1 alone lists it
    before, after = (model.eval().encoder.networks(g, 0.0) for g in (genes, changed))
    assert (before == after).all(dim=2)[0].tolist() == [True, False, True]
    mixed = [model.encoder.mix(tokens) for tokens in (before, after)]
    assert (mixed[0] == mixed[1]).all(dim=2)[0].tolist() == [False, False, False]


def mcat() -> MCAT:
    torch.manual_seed(0)
    model = MCAT(WIDTH, INDEX, OFFSETS, MCATSettings(width=8, heads=2, hidden=12, layers=1))
    return model.double().eval()


def test_mcat_groups_attend_to_the_tiles_of_their_own_case() -> None:
    model, batch = mcat(), make_batch()
    maps = model.attention(batch)
    assert [tuple(m.shape) for m in maps] == [(3, 5), (3, 1), (3, 9)]
    for attention in maps:
        torch.testing.assert_close(
            attention.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12
        )
    tiles = batch.tiles.clone()
    tiles[5] += 1  # the only tile of case 1
    moved = (model(make_batch(tiles)) != model(batch)).any(dim=1)
    assert moved.tolist() == [False, True, False]


def test_mcat_co_attention_is_the_formula_of_the_paper() -> None:
    model, batch = mcat(), make_batch()
    groups, _ = model.group_tokens(batch)
    tiles = model.project_tiles(batch)
    attended, maps = model.co_attend(groups, tiles, batch.offsets, with_maps=True)
    attention = model.co_attention
    assert attention.in_proj_weight is not None
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    keys = tiles[:5]
    scores = (groups[0] @ wq.T + bq) @ (keys @ wk.T + bk).T / 8**0.5
    torch.testing.assert_close(maps[0], scores.softmax(1), rtol=0, atol=1e-12)
    want = attention.out_proj(scores.softmax(1) @ (keys @ wv.T + bv))
    torch.testing.assert_close(attended[0], want, rtol=0, atol=1e-12)


def test_mcat_permuting_gene_groups_permutes_the_rows_of_its_attention() -> None:
    model, batch = mcat(), make_batch()
    groups, _ = model.group_tokens(batch)
    tiles, order = model.project_tiles(batch), [2, 0, 1]
    attended, maps = model.co_attend(groups, tiles, batch.offsets, with_maps=True)
    turned, turned_maps = model.co_attend(groups[:, order], tiles, batch.offsets, with_maps=True)
    torch.testing.assert_close(turned, attended[:, order], rtol=0, atol=1e-12)
    for own, other in zip(maps, turned_maps, strict=True):
        torch.testing.assert_close(other, own[order], rtol=0, atol=1e-12)
    # Both sets are pooled without an order, so the embedding stays as it was.
    pooled = model.image_pool(attended), model.image_pool(turned)
    torch.testing.assert_close(pooled[1], pooled[0], rtol=0, atol=1e-12)


def test_late_fusion_is_its_parts_side_by_side() -> None:
    settings = LateFusionSettings(
        image=ABMILSettings(width=4, attention_width=3),
        genes=PathwayMLPSettings(token_width=4, width=5),
    )
    model = LateFusion(WIDTH, INDEX, OFFSETS, settings).double().eval()
    image = ABMIL(WIDTH, settings.image).double().eval()
    genes = PathwayMLP(INDEX, OFFSETS, settings.genes).double().eval()
    image.load_state_dict(model.image.state_dict())
    genes.load_state_dict(model.genes.state_dict())
    batch = make_batch()
    out = model(batch)
    assert out.shape == (3, 9)
    assert torch.equal(out[:, :4], image(batch))
    assert torch.equal(out[:, 4:], genes(batch))


def probe(features: str = "both") -> LinearProbe:
    torch.manual_seed(0)
    config = LongNetConfig(
        in_features=WIDTH,
        width=8,
        depth=2,
        heads=2,
        ffn_width=16,
        segment_lengths=(4, 8),
        dilation_ratios=(1, 2),
    )
    settings = LinearProbeSettings.model_validate({"features": features})
    return LinearProbe(WIDTH, LongNet(config), settings)


def test_linear_probe_reads_the_slide_vector_and_the_mean_tile() -> None:
    model, batch = probe(), make_batch()
    batch = CaseBatch(batch.tiles.float(), batch.positions_px, batch.offsets)
    out = model(batch)
    means = torch.stack([own.mean(0) for own in batch.tiles.split(COUNTS)])
    encoder = model.slide_encoder
    assert encoder is not None
    tokens = encoder.embed(batch.tiles, batch.positions_px, batch.offsets)
    vectors = encoder.pool(encoder.blocks(tokens, 0, encoder.depth - 1))
    torch.testing.assert_close(out, torch.cat([vectors, means], 1))
    torch.testing.assert_close(probe("slide")(batch), vectors)
    torch.testing.assert_close(
        LinearProbe(WIDTH, None, LinearProbeSettings(features="mean"))(batch), means
    )


def test_linear_probe_leaves_the_encoder_alone_and_equals_the_published_probes() -> None:
    model = probe().train()
    assert model.slide_encoder is not None
    assert not model.slide_encoder.training
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batches = [
        CaseBatch(
            normal(seed, sum(COUNTS), WIDTH).float(),
            make_batch().positions_px,
            pack_offsets(COUNTS),
        )
        for seed in range(12)
    ]
    features = embed_batches(model, batches)
    assert model.training
    rng = np.random.default_rng(0)
    classes, events = rng.integers(0, 2, 36), rng.integers(0, 2, 36)
    durations = rng.exponential(10, 36)
    fitted = fit_probes(features, classes, durations, events)
    assert fitted.logistic is not None
    assert fitted.cox is not None
    want = fit_logistic(features, classes)
    np.testing.assert_array_equal(fitted.logistic.coef, want.coef)
    np.testing.assert_array_equal(
        fitted.cox.params, fit_cox(features, durations, events, 0.1).params
    )
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert fit_probes(features, classes).cox is None
