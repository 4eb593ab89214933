"""Pathway networks: METHOD 3.4 literally, the golden file, the CPU path, alpha dropout."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import pathway_mlp
from modaltune.kernels.grouped_mlp.reference import dropped_units
from modaltune.testing import (
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

# Pathways of the published table have 1 to 199 genes.
RAGGED = (1, 2, 15, 16, 17, 127, 199, 1)
ALPHA_DROPPED = -1.7580993408473766  # - lambda * alpha of SELU: Klambauer et al., 2017


def make_inputs(
    sizes: tuple[int, ...],
    cases: int = 3,
    genes: int = 9,
    width: int = 4,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Inputs with genes that several pathways list, and one that none does (the last)."""
    members, pathways = sum(sizes), len(sizes)
    fan_in = torch.repeat_interleave(torch.tensor(sizes), torch.tensor(sizes))
    made = {
        "expression": normal(0, cases, genes, dtype=dtype),
        "weight1": (normal(1, members, width) / fan_in.sqrt().unsqueeze(1)).to(dtype),
        "bias1": normal(2, pathways, width, dtype=dtype),
        "weight2": normal(3, pathways, width, width, dtype=dtype) / width**0.5,
        "bias2": normal(4, pathways, width, dtype=dtype),
    }
    made["gene_index"] = torch.arange(members) * 7 % (genes - 1)
    return made


def literal(
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    sizes: tuple[int, ...],
) -> Tensor:
    """`ELU(W2 ELU(W1 g + b1) + b2)`, a case, a pathway and a unit at a time."""

    def elu(value: Tensor) -> Tensor:
        return value if value > 0 else torch.exp(value) - 1

    out = []
    for case in expression:
        start = 0
        for p, size in enumerate(sizes):
            hidden = []
            for unit in range(bias1.shape[1]):
                total = bias1[p, unit]
                for member in range(start, start + size):
                    total = total + weight1[member, unit] * case[gene_index[member]]
                hidden.append(elu(total))
            for unit in range(bias2.shape[1]):
                total = bias2[p, unit]
                for source, value in enumerate(hidden):
                    total = total + weight2[p, unit, source] * value
                out.append(elu(total))
            start += size
    return torch.stack(out).reshape(expression.shape[0], len(sizes), -1)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("sizes", [(3, 1, 7, 2), (1,), (16, 17)])
