"""What this machine can do at best with float32 products and with attention, in FLOP/s."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.kernels import dilated_attention, frozen_linear, pin_products, product_libraries

# Products of the slide encoder in blocks that stay in the cache: what libraries do best.
_PRODUCTS = ((1024, 768, 3072), (1024, 3072, 768), (2048, 768, 2304))
_Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_ATTENTION = (1024, 16, 48)  # rows, heads, head width: the shortest published segment


@dataclass(frozen=True)
class Rates:
    """Best rates seen, FLOP/s; a busy machine shows less than it can, so rounds are joined.

    Attributes:
        products: Of float32 products, by any library.
        attention: Of attention, forward, by any implementation.
        attention_training: Of attention forward and backward together.
    """

    products: float = 0.0
    attention: float = 0.0
    attention_training: float = 0.0

    def better(self, other: Rates) -> Rates:
        """Return the best of both."""
        return Rates(
            max(self.products, other.products),
            max(self.attention, other.attention),
            max(self.attention_training, other.attention_training),
        )

    def seconds(self, products: float, attention: float, training: bool) -> float:
        """Return the least time of so many FLOPs."""
        rate = self.attention_training if training else self.attention
        return products / self.products + attention / rate


def _best(run: Callable[[], object], rounds: int) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def measure_rates(rounds: int = 3, training: bool = True) -> Rates:
    """Measure the rates, best of some rounds; under a second on two idle cores.

    Args:
        rounds: Of each product and attention.
        training: Measure attention's backward pass, too.
    """
    with torch.inference_mode():
        products = max(_product_rate(name, rounds) for name in product_libraries())
    rates = [_attention_rates(run, rounds, training, _heads()) for run in (_fused, _ours)]
    attention, both = (max(values) for values in zip(*rates, strict=True))
    return Rates(products, attention, both if training else attention)


def measure_gpu_rates(dtype: torch.dtype, rounds: int = 10, training: bool = True) -> Rates:
    """Measure what this GPU does at best: cuBLAS products, and torch's fused attention or ours.

    Args:
        dtype: Of the products and the attention.
        rounds: Of each.
        training: Measure attention's backward pass, too.
    """
    with torch.inference_mode():
        rates = []
        for rows, inner, outer in _PRODUCTS:
            x = torch.randn(16 * rows, inner, device="cuda", dtype=dtype)
            weight = torch.randn(outer, inner, device="cuda", dtype=dtype)
            seconds = _best(lambda x=x, weight=weight: _done(F.linear(x, weight)), rounds)  # type: ignore[misc]
            rates.append(2.0 * x.numel() * outer / seconds)
    shape = (8 * _ATTENTION[0], *_ATTENTION[1:])
    heads = tuple(torch.randn(*shape, device="cuda", dtype=dtype) for _ in range(3))
    attention = [
        _attention_rates(lambda q, k, v, run=run: _done(run(q, k, v)), rounds, training, heads)  # type: ignore[misc]
        for run in (_fused, _ours)
    ]
    forward, both = (max(values) for values in zip(*attention, strict=True))
    return Rates(max(rates), forward, both if training else forward)


def _done(result: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return result


def _attention_rates(
    run: _Attention, rounds: int, training: bool, heads: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Return the rates forward, and forward and backward together (0 unless `training`)."""
    flops = 4.0 * heads[0].shape[0] ** 2 * heads[0].shape[1] * heads[0].shape[2]
    with torch.inference_mode():
        forward = flops / _best(lambda: run(*heads), rounds)
    return forward, 3 * flops / _best(lambda: _back(run, heads), rounds) if training else 0.0


def _product_rate(library: str, rounds: int) -> float:
    """Return the rate of a library at its best shape; the pin in force is put back."""
    from modaltune.kernels import product_choice

    before = product_choice()
    pin_products(library)
    try:
        rates = []
        for rows, inner, outer in _PRODUCTS:
            x, weight = torch.randn(rows, inner), torch.nn.Parameter(torch.randn(outer, inner))
            weight.requires_grad_(False)
            seconds = _best(lambda x=x, weight=weight: frozen_linear(x, weight), rounds)  # type: ignore[misc]
            rates.append(2.0 * rows * inner * outer / seconds)
        return max(rates)
    finally:
        pin_products(before.library if before.why == "pinned" else None)


def _heads() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*_ATTENTION, generator=generator) for _ in range(3))
    return q, k, v


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dilated_attention(q, k, v, segment_lengths=(q.shape[0],), dilation_ratios=(1,))


def _back(run: _Attention, heads: tuple[Tensor, ...]) -> None:
    inputs = tuple(t.detach().requires_grad_() for t in heads)
    out = run(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    if out.device.type == "cuda":
        torch.cuda.synchronize()
