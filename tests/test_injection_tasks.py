"""`inject_tasks`: one pass for all tasks against separate calls of `inject`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import OutOfReachError, inject, inject_tasks
from modaltune.kernels.injection import cpu
from modaltune.testing import (
    allowed_error,
    cast,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

LENGTHS = [5, 0, 1, 40, 17]


def make_inputs(
    tokens: int = 6, tasks: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    cases, rows, width, inner = len(LENGTHS), sum(LENGTHS), 20, 12
    shapes = {
        "x": (rows, width),
        "keys": (cases, tokens, inner),
        "values": (cases, tokens, inner),
        "task_keys": (cases, tasks, inner),
        "task_values": (cases, tasks, inner),
        "gamma": (width,),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "query_weight": (inner, width),
        "query_bias": (inner,),
        "output_weight": (width, inner),
        "output_bias": (width,),
    }
    made = {name: normal(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    made["query_weight"] /= width**0.5
    made["output_weight"] /= inner**0.5
    return made


def options(**more: Any) -> dict[str, Any]:
    return {"num_heads": 3, "offsets": pack_offsets(LENGTHS), "num_prefix": 1, **more}


def masks(tokens: int) -> Tensor:
    """The fourth case with some tokens hidden, the last with all of them."""
    mask = torch.ones(len(LENGTHS), tokens, dtype=torch.bool)
    mask[3, ::2] = False
    mask[4] = False
    return mask


def separately(inputs: dict[str, Tensor], key_mask: Tensor | None, **how: Any) -> Tensor:
    """`inject` once a task, its token the last one."""
    rest = {n: t for n, t in inputs.items() if not n.startswith(("task", "keys", "values"))}
    if key_mask is not None:
        key_mask = torch.cat([key_mask, torch.ones(key_mask.shape[0], 1, dtype=torch.bool)], 1)
    outs = []
    for task in range(inputs["task_keys"].shape[1]):
        k, v = (
            torch.cat([inputs[name], inputs[f"task_{name}"][:, task, None]], dim=1)
            for name in ("keys", "values")
        )
        outs.append(inject(keys=k, values=v, key_mask=key_mask, **rest, **how))
    return torch.stack(outs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_rows", [7, 2048])
def test_equals_separate_calls_to_float64_rounding(
    masked: bool, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ROWS", block_rows)
    inputs, mask = make_inputs(), masks(6) if masked else None
    with poisoned_memory():
        got = inject_tasks(**inputs, key_mask=mask, impl="cpu", **options())
    want = separately(inputs, mask, impl="reference", **options())
    assert got.shape == (3, sum(LENGTHS), 20)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)  # values up to about 20
    # The results of the tasks differ: each has its own token.
    assert (got[0] - got[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loses_no_more_than_the_reference(dtype: torch.dtype) -> None:
    rounded = make_inputs(dtype=dtype)
    exact = separately(cast(rounded, torch.float64), masks(6), impl="reference", **options())
    plain = separately(rounded, masks(6), impl="reference", **options())
    got = inject_tasks(**rounded, key_mask=masks(6), impl="cpu", **options())
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= allowed_error(exact, plain, dtype)


def test_a_score_far_above_or_below_the_others_is_exact() -> None:
    """The merge neither overflows nor loses the smaller side."""
    inputs = make_inputs(tasks=2)
    inputs["task_keys"][:, 0] *= 1000
    inputs["task_keys"][:, 1] *= -1000
    got = inject_tasks(**inputs, impl="cpu", **options())
    want = separately(inputs, None, impl="reference", **options())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_are_those_of_separate_calls(impl: str) -> None:
    inputs = make_inputs()
    got = run_with_gradients(inject_tasks, inputs, key_mask=masks(6), impl=impl, **options())

    def apart(**given: Tensor) -> Tensor:
        return separately(given, masks(6), impl="reference", **options())

    want = run_with_gradients(apart, inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_without_common_tokens_or_tasks(impl: str) -> None:
    alone = make_inputs(tokens=0)
    got = inject_tasks(**alone, impl=impl, **options())
    want = separately(alone, None, impl="reference", **options())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert inject_tasks(**make_inputs(tasks=0), impl=impl, **options()).shape == (0, 63, 20)


def test_the_own_token_counts_among_those_on_chip() -> None:
    """So that `auto` on a GPU takes the reference for 128 common tokens, and does not fail."""
    inputs = make_inputs(dtype=torch.float32, tokens=128)
    with pytest.raises(OutOfReachError, match=r"inject_tasks: .* at most 128 keys .* got 129"):
        inject_tasks(**inputs, **options(impl="triton"))


def test_hidden_tokens_and_prefix_rows_are_never_read() -> None:
    inputs = make_inputs()
    want = inject_tasks(**inputs, key_mask=masks(6), impl="cpu", **options())
    prefix = pack_offsets(LENGTHS)[:-1][torch.tensor(LENGTHS) > 0]
    inputs["x"][prefix] = math.nan
    inputs["keys"][~masks(6)] = inputs["values"][~masks(6)] = math.nan
    got = inject_tasks(**inputs, key_mask=masks(6), impl="cpu", **options())
    assert got[:, prefix].isnan().all()
    got[:, prefix] = want[:, prefix]
    assert torch.equal(got, want)


def test_operator_passes_opcheck_and_compiles() -> None:
    inputs = make_inputs(dtype=torch.float32)
    arguments = (*inputs.values(), masks(6), pack_offsets(LENGTHS), 3, 1, 1e-5)
    torch.library.opcheck(
        torch.ops.modaltune.inject_tasks_fwd.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.compiler.reset()
    compiled = torch.compile(inject_tasks, fullgraph=True, backend="aot_eager")
    how = options(key_mask=masks(6), impl="cpu")
    assert torch.equal(compiled(**inputs, **how), inject_tasks(**inputs, **how))
    how["offsets"] = torch.clamp_max(pack_offsets(LENGTHS), sum(LENGTHS) - 1)
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of rows"):
        compiled(**inputs, **how)


def test_autocast_runs_in_its_dtype() -> None:
    inputs = make_inputs(dtype=torch.float32)
    want = inject_tasks(**cast(inputs, torch.bfloat16), impl="cpu", **options())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = inject_tasks(**inputs, impl="cpu", **options())
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_keys": torch.zeros(5, 12)}, r"task_keys must have shape \[5, \*, 12\]"),
        ({"task_keys": torch.zeros(4, 3, 12)}, r"task_keys must have shape \[5, \*, 12\]"),
        ({"task_values": torch.zeros(5, 2, 12)}, r"task_values must have shape \[5, 3, 12\]"),
        ({"task_values": torch.zeros(5, 3, 12)}, "task_values must have the dtype and device of x"),
        ({"gamma": torch.zeros(3)}, r"gamma must have shape \[20\], got \[3\]"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_tasks(**{**make_inputs(), **change}, **options())