def test_matches_method_literally(impl: str, sizes: tuple[int, ...]) -> None:
    inputs = make_inputs(sizes)
    got = run_with_gradients(pathway_mlp, inputs, offsets=pack_offsets(sizes), impl=impl)
    want = run_with_gradients(literal, inputs, sizes=sizes)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-13, msg=name)
    # The gene that no pathway lists.
    assert (got["grad expression"][:, -1] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs((2, 1, 3), cases=2, genes=4, width=2)
    index = inputs.pop("gene_index")
    names = list(inputs)
    torch.autograd.gradcheck(
        lambda *values: pathway_mlp(
            **dict(zip(names, values, strict=True)),
            gene_index=index,
            offsets=pack_offsets((2, 1, 3)),
            impl=impl,
        ),
        [t.requires_grad_() for t in inputs.values()],
    )


@pytest.mark.shared
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_golden(shared_dir: Path, impl: str) -> None:
    """The networks before the mixer of the published gene encoder."""
    stored = load_file(shared_dir / "golden" / "case5_gene_encoder.safetensors")
    stored = {name: t.double() for name, t in stored.items()}
    genes = [stored[f"in/genes.{p}"] for p in range(8)]
    layers = [f"weights/gene_networks.{p}" for p in range(8)]
    out = pathway_mlp(
        torch.cat(genes, dim=1),
        torch.arange(sum(g.shape[1] for g in genes)),
        torch.cat([stored[f"{name}.0.0.weight"].T for name in layers]),
        torch.stack([stored[f"{name}.0.0.bias"] for name in layers]),
        torch.stack([stored[f"{name}.1.0.weight"] for name in layers]),
        torch.stack([stored[f"{name}.1.0.bias"] for name in layers]),
        offsets=pack_offsets([g.shape[1] for g in genes]),
        impl=impl,
    )
    # The published run is float32: a rounding step of every value of order one.
    torch.testing.assert_close(out, stored["mid/snn"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize(
    ("cases", "width", "p"), [(1, 32, 0.0), (5, 33, 0.25), (64, 30, 0.0), (67, 8, 0.5)]
)
def test_cpu_loses_no_more_than_the_reference(
    dtype: torch.dtype, cases: int, width: int, p: float
) -> None:
    """Under dropout too: every path drops the same units."""
    check_against_reference(
        partial(pathway_mlp, seed=11),
        make_inputs(RAGGED, cases=cases, genes=300, width=width),
        impl="cpu",
        dtype=dtype,
        offsets=pack_offsets(RAGGED),
        dropout_p=p,
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("p", [0.25, 0.6])
def test_alpha_dropout(impl: str, p: float) -> None:
    """Second layers of 1 show what the first dropout makes of a hidden 1; then the second's share.

    Alpha dropout takes a value x to a x + b or, with probability p, to a alpha' + b, where a and b
    restore mean 0 and variance 1.
    """
    pathways, width = 64, 128
    shape = (pathways, width)
    out = pathway_mlp(
        torch.ones(1, 1, dtype=torch.float64),
        torch.zeros(pathways, dtype=torch.int64),
        torch.ones(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
        torch.eye(width, dtype=torch.float64).expand(pathways, -1, -1),
        torch.full(shape, 10.0, dtype=torch.float64),  # keeps the second ELU linear
        offsets=torch.arange(pathways + 1),
        dropout_p=p,
        seed=5,
        impl=impl,
    )
    a = ((1 - p) * (1 + p * ALPHA_DROPPED**2)) ** -0.5
    b = -a * p * ALPHA_DROPPED
    dropped, kept = a * ALPHA_DROPPED + b, a * 1 + b
    levels = torch.tensor([dropped, a * (10 + dropped) + b, a * (10 + kept) + b])
    distance = (out.flatten().unsqueeze(1) - levels).abs()
    assert distance.min(dim=1).values.max() < 1e-5
    share = torch.bincount(distance.argmin(dim=1), minlength=3) / out.numel()
    want = torch.tensor([p, (1 - p) * p, (1 - p) ** 2])
    # Six standard deviations of a share of 8,192 draws.
    assert (share - want).abs().max() < 6 * 0.5 / math.sqrt(out.numel())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_dropout_follows_the_seed_alone(impl: str) -> None:
    inputs, offsets = make_inputs((3, 2)), pack_offsets((3, 2))
    runs = []
    for seed in (1, 1, 2, 2**31 - 1):
        torch.manual_seed(len(runs))
        runs.append(pathway_mlp(**inputs, offsets=offsets, dropout_p=0.5, seed=seed, impl=impl))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[2], runs[3])


def test_cases_pathways_units_and_layers_draw_on_their_own() -> None:
    first, second = dropped_units(3, 0.5, 4, 6, 32)
    masks = torch.stack([first, second]).view(2 * 4 * 6, 32)
    assert len(masks.unique(dim=0)) == len(masks)
    assert len(masks.unique(dim=1).t()) == 32


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_unlisted_genes_and_other_cases_are_never_read(impl: str) -> None:
    inputs, offsets = make_inputs((3, 5, 2)), pack_offsets((3, 5, 2))
    want = run_with_gradients(pathway_mlp, inputs, offsets=offsets, impl=impl)
    inputs["expression"][:, -1] = math.nan
    got = run_with_gradients(pathway_mlp, inputs, offsets=offsets, impl=impl)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    inputs["expression"][1] = math.nan
    got = run_with_gradients(pathway_mlp, inputs, offsets=offsets, impl=impl)
    assert got["out"][1].isnan().all()
    assert torch.equal(got["out"][[0, 2]], want["out"][[0, 2]])


def test_same_bits_twice_for_strided_inputs_and_in_poisoned_memory() -> None:
    inputs = make_inputs(RAGGED, genes=300, dtype=torch.float32)
    wide = normal(9, 3, 600, dtype=torch.float32)
    inputs["expression"] = wide[:, ::2].contiguous()
    how = {"offsets": pack_offsets(RAGGED), "impl": "cpu"}
    first = run_with_gradients(pathway_mlp, inputs, **how)
    turned = inputs["weight2"].transpose(1, 2).contiguous().transpose(1, 2)
    with poisoned_memory():
        strided = {**inputs, "expression": wide[:, ::2], "weight2": turned}
        second = run_with_gradients(pathway_mlp, strided, **how)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_cases(impl: str) -> None:
    out = pathway_mlp(**make_inputs((2, 1), cases=0), offsets=pack_offsets((2, 1)), impl=impl)
    assert out.shape == (0, 2, 4)


def _valid() -> dict[str, object]:
    return {**make_inputs((4, 5)), "offsets": pack_offsets((4, 5))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expression": torch.zeros(3, 9).long()}, TypeError, "expression must be a floating poin"),
        ({"expression": torch.zeros(9)}, ValueError, r"expression must have shape \[\*, \*\]"),
        ({"weight1": torch.zeros(8, 4)}, ValueError, r"weight1 must have shape \[9, \*\], got"),
        ({"bias1": torch.zeros(3, 4)}, ValueError, r"bias1 must have shape \[2, 4\]"),
        ({"weight2": torch.zeros(2, 4, 3)}, ValueError, r"weight2 must have shape \[2, 4, 4\]"),
        ({"bias2": torch.zeros(4)}, ValueError, r"bias2 must have shape \[2, 4\]"),
        ({"gene_index": torch.zeros(9)}, ValueError, "gene_index must be a 1-D integer tensor"),
        ({"gene_index": torch.zeros(9, 1).long()}, ValueError, "gene_index must be a 1-D integer"),
        ({"gene_index": torch.full((9,), 9)}, ValueError, r"gene_index must lie in 0..8, got 9..9"),
        ({"gene_index": torch.arange(9) - 1}, ValueError, r"must lie in 0..8, got -1..7"),
        ({"offsets": torch.tensor([0, 9, 9])}, ValueError, r"every pathway at least one gene, got"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "offsets must rise from 0 to the num"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5}, ValueError, r"seed must be given where dropout_p is above 0, got Non"),
        ({"dropout_p": 0.5, "seed": -1}, ValueError, r"seed must lie in 0..2147483647, got -1"),
        ({"dropout_p": 0.5, "seed": 2**31}, ValueError, r"seed must lie in 0..2147483647, got 21"),
        (
            {"bias2": torch.zeros(2, 4)},
            ValueError,
            r"bias2 must have the dtype .* got torch.float32, cpu; cast it, or run under",
        ),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must lie in \[0, 1\), got -0.1"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        (
            {"impl": "triton"},
            RuntimeError,
            "pathway_mlp: impl='triton' takes float16, bfloat16 or float32, got torch.float64",
        ),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pathway_mlp(**{**_valid(), **change})


def test_no_pathways_are_refused() -> None:
    nothing = make_inputs((1,))
    nothing = {n: t if n == "expression" else t[:0] for n, t in nothing.items()}
    with pytest.raises(ValueError, match="offsets must hold at least one pathway"):
        pathway_mlp(**nothing, offsets=torch.tensor([0]))


def test_threads_do_not_change_a_bit() -> None:
    inputs = make_inputs(RAGGED, cases=5, genes=300, width=32, dtype=torch.float32)
    how = {"offsets": pack_offsets(RAGGED), "dropout_p": 0.25, "impl": "cpu"}
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            runs.append(run_with_gradients(partial(pathway_mlp, seed=1), inputs, **how))
    finally:
        torch.set_num_threads(threads)
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
