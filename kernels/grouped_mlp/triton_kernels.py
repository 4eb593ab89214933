"""The pathway networks on the GPU: a pathway from genes to tokens in one program.

    z1_b = sum_m x_b[gene_m] W1_m + b1    h1 = ELU(z1)    k1 = drop(h1)
    z2_b = W2 k1_b + b2                   h2 = ELU(z2)    y_b = drop(h2)

m runs over the memberships of pathway p, b over cases; ELU(z) = z where z > 0, else e^z - 1;
drop(h) = scale h + shift for a unit that is kept, `dropped` for one that is not. Backward, with g
the gradient of y, from the inputs alone (both layers and the bits of dropout are made again):

    dz2 = scale kept2 ELU'(z2) g    dW2 = sum_b dz2_b k1_b^T       db2 = sum_b dz2_b
    dz1 = scale kept1 ELU'(z1) (dz2 W2)    dW1_m = sum_b x_b[gene_m] dz1_b    db1 = sum_b dz1_b
    dx_b[gene] = sum over memberships m of the gene of W1_m . dz1_b

One kernel does all of it for BLOCK_B cases of one pathway and reads and writes each weight once;
more cases come in further launches that add up in float32. The terms of dx are summed by gene in a
second kernel. Every output is written by one program: no atomics, the same bits twice. Products
take the dtype of the inputs, all sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.grouped_mlp._dropout import AlphaDropout
from modaltune.kernels.resources import CompileSpec

OP = "grouped_mlp"
PRECISION = tl.constexpr("tf32x3")  # of float32 products: as exact as float32, on tensor cores

Allocate = Callable[..., Tensor]


@triton.jit
def _elu(z):
    # A NaN is not <= 0 and stays.
    return tl.where(z <= 0.0, tl.exp(tl.minimum(z, 0.0)) - 1.0, z)


@triton.jit
def _slope(activation):
    """Derivative of ELU, from its value."""
    return tl.where(activation <= 0.0, activation + 1.0, 1.0)


@triton.jit
def _gone(
    seed, threshold, unit, cases, SECOND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Mark the units [C] of some cases [B] that dropout drops after a layer, as [B, C]."""
    zero = tl.zeros([ROWS, COLUMNS], tl.int32)
    first, second, _, _ = tl.philox(
        seed, unit[None, :] + zero, cases[:, None] + zero, zero, zero
    )  # [B, C] each
    if SECOND:
        first = second
    return first.to(tl.int64) < threshold


