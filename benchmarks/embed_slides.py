"""Slides to tile features, timed: tiles, seconds per stage and tiles/s of one run."""

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
from modaltune.engine.cohort import items_from_paths
from modaltune.engine.encoders import load_encoder
from modaltune.engine.errors import InputError
from modaltune.engine.folder import EmbedOptions, embed_slides

CSV_NAME = "embed_slides.csv"
# Column to stage; reading and decoding are one stage.
_COLUMNS = {"open": "open", "mask": "mask", "read": "decode", "encode": "encode", "write": "write"}


def measure(slide: Path, base_mpp: float | None, encoder_name: str) -> dict[str, object]:
    """Embed one slide into a temporary folder and return the row.

    The encoder runs once on a blank tile first: loading and first-call costs are not the slide's.

    Raises:
        InputError: The slide can't be embedded.
    """
    encoder = load_encoder(encoder_name)
    side = encoder.spec.tile_px
    encoder.encode(torch.zeros(1, side, side, 3, dtype=torch.uint8))
    with tempfile.TemporaryDirectory() as out:
        report = embed_slides(
            items_from_paths([slide], base_mpp), encoder, out, EmbedOptions(overlays=True)
        )
    (outcome,) = report.outcomes
    if report.lost:
        raise InputError(outcome.reason)
    return {
        "time": timestamp(),
        "commit": commit_id(),
        "device": f"{cpu_model()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "torch": torch.__version__,
        "slide": slide.name,
        "reader": outcome.reader,
        "encoder": encoder_name,
        "tiles": outcome.tiles,
        "seconds": round(report.elapsed_s, 3),
        "tiles_per_s": round(outcome.tiles / report.elapsed_s, 2),
        **{f"{name}_s": round(report.stages_s[stage], 3) for name, stage in _COLUMNS.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modaltune.benchmarks.embed_slides",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("slides", nargs="+", type=Path, help="slide files")
    parser.add_argument("--base-mpp", type=float, help="for slides that do not say it")
    parser.add_argument("--tile-encoder", default="efficientnet-lite0")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--results", type=Path, help=f"folder of {CSV_NAME}")
    options = parser.parse_args(arguments)
    try:
        folder = results_folder(options.results)
        rows = [measure(s, options.base_mpp, options.tile_encoder) for s in options.slides]
        if folder is not None:
            for row in rows:
                append_row(folder / CSV_NAME, row)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        line = "{slide}: {tiles} tiles, {seconds} s, {tiles_per_s} tiles/s, reader {reader}"
        print(json.dumps(row) if options.json else line.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
