"""`extract` on the CPU against the literal extractor: METHOD 3.6 in torch calls, map by map."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modaltune.benchmarks.injection import (
    HEADS,
    INNER,
    TOKENS,
    WIDTH,
    attend,
    layer_norm,
    linear,
    run_benchmark,
)
from modaltune.kernels import extract


def literal_extract(
    x: Tensor, modal: Tensor, weights: Mapping[str, Tensor], heads: int = HEADS
) -> Tensor:
    """Return the extractor's attention with its residuals, `[G, D]`, before the FFN.

    Args:
        x: `[L, D]` tiles of a case.
        modal: `[G, D]` its modal tokens.
        weights: As of `draw_weights`; without `reduce` and `expand` the inner width is D.
        heads: Of the attention.
    """
    placed = layer_norm(modal, weights, "norm") + weights["positions"]
    q = linear(linear(placed, weights, "reduce"), weights, "query")
    kv = layer_norm(x, weights, "norm_kv")
    attended = attend(q, linear(kv, weights, "key"), linear(kv, weights, "value"), heads)
    return 2 * modal + linear(linear(attended, weights, "out"), weights, "expand")


def our_extract(
    x: Tensor, modal: Tensor, weights: Mapping[str, Tensor], heads: int = HEADS, impl: str = "auto"
) -> Tensor:
    """Return the same through `extract`."""
    w = weights
    placed = layer_norm(modal, w, "norm") + w["positions"]
    attended = extract(
        linear(linear(placed, w, "reduce"), w, "query")[None],
        x,
        norm_weight=w["norm_kv_weight"],
        norm_bias=w["norm_kv_bias"],
        kv_weight=torch.cat([w["key_weight"], w["value_weight"]]),
        kv_bias=torch.cat([w["key_bias"], w["value_bias"]]),
        num_heads=heads,
        impl=impl,
    )[0]
    return 2 * modal + linear(linear(attended, w, "out"), w, "expand")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""

    def flops(tiles: int) -> float:
        return 4.0 * tiles * INNER * (WIDTH + TOKENS)

    return run_benchmark("extraction", flops, (our_extract, literal_extract), arguments)


if __name__ == "__main__":
    sys.exit(main())
