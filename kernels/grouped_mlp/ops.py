"""Operators `modaltune::pathway_mlp_fwd` and `modaltune::pathway_mlp_bwd`; no Triton at import.

The forward one carries the autograd formula, which calls the backward one. Nothing but the inputs
is saved: the backward pass computes both layers, and the bits of dropout, again.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._checks import check_offsets, require
from modaltune.kernels._interpret import INTERPRET
from modaltune.kernels._library import LIBRARY, define, differentiable
from modaltune.kernels.grouped_mlp.cpu import pathway_mlp_cpu_bwd, pathway_mlp_cpu_fwd

MAX_TRITON_WIDTH = 256  # a row of hidden units lies in registers
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INPUTS = (
    "Tensor expression, Tensor gene_index, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, Tensor offsets, float dropout_p, SymInt seed"
)
_IS_FLOAT = (True, False, True, True, True, True)  # of the six tensors before the offsets


def why_not_triton(dtype: torch.dtype, width: int) -> str | None:
    """Return why the Triton kernels do not take a call, or None if they do."""
    if dtype not in TRITON_DTYPES:
        return f"takes float16, bfloat16 or float32, got {dtype}"
    if width > MAX_TRITON_WIDTH:
        return f"takes networks at most {MAX_TRITON_WIDTH} units wide, got {width}"
    return None


def check_members(gene_index: Tensor, offsets: Tensor, genes: int) -> Tensor:
    """Return the offsets as int64 on the CPU; they and the gene index are looked at, once each.

    Raises:
        ValueError: A pathway is empty, there is none, or an index is out of range.
    """
    bounds = check_offsets(offsets, gene_index.numel())
    require(
        bounds.numel() > 1 and bool((bounds.diff() > 0).all()),
        "offsets must hold at least one pathway, and every pathway at least one gene, got "
        f"{bounds.tolist()[:8]}",
    )
    low, high = _range_of(gene_index)
    require(
        low >= 0 and high < genes,
        f"gene_index must lie in 0..{genes - 1}, got {low}..{high}",
    )
    return bounds


_RANGES = torch.utils.weak.WeakTensorKeyDictionary()


def _range_of(gene_index: Tensor) -> tuple[int, int]:
    """Return the smallest and largest index; a tensor that has not changed is not read again.

    Reading it would make every call on a GPU wait for the device.
    """
    version = -1 if gene_index.is_inference() else gene_index._version
    known = _RANGES.get(gene_index)
    if known is None or version < 0 or known[0] != version:
        low, high = (int(t) for t in torch.aminmax(gene_index))
        known = _RANGES[gene_index] = (version, low, high)
    return known[1], known[2]


def _check_device(x: Tensor) -> None:
    if x.device.type != "cuda" and not INTERPRET:
        raise RuntimeError(
            "pathway_mlp: impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the "
            f"environment before Python starts, got {x.device}; use impl='auto'"
        )


def _forward(*arguments: Any) -> Tensor:
    *tensors, offsets, dropout_p, seed, impl = arguments
    bounds = check_members(tensors[1], offsets, tensors[0].shape[1])
    given = [*tensors, bounds, dropout_p, seed]
    if impl == "cpu":
        return pathway_mlp_cpu_fwd(*given)
    _check_device(tensors[0])
    from modaltune.kernels.grouped_mlp.triton_kernels import launch_pathway_mlp_fwd

    with torch.cuda.device_of(tensors[0]):
        return launch_pathway_mlp_fwd(*given)


def _forward_fake(expression: Tensor, _gene_index: Tensor, *rest: Any) -> Tensor:
    bias1 = rest[1]
    return expression.new_empty(expression.shape[0], *bias1.shape)


def _backward(*arguments: Any) -> list[Tensor]:
    grad_out, *tensors, offsets, dropout_p, seed, needs, impl = arguments
    bounds = check_members(tensors[1], offsets, tensors[0].shape[1])
    given = [grad_out, *tensors, bounds, dropout_p, seed, needs]
    if impl == "cpu":
        return pathway_mlp_cpu_bwd(*given)
    _check_device(grad_out)
    from modaltune.kernels.grouped_mlp.triton_kernels import launch_pathway_mlp_bwd

    with torch.cuda.device_of(grad_out):
        return launch_pathway_mlp_bwd(*given)


def _backward_fake(_grad_out: Tensor, *rest: Any) -> list[Tensor]:
    floats = [t for t, is_float in zip(rest[:6], _IS_FLOAT, strict=True) if is_float]
    return [t.new_empty(t.shape) for t, need in zip(floats, rest[9], strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dropout_p, ctx.seed, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:6]
    needs = [need for need, is_float in zip(wanted, _IS_FLOAT, strict=True) if is_float]
    found = torch.ops.modaltune.pathway_mlp_bwd(
        grad_out, *ctx.saved_tensors, ctx.dropout_p, ctx.seed, needs, ctx.impl
    )
    grads = iter(found)
    return (*(next(grads) if need else None for need in wanted), None, None, None, None)


def _autocast(*arguments: Any) -> Tensor:
    """Run the GPU kernels in the dtype of autocast, the CPU path in the widest of its inputs.

    On a CPU half precision is computed in float32, so that casting would cost time and bits.
    """
    device = arguments[0].device.type
    tensors = list(zip(arguments[:6], _IS_FLOAT, strict=True))
    dtype = torch.get_autocast_dtype(device)
    if arguments[-1] == "cpu":
        dtype = reduce(torch.promote_types, (t.dtype for t, is_float in tensors if is_float))
    cast = [t.to(dtype) if is_float else t for t, is_float in tensors]
    with torch.autocast(device, enabled=False):
        return torch.ops.modaltune.pathway_mlp_fwd(*cast, *arguments[6:])


define(f"pathway_mlp_fwd({_INPUTS}, str impl) -> Tensor", _forward, _forward_fake)
define(
    f"pathway_mlp_bwd(Tensor grad_out, {_INPUTS}, bool[] needs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable("pathway_mlp_fwd", _setup_context, _gradients)
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("pathway_mlp_fwd", _autocast, _key)

pathway_mlp_fwd = torch.ops.modaltune.pathway_mlp_fwd
