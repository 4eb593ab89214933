"""Public entry of the frozen feed-forward branch."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels._checks import check_float, check_shape, is_autocast_on, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.frozen_feedforward import ops
from modaltune.kernels.frozen_feedforward.reference import frozen_ffn_reference


def frozen_ffn(
    x: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    inner_weight: Tensor | None = None,
    inner_bias: Tensor | None = None,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Run the feed-forward branch of a pre-norm transformer whose weights need no gradient.

        y = W2 LN'(gelu(W1 LN(x) + b1)) + b2        LN' only with inner_weight (sub-LN)

    Differentiable in x alone (the reference: in everything), which is all that is saved: `4 D`
    bytes a row in float32, and nothing where the caller keeps x anyway. The backward pass computes
    the rest again. On the CPU it runs in blocks of rows: extra memory does not grow with N.
    Products go to the library that `frozen_linear` describes. The residual and dropout are the
    caller's.

    Args:
        x: `[N, D]`.
        norm_weight: `[D]` of the first LayerNorm, in the dtype of `x` like all others (under
            autocast any floating dtype).
        norm_bias: `[D]`.
        weight1: `[W, D]`.
        bias1: `[W]`.
        inner_weight: `[W]` of the LayerNorm before the second product; None leaves it out.
        inner_bias: `[W]`, given with inner_weight.
        weight2: `[D, W]`.
        bias2: `[D]`.
        eps: Of both norms.
        impl: `auto`, `cpu` or `reference`, which is plain torch.

    Returns:
        `[N, D]` in the dtype of `x`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices or impl break the rules above, or a weight wants a
            gradient.
        RuntimeError: `impl` was asked for by name and can't run here.

    Source: sub-LN after Magneto (Wang et al., 2022), as LongNet uses it; METHOD 3.2.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("weight1", weight1, (None, x.shape[1]))
    wide, width = weight1.shape
    require(
        (inner_weight is None) == (inner_bias is None),
        "inner_weight and inner_bias must be given together, got one of them",
    )
    named = {
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
        "weight1": (weight1, (wide, width)),
        "bias1": (bias1, (wide,)),
        "inner_weight": (inner_weight, (wide,)),
        "inner_bias": (inner_bias, (wide,)),
        "weight2": (weight2, (width, wide)),
        "bias2": (bias2, (width,)),
    }
    mixed = is_autocast_on(x.device)
    for name, (tensor, shape) in named.items():
        if tensor is None:
            continue
        check_shape(name, tensor, shape)
        require(
            tensor.device == x.device and (mixed or tensor.dtype == x.dtype),
            f"{name} must have the dtype and device of x ({x.dtype}, {x.device}), got "
            f"{tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )
        require(
            impl == "reference" or not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} must not need a gradient; call {name}.requires_grad_(False), or take "
            "impl='reference' for trained weights",
        )
    tensors = (x, norm_weight, norm_bias, weight1, bias1, inner_weight, inner_bias, weight2, bias2)
    if choose_impl("frozen_ffn", impl, x.device, ("cpu", "reference")) == "reference":
        return frozen_ffn_reference(*tensors, eps)
    return ops.frozen_ffn_fwd(*tensors, eps)
