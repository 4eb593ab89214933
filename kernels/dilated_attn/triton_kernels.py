"""Launchers of the dilated attention kernels, and what the offline compile report has to know.

The kernels stand in triton_forward.py and triton_backward.py, with their formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modaltune.kernels._interpret import needs_upcast
from modaltune.kernels._schedule import row_blocks
from modaltune.kernels._tuning import config, shipped
from modaltune.kernels.dilated_attn._blocks import block_layout, residue_classes
from modaltune.kernels.dilated_attn.triton_backward import (
    dilated_attn_bwd_dkdv_kernel,
    dilated_attn_bwd_dq_kernel,
)
from modaltune.kernels.dilated_attn.triton_forward import dilated_attn_fwd_kernel
from modaltune.kernels.resources import CompileSpec

OP = "dilated_attn"
LOG2E = 1.4426950408889634
# Weights of attention among up to 2^20 keys, times 2^10, stay normal float16 numbers on average.
_FP16_SHIFT = 10
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# L2 of the interpreter's stand-in device, an A100.
_L2_BYTES = 40 * 2**20


class Call(NamedTuple):
    """What a call attends to, beside its tensors.

    Attributes:
        offsets: First row of each sequence and the total.
        segment_lengths: Rows per segment, one per branch.
        ratios: Dilation per branch; one of them is 1.
        scale: Factor of q . k, of any sign.
    """

    offsets: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    ratios: tuple[int, ...]
    scale: float


class _Blocks(NamedTuple):
    """Tables of a launch on the device; see `block_rows` in triton_blocks.py."""

    units: Tensor
    residues: Tensor
    branches: Tensor
    modulus: int
    rows: int


def _widths(head_dim: int) -> dict[str, int]:
    """Split a head width, padded to the next multiple of 16, into at most two powers of two."""
    padded = -(-head_dim // 16) * 16
    main = 1 << (padded.bit_length() - 1)
    tail = triton.next_power_of_2(padded - main) if padded > main else 0
    if tail == main:
        main, tail = 2 * main, 0
    return {"HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail}


def _variant(kernel: str, dtype: str, head_dim: int) -> str:
    """Name of a kernel's configuration, by head width; dk and dv of float32 need no other."""
    if dtype == "fp32":
        return kernel + (":fp32:wide" if head_dim > 64 and "dkdv" not in kernel else ":fp32")
    return kernel + (":wide" if head_dim > 48 else "")


def _precision(dtype: str) -> str:
    # Tensor cores round float32 operands to tf32, which loses 13 bits; ignored for half precision.
    return "ieee" if dtype == "fp32" else "tf32"


def _constants(kernel: str, q: Tensor) -> dict[str, Any]:
    """Return the constexprs and options of a kernel but for ROWS and SHIFT."""
    dtype = _NAMES[q.dtype]
    return {
        **config(OP, _variant(kernel, dtype, q.shape[2]), q.device),
        **_widths(q.shape[2]),
        "UPCAST": needs_upcast(q.dtype),
        "PRECISION": _precision(dtype),
    }


