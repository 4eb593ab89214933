"""Layers of a slide encoder: as frozen ones without a trace in memory, or trained as torch does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modaltune.kernels import frozen_ffn, frozen_linear, frozen_qkv


def _impl(impl: str, *modules: nn.Module | None) -> str:
    """Return the implementation: the reference, which is plain torch, for what is trained.

    These ops have no Triton path: on a GPU torch's own products are the fastest.
    """
    trained = any(
        p.requires_grad for module in modules if module is not None for p in module.parameters()
    )
    if trained and torch.is_grad_enabled():
        return "reference"
    return "auto" if impl == "triton" else impl


def linear(
    layer: nn.Module, x: Tensor, activation: str | None = None, *, impl: str = "auto"
) -> Tensor:
    """Return `activation(layer(x))`; frozen, it saves nothing of x without an activation.

    Args:
        layer: An `nn.Linear`; one with trained parameters runs as torch's own.
        x: `[..., in_features]`.
        activation: None or `gelu`.
        impl: As the model's kernels run.
    """
    weight, bias = _of(layer)
    return frozen_linear(x, weight, bias, activation=activation, impl=_impl(impl, layer))


def qkv_heads(
    layer: nn.Module, x: Tensor, heads: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values `[N, heads, d]` of `[N, D]`.

    Args:
        layer: An `nn.Linear`, D to 3 heads d.
        x: Normed tokens.
        heads: Attention heads.
        impl: As the model's kernels run.
    """
    weight, bias = _of(layer)
    q, k, v = frozen_qkv(x, weight, bias, impl=_impl(impl, layer))
    return q.unflatten(1, (heads, -1)), k.unflatten(1, (heads, -1)), v.unflatten(1, (heads, -1))


def feed_forward(
    norm: nn.LayerNorm,
    layer1: nn.Module,
    inner_norm: nn.LayerNorm | None,
    layer2: nn.Module,
    x: Tensor,
    impl: str = "auto",
) -> Tensor:
    """Return `layer2(inner_norm(gelu(layer1(norm(x)))))`; frozen, it saves x alone.

    Args:
        norm: LayerNorm of width D.
        layer1: An `nn.Linear`, D to W.
        inner_norm: LayerNorm of width W with the eps of `norm`, or None.
        layer2: An `nn.Linear`, W to D.
        x: `[N, D]`.
        impl: As the model's kernels run.
    """
    weight1, bias1 = _of(layer1)
    weight2, bias2 = _of(layer2)
    return frozen_ffn(
        x,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        weight1=weight1,
        bias1=bias1,
        inner_weight=None if inner_norm is None else inner_norm.weight,
        inner_bias=None if inner_norm is None else inner_norm.bias,
        weight2=weight2,
        bias2=bias2,
        eps=norm.eps,
        impl=_impl(impl, norm, layer1, inner_norm, layer2),
    )


def _of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"layer must be an nn.Linear, got {type(layer).__name__}")
    return layer.weight, layer.bias
