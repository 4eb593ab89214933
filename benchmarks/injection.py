"""`inject` on the CPU against the literal injector: METHOD 3.6 in torch calls, map by map."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.engine.errors import InputError
from modaltune.kernels import inject, product_choice
from modaltune.testing import allowed_error, cast

CSV_NAME = "adapter_attention.csv"
WIDTH, INNER, HEADS, TOKENS, EPS = 768, 192, 12, 65, 1e-5


def draw_weights(seed: int = 0) -> dict[str, Tensor]:
    """Return the weights of one injector or extractor (without its FFN), float32.

    Maps `<name>_weight` `[out, in]` and `<name>_bias` `[out]`: `reduce` D -> E, `query` E -> E,
    `key` and `value` D -> E, `out` E -> E, `expand` E -> D; `norm` and `norm_kv` scale and shift
    `[D]`; `gamma` `[D]`; `positions` `[G, D]`.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = {
        "reduce": (INNER, WIDTH),
        "query": (INNER, INNER),
        "key": (INNER, WIDTH),
        "value": (INNER, WIDTH),
        "out": (INNER, INNER),
        "expand": (WIDTH, INNER),
    }
    made = {}
    for name, (outputs, inputs) in maps.items():
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        made[f"{name}_weight"] = weight
        made[f"{name}_bias"] = 0.2 * torch.randn(outputs, generator=generator)
    for name in ("norm", "norm_kv"):
        made[f"{name}_weight"] = 1 + 0.2 * torch.randn(WIDTH, generator=generator)
        made[f"{name}_bias"] = 0.2 * torch.randn(WIDTH, generator=generator)
    made["gamma"] = 0.5 * torch.randn(WIDTH, generator=generator)
    made["positions"] = 0.5 * torch.randn(TOKENS, WIDTH, generator=generator)
    return made


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Return multi-head attention of `[L, E]` queries over `[G, E]` keys, by torch's fused call."""
    by_head = (t.unflatten(-1, (heads, -1)).transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(*by_head)[0].transpose(0, 1).flatten(1)


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Apply one map by name; a map that is absent changes nothing."""
    if f"{name}_weight" not in weights:
        return x
    return F.linear(x, weights[f"{name}_weight"], weights[f"{name}_bias"])


def layer_norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Apply one LayerNorm by name."""
    scale, shift = weights[f"{name}_weight"], weights[f"{name}_bias"]
    return F.layer_norm(x, x.shape[-1:], scale, shift, EPS)


def literal_inject(
    x: Tensor, modal: Tensor, weights: Mapping[str, Tensor], heads: int = HEADS
) -> Tensor:
    """Return the injector `[L, D]` of METHOD 3.6, nothing folded.

    Args:
        x: `[L, D]` tiles of a case.
        modal: `[G, D]` its modal tokens.
        weights: As of `draw_weights`; without `reduce` and `expand` the inner width is D.
        heads: Of the attention.
    """
    q = linear(linear(layer_norm(x, weights, "norm"), weights, "reduce"), weights, "query")
    kv = layer_norm(modal, weights, "norm_kv") + weights["positions"]
    attended = attend(q, linear(kv, weights, "key"), linear(kv, weights, "value"), heads)
    update = linear(linear(attended, weights, "out"), weights, "expand")
    return x + weights["gamma"] * (x + update)


def our_inject(
    x: Tensor, modal: Tensor, weights: Mapping[str, Tensor], heads: int = HEADS, impl: str = "auto"
) -> Tensor:
    """Return the same through `inject`; folding the maps is part of the call."""
    w = weights
    query, output = (w["query_weight"], w["query_bias"]), (w["out_weight"], w["out_bias"])
    if "reduce_weight" in w:
        query = (query[0] @ w["reduce_weight"], linear(w["reduce_bias"], w, "query"))
        output = (w["expand_weight"] @ output[0], linear(output[1], w, "expand"))
    kv = layer_norm(modal, w, "norm_kv") + w["positions"]
    return inject(
        x,
        linear(kv, w, "key")[None],
        linear(kv, w, "value")[None],
        w["gamma"],
        norm_weight=w["norm_weight"],
        norm_bias=w["norm_bias"],
        query_weight=query[0],
        query_bias=query[1],
        output_weight=output[0],
        output_bias=output[1],
        num_heads=heads,
        impl=impl,
    )


Form = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def gate(ours: Form, rival: Form, x: Tensor, modal: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Refuse to time an answer that is off by more than STYLE allows a kernel.

    Raises:
        InputError: Ours is further from the rival in float64 than twice the rival in float32, plus
            a rounding step.
    """
    exact = rival(x.double(), modal.double(), cast(weights, torch.float64))
    limit = allowed_error(exact, rival(x, modal, weights), torch.float32)
    error = float((ours(x, modal, weights).double() - exact).abs().max())
    if not error <= limit:
        raise InputError(
            f"a benchmark must time right answers, got an error of {error:.3g} where {limit:.3g} "
            "is allowed; run the tests of the op"
        )


def interleaved(ours: Form, rival: Form, x: Tensor, modal: Tensor, runs: int) -> dict[str, object]:
    """Time both forms in turn, after the gate; return the figures of a row."""
    weights = draw_weights()
    gate(ours, rival, x[:2000], modal, weights)
    seconds: dict[Form, list[float]] = {ours: [], rival: []}
    for run in range(runs + 1):
        for form, found in seconds.items():
            start = time.perf_counter()
            form(x, modal, weights)
            if run:  # the first run warms up
                found.append(time.perf_counter() - start)
    figures: dict[str, object] = {}
    for name, form in (("ours", ours), ("rival", rival)):
        tenths = statistics.quantiles(seconds[form], n=10, method="inclusive")
        for place, value in (("p20", tenths[1]), ("p50", tenths[4]), ("p80", tenths[7])):
            figures[f"{name}_{place}_s"] = round(value, 5)
        figures[f"{name}_min_s"] = round(min(seconds[form]), 5)
    ratio = statistics.median(seconds[rival]) / statistics.median(seconds[ours])
    best = min(seconds[rival]) / min(seconds[ours])
    return {**figures, "ratio": round(ratio, 3), "ratio_of_minima": round(best, 3)}


def run_benchmark(
    op: str,
    flops: Callable[[int], float],
    forms: tuple[Form, Form],
    arguments: Sequence[str] | None,
) -> int:
    """Time one op from the command line; return the exit code.

    Args:
        op: Name for the row.
        flops: Multiplications and additions that the result needs, by tiles.
        forms: Ours and the literal rival.
        arguments: Of the command line, or None for those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m modaltune.benchmarks.{op}")
    parser.add_argument("--tiles", type=int, default=25_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each form, at least 2")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    if options.tiles < 1 or options.threads < 1 or options.runs < 2:
        parser.error("--tiles and --threads must be at least 1, --runs at least 2")
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(options.tiles, WIDTH, generator=generator)
    modal = torch.randn(TOKENS, WIDTH, generator=generator)
    try:
        folder = results_folder(options.results)
        with torch.no_grad():
            figures = interleaved(*forms, x, modal, options.runs)
        row = {
            "time": timestamp(),
            "commit": commit_id(),
            "device": f"{cpu_model()}, {options.threads} threads of {os.cpu_count()}",
            "torch": torch.__version__,
            "products": product_choice().library,
            "op": op,
            "rival": "literal",
            "mode": "forward",
            "dtype": "float32",
            "tiles": options.tiles,
            "tokens": TOKENS,
            "runs": options.runs,
            **figures,
            "gflops": round(flops(options.tiles) / float(str(figures["ours_p50_s"])) / 1e9, 1),
        }
        if folder is not None:
            append_row(folder / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = "{op}, {tiles} tiles: {ours_p50_s} s, literal {rival_p50_s} s, {ratio} times"
    print(json.dumps(row) if options.json else line.format(**row))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""

    def flops(tiles: int) -> float:
        return 4.0 * tiles * INNER * (WIDTH + TOKENS)

    return run_benchmark("injection", flops, (our_inject, literal_inject), arguments)


if __name__ == "__main__":
    sys.exit(main())
