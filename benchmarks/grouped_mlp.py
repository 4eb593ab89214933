"""`pathway_mlp` on the CPU against the literal loop: 331 pairs of linear layers, case by case."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

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
from modaltune.kernels import pathway_mlp
from modaltune.pathways import PathwayIndex, read_pathways
from modaltune.published_size import GENES, pathway_layout
from modaltune.testing import allowed_error

CSV_NAME = "pathway_mlp.csv"
WIDTH = 256


class Networks(NamedTuple):
    """The pathway networks, packed as `pathway_mlp` takes them."""

    gene_index: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    offsets: Tensor

    def as_dtype(self, dtype: torch.dtype) -> Networks:
        """Return the networks with their weights in another dtype."""
        return Networks(*(t.to(dtype) if t.is_floating_point() else t for t in self))


class LiteralNetwork(NamedTuple):
    """One pathway as the published code holds it: its genes, and `[out, in]` weights."""

    genes: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


Form = Callable[[Tensor], Tensor]


def draw_networks(gene_index: Tensor, offsets: Tensor, width: int = WIDTH) -> Networks:
    """Return random networks whose tokens have a spread near 1, float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    counts = offsets.diff()
    pathways = counts.numel()
    fan_in = torch.repeat_interleave(counts, counts).unsqueeze(1)
    return Networks(
        gene_index,
        draw(gene_index.numel(), width) / fan_in.sqrt(),
        0.2 * draw(pathways, width),
        draw(pathways, width, width) / width**0.5,
        0.2 * draw(pathways, width),
        offsets,
    )


def literal_networks(networks: Networks) -> list[LiteralNetwork]:
    """Return the networks one by one, each with tensors of its own."""
    return [
        LiteralNetwork(
            networks.gene_index[start:end].clone(),
            networks.weight1[start:end].t().contiguous(),
            networks.bias1[p].clone(),
            networks.weight2[p].clone(),
            networks.bias2[p].clone(),
        )
        for p, (start, end) in enumerate(pairwise(networks.offsets.tolist()))
    ]


def literal_pathways(expression: Tensor, networks: Sequence[LiteralNetwork]) -> Tensor:
    """Return `[B, P, d]`: METHOD 3.4 in torch calls, a case and a pathway at a time."""
    cases = []
    for case in expression.split(1):
        tokens = []
        for net in networks:
            hidden = F.elu(F.linear(case[:, net.genes], net.weight1, net.bias1))
            tokens.append(F.elu(F.linear(hidden, net.weight2, net.bias2)))
        cases.append(torch.stack(tokens, dim=1))
    return torch.cat(cases)


def gate(ours: Form, rival: Form, exact: Form, expression: Tensor) -> None:
    """Refuse to time an answer that is off by more than STYLE allows a kernel.

    Raises:
        InputError: Ours is further from the rival in float64 than twice the rival in float32, plus
            a rounding step.
    """
    want = exact(expression.double())
    limit = allowed_error(want, rival(expression), torch.float32)
    error = float((ours(expression).double() - want).abs().max())
    if not error <= limit:
        raise InputError(
            f"a benchmark must time right answers, got an error of {error:.3g} where {limit:.3g} "
            "is allowed; run the tests of the op"
        )


def interleaved(forms: dict[str, Form], expression: Tensor, runs: int) -> dict[str, object]:
    """Time `ours` and `rival` in turn; return the figures of a row, in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for run in range(runs + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form(expression)
            if run:  # the first run warms up
                seconds[name].append(time.perf_counter() - start)
    figures: dict[str, object] = {}
    for name, found in seconds.items():
        tenths = statistics.quantiles(found, n=10, method="inclusive")
        for place, value in (("p20", tenths[1]), ("p50", tenths[4]), ("p80", tenths[7])):
            figures[f"{name}_{place}_ms"] = round(1e3 * value, 3)
        figures[f"{name}_min_ms"] = round(1e3 * min(found), 3)
    ratio = statistics.median(seconds["rival"]) / statistics.median(seconds["ours"])
    best = min(seconds["rival"]) / min(seconds["ours"])
    return {**figures, "ratio": round(ratio, 3), "ratio_of_minima": round(best, 3)}


def measure(cases: int, runs: int, layout: tuple[Tensor, Tensor, int]) -> dict[str, object]:
    """Return the figures of one number of cases.

    Args:
        cases: Expression vectors at a time, for ours; the rival takes them one by one.
        runs: Timed runs of each form, at least 2.
        layout: Gene index, offsets and number of genes.
    """
    gene_index, offsets, genes = layout
    networks = draw_networks(gene_index, offsets)
    single = literal_networks(networks)
    double = literal_networks(networks.as_dtype(torch.float64))
    expression = torch.randn(cases, genes, generator=torch.Generator().manual_seed(1))
    weights = networks[:-1]

    def ours(x: Tensor) -> Tensor:
        return pathway_mlp(x, *weights, offsets=offsets)

    def rival(x: Tensor) -> Tensor:
        return literal_pathways(x, single)

    with torch.no_grad():
        gate(ours, rival, lambda x: literal_pathways(x, double), expression[:5])
        figures = interleaved({"ours": ours, "rival": rival}, expression, runs)
    size = sum(t.numel() for t in weights[1:])
    seconds = float(str(figures["ours_p50_ms"])) / 1e3
    flops = 2.0 * cases * (networks.weight1.numel() + networks.weight2.numel())
    return {
        "pathways": offsets.numel() - 1,
        "memberships": gene_index.numel(),
        "cases": cases,
        "runs": runs,
        **figures,
        "gflops": round(flops / seconds / 1e9, 1),
        "weights_gb_per_s": round(4 * size / seconds / 1e9, 1),
    }


def read_layout(path: Path | None) -> tuple[Tensor, Tensor, int]:
    """Return gene index, offsets and number of genes of a pathway file, or of the published size.

    Raises:
        InputError: The file can't be read.
    """
    if path is None:
        return *pathway_layout(), GENES
    table = read_pathways(path)
    every = sorted({gene for genes in table.genes for gene in genes})
    index = PathwayIndex.build(table, every)
    return index.indices, index.offsets, len(index.genes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.grouped_mlp",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--pathways", type=Path, help="pathway file; default: the published size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each form, at least 2")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    if options.cases < 1 or options.threads < 1 or options.runs < 2:
        parser.error("--cases and --threads must be at least 1, --runs at least 2")
    torch.set_num_threads(options.threads)
    try:
        folder = results_folder(options.results)
        row: dict[str, object] = {
            "time": timestamp(),
            "commit": commit_id(),
            "device": f"{cpu_model()}, {options.threads} threads of {os.cpu_count()}",
            "torch": torch.__version__,
            "op": "grouped_mlp",
            "rival": "literal",
            "mode": "forward",
            "dtype": "float32",
            **measure(options.cases, options.runs, read_layout(options.pathways)),
        }
        if folder is not None:
            append_row(folder / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = "{cases} cases: {ours_p50_ms} ms, literal {rival_p50_ms} ms, {ratio} times"
    print(json.dumps(row) if options.json else line.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
