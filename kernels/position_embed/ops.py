"""Operator `modaltune::position_embed_fwd`; no Triton at import.

Its gradient is a selection of rows and a sum of B rows, written in torch: nothing is saved but the
offsets, and for a single case the gradient of x is a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._checks import check_offsets
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import LIBRARY, define, differentiable
from modaltune.kernels.position_embed.cpu import embed_positions_cpu

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not_triton(dtype: torch.dtype) -> str | None:
    """Return why the Triton kernel does not take a call, or None if it does."""
    if dtype not in TRITON_DTYPES:
        return f"takes float16, bfloat16 or float32, got {dtype}"
    return None


def _forward(x: Tensor, cells: Tensor, cls_token: Tensor, offsets: Tensor, impl: str) -> Tensor:
    bounds = check_offsets(offsets, x.shape[0])
    if impl == "cpu":
        return embed_positions_cpu(x, cells, cls_token, offsets=bounds)
    if x.device.type != "cuda" and not INTERPRET:
        raise RuntimeError(
            "embed_positions: impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the "
            f"environment before Python starts, got {x.device}; use impl='auto'"
        )
    from modaltune.kernels.position_embed.triton_kernels import launch_position_embed_fwd

    with torch.cuda.device_of(x):
        return launch_position_embed_fwd(x, cells, cls_token, bounds)


def _forward_fake(x: Tensor, _cells: Tensor, _cls: Tensor, offsets: Tensor, _impl: str) -> Tensor:
    return x.new_empty(x.shape[0] + offsets.shape[0] - 1, x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, cls_token, offsets, _ = inputs
    ctx.cls_shape, ctx.cls_dtype = cls_token.shape, cls_token.dtype
    ctx.save_for_backward(offsets)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    cases = offsets.shape[0] - 1
    grad_x = grad_cls = None
    if ctx.needs_input_grad[0]:
        if cases == 1:
            grad_x = grad_out[1:]
        else:
            rows = grad_out.shape[0] - cases
            before = torch.arange(1, cases + 1, device=offsets.device)  # cls rows before a tile
            shift = torch.repeat_interleave(before, offsets.diff(), output_size=rows)
            at = torch.arange(rows, device=offsets.device) + shift
            grad_x = grad_out.index_select(0, at.to(grad_out.device))
    if ctx.needs_input_grad[2]:
        at = offsets[:-1] + torch.arange(cases, device=offsets.device)
        exact = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
        total = grad_out.index_select(0, at.to(grad_out.device)).sum(0, dtype=exact)
        grad_cls = total.to(ctx.cls_dtype).reshape(ctx.cls_shape)
    return grad_x, None, grad_cls, None, None


def _autocast(x: Tensor, *rest: Any) -> Tensor:
    """Keep the dtype of x, as an addition under autocast does: it comes from a projection."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.modaltune.position_embed_fwd(x, *rest)


define(
    "position_embed_fwd(Tensor x, Tensor cells, Tensor cls_token, Tensor offsets, str impl) "
    "-> Tensor",
    _forward,
    _forward_fake,
)
differentiable("position_embed_fwd", _setup_context, _gradients)
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("position_embed_fwd", _autocast, _key)

position_embed_fwd = torch.ops.modaltune.position_embed_fwd
