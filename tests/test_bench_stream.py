"""The stream's benchmark: a small cohort through the real engine, its row, picture and bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modaltune.benchmarks import stream
from modaltune.benchmarks.encoders import RANDOM_VIT
from modaltune.cli import app


def test_sizes_are_those_that_are_promised() -> None:
    counts = [columns * rows for columns, rows in stream.slide_sizes(24)]
    assert len(counts) == 24
    assert min(counts) >= stream.SMALLEST
    assert max(counts) <= stream.LARGEST
    assert sum(counts) == pytest.approx(3000, rel=0.1)


def test_a_small_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six slides of 30 tiles; which bars of speed are met depends on the machine."""
    monkeypatch.setattr(stream, "slide_sizes", lambda slides, _: [(6, 5)] * slides)
    monkeypatch.setattr(stream, "ALONE_TILES", 64)
    result = CliRunner().invoke(
        app,
        ["bench", "stream", "--slides", "6", "--runtime", "onnxruntime", "--workers", "1", "--json",
         "--results", str(tmp_path), "--out", str(tmp_path)],
    )  # fmt: skip
    found = json.loads(result.output)
    assert (found["slides"], found["tiles"], found["runtime"]) == (6, 180, "onnxruntime")
    assert 0 < found["encoder_busy"] <= 1
    assert len(found["rss_mib"]) == 6
    assert found["peak_mib"] == pytest.approx(max(found["rss_mib"]), abs=1)
    assert found["ratio"] == pytest.approx(
        found["tiles_per_s"] / found["alone_tiles_per_s"], rel=0.01
    )
    assert not [line for line in found["missed"] if line.startswith("memory")]
    assert found["base_mib"] + 100 < found["peak_mib"] <= found["bound_mib"]
    assert (tmp_path / "stream.png").stat().st_size > 10_000
    assert (tmp_path / stream.CSV_NAME).read_text().count("\n") == 2
    assert result.exit_code == (1 if found["missed"] else 0)


def test_the_bound_counts_the_processes_that_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On 64 cores 16 processes decode, not 64."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    encoder = stream.open_encoder(RANDOM_VIT, "torch", "cpu")
    said = stream.bound_mib(encoder, 1000.0, None, 300)
    assert said == stream.bound_mib(encoder, 1000.0, 16, 300)


def test_missed_bars_are_named() -> None:
    alone = {"alone_before_tiles_per_s": 40.0, "alone_after_tiles_per_s": 37.0}
    good = {"encoder_busy": 0.99, "ratio": 0.97, "peak_mib": 900, "bound_mib": 1000, "spread": 0.02}
    assert stream.missed_bars(alone | good) == []
    bad = {"encoder_busy": 0.5, "ratio": 0.6, "peak_mib": 1100, "bound_mib": 1000, "spread": 0.2}
    said = stream.missed_bars(alone | bad)
    assert [line.split()[0] for line in said] == ["encoder", "60.0%", "memory", "memory"]
    (said,) = stream.missed_bars({**alone, **good, "alone_after_tiles_per_s": 26.3})
    assert said == "ratio unknown, alone 40.0 tiles/s before and 26.3 after: not a quiet machine"


def test_a_slower_encoder_can_be_asked_for() -> None:
    encoder = stream.open_encoder(RANDOM_VIT, "torch", "cpu")
    assert (encoder.name, encoder.width, encoder.runtime) == ("vit-small", 384, "torch")