@triton.jit
def _load_rows(ptr, rows, end, columns, D: tl.constexpr, EDGE: tl.constexpr, UPCAST: tl.constexpr):
    """Rows below end of a pathway's matrix [*, D] at ptr, as a tile that is zero elsewhere."""
    mask = (rows < end)[:, None]
    if EDGE:
        mask = mask & (columns < D)[None, :]
    tile = tl.load(ptr + (rows[:, None] * D + columns[None, :]), mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _dot_rows(
    a, scratch_ptr, ptr, rows, end, columns, D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products of a [B, D] with rows [R] below end of a matrix [*, D], as [B, R].

    In steps of BLOCK_K columns, a read back from scratch, where whole rows of operands (three tf32
    parts of a float32) would spill.
    """
    if BLOCK_K < BLOCK_D:
        out = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        row = tl.arange(0, BLOCK_B) * BLOCK_D  # [B]
        for first_k in range(0, BLOCK_D, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)  # [K]
            part = tl.load(scratch_ptr + (row[:, None] + k[None, :]))  # [B, K]
            weight = _load_rows(ptr, rows, end, k, D, D < BLOCK_D, UPCAST)  # [R, K]
            out = tl.dot(part, tl.trans(weight), out, input_precision=PRECISION)  # [B, R]
    else:
        weight = _load_rows(ptr, rows, end, columns, D, D < BLOCK_D, UPCAST)  # [R, D]
        out = tl.dot(a, tl.trans(weight), input_precision=PRECISION)  # [B, R]
    return out


@triton.jit
def _to_scratch(
    scratch_ptr, tile, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Keep a tile [B, D] where all threads of the program can read it, if `_dot_rows` will."""
    if BLOCK_K < BLOCK_D:
        at = tl.arange(0, BLOCK_B)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [B, D]
        tl.debug_barrier()  # the tile before has been read
        tl.store(scratch_ptr + at, tile)
        tl.debug_barrier()


@triton.jit
def _gather(x_ptr, gene_ptr, members, end, cases, num_cases, stride_xb, UPCAST: tl.constexpr):
    """Expression of the genes of some memberships, [B, G]; zero past the end and for no case."""
    genes = tl.load(gene_ptr + members, mask=members < end, other=0)  # [G]
    at = x_ptr + cases.to(tl.int64)[:, None] * stride_xb + genes[None, :]  # [B, G]
    x = tl.load(at, mask=(cases < num_cases)[:, None] & (members < end)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _first_layer(
    x_ptr, gene_ptr, weight1_ptr, bias1_ptr, pathway, start, end, cases, d, num_cases, stride_xb,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """ELU(z1) of BLOCK_B cases, [B, D] in float32; columns past D are zero."""
    hidden = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    rows_ptr, genes = weight1_ptr + start.to(tl.int64) * D, end - start
    for first in range(0, genes, BLOCK_G):
        member = first + tl.arange(0, BLOCK_G)  # [G]
        x = _gather(
            x_ptr, gene_ptr + start, member, genes, cases, num_cases, stride_xb, UPCAST
        )  # [B, G]
        weight = _load_rows(rows_ptr, member, genes, d, D, D < BLOCK_D, UPCAST)  # [G, D]
        hidden = tl.dot(x, weight, hidden, input_precision=PRECISION)  # [B, D]
    bias = tl.load(bias1_ptr + pathway * D + d, mask=d < D, other=0.0).to(tl.float32)  # [D]
    return _elu(hidden + bias[None, :])


@triton.jit(do_not_specialize=["num_cases", "seed", "threshold"])
def pathway_mlp_fwd_kernel(
    x_ptr, gene_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, pathway_ptr,
    out_ptr,
    stride_xb, num_cases, num_pathways,
    seed, threshold, scale, shift, dropped,
    D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_B cases of one pathway, one of SPLITS shares of its outputs."""
    listed = pathway_ptr + tl.program_id(1) * 3
    pathway = tl.load(listed).to(tl.int64)
    start, end = tl.load(listed + 1), tl.load(listed + 2)
    split = tl.program_id(0) % SPLITS
    cases = tl.program_id(0) // SPLITS * BLOCK_B + tl.arange(0, BLOCK_B)  # [B]
    d = tl.arange(0, BLOCK_D)  # [D]
    hidden = _first_layer(
        x_ptr, gene_ptr, weight1_ptr, bias1_ptr, pathway, start, end, cases, d, num_cases,
        stride_xb, D, BLOCK_B, BLOCK_G, BLOCK_D, UPCAST,
    )  # [B, D]  # fmt: skip
    unit = (pathway * D).to(tl.int32)
    if HAS_DROPOUT:
        gone1 = _gone(seed, threshold, unit + d, cases, False, BLOCK_B, BLOCK_D)  # [B, D]
        hidden = tl.where(gone1, dropped, hidden * scale + shift)
    if not UPCAST:
        hidden = hidden.to(weight2_ptr.dtype.element_ty)
    SHARE: tl.constexpr = (D + SPLITS * BLOCK_O - 1) // (SPLITS * BLOCK_O) * BLOCK_O
    for step in range(0, SHARE, BLOCK_O):
        o = split * SHARE + step + tl.arange(0, BLOCK_O)  # [O]
        weight = _load_rows(
            weight2_ptr + pathway * D * D, o, D, d, D, D < BLOCK_D, UPCAST
        )  # [O, D]
        z = tl.dot(hidden, tl.trans(weight), input_precision=PRECISION)  # [B, O]
        bias = tl.load(bias2_ptr + pathway * D + o, mask=o < D, other=0.0).to(tl.float32)  # [O]
        final = _elu(z + bias[None, :])  # [B, O]
        if HAS_DROPOUT:
            gone2 = _gone(seed, threshold, unit + o, cases, True, BLOCK_B, BLOCK_O)  # [B, O]
            final = tl.where(gone2, dropped, final * scale + shift)
        out = out_ptr + (cases.to(tl.int64)[:, None] * num_pathways + pathway) * D + o[None, :]
        mask = (cases < num_cases)[:, None] & (o < D)[None, :]
        tl.store(out, final.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_to(ptr, tile, mask, is_first):
    """Add a tile to what earlier launches stored; the first launch sets it."""
    before = tl.load(ptr, mask=mask & (is_first == 0), other=0.0).to(tl.float32)
    tl.store(ptr, (tile + before).to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_case", "is_first", "num_cases", "seed", "threshold"])
def pathway_mlp_bwd_kernel(
    pulled_ptr, x_ptr, gene_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, pathway_ptr,
    grad_members_ptr, grad_weight1_ptr, grad_bias1_ptr, grad_weight2_ptr, grad_bias2_ptr,
    scratch_ptr,
    stride_xb, first_case, is_first, num_cases, num_pathways, num_members,
    seed, threshold, scale, shift, dropped,
    D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_WEIGHT1: tl.constexpr, NEEDS_BIAS1: tl.constexpr,
    NEEDS_WEIGHT2: tl.constexpr, NEEDS_BIAS2: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients that BLOCK_B cases give one pathway, and theirs by membership."""
    NEEDS_FIRST: tl.constexpr = NEEDS_X or NEEDS_WEIGHT1 or NEEDS_BIAS1
    listed = pathway_ptr + tl.program_id(0) * 3
    pathway = tl.load(listed).to(tl.int64)
    start, end = tl.load(listed + 1), tl.load(listed + 2)
    cases = first_case + tl.arange(0, BLOCK_B)  # [B]
    d = tl.arange(0, BLOCK_D)  # [D]
    hidden = _first_layer(
        x_ptr, gene_ptr, weight1_ptr, bias1_ptr, pathway, start, end, cases, d, num_cases,
        stride_xb, D, BLOCK_B, BLOCK_G, BLOCK_D, UPCAST,
    )  # [B, D]  # fmt: skip
    unit = (pathway * D).to(tl.int32)
    kept = hidden
    if HAS_DROPOUT:
        gone1 = _gone(seed, threshold, unit + d, cases, False, BLOCK_B, BLOCK_D)  # [B, D]
        kept = tl.where(gone1, dropped, hidden * scale + shift)
    if not UPCAST:
        kept = kept.to(weight2_ptr.dtype.element_ty)
    scratch_ptr += tl.program_id(0).to(tl.int64) * (BLOCK_B * BLOCK_D)
    _to_scratch(scratch_ptr, kept, BLOCK_B, BLOCK_D, BLOCK_K)
    grad_first = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for first_o in range(0, D, BLOCK_O):
        o = first_o + tl.arange(0, BLOCK_O)  # [O]
        rows_ptr = weight2_ptr + pathway * D * D
        z = _dot_rows(
            kept, scratch_ptr, rows_ptr, o, D, d, D, BLOCK_B, BLOCK_O, BLOCK_D, BLOCK_K, UPCAST
        )  # [B, O]
        bias = tl.load(bias2_ptr + pathway * D + o, mask=o < D, other=0.0).to(tl.float32)  # [O]
        at = pulled_ptr + (cases.to(tl.int64)[:, None] * num_pathways + pathway) * D + o[None, :]
        mask = (cases < num_cases)[:, None] & (o < D)[None, :]
        grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [B, O]
        grad = grad * _slope(_elu(z + bias[None, :]))
        if HAS_DROPOUT:
            gone2 = _gone(seed, threshold, unit + o, cases, True, BLOCK_B, BLOCK_O)  # [B, O]
            grad = tl.where(gone2, 0.0, grad * scale)
        if NEEDS_BIAS2:
            _add_to(grad_bias2_ptr + pathway * D + o, tl.sum(grad, axis=0), o < D, is_first)
        if not UPCAST:
            grad = grad.to(weight2_ptr.dtype.element_ty)
        if NEEDS_WEIGHT2:
            of_weight = tl.dot(tl.trans(grad), kept, input_precision=PRECISION)  # [O, D]
            at = grad_weight2_ptr + pathway * D * D + (o[:, None] * D + d[None, :])
            _add_to(at, of_weight, (o < D)[:, None] & (d < D)[None, :], is_first)
        if NEEDS_FIRST:
            weight = _load_rows(rows_ptr, o, D, d, D, D < BLOCK_D, UPCAST)  # [O, D]
            grad_first = tl.dot(grad, weight, grad_first, input_precision=PRECISION)  # [B, D]
    if NEEDS_FIRST:
        grad_first = grad_first * _slope(hidden)
        if HAS_DROPOUT:
            gone1 = _gone(seed, threshold, unit + d, cases, False, BLOCK_B, BLOCK_D)  # [B, D]
            grad_first = tl.where(gone1, 0.0, grad_first * scale)
        if NEEDS_BIAS1:
            total = tl.sum(grad_first, axis=0)  # [D]
            _add_to(grad_bias1_ptr + pathway * D + d, total, d < D, is_first)
        if not UPCAST:
            grad_first = grad_first.to(weight1_ptr.dtype.element_ty)
        if NEEDS_X:
            _to_scratch(scratch_ptr, grad_first, BLOCK_B, BLOCK_D, BLOCK_K)
        if NEEDS_X or NEEDS_WEIGHT1:
            genes = end - start
            for first in range(0, genes, BLOCK_G):
                member = first + tl.arange(0, BLOCK_G)  # [G]
                if NEEDS_WEIGHT1:
                    x = _gather(
                        x_ptr, gene_ptr + start, member, genes, cases, num_cases, stride_xb, UPCAST
                    )  # [B, G]
                    of_weight = tl.dot(tl.trans(x), grad_first, input_precision=PRECISION)  # [G, D]
                    rows_ptr = grad_weight1_ptr + start.to(tl.int64) * D
                    mask = (member < genes)[:, None] & (d < D)[None, :]
                    at = rows_ptr + (member[:, None] * D + d[None, :])
                    _add_to(at, of_weight, mask, is_first)
                if NEEDS_X:
                    rows_ptr = weight1_ptr + start.to(tl.int64) * D
                    of_x = _dot_rows(
                        grad_first, scratch_ptr, rows_ptr, member, genes, d, D, BLOCK_B, BLOCK_G,
                        BLOCK_D, BLOCK_K, UPCAST,
                    )  # [B, G]  # fmt: skip
                    at = cases.to(tl.int64)[:, None] * num_members + (start + member)[None, :]
                    mask = (cases < num_cases)[:, None] & (member < genes)[None, :]
                    tl.store(grad_members_ptr + at, of_x, mask=mask)


@triton.jit
def pathway_mlp_bwd_gene_kernel(
    grad_members_ptr, member_ptr, first_ptr,
    grad_x_ptr,
    num_genes, num_members,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of BLOCK_M genes of one case over their memberships, in list order."""
    case = tl.program_id(1).to(tl.int64)
    genes = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_gene = genes < num_genes
    start = tl.load(first_ptr + genes, mask=is_gene, other=0)  # [M]
    count = tl.load(first_ptr + genes + 1, mask=is_gene, other=0) - start  # [M]
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, tl.max(count, axis=0)):
        is_there = i < count
        member = tl.load(member_ptr + start + i, mask=is_there, other=0)  # [M]
        at = grad_members_ptr + case * num_members + member
        total += tl.load(at, mask=is_there, other=0.0)
    out = grad_x_ptr + case * num_genes + genes
    tl.store(out, total.to(grad_x_ptr.dtype.element_ty), mask=is_gene)


@lru_cache(maxsize=16)
def pathway_list(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `[P, 3]` int32: a pathway, its first membership and its end; long ones come first.

    Kept per layout: a captured CUDA graph copies nothing.
    """
    bounds = torch.tensor(offsets, dtype=torch.int64, device="cpu")
    order = torch.argsort(bounds.diff(), descending=True, stable=True)
    listed = torch.stack([order, bounds[order], bounds[order + 1]], dim=1)
    return listed.to(torch.int32).contiguous().to(device)


def _variant(dtype: torch.dtype, cases: int) -> str:
    """Return the suffix of a kernel's configuration."""
    if dtype == torch.float32:
        return ".fp32"
    return ".many" if cases > 16 else ""


def _fit(chosen: dict[str, Any], width: int) -> dict[str, Any]:
    """Fit the blocks of a configuration to the width of the networks."""
    padded = max(16, triton.next_power_of_2(width))
    fitted = {**chosen, "BLOCK_D": padded, "BLOCK_O": min(chosen["BLOCK_O"], padded)}
    fitted["BLOCK_K"] = min(chosen.get("BLOCK_K", padded), padded)
    if "SPLITS" in chosen:
        fitted["SPLITS"] = max(1, min(chosen["SPLITS"], padded // fitted["BLOCK_O"]))
    return fitted


def _launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
    """Launch a kernel with those of the given arguments that it has."""
    names = {*kernel.arg_names, "num_warps", "num_stages"}
    kernel[grid](**{name: value for name, value in given.items() if name in names})


def _arguments(
    tensors: Sequence[Tensor], offsets: Tensor, dropout_p: float, seed: int
) -> dict[str, Any]:
    """Return what the forward and the backward kernel both take."""
    expression, gene_index, weight1, bias1, weight2, bias2 = tensors
    expression = expression if expression.stride(1) == 1 else expression.contiguous()
    drop = AlphaDropout.of(dropout_p)
    return {
        "x_ptr": expression,
        "gene_ptr": gene_index.contiguous(),
        "weight1_ptr": weight1.contiguous(),
        "bias1_ptr": bias1.contiguous(),
        "weight2_ptr": weight2.contiguous(),
        "bias2_ptr": bias2.contiguous(),
        "pathway_ptr": pathway_list(tuple(offsets.tolist()), expression.device),
        "stride_xb": expression.stride(0),
        "num_cases": expression.shape[0],
        "num_pathways": bias1.shape[0],
        "num_members": gene_index.numel(),
        "num_genes": expression.shape[1],
        "seed": seed,
        **drop._asdict(),
        "D": bias1.shape[1],
        "HAS_DROPOUT": dropout_p > 0,
        "UPCAST": needs_upcast(expression.dtype),
    }


def launch_pathway_mlp_fwd(
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    dropout_p: float,
    seed: int,
    empty: Allocate = torch.empty,
) -> Tensor:
    """Return `[B, P, d]`. Arguments as in `pathway_mlp`, checked.

    `empty` allocates outputs and scratch like `torch.empty` (tests put guards around them).
    """
    tensors = (expression, gene_index, weight1, bias1, weight2, bias2)
    cases, (pathways, width) = expression.shape[0], bias1.shape
    kernel = "pathway_mlp_fwd_kernel" + _variant(expression.dtype, cases)
    chosen = _fit(config(OP, kernel, expression.device), width)
    out = empty((cases, pathways, width), dtype=expression.dtype, device=expression.device)
    given = _arguments(tensors, offsets, dropout_p, seed) | {"out_ptr": out} | chosen
    if cases:
        blocks = triton.cdiv(cases, chosen["BLOCK_B"])
        _launch(pathway_mlp_fwd_kernel, (blocks * chosen["SPLITS"], pathways), given)
    return out


def launch_pathway_mlp_bwd(
    grad_out: Tensor,
    expression: Tensor,
    gene_index: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    offsets: Tensor,
    dropout_p: float,
    seed: int,
    needs: Sequence[bool],
    empty: Allocate = torch.empty,
) -> list[Tensor]:
    """Return the gradients of those of expression and the four weights that `needs` names.

    What is not needed is not computed and has no elements.
    """
    tensors = (expression, gene_index, weight1, bias1, weight2, bias2)
    cases, dtype, device = expression.shape[0], expression.dtype, expression.device
    kernel = "pathway_mlp_bwd_kernel" + _variant(dtype, cases)
    chosen = _fit(config(OP, kernel, device), bias1.shape[1])
    # Sums over several launches are kept in float32.
    summed = dtype if cases <= chosen["BLOCK_B"] else torch.float32
    names = ("members", "weight1", "bias1", "weight2", "bias2")
    shapes = ((cases, gene_index.numel()), *(t.shape for t in tensors[2:]))
    grads = {
        f"grad_{name}_ptr": empty(
            shape if need else (0,) * len(shape),
            dtype=torch.float32 if name == "members" else summed,
            device=device,
        )
        for name, shape, need in zip(names, shapes, needs, strict=True)
    }
    through_memory = chosen["BLOCK_K"] < chosen["BLOCK_D"] and any(needs)
    scratch = bias1.shape[0] * chosen["BLOCK_B"] * chosen["BLOCK_D"] if through_memory else 0
    grads["scratch_ptr"] = empty((scratch,), dtype=dtype, device=device)
    flags = zip(("X", "WEIGHT1", "BIAS1", "WEIGHT2", "BIAS2"), needs, strict=True)
    given = _arguments(tensors, offsets, dropout_p, seed) | chosen | grads
    given |= {f"NEEDS_{name}": need for name, need in flags} | {"pulled_ptr": grad_out.contiguous()}
    for first in range(0, cases if any(needs) else 0, chosen["BLOCK_B"]):
        given |= {"first_case": first, "is_first": int(first == 0)}
        _launch(pathway_mlp_bwd_kernel, (bias1.shape[0],), given)
    found = list(grads.values())[:5]
    if not cases:
        found = [g.zero_() for g in found]
    if needs[0]:
        found[0] = _by_gene(given, gene_index, empty)
    return [g.to(dtype) for g, need in zip(found, needs, strict=True) if need]


def _by_gene(given: dict[str, Any], gene_index: Tensor, empty: Allocate) -> Tensor:
    """Sum the gradients per membership `[B, nnz]` to those of expression `[B, M]`."""
    x = given["x_ptr"]
    cases, genes = x.shape
    order = torch.argsort(gene_index, stable=True)
    each = torch.arange(genes + 1, device=x.device, dtype=gene_index.dtype)
    grad_x = empty((cases, genes), dtype=x.dtype, device=x.device)
    given = given | config(OP, "pathway_mlp_bwd_gene_kernel", x.device)
    given |= {
        "member_ptr": order.to(torch.int32),
        "first_ptr": torch.searchsorted(gene_index[order], each).to(torch.int32),
        "grad_x_ptr": grad_x,
    }
    if grad_x.numel():
        grid = (triton.cdiv(genes, given["BLOCK_M"]), cases)
        _launch(pathway_mlp_bwd_gene_kernel, grid, given)
    return grad_x


# Each stands for one variant of the blocks, and together for all flags: dtype, cases, dropout.
_SHIPPED = (
    ("fp16", torch.float16, 1, False),
    ("bf16", torch.bfloat16, 32, True),
    ("fp32", torch.float32, 1, True),
)
_WIDTH = 256
_LISTS = ("pathway_ptr", "member_ptr", "first_ptr")


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return every kernel in every shipped configuration for a compute capability."""
    specs = []
    flags = {f"NEEDS_{n}": True for n in ("X", "WEIGHT1", "BIAS1", "WEIGHT2", "BIAS2")}
    for name, dtype, cases, has_dropout in _SHIPPED:
        for kernel in (pathway_mlp_fwd_kernel, pathway_mlp_bwd_kernel):
            chosen = shipped(OP)[kernel.__name__ + _variant(dtype, cases)][str(capability)]
            chosen = _fit(dict(chosen), _WIDTH) | flags
            chosen |= {"D": _WIDTH, "HAS_DROPOUT": has_dropout, "UPCAST": False}
            specs.append(_spec(kernel, capability, name, chosen))
    chosen = dict(shipped(OP)[pathway_mlp_bwd_gene_kernel.__name__][str(capability)])
    specs.append(_spec(pathway_mlp_bwd_gene_kernel, capability, "fp32", chosen))
    return specs


def _spec(kernel: Any, capability: int, dtype: str, chosen: dict[str, Any]) -> CompileSpec:
    signature = dict.fromkeys(kernel.arg_names, "i32")
    for name in kernel.arg_names:
        if name.isupper():
            signature[name] = "constexpr"
        elif name in _LISTS:
            signature[name] = "*i32"
        elif name in ("scale", "shift", "dropped"):
            signature[name] = "fp32"
        elif name == "threshold":
            signature[name] = "i64"
        elif name == "gene_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name == "grad_members_ptr" else f"*{dtype}"
    return CompileSpec(
        op=OP,
        kernel=kernel.__name__,
        capability=capability,
        signature=signature,
        constexprs={name: chosen[name] for name in kernel.arg_names if name.isupper()},
        options={name: chosen[name] for name in ("num_warps", "num_stages")},
        aligned=[n for n in kernel.arg_names if n.endswith("_ptr")],
        dtype=dtype,
        has_product=kernel is not pathway_mlp_bwd_gene_kernel,
    )