@lru_cache(maxsize=64)
def _tables(
    offsets: tuple[int, ...],
    segment_lengths: tuple[int, ...],
    ratios: tuple[int, ...],
    heads: int,
    block: int,
    device: torch.device,
) -> _Blocks:
    """Return the tables of a layout. Kept: the layers of a model and CUDA graphs share them."""
    modulus, rows = block_layout(heads, segment_lengths, ratios, block)
    bounds = torch.tensor(offsets, dtype=torch.int64, device="cpu")
    cut = row_blocks(bounds, modulus * rows)
    begin = bounds.to(torch.int32)[cut.case.long()]
    units = torch.stack([cut.start, begin, cut.end], dim=1)
    classes = residue_classes(heads, segment_lengths, ratios, modulus, block // rows)
    branches = [list(pair) for pair in zip(segment_lengths, ratios, strict=True)]
    return _Blocks(
        units.contiguous().to(device),
        torch.tensor(classes, dtype=torch.int32, device=device),
        torch.tensor(branches, dtype=torch.int32, device=device),
        modulus,
        rows,
    )


def _blocks(call: Call, q: Tensor, block: int) -> _Blocks:
    # A segment beyond 32 bits is as good as the longest sequence there is.
    segments = tuple(min(w, 2**30) for w in call.segment_lengths)
    return _tables(call.offsets, segments, call.ratios, q.shape[1], block, q.device)


def heads_in_l2(rows: int, head_dim: int, tensors: int, itemsize: int, l2_bytes: int) -> int:
    """Return how many heads of `tensors` `[N, H, d]` tensors fit half the L2, at least 1."""
    return max(l2_bytes // 2 // max(rows * head_dim * tensors * itemsize, 1), 1)


def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _L2_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _dense_columns(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its last axis is dense, as slices of a fused product are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return `stride_<name>n` and `stride_<name>h` of `[N, H, d]` tensors."""
    return {
        f"stride_{name}{axis}": tensor.stride(position)
        for name, tensor in tensors.items()
        for position, axis in enumerate("nh")
    }


def _shared(blocks: _Blocks, q: Tensor) -> dict[str, Any]:
    """Return the arguments that every kernel takes."""
    return {
        "units_ptr": blocks.units,
        "residues_ptr": blocks.residues,
        "branches_ptr": blocks.branches,
        "num_rows": q.shape[0],
        "num_heads": q.shape[1],
        "num_units": blocks.units.shape[0],
        "num_branches": blocks.branches.shape[0],
        "modulus": blocks.modulus,
        "classes": blocks.residues.shape[1],
        "ROWS": blocks.rows,
    }


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Move the sign of the scale to the queries: the kernels take maxima before they scale."""
    # Not 0 either: masked scores are -inf.
    return (q, max(scale, 1e-30)) if scale >= 0 else (-q, -scale)


def launch_dilated_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o `[N, H, d]` and its log-sum-exp `[H, N]` float32, to base 2.

    Args:
        q: `[N, H, d]`; it, k and v as in `dilated_attention`.
        k: `[N, H, d]`.
        v: `[N, H, d]`.
        call: Layout, branches and scale; aligned (`misalignment`).
        out: Where o goes, last axis dense. Default: new memory.
        lse: Where the log-sum-exp goes, contiguous. Default: new memory.
    """
    q, scale = _positive(q, call.scale)
    q, k, v = (_dense_columns(t) for t in (q, k, v))
    rows, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device) if lse is None else lse
    if out.numel() == 0:
        return out, lse
    constants = _constants("dilated_attn_fwd_kernel", q)
    blocks = _blocks(call, q, constants["BLOCK_M"])
    shared = _shared(blocks, q)
    dilated_attn_fwd_kernel[(shared["num_units"] * shared["classes"] * heads,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        **_strides(q=q, k=k, v=v, o=out),
        **shared,
        heads_together=heads_in_l2(rows, width, 2, q.element_size(), _l2_bytes(q.device)),
        scale=scale * LOG2E,
        **constants,
    )
    return out, lse


def launch_dilated_attn_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    call: Call,
    needs: Sequence[bool],
    *,
    grads: Sequence[Tensor] | None = None,
    delta: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of those of q, k and v that `needs` names, `[N, H, d]`.

    A few heads at a time go through both kernels, so that the second finds in L2 what the first
    has read.

    Args:
        grad_out: `[N, H, d]` gradient of o; the others as in `launch_dilated_attn_fwd`.
        q: `[N, H, d]`.
        k: `[N, H, d]`.
        v: `[N, H, d]`.
        lse: `[H, N]` float32, contiguous, to base 2.
        call: Layout, branches and scale of the forward pass.
        needs: Whether q, k and v need a gradient. Without k and v, their kernel is not run.
        grads: Contiguous memory for all three. Default: new memory.
        delta: `[branches, H, N]` float32 of working memory. Default: new memory.
    """
    q, scale = _positive(q, call.scale)
    grad_out, q, k, v = (_dense_columns(t) for t in (grad_out, q, k, v))
    rows, heads, width = q.shape
    only_queries = not (needs[1] or needs[2])
    if grads is None:
        count = 1 if only_queries else 3
        grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(count)]
    wanted = [grad for grad, need in zip(grads, needs, strict=False) if need]
    if q.numel() == 0:
        return wanted
    if delta is None:
        delta = lse.new_empty(len(call.ratios), heads, rows)
    shared = {
        "grad_out_ptr": grad_out,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lse_ptr": lse,
        "delta_ptr": delta,
        **_strides(g=grad_out, q=q, k=k, v=v, d=grads[0]),
        "scale": abs(call.scale),
        "scale_log2": scale * LOG2E,
        "SHIFT": _FP16_SHIFT if q.dtype == torch.float16 else 0,
    }
    together = heads_in_l2(rows, width, 4, q.element_size(), _l2_bytes(q.device))
    for first in range(0, heads, together):
        here = min(together, heads - first)
        _launch_dq(shared, q, call, grads[0], first, here)
        if not only_queries:
            _launch_dkdv(shared, q, call, grads[1], grads[2], first, here)
    if call.scale < 0:
        grads[0].neg_()
    return wanted


def _launch_dq(
    shared: dict[str, Any], q: Tensor, call: Call, dq: Tensor, first: int, here: int
) -> None:
    constants = _constants("dilated_attn_bwd_dq_kernel", q)
    tables = _shared(_blocks(call, q, constants["BLOCK_M"]), q)
    dilated_attn_bwd_dq_kernel[(tables["num_units"] * tables["classes"] * here,)](
        **shared,
        **tables,
        dq_ptr=dq,
        dense_branch=call.ratios.index(1),
        first_head=first,
        heads_here=here,
        **constants,
    )


def _launch_dkdv(
    shared: dict[str, Any],
    q: Tensor,
    call: Call,
    dk: Tensor,
    dv: Tensor,
    first: int,
    here: int,
) -> None:
    constants = _constants("dilated_attn_bwd_dkdv_kernel", q)
    tables = _shared(_blocks(call, q, constants["BLOCK_M"]), q)
    dilated_attn_bwd_dkdv_kernel[(tables["num_units"] * tables["classes"] * here,)](
        **shared,
        **tables,
        dk_ptr=dk,
        dv_ptr=dv,
        first_head=first,
        heads_here=here,
        **constants,
    )


# Arguments of the kernels that are no element pointers; pointers not named here take the dtype.
_TYPES = {
    "units_ptr": "*i32",
    "residues_ptr": "*i32",
    "branches_ptr": "*i32",
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "scale": "fp32",
    "scale_log2": "fp32",
}
_KERNELS = (
    "dilated_attn_fwd_kernel",
    "dilated_attn_bwd_dq_kernel",
    "dilated_attn_bwd_dkdv_kernel",
)
_PUBLISHED = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)


def _spec(kernel: str, capability: int, dtype: str, head_dim: int) -> CompileSpec:
    chosen = dict(shipped(OP)[_variant(kernel, dtype, head_dim)][str(capability)])
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    rows = block_layout(16, *_PUBLISHED, chosen["BLOCK_M"])[1]
    constexprs: dict[str, Any] = {**chosen, **_widths(head_dim), "ROWS": rows}
    constexprs |= {"UPCAST": False, "PRECISION": _precision(dtype)}
    if kernel != _KERNELS[0]:
        constexprs["SHIFT"] = _FP16_SHIFT if dtype == "fp16" else 0
    names = list(globals()[kernel].arg_names)

    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return _TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    return CompileSpec(
        op=OP,
        kernel=kernel,
        capability=capability,
        signature={name: kind(name) for name in names},
        constexprs=constexprs,
        options=options,
        # Row and head strides of a fused q, k, v product are multiples of the head width.
        aligned=[n for n in names if n.endswith("_ptr") or n.startswith("stride_")],
        dtype=dtype,
    )


def compile_specs(capability: int) -> list[CompileSpec]:
    """Return every configuration as shipped for a compute capability such as 90.

    Each with the widest heads that it is for. Float16 compiles to what bfloat16 does. Float32 uses
    no tensor cores; where its configuration is one for all, it is compiled for the ends: the oldest
    capability and the one with least shared memory.
    """
    cases = [(kernel, "bf16", width) for width in (48, 128) for kernel in _KERNELS]
    cases.append(("dilated_attn_fwd_kernel", "fp32", 64))
    if capability in (80, 120):
        cases += [(kernel, "fp32", 128) for kernel in _KERNELS]
        cases.append(("dilated_attn_bwd_dq_kernel", "fp32", 64))
    return [_spec(kernel, capability, dtype, width) for kernel, dtype, width in cases]
