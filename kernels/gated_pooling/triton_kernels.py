"""Gated attention pooling on the GPU: gates, scores and pooling in one pass over the tiles.

    v = V x_l + bV   u = U x_l + bU   h_l = tanh(v) * sigmoid(u)   a_lc = s_c . h_l + bs_c
    lse_bc = log sum_l e^a_lc         w_lc = e^(a_lc - lse_bc)     pooled_bc = sum_l w_lc x_l

l runs over the tiles of case b, c over heads, k over the K units of a gate, d over the width D.
Forward: a program takes BLOCK_L tiles of one case, from x to sum_l e^(a_lc - m) x_l (m the largest
score of the block); a second kernel merges the blocks of each case. Backward, with P the gradient
of pooled, from scores and lse alone (v and u are computed again):

    g_lc = x_l . P_bc   delta_bc = pooled_bc . P_bc    da = w (g - delta) + (gradient of scores)
    dh = da s   dv = dh sigmoid(u) (1 - tanh(v)^2)     du = dh tanh(v) sigmoid(u) (1 - sigmoid(u))
    dx_l = sum_c w_lc P_bc + dv V + du U   dV = dv^T x   dU = du^T x   ds = da^T h

in three kernels: gates (dv and du of some rows), x (dx) and weight (dV, dU). Rows go through them
in chunks whose x, dv and du stay in L2. Products take the dtype of the inputs; all sums are
float32, also those over heads or with attention weights: 1 / 25,000 is subnormal in float16.
Every output is written by one program: no atomics, the same bits twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._schedule import RowBlocks, kept_row_blocks, row_blocks
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.resources import CompileSpec

OP = "gated_pooling"
NARROW_BYTES = 1536  # rows up to this long go in larger blocks: 128 rows per SM fit half the L2
INTERPRETER_L2_BYTES = 40 * 2**20
HEADS = tl.constexpr(16)  # C heads padded to one tensor-core tile
PRECISION = tl.constexpr("tf32x3")  # of float32 products: as exact as float32, on tensor cores

Allocate = Callable[..., Tensor]


@triton.jit
def _load_tile(
    ptr, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr
):
    """A tile of a row-major matrix, zero from row ROWS and column COLUMNS on (0: no such edge)."""
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if ROWS and COLUMNS:
        tile = tl.load(at, mask=(rows < ROWS)[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    elif ROWS:
        tile = tl.load(at, mask=(rows < ROWS)[:, None], other=0.0)
    elif COLUMNS:
        tile = tl.load(at, mask=(columns < COLUMNS)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _load_vector(ptr, index, mask):
    return tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _block_rows(start_ptr, end_ptr, block, BLOCK_L: tl.constexpr):
    """Rows [L] of a block, which of them are there, and rows that can be read for all of them."""
    end = tl.load(end_ptr + block)
    rows = tl.load(start_ptr + block) + tl.arange(0, BLOCK_L)  # [L]
    # Past its end a case's last row is read again, finite wherever the case is, and weighs zero.
    return rows, rows < end, tl.minimum(rows, end - 1)


@triton.jit
def _attention(scores_ptr, lse_ptr, case, rows, live, heads, C: tl.constexpr):
    """Attention weights [L, C] of some rows of a case, zero for rows and heads not there."""
    at = scores_ptr + rows.to(tl.int64)[:, None] * C + heads[None, :]  # [L, C]
    there = live[:, None] & (heads < C)[None, :]
    scores = tl.load(at, mask=there, other=float("-inf"))  # [L, C]
    lse = _load_vector(lse_ptr + case.to(tl.int64) * C, heads, heads < C)  # [C]
    return tl.exp(scores - lse[None, :])


@triton.jit
def _of_head(tile, heads, head: tl.constexpr):
    """One column of a tile [L, C], as [L]."""
    return tl.sum(tl.where(heads[None, :] == head, tile, 0.0), axis=1)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _snake(step, last, passes):
    """First column of a step over D; every other pass runs backwards, to what was read last."""
    return tl.where(passes % 2 == 1, last - step, step)


@triton.jit
def gated_pool_fwd_partial_kernel(
    x_ptr, value_weight_ptr, value_bias_ptr, gate_weight_ptr, gate_bias_ptr,
    score_weight_ptr, score_bias_ptr, start_ptr, end_ptr,
    scores_ptr, part_ptr, part_max_ptr, part_sum_ptr,
    stride_xn,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_L tiles, and their sum weighted by e^(score - largest score)."""
    EDGE_D: tl.constexpr = D if D % BLOCK_D else 0
    EDGE_K: tl.constexpr = K if K % BLOCK_K else 0
    LAST_D: tl.constexpr = (D - 1) // BLOCK_D * BLOCK_D
    block = tl.program_id(0)
    rows, live, near = _block_rows(start_ptr, end_ptr, block, BLOCK_L)  # [L]
    heads = tl.arange(0, HEADS)  # [C]
    is_head = heads < C
    bias = _load_vector(score_bias_ptr, heads, is_head)  # [C]
    scores = tl.zeros([BLOCK_L, HEADS], tl.float32) + bias[None, :]  # [L, C]
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)  # [K]
        is_k = k < K
        value = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        gate = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        for step in range(0, D, BLOCK_D):
            d = _snake(step, LAST_D, first_k // BLOCK_K) + tl.arange(0, BLOCK_D)  # [D]
            x = _load_tile(x_ptr, near, d, stride_xn, 0, EDGE_D, UPCAST)  # [L, D]
            weight = _load_tile(value_weight_ptr, k, d, D, EDGE_K, EDGE_D, UPCAST)  # [K, D]
            value = tl.dot(x, tl.trans(weight), value, input_precision=PRECISION)  # [L, K]
            weight = _load_tile(gate_weight_ptr, k, d, D, EDGE_K, EDGE_D, UPCAST)  # [K, D]
            gate = tl.dot(x, tl.trans(weight), gate, input_precision=PRECISION)  # [L, K]
        value = _tanh(value + _load_vector(value_bias_ptr, k, is_k)[None, :])
        gate = tl.sigmoid(gate + _load_vector(gate_bias_ptr, k, is_k)[None, :])
        for head in tl.static_range(C):
            weight = _load_vector(score_weight_ptr + head * K, k, is_k)  # [K]
            score = tl.sum(value * gate * weight[None, :], axis=1)  # [L]
            scores += tl.where(heads[None, :] == head, score[:, None], 0.0)

    out = scores_ptr + rows.to(tl.int64)[:, None] * C + heads[None, :]  # [L, C]
    tl.store(out, scores, mask=live[:, None] & is_head[None, :])
    scores = tl.where(live[:, None], scores, float("-inf"))
    largest = tl.max(scores, axis=0)  # [C]
    weights = tl.exp(scores - largest[None, :])  # [L, C], zero for rows that are not there
    part = block.to(tl.int64) * C + heads  # [C]
    tl.store(part_max_ptr + part, largest, mask=is_head)
    tl.store(part_sum_ptr + part, tl.sum(weights, axis=0), mask=is_head)
    for step in range(0, D, BLOCK_D):
        d = _snake(step, LAST_D, (K - 1) // BLOCK_K + 1) + tl.arange(0, BLOCK_D)  # [D]
        x = _load_tile(x_ptr, near, d, stride_xn, 0, EDGE_D, UPCAST)  # [L, D]
        pooled = tl.dot(tl.trans(weights.to(x.dtype)), x, input_precision=PRECISION)  # [C, D]
        at = part_ptr + part[:, None] * D + d[None, :]  # [C, D]
        tl.store(at, pooled, mask=is_head[:, None] & (d < D)[None, :])


@triton.jit
def gated_pool_fwd_merge_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, first_ptr,
    pooled_ptr, lse_ptr,
    D: tl.constexpr, C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the blocks of a case by their largest scores: BLOCK_D columns of one head."""
    case, head = tl.program_id(0), tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    end = tl.load(first_ptr + case + 1)
    pooled = tl.zeros([BLOCK_D], tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(tl.load(first_ptr + case), end, BLOCK_P):
        blocks = start + tl.arange(0, BLOCK_P)  # [P]
        live = blocks < end
        at = blocks.to(tl.int64) * C + head  # [P]
        part_max = tl.load(part_max_ptr + at, mask=live, other=float("-inf"))  # [P]
        part_sum = tl.load(part_sum_ptr + at, mask=live, other=0.0)  # [P]
        mask = live[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)  # [P, D]
        new = tl.maximum(largest, tl.max(part_max, axis=0))  # [1]
        decay = tl.exp(largest - new)  # [1]
        scale = tl.exp(part_max - new)  # [P]
        total = total * decay + tl.sum(part_sum * scale, axis=0)
        pooled = pooled * decay + tl.sum(part * scale[:, None], axis=0)  # [D]
        largest = new
    # A case without tiles has total = 0, pooled = 0 and largest = -inf: out go 0 and -inf.
    total = tl.where(total == 0.0, 1.0, total)
    row = case.to(tl.int64) * C + head
    out = (pooled / total).to(pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + row * D + d, out, mask=d < D)
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + row + tl.arange(0, 1), largest + tl.log(total))


@triton.jit(do_not_specialize=["first_block", "first_row"])
def gated_pool_bwd_gates_kernel(
    x_ptr, value_weight_ptr, value_bias_ptr, gate_weight_ptr, gate_bias_ptr, score_weight_ptr,
    scores_ptr, lse_ptr, delta_ptr, grad_pooled_ptr, grad_scores_ptr,
    case_ptr, start_ptr, end_ptr,
    grad_gates_ptr, sums_ptr,
    stride_xn, first_block, first_row,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dv and du of BLOCK_L tiles; and their sums over the tiles: dbV, dbU and the rows of ds."""
    EDGE_D: tl.constexpr = D if D % BLOCK_D else 0
    EDGE_K: tl.constexpr = K if K % BLOCK_K else 0
    block = first_block + tl.program_id(0)
    case = tl.load(case_ptr + block).to(tl.int64)
    rows, live, near = _block_rows(start_ptr, end_ptr, block, BLOCK_L)  # [L]
    heads = tl.arange(0, HEADS)  # [C]
    weights = _attention(scores_ptr, lse_ptr, case, rows, live, heads, C)  # [L, C]
    delta = _load_vector(delta_ptr + case * C, heads, heads < C)  # [C]
    pulled_ptr = grad_pooled_ptr + case * (C * D)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)  # [K]
        is_k = k < K
        value = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        gate = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        along = tl.zeros([BLOCK_L, HEADS], tl.float32)
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)  # [D]
            x = _load_tile(x_ptr, near, d, stride_xn, 0, EDGE_D, UPCAST)  # [L, D]
            weight = _load_tile(value_weight_ptr, k, d, D, EDGE_K, EDGE_D, UPCAST)  # [K, D]
            value = tl.dot(x, tl.trans(weight), value, input_precision=PRECISION)  # [L, K]
            weight = _load_tile(gate_weight_ptr, k, d, D, EDGE_K, EDGE_D, UPCAST)  # [K, D]
            gate = tl.dot(x, tl.trans(weight), gate, input_precision=PRECISION)  # [L, K]
            pulled = _load_tile(pulled_ptr, heads, d, D, C, EDGE_D, UPCAST)  # [C, D]
            along = tl.dot(x, tl.trans(pulled), along, input_precision=PRECISION)  # [L, C]
        value = _tanh(value + _load_vector(value_bias_ptr, k, is_k)[None, :])
        gate = tl.sigmoid(gate + _load_vector(gate_bias_ptr, k, is_k)[None, :])
        grad_score = weights * (along - delta[None, :])  # [L, C]
        if HAS_GRAD_SCORES:
            at = grad_scores_ptr + rows.to(tl.int64)[:, None] * C + heads[None, :]  # [L, C]
            there = live[:, None] & (heads < C)[None, :]
            grad_score += tl.load(at, mask=there, other=0.0)
        grad_hidden = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
        sums = sums_ptr + block.to(tl.int64) * ((2 + C) * K) + k  # [K]
        for head in tl.static_range(C):
            of_head = _of_head(grad_score, heads, head)[:, None]  # [L, 1]
            weight = _load_vector(score_weight_ptr + head * K, k, is_k)  # [K]
            grad_hidden += of_head * weight[None, :]  # [L, K]
            if NEEDS_WEIGHTS:
                grad_weight = tl.sum(of_head * value * gate, axis=0)  # [K]
                tl.store(sums + (2 + head) * K, grad_weight, mask=is_k)
        grad_value = grad_hidden * gate * (1.0 - value * value)  # [L, K]
        grad_gate = grad_hidden * value * gate * (1.0 - gate)  # [L, K]
        # Rows of the chunk: dv and du side by side, [rows, 2K].
        out = grad_gates_ptr + (rows - first_row).to(tl.int64)[:, None] * (2 * K) + k[None, :]
        mask = live[:, None] & is_k[None, :]
        tl.store(out, grad_value.to(grad_gates_ptr.dtype.element_ty), mask=mask)
        tl.store(out + K, grad_gate.to(grad_gates_ptr.dtype.element_ty), mask=mask)
        if NEEDS_WEIGHTS:
            tl.store(sums, tl.sum(grad_value, axis=0), mask=is_k)
            tl.store(sums + K, tl.sum(grad_gate, axis=0), mask=is_k)


