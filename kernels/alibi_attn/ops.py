"""Operators `modaltune::alibi_attn_fwd` and `modaltune::alibi_attn_bwd`; no Triton at import.

The second output of the forward operator is for the backward operator of the same `impl` alone: the
log-sum-exp of each row and head `[H, N]`, natural for `cpu`, to base 2 for `triton`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._checks import check_offsets
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import LIBRARY, define, differentiable
from modaltune.kernels.alibi_attn import cpu

MAX_HEAD_DIM = 128
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not_triton(q: Tensor) -> str | None:
    """Return why the Triton kernels can't take these inputs, or None if they can."""
    if q.dtype not in TRITON_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[2] > MAX_HEAD_DIM:
        return f"the kernels take heads of at most {MAX_HEAD_DIM} columns, not {q.shape[2]}"
    if q.device.type != "cuda" and not INTERPRET:
        return f"{q.device.type} tensors run only in Triton's interpreter, with TRITON_INTERPRET=1"
    return None


def require_triton(q: Tensor) -> None:
    """Raise RuntimeError where the Triton kernels can't take these inputs."""
    reason = why_not_triton(q)
    if reason:
        raise RuntimeError(f"alibi_attention: impl='triton' can't run: {reason}; use impl='auto'")


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Tensor,
    slopes: Tensor,
    offsets: Tensor,
    num_prefix: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    bounds = check_offsets(offsets, q.shape[0])
    if impl == "triton":
        require_triton(q)
        from modaltune.kernels.alibi_attn.triton_kernels import launch_alibi_attn_fwd

        with torch.cuda.device_of(q):
            return launch_alibi_attn_fwd(q, k, v, grid, slopes, bounds, num_prefix, scale)
    return cpu.alibi_attention_cpu_fwd(q, k, v, grid, slopes, bounds, num_prefix, scale)


def _fwd_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))


def _empty_grads(q: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory `[N, H, d]` for the gradients needed, no elements for the others."""
    shapes = [q.shape if need else (0,) for need in needs]
    first, second, third = (torch.empty(s, dtype=q.dtype, device=q.device) for s in shapes)
    return first, second, third


def _bwd(
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
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = check_offsets(offsets, q.shape[0])
    grads = _empty_grads(q, needs)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    arguments = (grad_out, q, k, v, grid, slopes, out, lse, bounds, num_prefix, scale, wanted)
    if impl == "triton":
        require_triton(q)
        from modaltune.kernels.alibi_attn.triton_kernels import launch_alibi_attn_bwd

        with torch.cuda.device_of(q):
            launch_alibi_attn_bwd(*arguments)
    else:
        cpu.alibi_attention_cpu_bwd(*arguments)
    return grads


def _bwd_fake(_grad_out: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(q, rest[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, grid, slopes, offsets, ctx.num_prefix, ctx.scale, ctx.impl = inputs
    out, lse = output
    ctx.needs = list(ctx.needs_input_grad[:3])
    # The gradient of v alone reads neither v nor the output.
    scores_need = ctx.needs[0] or ctx.needs[1]
    kept = (v, out) if scores_need else (None, None)
    ctx.save_for_backward(q, k, kept[0], grid, slopes, kept[1], lse, offsets)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    none: list[Tensor | None] = [None] * 9
    if grad_out is None:
        return tuple(none)
    grads = torch.ops.modaltune.alibi_attn_bwd(
        grad_out, *ctx.saved_tensors, ctx.num_prefix, ctx.scale, ctx.needs, ctx.impl
    )
    none[:3] = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
    return tuple(none)


def _autocast_fwd(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, slopes: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Run the GPU kernels in the dtype of autocast; slopes keep theirs.

    The CPU path computes halves in float32, so casting would only lose bits. A rounded slope is a
    bias off by up to 0.4 % of it, which at a hundred cells changes weights by a factor.
    """
    device = q.device.type
    if rest[-1] == "triton" and q.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast(device, enabled=False):
        return torch.ops.modaltune.alibi_attn_fwd(q, k, v, grid, slopes, *rest)


_SHARED = "Tensor offsets, int num_prefix, float scale"
define(
    f"alibi_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor grid, Tensor slopes, {_SHARED}, "
    "str impl) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
define(
    "alibi_attn_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor? v, Tensor grid, Tensor slopes, "
    f"Tensor? out, Tensor lse, {_SHARED}, bool[] needs, str impl) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
differentiable("alibi_attn_fwd", _setup_context, _backward)
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("alibi_attn_fwd", _autocast_fwd, _key)
