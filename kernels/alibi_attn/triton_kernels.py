"""Launchers of the ALiBi attention kernels, and what the offline compile report has to know.

The kernels stand in triton_forward.py and triton_backward.py, with their formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._schedule import row_blocks
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.alibi_attn.triton_backward import (
    alibi_attn_bwd_dkdv_kernel,
    alibi_attn_bwd_dq_kernel,
)
from modaltune.kernels.alibi_attn.triton_forward import (
    alibi_attn_fwd_cells_kernel,
    alibi_attn_fwd_kernel,
)
from modaltune.kernels.resources import CompileSpec

OP = "alibi_attn"
LOG2E = 1.4426950408889634
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _widths(head_dim: int, dtype: str) -> dict[str, int]:
    """Split a head width, padded to the next multiple of 16, into at most two powers of two.

    Two equal parts are one, but in float32, whose products without tensor cores spill above 64.
    """
    padded = -(-head_dim // 16) * 16
    main = 1 << (padded.bit_length() - 1)
    if dtype == "fp32":
        main = min(main, 64)
    tail = triton.next_power_of_2(padded - main) if padded > main else 0
    if tail == main and (dtype != "fp32" or 2 * main <= 64):
        main, tail = 2 * main, 0
    return {"HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail}


def _variant(kernel: str, dtype: str, head_dim: int) -> str:
    """Name of a kernel's configuration: float32 and heads wider than 64 have their own."""
    wide = ":wide" if head_dim > 64 else ""
    return kernel + (":fp32" if dtype == "fp32" else "") + wide


def _precision(dtype: str) -> str:
    # Tensor cores round float32 operands to tf32, which loses 13 bits; ignored for half precision.
    return "ieee" if dtype == "fp32" else "tf32"


def _constants(kernel: str, q: Tensor) -> dict[str, Any]:
    """Return the constexprs and options that every product kernel takes."""
    dtype = _NAMES[q.dtype]
    return {
        **config(OP, _variant(kernel, dtype, q.shape[2]), q.device),
        **_widths(q.shape[2], dtype),
        "UPCAST": needs_upcast(q.dtype),
        "PRECISION": _precision(dtype),
    }


