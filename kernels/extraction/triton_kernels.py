"""The extractor on the GPU: launchers, and what is compiled offline.

A launch of the forward pass is three kernels: sums of the weights that the LayerNorm is folded
into, one pass over the tiles that leaves each block's result and log-sum-exp, and their merge. The
backward pass computes keys and values again; see triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.extraction._head_groups import (
    HeadPlan,
    Work,
    head_plan,
    query_parts,
    work_list,
)
from modaltune.kernels.extraction.triton_backward import (
    extraction_bwd_dx_kernel,
    extraction_bwd_kernel,
    extraction_bwd_merge_kernel,
    extraction_bwd_project_kernel,
)
from modaltune.kernels.extraction.triton_forward import (
    LN2,
    extraction_fwd_kernel,
    extraction_fwd_merge_kernel,
    extraction_fwd_weights_kernel,
)
from modaltune.kernels.resources import CompileSpec

OP = "extraction"
MANY_QUERIES = 80  # more than 64 + 16: the backward kernel takes smaller blocks
LOG2E = 1 / LN2.value
PRECISION = "ieee"  # of float32 products, which are there for checks rather than for speed
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate an output or a workspace; tests put guards around it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _variant(kernel: str, dtype: torch.dtype, plan: HeadPlan | None, queries: int = 0) -> str:
    """Name of a kernel's configuration: float32, wide heads, many queries need small blocks."""
    name = kernel + (".fp32" if dtype == torch.float32 else "")
    if plan is not None and plan.padded_dim > 64:
        return name + ".wide"
    return name + (".many" if queries > MANY_QUERIES else "")


def _heads(plan: HeadPlan) -> dict[str, int]:
    """Constexprs that say how heads stand side by side."""
    return {
        "NUM_HEADS": plan.heads,
        "HEAD_DIM": plan.dim,
        "HEAD_PAD": plan.padded_dim,
        "PER_GROUP": plan.per_group,
        "GROUPS": plan.groups,
    }


