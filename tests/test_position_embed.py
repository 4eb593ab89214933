"""Positions and cls tokens: METHOD 3.1 literally, the golden file, the CPU path, bad arguments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modaltune.kernels import embed_positions
from modaltune.testing import (
    RAGGED,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)


def make_inputs(
    lengths: list[int] | tuple[int, ...], width: int = 12, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    return {
        "x": normal(0, rows, width, dtype=dtype),
        "cells": torch.randint(0, 1000, (rows, 2), generator=generator),
        "cls_token": normal(1, width, dtype=dtype),
    }


def row_of(first: int, second: int, width: int) -> list[float]:
    """METHOD 3.1 in plain floats: `[sin(j w), cos(j w), sin(i w), cos(i w)]`, i the first cell."""
    quarter = width // 4
    frequencies = [10000.0 ** (-k / quarter) for k in range(quarter)]
    row = []
    for cell in (second, first):
        row += [math.sin(cell * w) for w in frequencies]
        row += [math.cos(cell * w) for w in frequencies]
    return row


def literal(inputs: dict[str, Tensor], lengths: list[int] | tuple[int, ...]) -> list[list[float]]:
    rows, at = [], 0
    for length in lengths:
        rows.append(inputs["cls_token"].tolist())
        for _ in range(length):
            place = row_of(*inputs["cells"][at].tolist(), inputs["x"].shape[1])
            tile = inputs["x"][at].tolist()
            rows.append([a + b for a, b in zip(tile, place, strict=True)])
            at += 1
    return rows


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("width", [4, 12, 768])
def test_matches_method_literally(impl: str, width: int) -> None:
    lengths = [3, 0, 1, 17, 0]
    inputs = make_inputs(lengths, width)
    inputs["cells"][:2] = torch.tensor([[0, 0], [999, 998]])
    out = embed_positions(**inputs, offsets=pack_offsets(lengths), impl=impl)
    want = torch.tensor(literal(inputs, lengths), dtype=torch.float64)
    # Angles go up to 999 radians, whose own rounding is 999 * 2^-53 = 1.1e-13.
    torch.testing.assert_close(out, want, rtol=0, atol=5e-13)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradients(impl: str) -> None:
    """Every tile's gradient arrives unchanged, and the cls token's is the sum over the cases."""
    lengths = [3, 0, 2]
    inputs = make_inputs(lengths)
    found = run_with_gradients(embed_positions, inputs, offsets=pack_offsets(lengths), impl=impl)
    pulled = normal(0, 8, 12, dtype=torch.float32).double()
    assert torch.equal(found["grad x"], pulled[[1, 2, 3, 6, 7]])
    torch.testing.assert_close(
        found["grad cls_token"], pulled[[0, 4, 5]].sum(0), rtol=0, atol=1e-14
    )
    cells = inputs.pop("cells")
    torch.autograd.gradcheck(
        lambda x, cls_token: embed_positions(
            x, cells, cls_token, offsets=pack_offsets(lengths), impl=impl
        ),
        [t.requires_grad_() for t in inputs.values()],
    )


@pytest.mark.shared
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_golden(shared_dir: Path, impl: str) -> None:
    """Rows of the published table, which is computed in float64 and stored in float32."""
    stored = load_file(shared_dir / "golden" / "case5_pos_embed.safetensors")
    grid = 50
    index = stored["out/pos"][0].long() - 1  # row 0 belongs to cls
    cells = torch.stack([index.div(grid, rounding_mode="floor"), index % grid], dim=1)
    assert torch.equal(
        cells[:, 0] * grid + cells[:, 1],
        (stored["in/coords"][0] // 256 * torch.tensor([grid, 1])).sum(1),
    )
    width = stored["out/rows"].shape[1]
    got = embed_positions(torch.zeros(len(cells), width), cells, torch.zeros(width), impl=impl)
    want = torch.cat([stored["out/row0"], stored["out/rows"]])
    # Equal but where two libraries' float64 sines round to neighbouring float32.
    torch.testing.assert_close(got, want, rtol=0, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cpu_loses_no_more_than_the_reference(dtype: torch.dtype) -> None:
    check_against_reference(
        embed_positions,
        make_inputs(RAGGED, 48),
        impl="cpu",
        dtype=dtype,
        offsets=pack_offsets(RAGGED),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_equals_the_reference_to_the_bit(dtype: torch.dtype) -> None:
    inputs = make_inputs(RAGGED, 768, dtype)
    how = {"offsets": pack_offsets(RAGGED)}
    want = embed_positions(**inputs, **how, impl="reference")
    assert torch.equal(embed_positions(**inputs, **how, impl="cpu"), want)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_one_case_without_offsets_and_other_integer_cells(impl: str) -> None:
    inputs = make_inputs([9])
    want = embed_positions(**inputs, offsets=pack_offsets([9]), impl=impl)
    inputs["cells"] = inputs["cells"].to(torch.int16)
    inputs["cls_token"] = inputs["cls_token"].reshape(1, 1, -1)
    assert torch.equal(embed_positions(**inputs, impl=impl), want)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_stays_in_its_row(impl: str) -> None:
    inputs, offsets = make_inputs([4, 3]), pack_offsets([4, 3])
    want = embed_positions(**inputs, offsets=offsets, impl=impl)
    inputs["x"][2] = math.nan
    got = embed_positions(**inputs, offsets=offsets, impl=impl)
    assert got[3].isnan().all()
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(got[rest], want[rest])


def test_same_bits_twice_for_strided_inputs_and_in_poisoned_memory() -> None:
    """Every row of the output is written: memory that was not would show as NaN."""
    inputs = make_inputs(RAGGED, dtype=torch.float32)
    wide = normal(9, len(inputs["x"]), 24, dtype=torch.float32)
    inputs["x"] = wide[:, ::2].contiguous()
    before = {name: t.clone() for name, t in inputs.items()}
    how = {"offsets": pack_offsets(RAGGED), "impl": "cpu"}
    first = run_with_gradients(embed_positions, inputs, **how)
    assert all(torch.equal(inputs[name], t) for name, t in before.items())  # inputs are not edited
    cells = inputs["cells"].T.contiguous().T
    with poisoned_memory():
        second = run_with_gradients(
            embed_positions, {**inputs, "x": wide[:, ::2], "cells": cells}, **how
        )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tiles_leave_the_cls_tokens(impl: str, lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    out = embed_positions(**inputs, offsets=pack_offsets(lengths), impl=impl)
    assert torch.equal(out, inputs["cls_token"].expand(len(lengths), -1))


def _valid() -> dict[str, object]:
    return {**make_inputs([4, 5]), "offsets": pack_offsets([4, 5])}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 12).long()}, TypeError, "x must be a floating point tensor, got"),
        ({"x": torch.zeros(9, 3, 4)}, ValueError, r"x must have shape \[\*, \*\], got \[9, 3, 4\]"),
        ({"x": torch.zeros(9, 10)}, ValueError, "width of x must be a multiple of 4, got 10"),
        ({"cells": torch.zeros(8, 2).long()}, ValueError, r"cells must have shape \[9, 2\], got"),
        ({"cells": torch.zeros(9, 2)}, ValueError, "cells must be integers, got torch.float32"),
        ({"cls_token": torch.zeros(11)}, ValueError, "cls_token must have 12 values, got 11"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, "offsets must rise from 0 to the num"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        (
            {"impl": "triton"},
            RuntimeError,
            "embed_positions: impl='triton' takes float16, bfloat16 or float32, got torch.float64",
        ),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embed_positions(**{**_valid(), **change})


def test_triton_says_why_it_can_not_run() -> None:
    inputs = make_inputs([4], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, or TRITON_INTERPRET=1"):
        embed_positions(**inputs, impl="triton")


def test_cells_in_a_wide_range_equal_the_reference() -> None:
    inputs = make_inputs([9])
    inputs["cells"][3, 0], inputs["cells"][4, 1] = 10**7, -5
    want = embed_positions(**inputs, impl="reference")
    assert torch.equal(embed_positions(**inputs, impl="cpu"), want)


@pytest.mark.parametrize("lengths", [[9], [3, 0, 2]])
def test_opcheck(lengths: list[int]) -> None:
    inputs = make_inputs(lengths, dtype=torch.float32)
    x, cls_token = inputs["x"].requires_grad_(), inputs["cls_token"].requires_grad_()
    torch.library.opcheck(
        torch.ops.modaltune.position_embed_fwd.default,
        (x, inputs["cells"], cls_token, pack_offsets(lengths), "cpu"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lengths", [[9], [3, 0, 2]])
def test_compiles_as_one_graph(lengths: list[int], backend: str) -> None:
    inputs, offsets = make_inputs(lengths, dtype=torch.float32), pack_offsets(lengths)
    torch.compiler.reset()
    compiled = torch.compile(embed_positions, fullgraph=True, backend=backend)
    got = run_with_gradients(compiled, inputs, offsets=offsets)
    want = run_with_gradients(embed_positions, inputs, offsets=offsets, impl="cpu")
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_saves_the_offsets_alone_and_skips_frozen_inputs() -> None:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    inputs, offsets = make_inputs([4, 5]), pack_offsets([4, 5])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        assert not embed_positions(**inputs, offsets=offsets).requires_grad
        assert kept == []
        inputs["cls_token"].requires_grad_()
        out = embed_positions(**inputs, offsets=offsets)
    assert sum(t.numel() * t.element_size() for t in kept) == 8 * 3
    out.sum().backward()
    assert inputs["x"].grad is None
    assert torch.equal(inputs["cls_token"].grad, torch.full((12,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_keeps_the_dtype_of_the_tiles(impl: str) -> None:
    inputs = make_inputs([6], dtype=torch.float32)
    want = embed_positions(**inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_positions(**inputs, impl=impl), want)
        half = {**inputs, "x": inputs["x"].bfloat16()}
        assert embed_positions(**half, impl=impl).dtype == torch.bfloat16