@lru_cache(maxsize=64)
def work_list(offsets: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return `[n, 3]` int32: first row of each block, first row and end of its sequence.

    Blocks of long sequences come first, so that the last programs to start are short ones. Kept
    per layout: the layers of a model share it, and a captured CUDA graph copies nothing.
    """
    rows = torch.tensor(offsets, dtype=torch.int64, device="cpu")
    blocks = row_blocks(rows, block)
    begin = rows[:-1].to(torch.int32)[blocks.case.long()]
    work = torch.stack([blocks.start, begin, blocks.end], dim=1)
    longest_first = torch.argsort(blocks.end - begin, descending=True, stable=True)
    return work[longest_first].contiguous().to(device)


def _work(offsets: Tensor, block: int, device: torch.device) -> Tensor:
    return work_list(tuple(offsets.tolist()), block, device)


def _dense_columns(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its last axis is dense, as slices of a fused product are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _cells(grid: Tensor, offsets: Tensor) -> Tensor:
    """Return `[2, N]` float32 cells relative to the last row of each sequence."""
    cells = torch.empty(2, grid.shape[0], dtype=torch.float32, device=grid.device)
    block = config(OP, "alibi_attn_fwd_cells_kernel", grid.device)
    work = _work(offsets, block["BLOCK_L"], grid.device)
    if work.shape[0]:
        alibi_attn_fwd_cells_kernel[(work.shape[0],)](
            grid_ptr=grid,
            work_ptr=work,
            cells_ptr=cells,
            stride_gn=grid.stride(0),
            stride_gc=grid.stride(1),
            num_rows=grid.shape[0],
            **block,
        )
    return cells


def launch_alibi_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Tensor,
    slopes: Tensor,
    offsets: Tensor,
    num_prefix: int,
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o `[N, H, d]` and its log-sum-exp to base 2, `[H, N]` float32.

    Args:
        q: `[N, H, d]`; it, k, v, grid, slopes, num_prefix and scale as in `alibi_attention`.
        k: `[N, H, d]`.
        v: `[N, H, d]`.
        grid: `[N, 2]` int64.
        slopes: `[H]`.
        offsets: `[B + 1]` int64 on the CPU, checked.
        num_prefix: Rows without position at the head of each sequence.
        scale: Factor of q . k.
        out: Where o goes, last axis dense. Default: new memory.
        lse: Where the log-sum-exp goes, contiguous. Default: new memory.
    """
    q, k, v = (_dense_columns(t) for t in (q, k, v))
    rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device) if lse is None else lse
    constants = _constants("alibi_attn_fwd_kernel", q)
    if heads % constants["HEADS"]:
        constants["HEADS"] = 1
    work = _work(offsets, constants["BLOCK_M"], q.device)
    if work.shape[0]:
        alibi_attn_fwd_kernel[(work.shape[0], heads // constants["HEADS"])](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            cells_ptr=_cells(grid, offsets),
            slopes_ptr=slopes.to(torch.float32).contiguous(),
            work_ptr=work,
            out_ptr=out,
            lse_ptr=lse,
            **_strides(q=q, k=k, v=v, o=out),
            num_rows=rows,
            num_prefix=num_prefix,
            scale=scale * LOG2E,
            **constants,
        )
    return out, lse


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return `stride_<name>n` and `stride_<name>h` of `[N, H, d]` tensors."""
    return {
        f"stride_{name}{axis}": tensor.stride(position)
        for name, tensor in tensors.items()
        for position, axis in enumerate("nh")
    }


def launch_alibi_attn_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    grid: Tensor,
    slopes: Tensor,
    out: Tensor | None,
    lse: Tensor,
    offsets: Tensor,
    num_prefix: int,
    scale: float,
    grads: Sequence[Tensor | None],
) -> None:
    """Fill the gradients of q, k and v; a gradient that is None is not computed.

    Args:
        grad_out: `[N, H, d]` gradient of o; the others as in `launch_alibi_attn_fwd`.
        q: `[N, H, d]`.
        k: `[N, H, d]`.
        v: `[N, H, d]`, or None where only v needs a gradient.
        grid: `[N, 2]` int64.
        slopes: `[H]`.
        out: `[N, H, d]` contiguous, or None where only v needs a gradient.
        lse: `[H, N]` float32, contiguous, to base 2.
        offsets: `[B + 1]` int64 on the CPU, checked.
        num_prefix: Rows without position at the head of each sequence.
        scale: Factor of q . k.
        grads: Contiguous `[N, H, d]` memory for the gradients of q, k and v, or None.
    """
    dq, dk, dv = grads
    grad_out, q, k = (_dense_columns(t) for t in (grad_out, q, k))
    v = k if v is None else _dense_columns(v)
    rows, heads, _ = q.shape
    if not rows:
        return
    shared = {
        "grad_out_ptr": grad_out,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lse_ptr": lse,
        "cells_ptr": _cells(grid, offsets),
        "slopes_ptr": slopes.to(torch.float32).contiguous(),
        **_strides(g=grad_out, q=q, k=k, v=v),
        "num_rows": rows,
        "num_prefix": num_prefix,
        "scale": scale,
        "scale_log2": scale * LOG2E,
    }
    delta = lse  # never read where only v needs a gradient
    if out is not None:
        delta = torch.empty_like(lse)
        _launch_dq(shared, q, out, delta, dq, offsets)
    if dk is None and dv is None:
        return
    constants = _constants("alibi_attn_bwd_dkdv_kernel", q)
    work = _work(offsets, constants["BLOCK_N"], q.device)
    dk_or_dv = dv if dk is None else dk
    assert dk_or_dv is not None  # for the type checker
    alibi_attn_bwd_dkdv_kernel[(work.shape[0], heads)](
        **shared,
        delta_ptr=delta,
        work_ptr=work,
        dk_ptr=dk_or_dv,
        dv_ptr=dk_or_dv if dv is None else dv,
        **_strides(d=dk_or_dv),
        NEEDS_DK=dk is not None,
        NEEDS_DV=dv is not None,
        **constants,
    )


def _launch_dq(
    shared: dict[str, Any],
    q: Tensor,
    out: Tensor,
    delta: Tensor,
    dq: Tensor | None,
    offsets: Tensor,
) -> None:
    """Fill delta `[H, N]` and dq (unless None)."""
    constants = _constants("alibi_attn_bwd_dq_kernel", q)
    work = _work(offsets, constants["BLOCK_M"], q.device)
    alibi_attn_bwd_dq_kernel[(work.shape[0], q.shape[1])](
        **shared,
        out_ptr=out,
        work_ptr=work,
        delta_ptr=delta,
        dq_ptr=out if dq is None else dq,
        **_strides(o=out),
        NEEDS_DQ=dq is not None,
        **constants,
    )


# Arguments of the kernels that are no element pointers; pointers not named here take the dtype.
_TYPES = {
    "work_ptr": "*i32",
    "cells_ptr": "*fp32",
    "slopes_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "grid_ptr": "*i64",
    "num_rows": "i32",
    "num_prefix": "i32",
    "scale": "fp32",
    "scale_log2": "fp32",
}
_FLAGS = {
    "alibi_attn_fwd_kernel": {},
    "alibi_attn_bwd_dq_kernel": {"NEEDS_DQ": True},
    "alibi_attn_bwd_dkdv_kernel": {"NEEDS_DK": True, "NEEDS_DV": True},
}
# TITAN's heads in every dtype, and the widest; float32 has that one in two parts.
_SPEC_WIDTHS = (("fp16", 64), ("bf16", 64), ("fp32", 64), ("bf16", 128), ("fp32", 128))


def _spec(
    kernel: str, capability: int, dtype: str, constexprs: dict[str, Any], options: dict[str, int]
) -> CompileSpec:
    names = list(globals()[kernel].arg_names)
    products = kernel in _FLAGS
    # Arguments equal to 1 become constants at a launch: one cls row, the last axis of the grid.
    constexprs |= {name: 1 for name in ("num_prefix", "stride_gc") if name in names}
    signature = {
        name: "constexpr"
        if name in constexprs
        else _TYPES.get(name, "i32" if name.startswith("stride_") else f"*{dtype}")
        for name in names
    }
    return CompileSpec(
        op=OP,
        kernel=kernel,
        capability=capability,
        signature=signature,
        constexprs=constexprs,
        options=options,
        # Row and head strides of a fused q, k, v product are multiples of the head width.
        aligned=[n for n in names if n.endswith("_ptr") or (n.startswith("stride_") and products)],
        dtype=dtype,
        has_product=products,
    )


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return every kernel and dtype as shipped for a compute capability such as 90."""
    specs = []
    for kernel, flags in _FLAGS.items():
        for dtype, width in _SPEC_WIDTHS:
            chosen = dict(shipped(OP)[_variant(kernel, dtype, width)][str(capability)])
            options = {n: chosen.pop(n) for n in ("num_warps", "num_stages")}
            constexprs: dict[str, Any] = {**chosen, **_widths(width, dtype), **flags}
            constexprs |= {"UPCAST": False, "PRECISION": _precision(dtype)}
            specs.append(_spec(kernel, capability, dtype, constexprs, options))
    cells = dict(shipped(OP)["alibi_attn_fwd_cells_kernel"][str(capability)])
    options = {n: cells.pop(n) for n in ("num_warps", "num_stages")}
    specs.append(_spec("alibi_attn_fwd_cells_kernel", capability, "i64", cells, options))
    return specs
