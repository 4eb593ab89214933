"""The demo over several seeds: what image and genes give together and alone, a row per seed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from modaltune.benchmarks.harness import (
    append_row,
    commit_id,
    cpu_model,
    results_folder,
    timestamp,
)
from modaltune.demo import DemoResult, run_demo
from modaltune.engine.errors import InputError

CSV_NAME = "demo_seeds.csv"


def row_of(result: DemoResult, cases: int) -> dict[str, object]:
    """Return the row of one demo: values out of fold with the ends of their 95 % intervals."""
    row: dict[str, object] = {
        "time": timestamp(),
        "commit": commit_id(),
        "device": f"{cpu_model()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "torch": torch.__version__,
        "seed": result.seed,
        "cases": cases,
    }
    for name, found in result.study.variants.items():
        column = name.replace(" + ", "_and_").replace(" ", "_")
        for metric in ("balanced_accuracy", "c_index"):
            for end, value in zip(("", "_low", "_high"), getattr(found, metric), strict=True):
                row[f"{column}_{metric}{end}"] = round(value, 4)
    return {**row, "margin": round(result.margin, 4), "seconds": round(result.elapsed_s, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.demo_seeds",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("seeds", nargs="+", type=int, help="seeds of cohort, folds and training")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        folder = results_folder(options.results)
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as out:
                row = row_of(run_demo(Path(out), cases=options.cases, seed=seed), options.cases)
            if folder is not None:
                append_row(folder / CSV_NAME, row)
            line = (
                "seed {seed}: {image_and_genes_balanced_accuracy} together, "
                "{image_only_balanced_accuracy} image, {genes_only_balanced_accuracy} genes, "
                "ahead by {margin}"
            )
            print(json.dumps(row) if options.json else line.format(**row), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
