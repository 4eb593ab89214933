"""The Triton kernel of positions in the interpreter: `TRITON_INTERPRET=1 pytest THIS_FILE`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modaltune.kernels import embed_positions
from modaltune.kernels.position_embed.reference import position_rows_reference
from modaltune.kernels.position_embed.triton_kernels import launch_position_embed_fwd
from modaltune.testing import (
    RAGGED,
    at_default,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

pytestmark = pytest.mark.triton

GUARD = 1 << 16  # elements before and after the output: more than a block can overrun
EDGES = (14, 15, 16, 30, 31, 32, 33, 0)  # around blocks of 16 and 32 rows, the cls row included
POSITION_ERROR = 8e-8  # stated by the op; what is added to it below is the rounding of the output


def make_inputs(
    lengths: tuple[int, ...], width: int = 12, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    return {
        "x": normal(0, rows, width, dtype=dtype),
        "cells": at_default(torch.randint(0, 1000, (rows, 2), generator=generator, device="cpu")),
        "cls_token": normal(1, width, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("lengths", "width"),
    [(RAGGED, 68), (EDGES, 4), (EDGES, 260)],
    ids=["ragged", "narrow", "block edges"],
)
def test_loses_no_more_than_the_reference(
    lengths: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    check_against_reference(
        embed_positions,
        make_inputs(lengths, width),
        impl="triton",
        dtype=dtype,
        offsets=pack_offsets(lengths),
    )


def test_a_long_sequence() -> None:
    check_against_reference(
        embed_positions, make_inputs((5793,), 64), impl="triton", dtype=torch.float16
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1000), (-1000, 0), (-(10**6), 10**6)], ids=["grid", "negative", "far"]
)
def test_positions_are_as_exact_as_stated(low: int, high: int) -> None:
    """At the published width, on bare positions; the first two ranges are covered whole."""
    count = min(high - low, 1000)
    cells = torch.linspace(low, high - 1, count, dtype=torch.float64).round().long()
    cells = torch.stack([cells, cells.flip(0)], dim=1)
    out = embed_positions(torch.zeros(count, 768), cells, torch.zeros(768), impl="triton")
    want = position_rows_reference(cells, 768)
    assert (out[1:] - want).abs().max() <= POSITION_ERROR
    assert (out[0] == 0).all()


def test_cells_far_apart_do_not_blur() -> None:
    """A float32 angle would be off by 60 radians here."""
    cells = torch.tensor([[2**30, 2**30 + 1], [-(2**31), 2**31]])
    out = embed_positions(torch.zeros(2, 768), cells, torch.zeros(768), impl="triton")
    # The float64 angle of the reference is itself off by up to 2^31 * 2^-53.
    error = (out[1:] - position_rows_reference(cells, 768)).abs().max()
    assert error <= POSITION_ERROR + 2.0**-21


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_writes_the_output_and_nothing_beside_it(dtype: torch.dtype) -> None:
    inputs, offsets = make_inputs(EDGES, 36, dtype), pack_offsets(EDGES)
    buffers = []

    def guarded(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffers.append(torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device))
        return buffers[-1][GUARD : GUARD + size].view(shape)

    out = launch_position_embed_fwd(**inputs, offsets=offsets, empty=guarded)
    (buffer,) = buffers
    assert buffer[:GUARD].isnan().all()
    assert buffer[-GUARD:].isnan().all()
    assert not out.isnan().any()
    starts = offsets[:-1] + torch.arange(len(EDGES), device="cpu")
    assert torch.equal(out[starts], inputs["cls_token"].expand(len(EDGES), -1))
    with poisoned_memory():
        again = launch_position_embed_fwd(**inputs, offsets=offsets)
    assert torch.equal(out, again)  # the same bits twice


def test_nan_stays_in_its_row_and_strides_do_not_matter() -> None:
    lengths = (4, 20)
    inputs = make_inputs(lengths, 36, torch.float32)
    how = {"offsets": pack_offsets(lengths), "impl": "triton"}
    want = run_with_gradients(embed_positions, inputs, **how)
    wide = torch.full((24, 50), math.nan)
    wide[:, 8:44] = inputs["x"]
    columns = inputs["cells"].t().contiguous().t().to(torch.int32)
    changed = {
        "x": wide[:, 8:44],
        "cells": columns,
        "cls_token": inputs["cls_token"].view(1, 1, -1),
    }
    got = run_with_gradients(embed_positions, changed, **how)
    for name in want:
        assert torch.equal(got[name].flatten(), want[name].flatten()), name
    turned = {**inputs, "x": inputs["x"].t().contiguous().t()}
    assert torch.equal(embed_positions(**turned, **how), want["out"])
    inputs["x"][2] = math.nan
    out = embed_positions(**inputs, **how)
    assert out[3].isnan().all()
    rest = [i for i in range(26) if i != 3]
    assert torch.equal(out[rest], want["out"][rest])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tiles_leave_the_cls_tokens(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths, 12, torch.float32)
    with poisoned_memory():
        out = embed_positions(**inputs, offsets=pack_offsets(lengths), impl="triton")
    assert torch.equal(out, inputs["cls_token"].expand(len(lengths), -1))


def test_operator_takes_the_kernel() -> None:
    inputs = make_inputs((3, 0, 2), 16, torch.float32)
    x, cells, cls_token = (t for t in inputs.values())
    torch.library.opcheck(
        torch.ops.modaltune.position_embed_fwd.default,
        (x.requires_grad_(), cells, cls_token, pack_offsets((3, 0, 2)), "triton"),
    )