@triton.jit(do_not_specialize=["first_block", "first_row"])
def gated_pool_bwd_x_kernel(
    grad_gates_ptr, value_weight_ptr, gate_weight_ptr, scores_ptr, lse_ptr, grad_pooled_ptr,
    case_ptr, start_ptr, end_ptr,
    grad_x_ptr,
    first_block, first_row,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_L tiles, BLOCK_D columns: w P + dv V + du U."""
    EDGE_D: tl.constexpr = D if D % BLOCK_D else 0
    EDGE_K: tl.constexpr = K if K % BLOCK_K else 0
    block = first_block + tl.program_id(1)
    case = tl.load(case_ptr + block).to(tl.int64)
    rows, live, near = _block_rows(start_ptr, end_ptr, block, BLOCK_L)  # [L]
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    heads = tl.arange(0, HEADS)  # [C]
    weights = _attention(scores_ptr, lse_ptr, case, rows, live, heads, C)  # [L, C]
    grad_x = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for head in tl.static_range(C):
        pulled = _load_vector(grad_pooled_ptr + (case * C + head) * D, d, d < D)  # [D]
        grad_x += _of_head(weights, heads, head)[:, None] * pulled[None, :]  # [L, D]
    inside = near - first_row  # [L], rows of the chunk
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)  # [K]
        grad = _load_tile(grad_gates_ptr, inside, k, 2 * K, 0, EDGE_K, UPCAST)  # [L, K]
        weight = _load_tile(value_weight_ptr, k, d, D, EDGE_K, EDGE_D, UPCAST)  # [K, D]
        grad_x = tl.dot(grad, weight, grad_x, input_precision=PRECISION)  # [L, D]
        grad = _load_tile(grad_gates_ptr + K, inside, k, 2 * K, 0, EDGE_K, UPCAST)  # [L, K]
        weight = _load_tile(gate_weight_ptr, k, d, D, EDGE_K, EDGE_D, UPCAST)  # [K, D]
        grad_x = tl.dot(grad, weight, grad_x, input_precision=PRECISION)  # [L, D]
    out = grad_x_ptr + rows.to(tl.int64)[:, None] * D + d[None, :]
    mask = live[:, None] & (d < D)[None, :]
    # Not read again here: dx must not push x, dv and du of the chunk out of L2.
    tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["first_row", "rows_per_split", "end_row", "is_first"])
def gated_pool_bwd_weight_kernel(
    grad_gates_ptr, x_ptr,
    grad_weight_ptr,
    stride_xn, first_row, rows_per_split, end_row, is_first,
    D: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one split of a chunk's rows to a tile of [dV; dU]; the first chunk begins the sum."""
    EDGE_D: tl.constexpr = D if D % BLOCK_D else 0
    split = tl.program_id(2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # [K], of the 2K rows of [V; U]
    is_k = k < 2 * K
    mask = is_k[:, None] & (d < D)[None, :]
    out = grad_weight_ptr + (split * 2 * K + k).to(tl.int64)[:, None] * D + d[None, :]  # [K, D]
    total = tl.load(out, mask=mask & (is_first == 0), other=0.0)  # [K, D]
    start = first_row + split * rows_per_split
    end = tl.minimum(start + rows_per_split, end_row)
    for row in range(start, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)  # [R]
        near = tl.minimum(rows, end - 1)  # [R], what is read past the end meets a gradient of zero
        at = grad_gates_ptr + (rows - first_row).to(tl.int64)[:, None] * (2 * K) + k[None, :]
        grad = tl.load(at, mask=(rows < end)[:, None] & is_k[None, :], other=0.0)  # [R, K]
        if UPCAST:
            grad = grad.to(tl.float32)
        x = _load_tile(x_ptr, near, d, stride_xn, 0, EDGE_D, UPCAST)  # [R, D]
        total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)  # [K, D]
    tl.store(out, total, mask=mask)


def _variant(dtype: torch.dtype, width: int = 0) -> str:
    """Return the suffix of a kernel's configuration for a dtype and, where it matters, a width."""
    if dtype == torch.float32:
        return ".fp32"
    return "" if width * dtype.itemsize <= NARROW_BYTES else ".wide"


def _fit(chosen: dict[str, Any], hidden: int, width: int) -> dict[str, Any]:
    """Shrink the blocks of a configuration to a small shape, and BLOCK_K towards a divisor of K."""
    fitted = dict(chosen)
    for name, size in (("BLOCK_K", hidden), ("BLOCK_D", width)):
        fitted[name] = max(16, min(chosen[name], triton.next_power_of_2(size)))
    while hidden % fitted["BLOCK_K"] and fitted["BLOCK_K"] > 128:
        fitted["BLOCK_K"] //= 2
    return fitted


def _sizes(x: Tensor, score_weight: Tensor) -> dict[str, Any]:
    sizes = dict(zip(("C", "K", "D"), (*score_weight.shape, x.shape[1]), strict=True))
    return {**sizes, "UPCAST": needs_upcast(x.dtype)}


def _launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
    """Launch a kernel with those of the given arguments that it has."""
    names = {*kernel.arg_names, "num_warps", "num_stages"}
    kernel[grid](**{name: value for name, value in given.items() if name in names})


def launch_gated_pool_fwd(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    offsets: Tensor,
    empty: Allocate = torch.empty,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled `[B, C, D]`, scores `[N, C]` and their log-sum-exp `[B, C]` (float32).

    Arguments as in `gated_pool`, checked; `empty` allocates outputs and scratch like `torch.empty`
    (tests put guards around them).
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (heads, hidden), width, cases = score_weight.shape, x.shape[1], offsets.numel() - 1
    kernel = "gated_pool_fwd_partial_kernel" + _variant(x.dtype, width)
    chosen = _fit(config(OP, kernel, x.device), hidden, width)
    merge = config(OP, "gated_pool_fwd_merge_kernel", x.device)
    lists = kept_row_blocks(tuple(offsets.tolist()), chosen["BLOCK_L"], x.device)
    single = {"dtype": torch.float32, "device": x.device}
    given = {
        "x_ptr": x,
        "value_weight_ptr": value_weight.contiguous(),
        "value_bias_ptr": value_bias.contiguous(),
        "gate_weight_ptr": gate_weight.contiguous(),
        "gate_bias_ptr": gate_bias.contiguous(),
        "score_weight_ptr": score_weight.contiguous(),
        "score_bias_ptr": score_bias.contiguous(),
        "start_ptr": lists.start,
        "end_ptr": lists.end,
        "first_ptr": lists.first,
        "scores_ptr": empty((x.shape[0], heads), **single),
        "part_ptr": empty((lists.blocks, heads, width), **single),
        "part_max_ptr": empty((lists.blocks, heads), **single),
        "part_sum_ptr": empty((lists.blocks, heads), **single),
        "pooled_ptr": empty((cases, heads, width), dtype=x.dtype, device=x.device),
        "lse_ptr": empty((cases, heads), **single),
        "stride_xn": x.stride(0),
        **_sizes(x, score_weight),
    }
    if lists.blocks:
        _launch(gated_pool_fwd_partial_kernel, (lists.blocks,), given | chosen)
    if cases:
        grid = (cases, heads, triton.cdiv(width, merge["BLOCK_D"]))
        _launch(gated_pool_fwd_merge_kernel, grid, given | merge)
    return given["pooled_ptr"], given["scores_ptr"], given["lse_ptr"]


class _Chunk(NamedTuple):
    """A run of row blocks that goes through the backward kernels together."""

    first_block: int
    blocks: int
    first_row: int
    end_row: int


def _chunks(lists: RowBlocks, row_bytes: int, block: int, l2_bytes: int) -> Iterator[_Chunk]:
    """Cut the blocks (lists on the CPU) into runs whose x, dv and du fill at most half the L2."""
    most = max(1, l2_bytes // 2 // (block * row_bytes))
    for first in range(0, lists.blocks, most):
        last = min(first + most, lists.blocks) - 1
        end_row = min(int(lists.start[last]) + block, int(lists.end[last]))
        yield _Chunk(first, last + 1 - first, int(lists.start[first]), end_row)


def launch_gated_pool_bwd(
    grad_pooled: Tensor,
    grad_scores: Tensor | None,
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    pooled: Tensor,
    scores: Tensor,
    lse: Tensor,
    offsets: Tensor,
    needs: list[bool],
    empty: Allocate = torch.empty,
    l2_bytes: int | None = None,
) -> list[Tensor]:
    """Return the gradients of those of x and the six weights that `needs` names, in this order.

    Inputs as in `gated_pool`, outputs and their gradients as in `launch_gated_pool_fwd`. The L2
    (None: that of the device) sizes the chunks of rows; `empty` allocates like `torch.empty`.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    grad_pooled = grad_pooled.contiguous()
    given = {
        "x_ptr": x,
        "value_weight_ptr": value_weight.contiguous(),
        "value_bias_ptr": value_bias.contiguous(),
        "gate_weight_ptr": gate_weight.contiguous(),
        "gate_bias_ptr": gate_bias.contiguous(),
        "score_weight_ptr": score_weight.contiguous(),
        "scores_ptr": scores,
        "lse_ptr": lse,
        "delta_ptr": (pooled.float() * grad_pooled.float()).sum(-1),  # [B, C]
        "grad_pooled_ptr": grad_pooled,
        "grad_scores_ptr": scores if grad_scores is None else grad_scores.contiguous(),
        "HAS_GRAD_SCORES": grad_scores is not None,
        "NEEDS_WEIGHTS": any(needs[1:6]),
        "stride_xn": x.stride(0),
        **_sizes(x, score_weight),
    }
    grad_x, grad_weight, sums = _backward_chunks(given, offsets, needs, empty, l2_bytes)
    # A shift of all scores moves no attention weight: the pooled output gives its bias nothing.
    of_bias = torch.zeros_like(score_bias) if grad_scores is None else grad_scores.sum(0)
    value, gate = grad_weight.chunk(2)
    found = (grad_x, value, sums[0], gate, sums[1], sums[2:], of_bias)
    return [
        # Copied: an operator must not return two views of one tensor.
        t if t is grad_x else t.to(x.dtype, copy=True)
        for t, need in zip(found, needs, strict=True)
        if need
    ]


def _backward_chunks(
    given: dict[str, Any],
    offsets: Tensor,
    needs: list[bool],
    empty: Allocate,
    l2_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels chunk by chunk.

    Returns:
        dx `[N, D]` in the dtype of x; `[dV; dU]` `[2K, D]` and `[dbV; dbU; ds]` `[2 + C, K]` in
        float32. What is not needed has no rows, or is zero.
    """
    x, hidden, width = given["x_ptr"], given["K"], given["D"]
    gates, of_x, of_weight = _backward_configs(x, hidden)
    lists = row_blocks(offsets, gates["BLOCK_L"])
    if l2_bytes is None and x.device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(x.device).L2_cache_size
    row_bytes = (width + 2 * hidden) * x.itemsize
    chunks = list(_chunks(lists, row_bytes, gates["BLOCK_L"], l2_bytes or INTERPRETER_L2_BYTES))
    most_rows = max((chunk.end_row - chunk.first_row for chunk in chunks), default=0)
    needs_sums, needs_products = any(needs[1:6]), needs[1] or needs[3]
    splits = of_weight["SPLITS"] if needs_products and chunks else 0
    same, single = ({"dtype": t, "device": x.device} for t in (x.dtype, torch.float32))
    on_device = lists.to(x.device)
    given = given | {
        "case_ptr": on_device.case,
        "start_ptr": on_device.start,
        "end_ptr": on_device.end,
        "grad_gates_ptr": empty((most_rows, 2 * hidden), **same),
        "grad_x_ptr": empty((len(x) if needs[0] else 0, width), **same),
        "sums_ptr": empty((lists.blocks if needs_sums else 0, 2 + given["C"], hidden), **single),
        "grad_weight_ptr": empty((splits, 2 * hidden, width), **single),
    }
    for chunk in chunks if needs[0] or needs_sums else ():
        given |= {"first_block": chunk.first_block, "first_row": chunk.first_row}
        _launch(gated_pool_bwd_gates_kernel, (chunk.blocks,), given | gates)
        if needs[0]:
            grid = (triton.cdiv(width, of_x["BLOCK_D"]), chunk.blocks)
            _launch(gated_pool_bwd_x_kernel, grid, given | of_x)
        if needs_products:
            _launch_weight(given | of_weight, chunk)
    return given["grad_x_ptr"], given["grad_weight_ptr"].sum(0), given["sums_ptr"].sum(0)


def _launch_weight(given: dict[str, Any], chunk: _Chunk) -> None:
    share = triton.cdiv(chunk.end_row - chunk.first_row, given["SPLITS"])
    given |= {
        "rows_per_split": triton.cdiv(share, given["BLOCK_R"]) * given["BLOCK_R"],
        "end_row": chunk.end_row,
        "is_first": int(chunk.first_block == 0),
    }
    tiles = triton.cdiv(given["D"], given["BLOCK_D"]), triton.cdiv(2 * given["K"], given["BLOCK_K"])
    _launch(gated_pool_bwd_weight_kernel, (*tiles, given["SPLITS"]), given)


def _backward_configs(x: Tensor, hidden: int) -> tuple[dict[str, Any], ...]:
    """Return the configurations of the gates, x and weight kernels."""
    width, variant = x.shape[1], _variant(x.dtype)
    gates, of_x, of_weight = (
        config(OP, f"gated_pool_bwd_{part}_kernel{variant}", x.device)
        for part in ("gates", "x", "weight")
    )
    of_x["BLOCK_L"] = gates["BLOCK_L"]  # both go by the same list of row blocks
    return _fit(gates, hidden, width), _fit(of_x, hidden, width), _fit(of_weight, 2 * hidden, width)


_LISTS = ("case_ptr", "start_ptr", "end_ptr", "first_ptr")
_SINGLE = (
    *("scores_ptr", "lse_ptr", "delta_ptr", "grad_scores_ptr", "sums_ptr", "grad_weight_ptr"),
    *("part_ptr", "part_max_ptr", "part_sum_ptr"),
)
# Published-like shapes; each dtype stands for one variant of the blocks and one of the flags.
_SHIPPED = {"fp16": (torch.float16, 768), "bf16": (torch.bfloat16, 1536)}
_SHIPPED |= {"fp32": (torch.float32, 768)}
_HIDDEN, _HEADS = 256, 4


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return every kernel in every shipped configuration for a compute capability."""
    specs = []
    for name, (dtype, width) in _SHIPPED.items():
        by_width, variant = _variant(dtype, width), _variant(dtype)
        gates = shipped(OP)["gated_pool_bwd_gates_kernel" + variant][str(capability)]
        for kernel, suffix, hidden in (
            (gated_pool_fwd_partial_kernel, by_width, _HIDDEN),
            (gated_pool_fwd_merge_kernel, "", _HIDDEN),
            (gated_pool_bwd_gates_kernel, variant, _HIDDEN),
            (gated_pool_bwd_x_kernel, variant, _HIDDEN),
            (gated_pool_bwd_weight_kernel, variant, 2 * _HIDDEN),
        ):
            chosen = shipped(OP)[kernel.__name__ + suffix][str(capability)]
            chosen = _fit({"BLOCK_L": gates["BLOCK_L"], "BLOCK_K": 16} | chosen, hidden, width)
            chosen |= {"D": width, "K": _HIDDEN, "C": _HEADS, "UPCAST": False}
            chosen |= {"HAS_GRAD_SCORES": name == "bf16", "NEEDS_WEIGHTS": True}
            specs.append(_spec(kernel, capability, name, chosen))
    return specs


def _spec(kernel: Any, capability: int, dtype: str, chosen: dict[str, Any]) -> CompileSpec:
    signature = dict.fromkeys(kernel.arg_names, "i32")
    for name in kernel.arg_names:
        if name.isupper():
            signature[name] = "constexpr"
        elif name in _LISTS:
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in _SINGLE else f"*{dtype}"
    return CompileSpec(
        op=OP,
        kernel=kernel.__name__,
        capability=capability,
        signature=signature,
        constexprs={name: chosen[name] for name in kernel.arg_names if name.isupper()},
        options={name: chosen[name] for name in ("num_warps", "num_stages")},
        aligned=[n for n in kernel.arg_names if n.endswith("_ptr") or n == "stride_xn"],
        dtype=dtype,
        has_product=kernel is not gated_pool_fwd_merge_kernel,
    )
