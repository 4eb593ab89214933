"""Dilated attention on the CPU against its literal formulation: seconds, memory, GFLOP/s.

    python -m modaltune.benchmarks.dilated_attn [--tiles 10000] [--mode forward|train] [--json]

Published shape (16 heads of 48 columns, five branches), float32. The literal formulation pads and
gathers a copy per branch, runs ATen's fused attention on it, scatters to full size and merges by a
softmax. Both answers are compared with the literal one in float64 before anything is timed; rounds
are interleaved; each side's memory is measured in a process of its own. Bars: 1.5 times as fast
and, from 4,000 tiles on, extra memory of at most 1.5 times that of q, k, v and the output. The exit
code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
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
from modaltune.kernels import dilated_attention
from modaltune.kernels.dilated_attn.cost import dilated_attn_cost
from modaltune.testing import allowed_error, peak_memory_mib, run_with_gradients

CSV_NAME = "dilated_attn.csv"
HEADS, HEAD_DIM = 16, 48
SEGMENTS, RATIOS = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
SPEED_BAR, MEMORY_BAR, MEMORY_BAR_TILES = 1.5, 1.5, 4000
# The backward pass reads back a rounded log-sum-exp of up to log2(10,000) + 1 < 16: half of 16
# steps in each weight, the row sums that they take part in, and the step every kernel has.
BACKWARD_STEPS = 10
_NO_ATTENTION = -1e8
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def dilated_attention_literal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int] = SEGMENTS,
    dilation_ratios: Sequence[int] = RATIOS,
) -> Tensor:
    """Return `[L, H, d]` of one sequence, as METHOD says it, with ordinary library calls.

    Args:
        q: `[L, H, d]` queries; H is a multiple of every dilation.
        k: `[L, H, d]` keys.
        v: `[L, H, d]` values.
        segment_lengths: Rows per segment, one per branch; clipped to L.
        dilation_ratios: Dilation per branch.
    """
    outs, lses = [], []
    for segment, ratio in zip(segment_lengths, dilation_ratios, strict=True):
        out, lse = _branch(q, k, v, segment, ratio)
        outs.append(out)
        lses.append(lse)
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), dim=0)  # [branches, L, H]
    return (weights.unsqueeze(-1) * torch.stack(outs)).sum(0)


def _branch(q: Tensor, k: Tensor, v: Tensor, segment: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Return the output `[L, H, d]` and log-sum-exp `[L, H]` of one branch."""
    length, heads, dim = q.shape
    w = min(segment, length)
    n, m, per_group = math.ceil(length / w), math.ceil(w / ratio), heads // ratio

    def gather(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, 0, n * w - length)).reshape(n, w, heads, dim)
        t = F.pad(t, (0, 0, 0, 0, 0, m * ratio - w))
        t = t.reshape(n, m, ratio, ratio, per_group, dim).diagonal(dim1=2, dim2=3)
        return t.permute(0, 4, 2, 1, 3).reshape(n * ratio, per_group, m, dim)

    def scatter(t: Tensor, fill: float) -> Tensor:
        full = t.new_full((n, m, ratio, ratio, per_group, t.shape[-1]), fill)
        sparse = t.reshape(n, ratio, per_group, m, -1).permute(0, 3, 2, 4, 1)
        full.diagonal(dim1=2, dim2=3).copy_(sparse)
        return full.reshape(n * m * ratio, heads, -1)[:length]

    out, lse = _flash(gather(q), gather(k), gather(v))
    with torch.no_grad():
        lse = torch.where(lse == 0.0, _NO_ATTENTION, lse).to(q.dtype)
        lse = scatter(lse.unsqueeze(-1), _NO_ATTENTION).squeeze(-1)
    return scatter(out, 0.0), lse


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run our CPU path in the published configuration."""
    return dilated_attention(q, k, v, segment_lengths=SEGMENTS, dilation_ratios=RATIOS, impl="cpu")


SIDES: Mapping[str, Side] = {"ours": ours, "rival": dilated_attention_literal}


def make_inputs(tiles: int) -> dict[str, Tensor]:
    """Return q, k, v `[tiles, 16, 48]` float32, slices of one projection as the model has them."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(tiles, 3, HEADS, HEAD_DIM, generator=generator)
    return dict(zip("qkv", fused.unbind(1), strict=True))


def check(inputs: Mapping[str, Tensor], side: Side = ours) -> None:
    """Raise RuntimeError where a side's output or a gradient is wrong.

    Right is twice the error that the literal form makes in float32, plus rounding steps.
    """
    double = {name: t.double() for name, t in inputs.items()}
    exact = run_with_gradients(dilated_attention_literal, double)
    plain = run_with_gradients(dilated_attention_literal, inputs)
    found = run_with_gradients(side, inputs)
    for name, want in exact.items():
        steps = 1 if name == "out" else BACKWARD_STEPS
        limit = allowed_error(want, plain[name], torch.float32, steps)
        error = float((found[name].double() - want).abs().max())
        if not error <= limit:
            raise RuntimeError(f"{name} is off by {error:.3g}, allowed {limit:.3g}: not timed")


