"""Rules that every baseline keeps: shapes, gradients, packing, missing modalities, messages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modaltune.baselines import BASELINES, Baseline, make_baseline
from modaltune.baselines.registry import BaselineKind
from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.modalities import GeneConfig
from modaltune.pathways import PathwayIndex, PathwayTable
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig
from modaltune.testing import normal, pack_offsets

TILE_WIDTH, GENES = 6, 7
INDEX = torch.tensor([2, 0, 6, 3, 1, 0, 2, 4, 5])
OFFSETS = torch.tensor([0, 2, 5, 9])
ENCODER = LongNetConfig(
    in_features=TILE_WIDTH,
    width=8,
    depth=2,
    heads=2,
    ffn_width=16,
    segment_lengths=(4, 8),
    dilation_ratios=(1, 2),
)
SMALL = {
    "linear_probe": {},
    "abmil": {"width": 12, "attention_width": 5, "dropout": 0.2},
    "pathway_mlp": {"token_width": 4, "width": 10},
    "gene_mixer": {"width": 8, "depth": 2, "tokens": 3, "out_width": 9},
    "mcat": {"width": 8, "heads": 2, "hidden": 12, "layers": 1},
    "late_fusion": {"image": {"width": 12}, "genes": {"token_width": 4, "width": 10}},
}
# A shift of all scores of a softmax changes nothing, and neither does the mixer's last shift of a
# pathway in front of a norm: their gradients are rounding errors around zero.
SHIFTS = ("score.bias", "token_out.bias")


def make(name: str, seed: int = 0) -> Baseline:
    torch.manual_seed(seed)
    made = make_baseline(
        name,
        tile_width=TILE_WIDTH,
        pathways=(INDEX, OFFSETS),
        slide_encoder=LongNet(ENCODER),
        settings=SMALL[name],
    )
    return made.double()


def make_batch(
    counts: tuple[int, ...] = (5, 1, 9), without_genes: tuple[int, ...] = ()
) -> CaseBatch:
    """Cases of some tiles each; values of cases without genes are NaN."""
    genes = normal(1, len(counts), GENES)
    present = torch.tensor([b not in without_genes for b in range(len(counts))])
    genes[~present] = math.nan
    total = sum(counts)
    positions = torch.stack([torch.arange(total) % 3, torch.arange(total) // 3], 1) * 256.0
    return CaseBatch(
        normal(2, total, TILE_WIDTH),
        positions.double(),
        pack_offsets(counts),
        {"genes": genes},
        {"genes": present},
    )


def one_case(batch: CaseBatch, b: int) -> CaseBatch:
    start, end = batch.offsets[b : b + 2].tolist()
    return CaseBatch(
        batch.tiles[start:end],
        batch.positions_px[start:end],
        torch.tensor([0, end - start]),
        {name: v[b : b + 1] for name, v in batch.modalities.items()},
        {name: v[b : b + 1] for name, v in batch.present.items()},
    )


@pytest.mark.parametrize("name", BASELINES)
def test_embeddings_are_finite_and_as_wide_as_said(name: str) -> None:
    model = make(name).eval()
    out = model(make_batch())
    assert out.shape == (3, model.width)
    assert bool(torch.isfinite(out).all())
    assert not torch.equal(out[0], out[2])


@pytest.mark.parametrize("name", BASELINES)
def test_every_trainable_parameter_gets_a_finite_gradient(name: str) -> None:
    model = make(name).train()
    trainable = dict(model.named_parameters())
    if name == "linear_probe":
        assert model.trainable_parameters() == []
        assert not model(make_batch()).requires_grad
        return
    assert all(p.requires_grad for p in trainable.values())
    out = model(make_batch())
    (out * normal(3, *out.shape)).sum().backward()
    for parameter, p in trainable.items():
        assert p.grad is not None, parameter
        assert bool(torch.isfinite(p.grad).all()), parameter
        if not parameter.endswith(SHIFTS):
            assert bool((p.grad != 0).any()), parameter


@pytest.mark.parametrize("name", BASELINES)
def test_a_packed_batch_equals_one_case_at_a_time(name: str) -> None:
    model = make(name).eval()
    batch = make_batch((4, 0, 7, 1), without_genes=(2,))
    together = model(batch)
    for b in range(4):
        torch.testing.assert_close(
            together[b : b + 1], model(one_case(batch, b)), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", BASELINES)
def test_a_missing_modality_leaves_a_finite_embedding_and_gradient(name: str) -> None:
    model = make(name).train()
    out = model(make_batch((0, 3, 0), without_genes=(1, 2)))
    assert bool(torch.isfinite(out).all())
    if out.requires_grad:
        out.sum().backward()
        assert all(
            bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None
        )


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_without_any_tile_or_gene_is_embedded(name: str) -> None:
    model = make(name).eval()
    nothing = CaseBatch(torch.zeros(0, TILE_WIDTH), torch.zeros(0, 2), torch.tensor([0, 0, 0]))
    out = model(nothing)
    assert out.shape == (2, model.width)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)
    kind: BaselineKind = BASELINES[name]
    if kind.reads_tiles != kind.reads_genes and name != "gene_mixer":
        assert not bool(out.any())


@pytest.mark.parametrize("name", BASELINES)
def test_only_what_a_baseline_reads_moves_it(name: str) -> None:
    model, kind, batch = make(name).eval(), BASELINES[name], make_batch()
    out = model(batch)
    other_tiles = CaseBatch(
        batch.tiles + 1, batch.positions_px, batch.offsets, batch.modalities, batch.present
    )
    other_genes = CaseBatch(
        batch.tiles, batch.positions_px, batch.offsets, {"genes": batch.modalities["genes"] + 1}
    )
    assert torch.equal(model(other_tiles), out) == (not kind.reads_tiles)
    assert torch.equal(model(other_genes), out) == (not kind.reads_genes)


def test_bad_values_are_refused_by_name() -> None:
    batch = make_batch()
    wide = CaseBatch(batch.tiles[:, :4], batch.positions_px, batch.offsets)
    with pytest.raises(InputError, match=r"must be \[N, 6\]"):
        make("abmil").check(wide)
    few = CaseBatch(
        batch.tiles, batch.positions_px, batch.offsets, {"genes": normal(0, 3, GENES - 1)}
    )
    with pytest.raises(InputError, match=r"genes must be \[3, 7\]"):
        make("mcat").check(few)
    make("abmil").check(few)
    bad = CaseBatch(
        batch.tiles,
        batch.positions_px,
        batch.offsets,
        {"genes": torch.full((3, GENES), math.nan)},
        case_ids=("a", "b", "c"),
    )
    with pytest.raises(InputError, match=r"genes must be finite.*first is a"):
        make("pathway_mlp").check(bad)


def test_the_registry_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"name must be one of linear_probe, .*got 'abml'"):
        make_baseline("abml")
    with pytest.raises(InputError, match="tile_width must be given for mcat"):
        make_baseline("mcat", pathways=(INDEX, OFFSETS))
    with pytest.raises(InputError, match="pathways must be given for gene_mixer"):
        make_baseline("gene_mixer")
    with pytest.raises(InputError, match=r"settings of abmil.*hidden: Extra inputs"):
        make_baseline("abmil", tile_width=3, settings={"hidden": 3})
    with pytest.raises(InputError, match="heads must divide width, got 3 and 8"):
        make_baseline(
            "mcat", tile_width=3, pathways=(INDEX, OFFSETS), settings={"width": 8, "heads": 3}
        )
    with pytest.raises(InputError, match="settings of abmil must be ABMILSettings, got GeneConfig"):
        make_baseline("abmil", tile_width=3, settings=GeneConfig())
    with pytest.raises(InputError, match=r"slide_encoder must be given.*got none"):
        make_baseline("linear_probe", tile_width=3)


def test_a_pathway_index_does_as_well_as_its_tensors() -> None:
    table = PathwayTable(("p", "q"), (("B", "A"), ("C", "B")))
    index = PathwayIndex.build(table, "ABC")

    def embed(pathways: PathwayIndex | tuple[Tensor, Tensor]) -> Tensor:
        torch.manual_seed(0)
        model = make_baseline("pathway_mlp", pathways=pathways).eval()
        genes = torch.tensor([[1.0, 2.0, 3.0]])
        return model(
            CaseBatch(torch.zeros(0, 1), torch.zeros(0, 2), torch.tensor([0, 0]), {"genes": genes})
        )

    assert torch.equal(embed(index), embed((index.indices, index.offsets)))
