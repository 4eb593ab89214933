"""The decoding benchmark: its slides, its rows, and that wrong pixels are not timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from modaltune.benchmarks import decode as bench
from modaltune.benchmarks.decode_plot import plot_rows, speeds
from modaltune.benchmarks.decode_slides import CASES, Case, mosaic, write_slides
from modaltune.engine.errors import InputError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.readers import open_slide

SMALL = Case("deflate", 256, 0.5, 100, 3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return write_pyramid(tmp_path / "source.tif", cv2.resize(noise, (400, 300)), mpp=0.5)


@pytest.fixture
def small_slides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slides of 1,200 px instead of 20,000, in a folder of their own."""
    monkeypatch.setattr(Case, "slide_px", 1_200)
    monkeypatch.setattr(bench, "default_folder", lambda: tmp_path / "cache")


def test_a_mosaic_has_no_seams(source: Path) -> None:
    with open_slide(source) as slide:
        tile = slide.read_region((0, 0), (400, 300))
    found = mosaic(source, 1000)
    assert found.shape == (1000, 1000, 3)
    np.testing.assert_array_equal(found[:300, :400], tile)
    np.testing.assert_array_equal(found[300:600, :400], tile[::-1])
    np.testing.assert_array_equal(found[:300, 400:800], tile[:, ::-1])
    np.testing.assert_array_equal(found[600:900, 800:], tile[:, :200])


def test_every_case_lies_on_its_slide_and_has_its_bars() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        grid = case.grid()
        assert len(grid) == case.side_tiles**2
        assert (grid.coords % 256 == case.offset_px).all()
        assert case.bar("cucim") in (0.8, 1.4, 1.8, 2.0)
        assert (case.bar("hs2p-single"), case.bar("openslide")) == (1.5, 4.0)
        assert case.bar("tiffslide") is None
    with pytest.raises(ValueError, match="the tiles leave the slide"):
        Case("jpeg2000", 256, 0.5, 0, 17).grid()


@pytest.mark.usefixtures("small_slides")
def test_a_run_checks_times_and_writes_rows(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "CASES", (SMALL,))
    monkeypatch.setattr(bench, "RIVALS", ("cucim", "openslide", "tiffslide"))
    picture = tmp_path / "a.png"
    arguments = [str(source), "--rounds", "1", "--json", "--results", str(tmp_path)]
    assert bench.main([*arguments, "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["impl"] for row in rows] == ["modaltune", "cucim", "openslide"]
    assert "tiffslide: absent" in err
    for row in rows:
        assert row["tiles"] == 9
        assert row["tiles_per_s_p20"] == row["tiles_per_s_p80"] > 0  # of one round
        assert row["difference"] == 0
    assert (tmp_path / bench.CSV_NAME).read_text().count("\n") == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert speeds(rows)[SMALL.name]["cucim"] == rows[1]["tiles_per_s_p50"]


@pytest.mark.usefixtures("small_slides")
def test_wrong_pixels_are_not_timed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_slides((SMALL,), source, tmp_path / "cache")
    monkeypatch.setattr(bench, "our_difference", lambda *_: 0.01)
    with pytest.raises(InputError, match="our tiles differ from read_tiles; not timed"):
        bench.measure(SMALL, paths[SMALL], [], 1)


@pytest.mark.usefixtures("small_slides")
def test_a_gpu_takes_part_where_it_decodes_and_where_there_is_one(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {case: bench.our_options(case, on_gpu=True) for case in CASES}
    assert {case.codec for case, way in ways.items() if bench.ON_GPU in way} == {"jpeg"}
    assert all(way[bench.OURS].device == "cpu" for way in ways.values())
    assert ways[CASES[0]][bench.ON_GPU].device == "cuda"
    assert bench.ON_GPU not in bench.our_options(CASES[0], on_gpu=False)
    monkeypatch.setattr(bench, "CASES", (replace(SMALL, codec="jpeg"),))
    words = [str(source), "--gpu", "--rounds", "1", "--results", str(tmp_path)]
    if not torch.cuda.is_available():
        assert bench.main(words) == 1
        assert "GPU" in capsys.readouterr().err


def test_a_missing_slide_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tmp_path / "none.svs"), "--results", str(tmp_path)]) == 1
    assert "slide must be an existing file" in capsys.readouterr().err


def test_a_plot_shows_the_faster_way_of_hs2p(tmp_path: Path) -> None:
    rows = [
        {"case": "a", "impl": impl, "tiles_per_s_p50": value}
        for impl, value in (("modaltune", 9.0), ("hs2p-groups", 2.0), ("hs2p-single", 3.0))
    ]
    assert speeds(rows) == {"a": {"modaltune": 9.0, "hs2p": 3.0}}
    assert plot_rows(rows, tmp_path / "new" / "a.png").exists()
