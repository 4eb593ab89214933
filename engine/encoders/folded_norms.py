"""Batch normalisation folded into the convolution before it, in float32, before any rounding.

    norm(conv(x)) = s conv(x) + (b - m s),  s = w / sqrt(v + eps)

so the convolution's weights take the factor s and its bias the rest. Rounding happens once, to the
folded weights; an exporter that folds rounded weights rounds twice and may mix types.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def fold_batch_norms(network: nn.Module, example: Tensor) -> int:
    """Fold every batch normalisation whose input comes straight from a convolution, in place.

    Args:
        network: In evaluation mode, float32.
        example: An input, to see which layer feeds which.

    Returns:
        The number of layers folded.
    """
    pairs = _feeding_convolutions(network, example)
    for name, (convolution, norm) in pairs.items():
        _fold(convolution, norm)
        # timm's normalisations carry their activation.
        rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
        network.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
    return len(pairs)


def _feeding_convolutions(
    network: nn.Module, example: Tensor
) -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return convolution and normalisation by the latter's name; layers used once only."""
    made: dict[int, nn.Conv2d] = {}
    kept: list[Tensor] = []  # alive, so that no other tensor gets the same id
    pairs: dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]] = {}
    calls: dict[int, int] = {}

    def after(module: nn.Module, _: Any, out: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if isinstance(module, nn.Conv2d):
            made[id(out)] = module
            kept.append(out)

    def before(name: str, module: nn.BatchNorm2d, inputs: Any) -> None:
        source = made.get(id(inputs[0]))
        if source is not None:
            pairs[name] = (source, module)

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            handles.append(module.register_forward_hook(after))
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            handles.append(module.register_forward_pre_hook(partial(before, name)))
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    once = {n: p for n, p in pairs.items() if all(calls[id(layer)] == 1 for layer in p)}
    sources = [id(convolution) for convolution, _ in once.values()]
    return {n: p for n, p in once.items() if sources.count(id(p[0])) == 1}


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("norm must have running statistics, got none; fold in evaluation mode")
    spread = torch.rsqrt(variance.double() + norm.eps)
    scale = spread if norm.weight is None else norm.weight.double() * spread
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    weight = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
    convolution.bias = nn.Parameter(shift.float(), requires_grad=False)
