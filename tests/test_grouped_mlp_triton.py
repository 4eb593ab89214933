"""The Triton kernels of the pathway networks in the interpreter.

`TRITON_INTERPRET=1 pytest THIS_FILE`
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import pathway_mlp
from modaltune.kernels.grouped_mlp.triton_kernels import (
    launch_pathway_mlp_bwd,
    launch_pathway_mlp_fwd,
)
from modaltune.testing import (
    INTERPRET,
    cast,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

pytestmark = pytest.mark.triton

FLOATS = ("expression", "weight1", "bias1", "weight2", "bias2")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Memberships around blocks of 16, 32 and 64, and the ends of the published table: 1 and 199 genes.
SIZES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 199)
FEW = (1, 17, 40)
# The exponential of a GPU is off by up to two units in the last place (CUDA C++ Programming Guide,
# intrinsic functions), and the gradient of ELU is a factor of it; interpreted it is NumPy's.
GRADIENT_STEPS = 1 if INTERPRET else 3
GUARD = 1 << 17  # elements before and after every buffer: more than a block can overrun


def make_inputs(
    sizes: tuple[int, ...],
    cases: int,
    width: int,
    genes: int = 60,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Inputs with genes that several pathways list, and one that none does (the last)."""
    members, pathways = sum(sizes), len(sizes)
    fan_in = torch.repeat_interleave(torch.tensor(sizes), torch.tensor(sizes))
    made = {
        "expression": normal(0, cases, genes, dtype=dtype),
        "gene_index": torch.arange(members) * 7 % (genes - 1),
        "weight1": (normal(1, members, width) / fan_in.sqrt().unsqueeze(1)).to(dtype),
        "bias1": normal(2, pathways, width, dtype=dtype),
        "weight2": (normal(3, pathways, width, width) / width**0.5).to(dtype),
        "bias2": normal(4, pathways, width, dtype=dtype),
    }
    return made


