"""The extractor on the GPU: launchers, and what is compiled offline.

A launch of the forward pass is three kernels: weights folded with the LayerNorm and packed by head
group, one pass over the tiles that leaves each block's result and log-sum-exp, and their merge. The
backward pass computes keys and values again; see triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.extraction.schedule import (
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
LOG2E = 1 / LN2.value
PRECISION = {torch.float16: "tf32", torch.bfloat16: "tf32", torch.float32: "tf32x3"}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate an output or a workspace; tests put guards around it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _variant(kernel: str, dtype: torch.dtype, plan: HeadPlan) -> str:
    """Name of a kernel's configuration: wide heads and float32 need smaller blocks."""
    wide = ".wide" if plan.padded_dim > 64 else ""
    return kernel + (".fp32" if dtype == torch.float32 else "") + wide


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


def _pack(
    kv_weight: Tensor, kv_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, plan: HeadPlan
) -> tuple[Tensor, Tensor]:
    """Return the packed weights `[columns, D]` and their sums and biases `[2, columns]` fp32."""
    columns, width = plan.groups * plan.columns, kv_weight.shape[1]
    kv_weight = _rows_last(kv_weight)
    packed = _allocate((columns, width), kv_weight.dtype, kv_weight.device)
    constants = _allocate((2, columns), torch.float32, kv_weight.device)
    extraction_fwd_weights_kernel[(columns,)](
        weight_ptr=kv_weight,
        bias_ptr=kv_bias.contiguous(),
        norm_weight_ptr=norm_weight.contiguous(),
        norm_bias_ptr=norm_bias.contiguous(),
        packed_ptr=packed,
        constants_ptr=constants,
        stride_we=kv_weight.stride(0),
        width=width,
        **_heads(plan),
        UPCAST=needs_upcast(kv_weight.dtype),
        **config(OP, "extraction_fwd_weights_kernel", kv_weight.device),
    )
    return packed, constants


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
    packed, constants = _pack(kv_weight, kv_bias, norm_weight, norm_bias, plan)
    part_lse = _allocate((work.blocks, plan.padded_heads, count), torch.float32, device)
    part = _allocate((*part_lse.shape, plan.padded_dim), x.dtype, device)
    if work.blocks:
        extraction_fwd_kernel[(work.blocks * plan.groups,)](
            q_ptr=queries,
            x_ptr=x,
            packed_ptr=packed,
            constants_ptr=constants,
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
            PRECISION=PRECISION[x.dtype],
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
    packed, constants = _pack(kv_weight, kv_bias, norm_weight, norm_bias, plan)
    kv, of_rows = _project(x, packed, constants, offsets, num_prefix, plan, eps)
    settings = config(OP, _variant("extraction_bwd_kernel", x.dtype, plan), x.device)
    work = work_list(offsets, settings["BLOCK_L"], num_prefix, x.device)
    pulled = _pull_rows(
        grad_out, queries, constants, out, lse, kv, of_rows, work, plan, needs, settings
    )
    found: list[Tensor | None] = [None] * 6
    if needs[0]:
        found[0] = _merge_queries(pulled.dq, work, queries, plan)
    if needs[1]:
        found[1] = _pull_x(x, packed, pulled, offsets, num_prefix, plan)
    if any(needs[2:]):
        found[2:] = _pull_weights(
            x, norm_weight, norm_bias, kv_weight, pulled, offsets, num_prefix, plan, needs[2:]
        )
    return [t for t, need in zip(found, needs, strict=True) if need and t is not None]


def _project(
    x: Tensor,
    packed: Tensor,
    constants: Tensor,
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
            packed_ptr=packed,
            constants_ptr=constants,
            work_ptr=work.items,
            kv_ptr=kv,
            rows_ptr=of_rows,
            stride_xn=x.stride(0),
            num_rows=rows,
            width=x.shape[1],
            eps=eps,
            COLUMNS=plan.columns,
            GROUPS=plan.groups,
            EVEN_K=x.shape[1] % settings["BLOCK_K"] == 0,
            UPCAST=needs_upcast(x.dtype),
            PRECISION=PRECISION[x.dtype],
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
            PRECISION=PRECISION[kv.dtype],
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
    x: Tensor, packed: Tensor, pulled: _Pulled, offsets: Tensor, num_prefix: int, plan: HeadPlan
) -> Tensor:
    """Return dx `[N, D]`; zero in the prefix rows."""
    suffix = ".fp32" if x.dtype == torch.float32 else ""
    settings = config(OP, "extraction_bwd_dx_kernel" + suffix, x.device)
    settings["BLOCK_K"] = min(settings["BLOCK_K"], plan.columns)
    work = work_list(offsets, settings["BLOCK_L"], num_prefix, x.device)
    dx = _allocate(x.shape, x.dtype, x.device)
    dx.index_fill_(0, work.prefix, 0)
    if work.blocks:
        extraction_bwd_dx_kernel[(work.blocks * triton.cdiv(x.shape[1], settings["BLOCK_D"]),)](
            x_ptr=x,
            w_ptr=pulled.w,
            packed_ptr=packed,
            rows_ptr=pulled.rows,
            work_ptr=work.items,
            dx_ptr=dx,
            stride_xn=x.stride(0),
            stride_dn=dx.stride(0),
            num_rows=x.shape[0],
            width=x.shape[1],
            NUM_HEADS=plan.heads,
            ALL_COLUMNS=plan.groups * plan.columns,
            EVEN_D=x.shape[1] % settings["BLOCK_D"] == 0,
            UPCAST=needs_upcast(x.dtype),
            PRECISION=PRECISION[x.dtype],
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

    def unpacked(t: Tensor) -> Tensor:
        """From packed columns first to the 2E columns of the projection."""
        t = t.unflatten(0, (plan.groups, 2, plan.per_group, plan.padded_dim)).transpose(0, 1)
        t = t.flatten(1, 2)[:, : plan.heads, : plan.dim]
        return t.flatten(0, 2)

    shift = unpacked(sums[0])  # [2E]
    weight = kv_weight.float()
    found: list[Tensor | None] = [None] * 4
    if needs[0] or needs[2]:
        product = torch.zeros(sums.shape[1], width, dtype=torch.float32, device=x.device)
        for start, end in pairwise(offsets.tolist()):
            start = min(start + num_prefix, end)
            product += _product(pulled.w[start:end], x[start:end])
        slopes = unpacked(product - sums[1, :, None])  # [2E, D]
        if needs[0]:
            found[0] = (weight * slopes).sum(0)
        if needs[2]:
            found[2] = slopes * norm_weight.float() + torch.outer(shift, norm_bias.float())
    if needs[1]:
        found[1] = shift @ weight
    if needs[3]:
        found[3] = shift
    return [t if t is None else t.to(x.dtype) for t in found]


def _spec(
    kernel: Any,
    capability: int,
    dtype: str,
    constexprs: Mapping[str, Any],
    settings: Mapping[str, int],
    half: Sequence[str] = (),
    has_product: bool = True,
) -> CompileSpec:
    """Spec of a kernel whose pointers `half` have the dtype of x; other pointers are float32."""
    options = {k: settings[k] for k in ("num_warps", "num_stages")}
    constexprs = {**constexprs, **{k: v for k, v in settings.items() if k not in options}}
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in ("work_ptr", "first_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in half else "*fp32"
        else:
            signature[name] = "fp32" if name in ("eps", "scale") else "i32"
    free = ("num_queries", "num_rows", "eps", "scale")
    aligned = [n for n, t in signature.items() if t != "constexpr" and n not in free]
    return CompileSpec(
        OP, kernel.__name__, capability, signature, constexprs, options, aligned, dtype, has_product
    )


# Queries, inner width and heads: the published extractor, its largest case, TITAN's pooler.
_SHAPES = ((65, 192, 12), (128, 192, 12), (1, 768, 8))
_WIDTH = 768


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return what is compiled offline: every kernel at D = 768, for 65 and 128 queries of 12 heads
    of 16, and one query of 8 heads of 96."""
    specs: list[CompileSpec] = []
    for dtype, name in _NAMES.items():
        for queries, inner, heads in _SHAPES[: None if name != "fp32" else 1]:
            specs += _shape_specs(capability, dtype, name, queries, head_plan(inner, heads))
    return specs


def _shape_specs(
    capability: int, dtype: torch.dtype, name: str, queries: int, plan: HeadPlan
) -> list[CompileSpec]:
    main, tail = query_parts(queries)
    common = {"UPCAST": False, "PRECISION": PRECISION[dtype]}
    heads = {**_heads(plan), "MAIN": main, "TAIL": tail, **common}
    one = {"NUM_HEADS": plan.heads, "HEAD_DIM": plan.dim, "HEAD_PAD": plan.padded_dim}
    columns = plan.groups * plan.columns

    def spec(kernel: Any, constexprs: Mapping[str, Any], variant: str = "", **more: Any) -> None:
        chosen = dict(shipped(OP)[variant or kernel.__name__][str(capability)])
        least_tail = chosen.pop("LEAST_TAIL", 16)
        if "TAIL" in constexprs:
            constexprs = {**constexprs, "TAIL": query_parts(queries, least_tail)[1]}
        specs.append(_spec(kernel, capability, name, constexprs, chosen, **more))

    specs: list[CompileSpec] = []
    spec(
        extraction_fwd_kernel,
        {**heads, "EVEN_K": True},
        _variant("extraction_fwd_kernel", dtype, plan),
        half=("q_ptr", "x_ptr", "packed_ptr", "part_ptr"),
    )
    spec(
        extraction_bwd_kernel,
        {**heads, "NEEDS_DQ": True, "NEEDS_DKV": True},
        _variant("extraction_bwd_kernel", dtype, plan),
        half=("do_ptr", "q_ptr", "kv_ptr"),
    )
    if queries == 128:
        return specs  # the other kernels do not depend on the number of queries
    spec(
        extraction_bwd_project_kernel,
        {"COLUMNS": plan.columns, "GROUPS": plan.groups, "EVEN_K": True, **common},
        _variant("extraction_bwd_project_kernel", dtype, plan),
        half=("x_ptr", "packed_ptr", "kv_ptr"),
    )
    spec(
        extraction_bwd_dx_kernel,
        {"NUM_HEADS": plan.heads, "ALL_COLUMNS": columns, "EVEN_D": True, **common},
        "extraction_bwd_dx_kernel" + (".fp32" if name == "fp32" else ""),
        half=("x_ptr", "w_ptr", "packed_ptr", "dx_ptr"),
    )
    spec(
        extraction_fwd_weights_kernel,
        {**_heads(plan), "UPCAST": False},
        half=("weight_ptr", "bias_ptr", "norm_weight_ptr", "norm_bias_ptr", "packed_ptr"),
        has_product=False,
    )
    spec(
        extraction_fwd_merge_kernel,
        {**one, "PADDED_HEADS": plan.padded_heads, "UPCAST": False},
        half=("part_ptr", "out_ptr"),
        has_product=False,
    )
    spec(extraction_bwd_merge_kernel, one, half=("dq_ptr",), has_product=False)
    return specs
