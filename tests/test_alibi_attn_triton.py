"""The Triton kernels of ALiBi attention in the interpreter, against the float64 reference.

Run with TRITON_INTERPRET=1 set before anything imports Triton (tests/test_interpreter.py does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import alibi_attention
from modaltune.slide_encoders.titan import alibi_slopes
from modaltune.testing import (
    INTERPRET,
    allowed_error,
    at_default,
    check_against_reference,
    normal,
    pack_offsets,
    poisoned_memory,
    run_with_gradients,
)

pytestmark = pytest.mark.triton

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set block sizes of every kernel; a GPU, whose memory larger ones overflow, takes no more."""

    def set_blocks(m: int, n: int, heads: int = 1) -> None:
        from modaltune.kernels.alibi_attn import triton_kernels

        sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_L": 32, "HEADS": heads}
        original = triton_kernels.config

        def config(op: str, kernel: str, device: torch.device) -> dict[str, Any]:
            shipped = original(op, kernel, device)
            found = {name: sizes.get(name, value) for name, value in shipped.items()}
            return found if INTERPRET else {n: min(v, shipped[n]) for n, v in found.items()}

        monkeypatch.setattr(triton_kernels, "config", config)

    return set_blocks


# A log-sum-exp below 16 (to base 2) is read back from float32: half a unit in its last place is 4
# steps, times ln 2 in a weight, and one step for the rounding of the result.
BACKWARD_STEPS = 4


def make(
    lengths: list[int], heads: int, dim: int, *, prefix: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return q, k, v, and the other arguments; the positions of prefix rows are absurd."""
    rows, offsets = sum(lengths), pack_offsets(lengths)
    inputs = {name: normal(i, rows, heads, dim) for i, name in enumerate("qkv")}
    generator = torch.Generator().manual_seed(rows)
    grid = at_default(torch.randint(-20, 60, (rows, 2), generator=generator, device="cpu"))
    grid += 40_000_000  # beyond what float32 tells apart
    for first, length in zip(offsets.tolist(), lengths, strict=False):
        grid[first : first + min(prefix, length)] = torch.tensor([-7, 10**12])
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    options = {"grid": grid, "slopes": slopes, "offsets": offsets, "num_prefix": prefix}
    return inputs, options


def against_reference(
    lengths: list[int], heads: int, dim: int, dtype: torch.dtype, **options: Any
) -> None:
    inputs, given = make(lengths, heads, dim, prefix=options.pop("prefix", 1))
    with poisoned_memory():
        check_against_reference(
            alibi_attention,
            inputs,
            impl="triton",
            dtype=dtype,
            gradient_steps=BACKWARD_STEPS,
            **given,
            **options,
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_published_width_and_shipped_blocks(dtype: torch.dtype) -> None:
    """Heads of 64 columns; lengths around both blocks, none, one, and two blocks and more."""
    against_reference([0, 1, 16, 63, 129, 290], 2, 64, dtype)


def test_published_width_in_float32() -> None:
    """With the small blocks that float32 is shipped with."""
    against_reference([0, 1, 33, 64, 80], 1, 64, torch.float32)


def test_a_thousand_rows(blocks: Callable[..., None]) -> None:
    blocks(256, 256, heads=2)
    against_reference([1000, 0, 17], 2, 16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("prefix", [0, 1, 37])
def test_small_blocks_and_prefixes(
    blocks: Callable[..., None], dtype: torch.dtype, prefix: int
) -> None:
    """Ragged lengths around blocks of 16 and 32; prefixes of none, one, and over one block."""
    blocks(32, 16)
    against_reference([1, 15, 0, 16, 17, 33, 127], 1, 16, dtype, prefix=prefix, scale=0.4)


# Rows past the end, which no one stores, may overflow.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_far_below_zero(blocks: Callable[..., None], dtype: torch.dtype) -> None:
    """Every score near -300: a row past the end, whose score is 0, would weigh e^300."""
    blocks(32, 32)
    inputs, given = make([40], 1, 16)
    inputs["q"], inputs["k"] = 4 + inputs["q"] / 64, -4 + inputs["k"] / 64
    with poisoned_memory():
        check_against_reference(
            alibi_attention, inputs, impl="triton", dtype=dtype, scale=300 / 256, **given
        )


@pytest.mark.parametrize("dim", [1, 40, 48, 80, 100])
def test_widths_that_are_no_power_of_two(blocks: Callable[..., None], dim: int) -> None:
    """One part, two parts (48 = 32 + 16, 80 = 64 + 16), padding inside either."""
    blocks(32, 32)
    against_reference([40, 33], 1, dim, torch.float32)


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_heads_in_pairs_or_alone(blocks: Callable[..., None], heads: int) -> None:
    """An odd number of heads is run one at a time; a pair shares its distances, not its slope."""
    blocks(32, 32, heads=2)
    against_reference([70], heads, 48, torch.float32)


class Guarded:
    """Outputs `[N, ...]` inside larger memory, whose other rows must not change."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def rows(self, rows: int, *shape: int, dtype: torch.dtype) -> Tensor:
        whole = torch.full((rows + 2 * 300, *shape), 7.0, dtype=dtype)
        self.memory.append(whole)
        inner = whole[300 : 300 + rows]
        inner.fill_(float("nan"))
        return inner

    def check(self) -> None:
        for whole in self.memory:
            assert bool((whole[:300] == 7).all())
            assert bool((whole[-300:] == 7).all())
            assert not bool(whole[300:-300].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_rows_of_the_batch_are_read_and_written(dtype: torch.dtype) -> None:
    """Guard rows round every output stay; NaN in rows and columns beside the inputs stays out."""
    from modaltune.kernels.alibi_attn import triton_kernels

    inputs, given = make([5, 130, 0, 16], 2, 24)
    rows = 151
    guarded = Guarded()

    def between_nans(tensor: Tensor) -> Tensor:
        whole = torch.full((rows + 300, 3, 40), float("nan"), dtype=dtype)
        whole[100 : 100 + rows, :2, :24] = tensor.to(dtype)
        return whole[100 : 100 + rows, :2, :24]

    q, k, v = (between_nans(inputs[name]) for name in "qkv")
    grad_out = between_nans(normal(9, rows, 2, 24))
    fixed = (given["grid"], given["slopes"])
    out = guarded.rows(rows, 2, 24, dtype=dtype)
    # [H, N]: rows of guard before and after all of it.
    lse = guarded.rows(2, rows, dtype=torch.float32)
    last = (given["offsets"], 1, 0.2)
    triton_kernels.launch_alibi_attn_fwd(q, k, v, *fixed, *last, out=out, lse=lse)
    grads = [guarded.rows(rows, 2, 24, dtype=dtype) for _ in range(3)]
    triton_kernels.launch_alibi_attn_bwd(grad_out, q, k, v, *fixed, out, lse, *last, grads)
    guarded.check()


@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "kv"], ids=lambda n: f"grad-{n}")
def test_gradients_of_some_inputs_are_the_same_bits(
    blocks: Callable[..., None], needs: str
) -> None:
    """Leaving out a gradient changes no other one, and twice gives the same bits."""
    blocks(32, 32)
    inputs, given = make([40, 19], 2, 16)
    leaves = {n: t.float() for n, t in inputs.items()}
    full = run_with_gradients(alibi_attention, leaves, impl="triton", **given)
    some = {n: t.clone().requires_grad_(n in needs) for n, t in leaves.items()}
    out = alibi_attention(**some, impl="triton", **given)
    pulled = normal(0, *out.shape, dtype=torch.float32)
    grads = torch.autograd.grad(out, [some[n] for n in needs], pulled)
    assert torch.equal(out.detach(), full["out"])
    for name, grad in zip(needs, grads, strict=True):
        assert torch.equal(grad, full[f"grad {name}"])