def run_once(side: Side, inputs: Mapping[str, Tensor], mode: str) -> None:
    """Run a side forward, or forward and backward (`train`)."""
    if mode == "train":
        leaves = [t.detach().requires_grad_() for t in inputs.values()]
        out = side(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return
    with torch.no_grad():
        side(*inputs.values())


def extra_mib(name: str, tiles: int, mode: str) -> float:
    """Return the peak memory of one run beyond its inputs (here: the output counts as extra)."""
    inputs = make_inputs(tiles)
    run_once(SIDES[name], make_inputs(64), mode)  # libraries load on the first call
    before = peak_memory_mib()
    run_once(SIDES[name], inputs, mode)
    return peak_memory_mib() - before


def _extra_mib_elsewhere(name: str, tiles: int, mode: str) -> float:
    code = (
        "import sys; from modaltune.benchmarks.dilated_attn import extra_mib; "
        "print(extra_mib(sys.argv[1], int(sys.argv[2]), sys.argv[3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(tiles), mode],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"measuring the memory of {name} failed: {last}")
    return float(done.stdout)


def time_sides(
    inputs: Mapping[str, Tensor], mode: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run the sides in turn; return the sorted seconds of each, and its least CPU seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    busy: dict[str, list[float]] = {name: [] for name in SIDES}
    for name, side in [*SIDES.items()] * (rounds + 1):
        started, worked = time.perf_counter(), time.process_time()
        run_once(side, inputs, mode)
        seconds[name].append(time.perf_counter() - started)
        busy[name].append(time.process_time() - worked)
    # The first round warms up.
    return (
        {name: sorted(found[1:]) for name, found in seconds.items()},
        {name: min(found[1:]) for name, found in busy.items()},
    )


def run(tiles: int, mode: str, rounds: int) -> dict[str, object]:
    """Check, time and weigh both sides; return the row of the CSV."""
    inputs = make_inputs(tiles)
    check(inputs)
    seconds, busy = time_sides(inputs, mode, rounds)
    sides = {name: _extra_mib_elsewhere(name, tiles, mode) for name in SIDES}
    costs = [dilated_attn_cost([tiles], dtype=torch.float32, backward=b) for b in (False, True)]
    flops = costs[0].flops + (costs[1].flops if mode == "train" else 0.0)
    best = {name: found[0] for name, found in seconds.items()}
    row: dict[str, object] = {
        "time": timestamp(),
        "commit": commit_id(),
        "device": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "mode": mode,
        "tiles": tiles,
        "rounds": rounds,
    }
    for name, found in seconds.items():
        for share in (20, 50, 80):
            row[f"{name}_p{share}_s"] = round(found[(len(found) - 1) * share // 100], 4)
        row[f"{name}_cpu_s"] = round(busy[name], 4)
        row[f"{name}_gflops"] = round(flops / best[name] / 1e9, 1)
    row["ratio_of_minima"] = round(best["rival"] / best["ours"], 2)
    row["ratio_of_cpu_seconds"] = round(busy["rival"] / busy["ours"], 2)
    row["ratio_of_medians"] = round(
        float(str(row["rival_p50_s"])) / float(str(row["ours_p50_s"])), 2
    )
    row["qkvo_mib"] = round(4 * tiles * HEADS * HEAD_DIM * 4 / 2**20, 1)
    row |= {f"{name}_extra_mib": round(mib, 1) for name, mib in sides.items()}
    return row


def is_met(row: Mapping[str, object]) -> bool:
    """Whether a row meets the bars. That of memory is for sequences whose buffers are no matter.

    The output itself, a quarter of q, k, v and output, is no extra memory.
    """
    tiles, qkvo, extra, ratio = (
        float(str(row[name])) for name in ("tiles", "qkvo_mib", "ours_extra_mib", "ratio_of_minima")
    )
    small = extra - qkvo / 4 <= MEMORY_BAR * qkvo
    return ratio >= SPEED_BAR and (small or tiles < MEMORY_BAR_TILES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code: 0, 1 missed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.dilated_attn",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--tiles", type=int, default=10_000, help="rows of the sequence")
    parser.add_argument("--mode", choices=("forward", "train"), default="forward")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each side")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of {CSV_NAME}; ./benchmarks/results if it exists, else no row is saved",
    )
    options = parser.parse_args(arguments)
    if options.tiles < 1 or options.rounds < 1:
        parser.error("--tiles and --rounds must be at least 1")
    try:
        folder = results_folder(options.results)
        row = run(options.tiles, options.mode, options.rounds)
        if folder is not None:
            append_row(folder / CSV_NAME, row)
    except InputError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({**row, "met": is_met(row)}))
    else:
        print("\n".join(f"{name:<18}{value}" for name, value in row.items()))
    return int(not is_met(row))


if __name__ == "__main__":
    sys.exit(main())
