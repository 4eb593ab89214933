"""Injector: tiles attend to modal tokens, gated into the slide encoder's stream."""

from __future__ import annotations

import torch
from torch import Tensor

from modaltune.kernels._checks import check_float, check_offsets, check_shape, require
from modaltune.kernels._dispatch import choose_impl
from modaltune.kernels.injection import ops
from modaltune.kernels.injection.reference import inject_reference


def inject(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gamma: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    num_heads: int,
    offsets: Tensor | None = None,
    num_prefix: int = 0,
    key_mask: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Let every tile attend to its case's modal tokens: `x + gamma * (x + attn(LN(x)))`.

    Query and output projections come folded (`[E, D]` and `[D, E]`): a product of the adapter's
    two linear maps on either side, which is exact and a quarter of the work.

    The backward pass recomputes everything: beyond its inputs a call saves only `offsets`
    (`8 * (B + 1)` bytes), and nothing at all where no input needs a gradient. Gradients of frozen
    inputs are not computed.

    Args:
        x: `[N, D]` tokens of all cases, packed case after case without padding.
        keys: `[B, G, E]` projected keys of the modal tokens, in the dtype of `x` like every other
            tensor (under autocast any floating dtype); E is heads x head width. The Triton path
            takes at most 128 tokens, and heads that come to at most 256 columns when each is
            padded to a power of two from 16 on.
        values: `[B, G, E]` projected values.
        gamma: `[D]` gate; zero leaves the stream untouched.
        norm_weight: `[D]` LayerNorm scale on the tiles.
        norm_bias: `[D]` LayerNorm shift.
        query_weight: `[E, D]` folded query projection.
        query_bias: `[E]`.
        output_weight: `[D, E]` folded output projection.
        output_bias: `[D]`.
        num_heads: Attention heads; divides E.
        offsets: `[B + 1]` integer rows of each case; None for one case.
        num_prefix: Rows at the start of each case (cls) that pass through unchanged.
        key_mask: `[B, G]` bool, False for tokens of a missing modality. A case without any token
            passes through unchanged.
        eps: LayerNorm epsilon.
        impl: `auto`, `triton` (CUDA; CPU tensors only under `TRITON_INTERPRET=1`), `cpu` or
            `reference`.

    Returns:
        `[N, D]` in the dtype of `x`.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes, dtypes, devices or offsets contradict each other.
        RuntimeError: The implementation asked for can't run here.

    Source: ModalTune (Ramanathan et al., 2025), injector of the Modal Adapter.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_shape("keys", keys, (None, None, None))
    cases, tokens, inner = keys.shape
    width = x.shape[1]
    check_shape("values", values, (cases, tokens, inner))
    check_shape("query_weight", query_weight, (inner, width))
    check_shape("output_weight", output_weight, (width, inner))
    check_shape("query_bias", query_bias, (inner,))
    rows = {"norm_weight": norm_weight, "norm_bias": norm_bias, "output_bias": output_bias}
    for name, tensor in {"gamma": gamma, **rows}.items():
        check_shape(name, tensor, (width,))
    if key_mask is not None:
        check_shape("key_mask", key_mask, (cases, tokens))
        # An integer mask would index tokens 0 and 1 instead of choosing among them.
        require(key_mask.dtype == torch.bool, f"key_mask must be bool, got {key_mask.dtype}")
    require(
        num_heads >= 1 and inner % num_heads == 0,
        f"num_heads must divide {inner}, got {num_heads}",
    )
    require(num_prefix >= 0, f"num_prefix must be at least 0, got {num_prefix}")
    bounds = check_offsets(offsets, x.shape[0])
    require(
        bounds.numel() == cases + 1,
        f"offsets must hold one row range per case ({cases}), got {bounds.numel() - 1}",
    )
    mixed = torch.is_autocast_enabled(x.device.type)
    named = {"keys": keys, "values": values, "gamma": gamma, **rows}
    named |= {"query_weight": query_weight, "query_bias": query_bias}
    for name, tensor in {**named, "output_weight": output_weight}.items():
        require(
            tensor.device == x.device and (mixed or tensor.dtype == x.dtype),
            f"{name} must have the dtype and device of x ({x.dtype}, {x.device}), "
            f"got {tensor.dtype}, {tensor.device}; cast it, or run under torch.autocast",
        )
    dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
    beyond = ops.beyond_triton(dtype, inner, num_heads, tokens)
    if impl == "triton" and beyond:
        raise RuntimeError(f"inject: impl='triton' {beyond}; use impl='auto'")
    available = ("cpu", "reference") if beyond else ("triton", "cpu", "reference")
    chosen = choose_impl("inject", impl, x.device, available)
    weights = (norm_weight, norm_bias, query_weight, query_bias, output_weight, output_bias)
    if chosen != "reference":
        return ops.inject_fwd(
            x, keys, values, gamma, *weights, key_mask, bounds, num_heads, num_prefix, eps, chosen
        )
    return inject_reference(
        x,
        keys,
        values,
        gamma,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        query_weight=query_weight,
        query_bias=query_bias,
        output_weight=output_weight,
        output_bias=output_bias,
        num_heads=num_heads,
        offsets=bounds,
        num_prefix=num_prefix,
        key_mask=key_mask,
        eps=eps,
    )