def test_slices_of_a_fused_product_and_expanded_gradients() -> None:
    """q, k, v as TITAN has them, with the gradient of a sum, whose strides are all 0."""
    inputs, given = make([40], 2, 16)
    fused = torch.stack([inputs[n].float() for n in "qkv"], 1).requires_grad_()
    out = alibi_attention(*fused.unbind(1), impl="triton", **given)
    (got,) = torch.autograd.grad(out.sum(), fused)
    exact = fused.detach().double().requires_grad_()
    want_out = alibi_attention(*exact.unbind(1), impl="reference", **given)
    (want,) = torch.autograd.grad(want_out.sum(), exact)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=2e-6)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_no_rows() -> None:
    for lengths in ([], [0, 0]):
        inputs, given = make(lengths, 2, 16)
        leaves = {n: t.float() for n, t in inputs.items()}
        got = run_with_gradients(alibi_attention, leaves, impl="triton", **given)
        assert all(t.shape == (0, 2, 16) for t in got.values())


@pytest.fixture
def autocast_bf16() -> Iterator[None]:
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        yield


@pytest.mark.usefixtures("autocast_bf16")
def test_autocast_rounds_q_k_v_and_not_the_slopes(blocks: Callable[..., None]) -> None:
    """The result in bfloat16, under slopes that bfloat16 would spoil, of float32 tensors."""
    blocks(32, 32)
    inputs, given = make([50], 2, 16)
    given["slopes"] = torch.tensor([0.7071, 1.414], dtype=torch.float32)
    leaves = {n: t.float() for n, t in inputs.items()}
    got = run_with_gradients(alibi_attention, leaves, impl="triton", **given)
    assert got["out"].dtype == torch.bfloat16
    assert got["grad q"].dtype == torch.float32
    with torch.autocast(torch.get_default_device().type, enabled=False):
        rounded = {n: t.to(torch.bfloat16) for n, t in leaves.items()}
        same = run_with_gradients(alibi_attention, rounded, impl="triton", **given)
        exact = run_with_gradients(
            alibi_attention,
            {n: t.double() for n, t in rounded.items()},
            impl="reference",
            **given,
        )
        plain = run_with_gradients(alibi_attention, rounded, impl="reference", **given)
    assert torch.equal(got["out"], same["out"])
    limit = allowed_error(exact["out"], plain["out"], torch.bfloat16)
    assert float((got["out"].double() - exact["out"]).abs().max()) <= limit


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"), [(torch.float64, 16, "float64"), (torch.float32, 129, "129")]
)
def test_what_the_kernels_do_not_take(dtype: torch.dtype, dim: int, reason: str) -> None:
    inputs, given = make([4], 1, dim)
    leaves = {n: t.to(dtype) for n, t in inputs.items()}
    with pytest.raises(RuntimeError, match=f"alibi_attention: impl='triton' can't run: .*{reason}"):
        alibi_attention(**leaves, impl="triton", **given)


def test_long_sequences_are_scheduled_first() -> None:
    from modaltune.kernels.alibi_attn.triton_kernels import work_list

    work = work_list((0, 5, 5, 25, 32), 8, torch.device("cpu"))
    want = [[5, 5, 25], [13, 5, 25], [21, 5, 25], [25, 25, 32], [0, 0, 5]]
    assert work.tolist() == want
    assert work.dtype == torch.int32
