"""Public entry of products with frozen weights, and of the choice of their library."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels._checks import check_float, check_shape, is_autocast_on, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels._product_choice import ProductChoice as ProductChoice
from modaltune.kernels._product_choice import known_product_choice as known_product_choice
from modaltune.kernels._product_choice import pin_products as pin_products
from modaltune.kernels._product_choice import product_choice as product_choice
from modaltune.kernels._product_choice import product_libraries as product_libraries
from modaltune.kernels._product_choice import products_kept as products_kept
from modaltune.kernels._products import PACKED
from modaltune.kernels._products import most_packed_bytes as most_packed_bytes
from modaltune.kernels.frozen_product import ops
from modaltune.kernels.frozen_product.reference import frozen_linear_reference


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multiply by a weight that needs no gradient: `activation(x W^T + b)`.

    On the CPU, float32 products go to the fastest library of the machine: oneDNN, numpy's BLAS or
    torch's. Which one is measured once and kept in a file; `MODALTUNE_PRODUCTS=torch` or
    `pin_products("torch")` pins it, `product_choice()` tells it. The libraries agree to float32
    rounding. oneDNN keeps a reordered copy of the weight (one more for gradients) as long as the
    weight lives, at most `MODALTUNE_PACKED_MIB` in all; a changed weight is noticed. Elsewhere, and
    in other dtypes, this is torch.

    Differentiable in x alone (the reference: in everything). The backward pass is `grad W`; it
    saves nothing of the input. With an activation x is saved (`4 K` bytes a row) and `x W^T`
    computed again.

    Args:
        x: `[..., K]`.
        weight: `[M, K]`, in the dtype of `x` (under autocast any floating dtype).
        bias: `[M]` or None.
        activation: None, or `gelu` for the exact GELU (half precision: computed in float32).
        impl: `auto`, `cpu` or `reference`, which is plain torch.

    Returns:
        `[..., M]` in the dtype of `x`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices, activation or impl break the rules above, or the
            weight or bias wants a gradient.
        RuntimeError: `impl` was asked for by name and can't run here.
    """
    check_float("x", x)
    require(x.dim() >= 1, "x must be [..., K], got a scalar")
    check_shape("weight", weight, (None, x.shape[-1]))
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    require(activation in (None, "gelu"), f"activation must be None or gelu, got {activation!r}")
    _check_frozen(x, weight, bias, impl)
    if choose_impl("frozen_linear", impl, x.device, ("cpu", "reference")) == "reference":
        return frozen_linear_reference(x, weight, bias, activation)
    return ops.frozen_linear_fwd(x, weight, bias, activation or "")


def _check_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> None:
    mixed = is_autocast_on(x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        require(
            tensor.device == x.device and (mixed or tensor.dtype == x.dtype),
            f"{name} must have the dtype and device of x ({x.dtype}, {x.device}), got "
            f"{tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )
        require(
            impl == "reference" or not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} must not need a gradient; call {name}.requires_grad_(False), or take "
            "impl='reference' for a trained layer",
        )


def frozen_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Project to queries, keys and values by one frozen weight; see `frozen_linear`.

    Each result lies in memory of its own: smaller pieces, which the allocator finds again, and no
    gradient padded to the width of all three. Nothing is saved for backward but the weight.

    Args:
        x: `[N, K]`.
        weight: `[3 M, K]`: the weights of queries, keys and values under each other.
        bias: `[3 M]` or None.
        impl: `auto`, `cpu` or `reference`, which is plain torch.

    Returns:
        Queries, keys and values, `[N, M]` each, in the dtype of `x`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices or impl break the rules above, or the weight or bias
            wants a gradient.
        RuntimeError: `impl` was asked for by name and can't run here.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("weight", weight, (None, x.shape[1]))
    rows = weight.shape[0]
    require(rows % 3 == 0, f"weight must have a multiple of 3 rows, got {rows}")
    if bias is not None:
        check_shape("bias", bias, (rows,))
    _check_frozen(x, weight, bias, impl)
    if choose_impl("frozen_qkv", impl, x.device, ("cpu", "reference")) == "reference":
        q, k, v = frozen_linear_reference(x, weight, bias, None).chunk(3, dim=1)
        return q, k, v
    q, k, v = ops.frozen_qkv_fwd(x, weight, bias)
    return q, k, v


def packed_bytes() -> int:
    """Return the bytes of the reordered copies of frozen weights that are alive."""
    return PACKED.bytes_kept()
