"""The embedding benchmark: a row per slide with figures that add up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from modaltune.benchmarks import embed_slides
from modaltune.engine.pyramid import write_pyramid


def test_a_row_per_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rgb = np.random.default_rng(0).integers(90, 180, (512, 512, 3), dtype=np.uint8)
    write_pyramid(tmp_path / "a.tiff", rgb, mpp=0.5)
    assert embed_slides.main([str(tmp_path / "a.tiff"), "--results", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    with (tmp_path / embed_slides.CSV_NAME).open() as file:
        (row,) = csv.DictReader(file)
    assert row["tiles"] == "4"
    assert printed["tiles"] == 4
    stages = [float(row[f"{s}_s"]) for s in ("open", "mask", "read", "encode", "write")]
    assert sum(stages) > 0
    assert max(stages) <= float(row["seconds"]) + 0.01
    assert float(row["tiles_per_s"]) == pytest.approx(4 / float(row["seconds"]), rel=0.02)


def test_a_slide_that_fails_appends_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.svs").write_text("no slide")
    assert embed_slides.main([str(tmp_path / "bad.svs"), "--results", str(tmp_path)]) == 1
    assert not (tmp_path / embed_slides.CSV_NAME).exists()