def _rows_last(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring columns side by side in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Weights(NamedTuple):
    """The projection as the kernels take it.

    Attributes:
        weight: `[2E, D]` with neighbouring columns side by side.
        norm_weight: `[D]`.
        constants: `[2, columns]` float32 sums and biases of the folded columns.
    """

    weight: Tensor
    norm_weight: Tensor
    constants: Tensor

    def folded(self) -> dict[str, Any]:
        """Arguments of a kernel that folds weights as it loads them."""
        return {
            "weight_ptr": self.weight,
            "norm_weight_ptr": self.norm_weight,
            "stride_we": self.weight.stride(0),
        }


def _sum_weights(
    kv_weight: Tensor, kv_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, plan: HeadPlan
) -> _Weights:
    """Launch the sums over the width that fold the LayerNorm into the projection."""
    columns, device = plan.groups * plan.columns, kv_weight.device
    found = _Weights(
        _rows_last(kv_weight),
        norm_weight.contiguous(),
        _allocate((2, columns), torch.float32, device),
    )
    extraction_fwd_weights_kernel[(columns,)](
        **found.folded(),
        bias_ptr=kv_bias.contiguous(),
        norm_bias_ptr=norm_bias.contiguous(),
        constants_ptr=found.constants,
        width=kv_weight.shape[1],
        **_heads(plan),
        UPCAST=needs_upcast(kv_weight.dtype),
        **config(OP, "extraction_fwd_weights_kernel", device),
    )
    return found


def launch_extraction_fwd(
    queries: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attended values, the same in float32, and their log-sum-exp in float32.

    Shapes `[B, G, E]` twice and `[B, H, G]`; the last two are for the backward pass.

    Args:
        queries: `[B, G, E]`, B, G >= 1.
        x: `[N, D]`, N may be 0.
        norm_weight: `[D]`.
        norm_bias: `[D]`.
        kv_weight: `[2E, D]`.
        kv_bias: `[2E]`.
        offsets: `[B + 1]` int64 on the CPU.
        num_heads: H.
        num_prefix: Rows at the start of each case to leave out.
        eps: LayerNorm epsilon.
    """
    (cases, count, inner), device = queries.shape, x.device
    plan = head_plan(inner, num_heads)
    settings = config(OP, _variant("extraction_fwd_kernel", x.dtype, plan), device)
    main, tail = query_parts(count, settings.pop("LEAST_TAIL", 16))
    x, queries = _rows_last(x), _rows_last(queries)
    work = work_list(offsets, settings["BLOCK_L"], num_prefix, device)
    weights = _sum_weights(kv_weight, kv_bias, norm_weight, norm_bias, plan)
    part_lse = _allocate((work.blocks, plan.padded_heads, count), torch.float32, device)
    part = _allocate((*part_lse.shape, plan.padded_dim), x.dtype, device)
    if work.blocks:
        extraction_fwd_kernel[(work.blocks * plan.groups,)](
            q_ptr=queries,
            x_ptr=x,
            **weights.folded(),
            constants_ptr=weights.constants,
            work_ptr=work.items,
            part_ptr=part,
            part_lse_ptr=part_lse,
            stride_qb=queries.stride(0),
            stride_qg=queries.stride(1),
            stride_xn=x.stride(0),
            num_queries=count,
            width=x.shape[1],
            eps=eps,
            scale=plan.dim**-0.5 * LOG2E,
            **_heads(plan),
            MAIN=main,
            TAIL=tail,
            EVEN_K=x.shape[1] % settings["BLOCK_K"] == 0,
            UPCAST=needs_upcast(x.dtype),
            PRECISION=PRECISION,
            **settings,
        )
    out = _allocate((cases, count, inner), x.dtype, device)
    exact = _allocate((cases, count, inner), torch.float32, device)
    lse = _allocate((cases, num_heads, count), torch.float32, device)
    settings = config(OP, "extraction_fwd_merge_kernel", device)
    extraction_fwd_merge_kernel[(cases, num_heads, triton.cdiv(count, settings["BLOCK_G"]))](
        part_ptr=part,
        part_lse_ptr=part_lse,
        first_ptr=work.first,
        out_ptr=out,
        exact_ptr=exact,
        lse_ptr=lse,
        stride_ob=out.stride(0),
        stride_og=out.stride(1),
        num_queries=count,
        NUM_HEADS=num_heads,
        PADDED_HEADS=plan.padded_heads,
        HEAD_DIM=plan.dim,
        HEAD_PAD=plan.padded_dim,
        UPCAST=needs_upcast(x.dtype),
        **settings,
    )
    return out, exact, lse


def launch_extraction_bwd(
    grad_out: Tensor,
    queries: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    num_heads: int,
    num_prefix: int,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the six tensors before `out` that need one, in their order.

    Args:
        grad_out: `[B, G, E]` gradient of the attended values.
        queries: As in the forward pass, like the five after it.
        x: As in the forward pass.
        norm_weight: As in the forward pass.
        norm_bias: As in the forward pass.
        kv_weight: As in the forward pass.
        kv_bias: As in the forward pass.
        out: `[B, G, E]` float32 from the forward pass.
        lse: `[B, H, G]` float32 from the forward pass.
        offsets: `[B + 1]` int64 on the CPU.
        num_heads: H.
        num_prefix: Rows at the start of each case to leave out.
        eps: LayerNorm epsilon.
        needs: Which of the six need a gradient.
    """
    x, queries, grad_out = _rows_last(x), _rows_last(queries), _rows_last(grad_out)
    plan = head_plan(queries.shape[2], num_heads)
    weights = _sum_weights(kv_weight, kv_bias, norm_weight, norm_bias, plan)
    kv, of_rows = _project(x, weights, offsets, num_prefix, plan, eps)
    variant = _variant("extraction_bwd_kernel", x.dtype, plan, queries.shape[1])
    settings = config(OP, variant, x.device)
    work = work_list(offsets, settings["BLOCK_L"], num_prefix, x.device)
    pulled = _pull_rows(
        grad_out, queries, weights.constants, out, lse, kv, of_rows, work, plan, needs, settings
    )
    found: list[Tensor | None] = [None] * 6
    if needs[0]:
        found[0] = _merge_queries(pulled.dq, work, queries, plan)
    if needs[1]:
        found[1] = _pull_x(x, weights, pulled, offsets, num_prefix, plan)
    if any(needs[2:]):
        found[2:] = _pull_weights(
            x, norm_weight, norm_bias, kv_weight, pulled, offsets, num_prefix, plan, needs[2:]
        )
    return [t for t, need in zip(found, needs, strict=True) if need and t is not None]


def _project(
    x: Tensor,
    weights: _Weights,
    offsets: Tensor,
    num_prefix: int,
    plan: HeadPlan,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return keys and values `[N, columns]` and, float32, mean and 1 / deviation, with room for two
    more rows a head, `[2 + 2H, N]`; prefix rows are not written."""
    rows, device, columns = x.shape[0], x.device, plan.groups * plan.columns
    settings = config(OP, _variant("extraction_bwd_project_kernel", x.dtype, plan), device)
    work = work_list(offsets, settings["BLOCK_L"], num_prefix, device)
    kv = _allocate((rows, columns), x.dtype, device)
    of_rows = _allocate((2 + 2 * plan.heads, rows), torch.float32, device)
    if work.blocks:
        extraction_bwd_project_kernel[(work.blocks * plan.groups,)](
            x_ptr=x,
            **weights.folded(),
            constants_ptr=weights.constants,
            work_ptr=work.items,
            kv_ptr=kv,
            rows_ptr=of_rows,
            stride_xn=x.stride(0),
            num_rows=rows,
            width=x.shape[1],
            eps=eps,
            **_heads(plan),
            EVEN_K=x.shape[1] % settings["BLOCK_K"] == 0,
            UPCAST=needs_upcast(x.dtype),
            PRECISION=PRECISION,
            **settings,
        )
    return kv, of_rows


class _Pulled(NamedTuple):
    """What the rows send back; the shapes are those of `extraction_bwd_kernel`."""

    dq: Tensor
    w: Tensor
    sums: Tensor
    rows: Tensor


def _pull_rows(
    grad_out: Tensor,
    queries: Tensor,
    constants: Tensor,
    out: Tensor,
    lse: Tensor,
    kv: Tensor,
    of_rows: Tensor,
    work: Work,
    plan: HeadPlan,
    needs: Sequence[bool],
    settings: dict[str, Any],
) -> _Pulled:
    """Launch the backward pass of the attention; it turns `kv` into w."""
    count, device = queries.shape[1], kv.device
    needs_dq, needs_dkv = needs[0], any(needs[1:])
    blocks = work.blocks if needs_dq else 0
    dq = _allocate((blocks, plan.heads, count, plan.padded_dim), torch.float32, device)
    sums = _allocate((work.blocks if needs_dkv else 0, 2, kv.shape[1]), torch.float32, device)
    if plan.padded_heads > plan.heads:
        sums.zero_()  # columns of padded heads are nobody's
    main, tail = query_parts(count)
    if work.blocks:
        extraction_bwd_kernel[(work.blocks * plan.heads,)](
            do_ptr=grad_out,
            q_ptr=queries,
            constants_ptr=constants,
            out_ptr=out,
            lse_ptr=lse,
            work_ptr=work.items,
            kv_ptr=kv,
            dq_ptr=dq,
            sums_ptr=sums,
            rows_ptr=of_rows,
            stride_db=grad_out.stride(0),
            stride_dg=grad_out.stride(1),
            stride_qb=queries.stride(0),
            stride_qg=queries.stride(1),
            stride_ob=out.stride(0),
            stride_og=out.stride(1),
            num_queries=count,
            num_rows=kv.shape[0],
            scale=plan.dim**-0.5,
            **_heads(plan),
            MAIN=main,
            TAIL=tail,
            UPCAST=needs_upcast(kv.dtype),
            PRECISION=PRECISION,
            NEEDS_DQ=needs_dq,
            NEEDS_DKV=needs_dkv,
            **settings,
        )
    return _Pulled(dq, kv, sums, of_rows)


def _merge_queries(part: Tensor, work: Work, queries: Tensor, plan: HeadPlan) -> Tensor:
    """Return dq `[B, G, E]` from the partial sums of the blocks."""
    cases, count, _ = queries.shape
    dq = _allocate(queries.shape, queries.dtype, queries.device)
    settings = config(OP, "extraction_bwd_merge_kernel", queries.device)
    extraction_bwd_merge_kernel[(cases, plan.heads, triton.cdiv(count, settings["BLOCK_G"]))](
        part_ptr=part,
        first_ptr=work.first,
        dq_ptr=dq,
        stride_qb=dq.stride(0),
        stride_qg=dq.stride(1),
        num_queries=count,
        NUM_HEADS=plan.heads,
        HEAD_DIM=plan.dim,
        HEAD_PAD=plan.padded_dim,
        **settings,
    )
    return dq


def _pull_x(
    x: Tensor, weights: _Weights, pulled: _Pulled, offsets: Tensor, num_prefix: int, plan: HeadPlan
) -> Tensor:
    """Return dx `[N, D]`; zero in the prefix rows."""
    settings = config(OP, _variant("extraction_bwd_dx_kernel", x.dtype, None), x.device)
    settings["BLOCK_K"] = min(settings["BLOCK_K"], plan.columns)
    work = work_list(offsets, settings["BLOCK_L"], num_prefix, x.device)
    dx = _allocate(x.shape, x.dtype, x.device)
    dx.index_fill_(0, work.prefix, 0)
    if work.blocks:
        extraction_bwd_dx_kernel[(work.blocks * triton.cdiv(x.shape[1], settings["BLOCK_D"]),)](
            x_ptr=x,
            w_ptr=pulled.w,
            **weights.folded(),
            rows_ptr=pulled.rows,
            work_ptr=work.items,
            dx_ptr=dx,
            stride_xn=x.stride(0),
            stride_dn=dx.stride(0),
            num_rows=x.shape[0],
            width=x.shape[1],
            **_heads(plan),
            EVEN_D=x.shape[1] % settings["BLOCK_D"] == 0,
            UPCAST=needs_upcast(x.dtype),
            PRECISION=PRECISION,
            **settings,
        )
    return dx


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b in float32, whatever the dtype of both."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().float() @ b.float()


def _pull_weights(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    pulled: _Pulled,
    offsets: Tensor,
    num_prefix: int,
    plan: HeadPlan,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the norm's scale and shift, the projection and its bias.

    With P_ed = sum_l dkv_le (x_ld - m_l) r_l and S_e = sum_l dkv_le, the LayerNorm's output is
    never needed: dW = a P + S z, da = sum_e W P, dz = S W, db = S.
    """
    width = x.shape[1]
    sums = pulled.sums.sum(0)  # [2, columns]

    def in_order(t: Tensor) -> Tensor:
        """From columns by group first to the 2E rows of the projection."""
        t = t.unflatten(0, (plan.groups, 2, plan.per_group, plan.padded_dim)).transpose(0, 1)
        t = t.flatten(1, 2)[:, : plan.heads, : plan.dim]
        return t.flatten(0, 2)

    shift = in_order(sums[0])  # [2E]
    weight = kv_weight.float()
    found: list[Tensor | None] = [None] * 4
    if needs[0] or needs[2]:
        product = torch.zeros(sums.shape[1], width, dtype=torch.float32, device=x.device)
        for start, end in pairwise(offsets.tolist()):
            rows = slice(min(start + num_prefix, end), end)
            tiles = x[rows]
            if x.dtype == torch.float32:
                # Beforehand, at the price of a copy: afterwards a large mean would cost digits.
                tiles = tiles - pulled.rows[0, rows, None]
            product += _product(pulled.w[rows], tiles)
        if x.dtype != torch.float32:
            product -= sums[1, :, None]
        slopes = in_order(product)  # [2E, D]
        if needs[0]:
            found[0] = (weight * slopes).sum(0)
        if needs[2]:
            found[2] = slopes * norm_weight.float() + torch.outer(shift, norm_bias.float())
    if needs[1]:
        found[1] = shift @ weight
    if needs[3]:
        found[3] = shift
    return [t if t is None else t.to(x.dtype) for t in found]


_PUBLISHED = (65, 192, 12)  # queries, inner width, heads
_POOLER = (1, 768, 8)  # TITAN's attentional pooler: heads of 96
_MOST = (128, 192, 12)  # as many queries as fit
_HALF_POINTERS = tuple(
    f"{name}_ptr"
    for name in (
        *("q", "x", "part", "do", "kv", "w", "dx", "dq", "out"),
        *("weight", "bias", "norm_weight", "norm_bias"),
    )
)
# One configuration serves every GPU in float32 and for wide heads: compiled for the GPU with the
# fewest registers and bytes of shared memory to a program. Kernels without products likewise.
_TIGHTEST = 120
_PRODUCTS = (
    extraction_fwd_kernel,
    extraction_bwd_project_kernel,
    extraction_bwd_kernel,
    extraction_bwd_dx_kernel,
)
_MERGES = (
    extraction_fwd_weights_kernel,
    extraction_fwd_merge_kernel,
    extraction_bwd_merge_kernel,
)


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return what is compiled offline, at D = 768.

    The published extractor in bfloat16 for every GPU (float16 differs in the type of an
    instruction); the largest number of queries, TITAN's pooler, float32, and what multiplies
    nothing for the tightest one.
    """
    specs = [_spec(kernel, capability, torch.bfloat16, _PUBLISHED) for kernel in _PRODUCTS]
    if capability == _TIGHTEST:
        specs += [_spec(kernel, capability, torch.bfloat16, _PUBLISHED) for kernel in _MERGES]
        specs += [_spec(kernel, capability, torch.float32, _PUBLISHED) for kernel in _PRODUCTS]
        for kernel in (extraction_fwd_kernel, extraction_bwd_kernel):
            specs.append(_spec(kernel, capability, torch.bfloat16, _MOST))
        for dtype in (torch.bfloat16, torch.float32):
            specs += [_spec(kernel, capability, dtype, _POOLER) for kernel in _PRODUCTS[:3]]
    return specs


def _spec(
    kernel: Any, capability: int, dtype: torch.dtype, shape: tuple[int, int, int]
) -> CompileSpec:
    """Spec of a kernel for G queries, inner width E and H heads."""
    queries, plan = shape[0], head_plan(*shape[1:])
    name, half = kernel.fn.__name__, _NAMES[dtype]
    key = name
    if kernel in _PRODUCTS:
        many = queries if kernel is extraction_bwd_kernel else 0
        key = _variant(name, dtype, None if kernel is extraction_bwd_dx_kernel else plan, many)
    settings = dict(shipped(OP)[key][str(capability)])
    main, tail = query_parts(queries, settings.pop("LEAST_TAIL", 16))
    known: dict[str, Any] = {**settings, **_heads(plan), "MAIN": main, "TAIL": tail}
    known |= {"PADDED_HEADS": plan.padded_heads, "EVEN_K": True, "EVEN_D": True}
    known |= {"NEEDS_DQ": True, "NEEDS_DKV": True, "UPCAST": False, "PRECISION": PRECISION}

    def kind(argument: str) -> str:
        if argument in known:
            return "constexpr"
        if argument in ("work_ptr", "first_ptr"):
            return "*i32"
        if argument.endswith("_ptr"):
            # The backward kernel reads the unrounded result; its merge adds up float32 parts.
            single = kernel is extraction_bwd_kernel and argument in ("out_ptr", "dq_ptr")
            single |= kernel is extraction_bwd_merge_kernel and argument == "part_ptr"
            return f"*{half}" if argument in _HALF_POINTERS and not single else "*fp32"
        return "fp32" if argument in ("eps", "scale") else "i32"

    free = ("num_queries", "num_rows", "eps", "scale")
    signature = {n: kind(n) for n in kernel.arg_names}
    return CompileSpec(
        op=OP,
        kernel=name,
        capability=capability,
        signature=signature,
        constexprs={n: known[n] for n in kernel.arg_names if n in known},
        options={n: settings[n] for n in ("num_warps", "num_stages")},
        aligned=[n for n, t in signature.items() if t != "constexpr" and n not in free],
        dtype=half,
        has_product=kernel in _PRODUCTS,
    )
