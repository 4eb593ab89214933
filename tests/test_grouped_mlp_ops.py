"""The operators of the pathway networks: what they save, skip, trace and refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from modaltune.kernels import pathway_mlp
from modaltune.testing import normal, pack_offsets, run_with_gradients

FLOATS = ("expression", "weight1", "bias1", "weight2", "bias2")


def make_inputs(
    sizes: tuple[int, ...], cases: int = 3, width: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    shapes = ((cases, 9), (sum(sizes), width), (len(sizes), width), (len(sizes), width, width))
    shapes = (*shapes, (len(sizes), width))
    made = {
        name: normal(i, *shape, dtype=dtype)
        for i, (name, shape) in enumerate(zip(FLOATS, shapes, strict=True))
    }
    made["gene_index"] = torch.arange(sum(sizes)) * 7 % 9
    return made


def _saved(inputs: dict[str, Tensor], offsets: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        pathway_mlp(**inputs, offsets=offsets, dropout_p=0.5, seed=1, impl="cpu")
    return kept


def test_saves_its_inputs_and_nothing_else() -> None:
    inputs, offsets = make_inputs((3, 5, 2)), pack_offsets((3, 5, 2))
    assert _saved(inputs, offsets) == []
    inputs["weight2"].requires_grad_()
    saved = _saved(inputs, offsets)
    assert saved
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*inputs.values(), offsets)}


def _operands(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[n] for n in ("expression", "gene_index", *FLOATS[1:])]


def test_frozen_inputs_get_no_gradient_and_the_others_do_not_change() -> None:
    inputs, offsets = make_inputs((3, 5, 2), cases=2), pack_offsets((3, 5, 2))
    known = (*_operands(inputs), offsets, 0.5, 4)

    def backward(needs: list[bool]) -> list[Tensor]:
        return torch.ops.modaltune.pathway_mlp_bwd(normal(7, 2, 3, 4), *known, needs, "cpu")

    whole = backward([True] * 5)
    for wanted in ([0], [1], [2], [3], [4], [1, 2, 3, 4], [3, 4], []):
        found = backward([i in wanted for i in range(5)])
        assert len(found) == len(wanted)
        for i, grad in zip(wanted, found, strict=True):
            assert torch.equal(grad, whole[i]), FLOATS[i]


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad: bool) -> None:
    inputs = make_inputs((3, 1, 2), dtype=torch.float32)
    for name in FLOATS:
        inputs[name].requires_grad_(grad)
    torch.library.opcheck(
        torch.ops.modaltune.pathway_mlp_fwd.default,
        (*_operands(inputs), pack_offsets((3, 1, 2)), 0.25, 3, "cpu"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str) -> None:
    inputs, offsets = make_inputs((3, 1, 2), dtype=torch.float32), pack_offsets((3, 1, 2))
    torch.compiler.reset()
    compiled = torch.compile(pathway_mlp, fullgraph=True, backend=backend)
    for seed in (3, 4, 5):
        how = {"offsets": offsets, "dropout_p": 0.25}
        got = run_with_gradients(partial(compiled, seed=seed), inputs, **how)
        want = run_with_gradients(partial(pathway_mlp, seed=seed), inputs, **how, impl="cpu")
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_takes_mixed_dtypes_and_returns_gradients_in_theirs(impl: str) -> None:
    inputs, offsets = make_inputs((3, 1, 2), dtype=torch.float32), pack_offsets((3, 1, 2))
    inputs["expression"] = inputs["expression"].half()  # stored values beside float32 weights
    for name in FLOATS:
        inputs[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = pathway_mlp(**inputs, offsets=offsets, impl=impl)
        out.float().sum().backward()
    if impl == "cpu":
        assert out.dtype == torch.float32
    for name in FLOATS:
        grad = inputs[name].grad
        assert grad is not None, name
        assert grad.dtype == inputs[name].dtype, name
        assert grad.isfinite().all(), name


def test_an_index_that_changed_is_looked_at_again() -> None:
    inputs, offsets = make_inputs((4, 5)), pack_offsets((4, 5))
    pathway_mlp(**inputs, offsets=offsets)
    inputs["gene_index"][3] = 9
    with pytest.raises(ValueError, match=r"gene_index must lie in 0..8, got 0..9"):
        pathway_mlp(**inputs, offsets=offsets)
    with torch.inference_mode():
        inputs["gene_index"] = inputs["gene_index"] % 9
        pathway_mlp(**inputs, offsets=offsets)
        inputs["gene_index"][3] = 9
        with pytest.raises(ValueError, match=r"gene_index must lie in 0..8, got 0..9"):
            pathway_mlp(**inputs, offsets=offsets)


def test_triton_says_why_it_can_not_run() -> None:
    wide = make_inputs((1, 2), width=260, dtype=torch.float32)
    how = {"offsets": pack_offsets((1, 2)), "impl": "triton"}
    with pytest.raises(RuntimeError, match="takes networks at most 256 units wide, got 260; use"):
        pathway_mlp(**wide, **how)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        pathway_mlp(**make_inputs((1, 2), dtype=torch.float32), **how)


def test_traces_on_the_meta_device() -> None:
    inputs = {name: t.to("meta") for name, t in make_inputs((3, 5, 2)).items()}
    offsets = pack_offsets((3, 5, 2))
    assert pathway_mlp(**inputs, offsets=offsets).shape == (3, 3, 4)
