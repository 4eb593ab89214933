"""Everything that a GPU can measure, one command: each step is a command of its own, in turn.

A step that fails is named at the end, and the others run all the same; rows go to the same files as
anywhere. What takes part can be listed first: `--list`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modaltune.benchmarks.harness import results_folder
from modaltune.engine.errors import InputError

TILES = (1_000, 10_000, 25_000)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: What it shows.
        words: Its arguments after `python -m`.
    """

    name: str
    words: tuple[str, ...]


def steps(results: Path, golden: Path | None) -> list[Step]:
    """Return what is run, the shortest first.

    Args:
        results: Folder of the rows.
        golden: Folder of golden cases; None leaves them out.
    """
    rows, gpu = ("--results", str(results)), ("--device", "cuda")
    bench = ("modaltune", "bench")
    found = []
    if golden is not None:
        checked = ("modaltune", "golden", str(golden), "--impl", "triton")
        found.append(Step("golden cases through Triton", checked))
    sizes = [word for tiles in TILES for word in ("--tiles", str(tiles))]
    found.append(Step("kernels", (*bench, "kernels", *gpu, *sizes, *rows)))
    for mode in ("forward", "train"):
        for tiles in TILES[:2]:
            words = [*bench, "model", "--tiles", str(tiles), "--mode", mode, *gpu]
            words += ["--precision", "bfloat16", *rows, "--json"]
            found.append(Step(f"model {mode} {tiles}", tuple(words)))
    decoded = (*bench, "decode", "--gpu", "--case", "jpeg", *rows, "--json")
    found.append(Step("decode", decoded))
    for runtime in ("torch", "torch-compile", "tensorrt"):
        streamed = (*bench, "stream", "--runtime", runtime, *gpu, *rows, "--json")
        found.append(Step(f"stream, {runtime}", streamed))
    return found


def run(chosen: Sequence[Step]) -> list[str]:
    """Run steps one after another; return the names of those that failed."""
    failed = []
    for step in chosen:
        started = time.monotonic()
        print(f"== {step.name}: {shlex.join(('python', '-m', *step.words))}", flush=True)
        code = subprocess.run([sys.executable, "-m", *step.words], check=False).returncode
        print(f"== {step.name}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code:
            failed.append(step.name)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.gpu_suite",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--golden", type=Path, help="folder of golden cases")
    parser.add_argument("--results", type=Path, help="folder of the rows")
    parser.add_argument("--only", default="", help="only steps with this in their name")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments)
    try:
        results = results_folder(options.results)
        if results is None:
            raise InputError(
                "--results must name the folder of the rows, got none and there is no "
                "./benchmarks/results; run this in a checkout, or give a folder"
            )
        chosen = [s for s in steps(results, options.golden) if options.only in s.name]
        if options.list:
            print("\n".join(shlex.join(("python", "-m", *step.words)) for step in chosen))
            return 0
        if not torch.cuda.is_available():
            raise InputError(
                "the suite must run on a machine with a GPU, got one without; "
                "`modaltune bench` measures what a CPU does"
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = run(chosen)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} steps passed", flush=True)
    for name in failed:
        print(f"failed: {name}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