class GuardedMemory:
    """Allocates like `torch.empty`: NaN inside and around; `check` sees writes beside a buffer."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __call__(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(tuple(shape))

    def check(self) -> None:
        for buffer, size in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[GUARD + size :].isnan().all()


@pytest.mark.parametrize(
    ("sizes", "cases", "width", "p"),
    [
        (SIZES, 3, 32, 0.0),
        (FEW, 1, 33, 0.25),
        (FEW, 16, 15, 0.25),
        (FEW, 17, 64, 0.0),
        (FEW, 65, 17, 0.25),
        ((2, 3), 5, 1, 0.0),
    ],
    ids=["table", "one case", "a block", "block and one", "two blocks", "narrow"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loses_no_more_than_the_reference(
    sizes: tuple[int, ...], cases: int, width: int, p: float, dtype: torch.dtype
) -> None:
    """Under dropout too: the kernels drop the units that the reference drops."""
    check_against_reference(
        partial(pathway_mlp, seed=2**31 - 1),
        make_inputs(sizes, cases, width),
        impl="triton",
        dtype=dtype,
        gradient_steps=GRADIENT_STEPS,
        offsets=pack_offsets(sizes),
        dropout_p=p,
    )


def test_published_widths() -> None:
    check_against_reference(
        partial(pathway_mlp, seed=7),
        make_inputs((199, 1), 2, 256, genes=300),
        impl="triton",
        dtype=torch.float16,
        offsets=pack_offsets((199, 1)),
        dropout_p=0.25,
    )


def _run(inputs: dict[str, Tensor], offsets: Tensor, **how: Any) -> tuple[Tensor, ...]:
    """Return the output and the gradients that `needs` names, with dropout."""
    names = ("expression", "gene_index", "weight1", "bias1", "weight2", "bias2")
    known = (*(inputs[n] for n in names), offsets, 0.25, 3)
    out = launch_pathway_mlp_fwd(*known, **{k: v for k, v in how.items() if k == "empty"})
    how = {"needs": [True] * 5, **how}
    pulled = normal(30, *out.shape, dtype=out.dtype)
    return out, *launch_pathway_mlp_bwd(pulled, *known, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", [5, 33])
def test_writes_every_output_and_nothing_beside_it(cases: int, dtype: torch.dtype) -> None:
    inputs, offsets = make_inputs(FEW, cases, 33, dtype=dtype), pack_offsets(FEW)
    memory = GuardedMemory()
    found = _run(inputs, offsets, empty=memory)
    memory.check()
    # The output; gradients by membership and of four weights; scratch; the gradient of expression.
    assert len(memory.buffers) == 8
    for name, t in zip(["out", *FLOATS], found, strict=True):
        assert not t.isnan().any(), name
        assert t.dtype == dtype, name
    with poisoned_memory():
        again = _run(inputs, offsets)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)  # the same bits twice


def test_cases_and_pathways_do_not_see_each_other() -> None:
    """A NaN stays in its case; a gene that nobody lists and strides do not matter."""
    inputs, offsets = make_inputs(FEW, 20, 16, dtype=torch.float32), pack_offsets(FEW)
    how = {"offsets": offsets, "impl": "triton"}
    want = run_with_gradients(pathway_mlp, inputs, **how)
    wide = torch.full((20, 70), math.nan)
    wide[:, 4:63] = inputs["expression"][:, :59]  # column 63, which no pathway lists, stays NaN
    turned = inputs["weight2"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = {**inputs, "expression": wide[:, 4:64], "weight2": turned}
    got = run_with_gradients(pathway_mlp, strided, **how)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    columns = {**inputs, "expression": inputs["expression"].t().contiguous().t()}
    assert torch.equal(pathway_mlp(**columns, **how), want["out"])
    inputs["expression"][7] = math.nan
    got = run_with_gradients(pathway_mlp, inputs, **how)
    others = [i for i in range(20) if i != 7]
    assert got["out"][7].isnan().all()
    assert torch.equal(got["out"][others], want["out"][others])
    assert torch.equal(got["grad expression"][others], want["grad expression"][others])
    inputs["weight1"][1:18] = math.nan  # pathway 1
    out = pathway_mlp(**inputs, **how)[others]
    assert torch.equal(out[:, [0, 2]], want["out"][others][:, [0, 2]])
    assert out[:, 1].isnan().all()
    inputs["expression"][:, 0] = math.nan  # pathway 0 alone lists gene 0
    out = pathway_mlp(**inputs, **how)[others]
    assert torch.equal(out[:, 2], want["out"][others][:, 2])
    assert out[:, 0].isnan().all()


def test_frozen_inputs_cost_nothing() -> None:
    inputs, offsets = make_inputs(FEW, 4, 16, dtype=torch.float32), pack_offsets(FEW)
    whole = _run(inputs, offsets)[1:]
    for wanted in ([0], [1], [2], [3], [4], [1, 2, 3, 4], [3, 4], []):
        memory = GuardedMemory()
        needs = [i in wanted for i in range(5)]
        found = _run(inputs, offsets, needs=needs, empty=memory)[1:]
        assert len(found) == len(wanted)
        for i, grad in zip(wanted, found, strict=True):
            assert torch.equal(grad, whole[i]), FLOATS[i]
        sizes = [size for _, size in memory.buffers[1:6]]
        assert [size > 0 for size in sizes] == needs


def test_no_cases() -> None:
    inputs, offsets = make_inputs(FEW, 0, 16, dtype=torch.float32), pack_offsets(FEW)
    with poisoned_memory():
        out, *grads = _run(inputs, offsets)
    assert out.shape == (0, 3, 16)
    for name, grad in zip(FLOATS, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(inputs[name])), name


def test_operators_and_autocast_take_the_kernels() -> None:
    inputs, offsets = make_inputs(FEW, 2, 16, dtype=torch.float32), pack_offsets(FEW)
    how = {"offsets": offsets, "impl": "triton"}
    want = pathway_mlp(**cast(inputs, torch.bfloat16), **how)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(pathway_mlp(**inputs, **how), want)
    torch.library.opcheck(
        torch.ops.modaltune.pathway_mlp_fwd.default,
        (
            *(inputs[n] for n in ("expression", "gene_index", *FLOATS[1:])),
            offsets,
            0.25,
            3,
            "triton",
        ),
    )
