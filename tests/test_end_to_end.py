"""The end-to-end comparison: what it measures, compares and refuses; ours on a small slide."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from modaltune.benchmarks import end_to_end, end_to_end_rival
from modaltune.benchmarks.end_to_end import Checked, Outcome, Side
from modaltune.benchmarks.end_to_end_plot import plot_rows, read_rows
from modaltune.benchmarks.end_to_end_slide import Workplace, densest_window, prepare
from modaltune.benchmarks.harness import append_row
from modaltune.benchmarks.process_tree import Finished, run_measured
from modaltune.engine.errors import InputError
from modaltune.engine.pyramid import write_pyramid

COORDS = np.array([[0, 0], [256, 0], [0, 256]], dtype=np.int64)
DONE = Finished(0, 10.0, 12.0, 700.0)


def tissue(side: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(100, 190, (side, side, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    return rgb


def place_in(folder: Path) -> Workplace:
    facts = {
        "architecture": "test_efficientnet", "weights": str(folder / "weights.safetensors"),
        "input_px": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "width": 256, "min_foreground": 0.95,
        "layout": {"workers": 2, "threads": 1, "batch_size": 2},
    }  # fmt: skip
    return Workplace(folder, folder / "a.tif", folder / "b.tif", 12, facts)


def test_memory_and_time_are_those_of_the_whole_tree(tmp_path: Path) -> None:
    child = "kept = bytearray(b'x') * (80 << 20); print(sum(kept[:: 1 << 12]))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    log = tmp_path / "log"
    words = [sys.executable, "-c", f"{code}\nfor _ in range(2): {code}"]
    found = run_measured(words, log=log, environment={}, watch_s=0.005)
    assert found.code == 0, log.read_text()
    assert found.peak_mib is not None
    assert 80 < found.peak_mib < 200
    assert 0 < found.cpu_s <= 2 * found.wall_s + 0.1
    assert log.read_text().count(str(20480 * ord("x"))) == 3
    assert run_measured(words, log=log, environment={}).peak_mib is None


def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import signal; signal.pause()"]
    with pytest.raises(InputError, match=r"must end within 0\.5 s"):
        run_measured(words, log=tmp_path / "log", environment={}, timeout_s=0.5)
    assert run_measured(["/bin/false"], log=tmp_path / "log", environment={}).code == 1


def test_the_densest_window_is_found() -> None:
    rgb = np.full((100, 120, 3), 255, dtype=np.uint8)
    rgb[30:70, 50:90] = tissue(40)
    np.testing.assert_array_equal(densest_window(rgb, 36), rgb[30:66, 50:86])
    with pytest.raises(InputError, match="must have a square of 60 px of tissue"):
        densest_window(rgb, 60)
    with pytest.raises(InputError, match="at least 300 px a side"):
        densest_window(rgb, 300)


def outcome(features: Any, coords: Any = COORDS, slide_s: float = 4.0) -> Outcome:
    return Outcome(DONE, slide_s, 3, "1.0", (np.asarray(features, np.float32), coords))


def test_features_are_compared_tile_by_tile() -> None:
    side = Side("slide2vec", "torch", "python")
    ours = np.random.default_rng(0).normal(size=(3, 8))
    order = [2, 0, 1]
    same = outcome(ours[order] + 1e-6, COORDS[order])
    assert end_to_end.agreement(side, same, outcome(ours)) > 0.9999
    with pytest.raises(InputError, match="slide2vec torch must give our features with cosine"):
        end_to_end.agreement(side, outcome(ours[order]), outcome(ours))
    with pytest.raises(InputError, match="must take the 3 tiles that modaltune takes, got 2"):
        end_to_end.agreement(side, outcome(ours[:2], COORDS[:2]), outcome(ours))
    with pytest.raises(InputError, match="must be kept to be compared"):
        end_to_end.agreement(side, Outcome(DONE, 1.0, 3, "1"), outcome(ours))
    null = Side("lazyslide", "null", "python")
    pixels = 100 * np.ones((3, 27))
    assert end_to_end.agreement(null, outcome(pixels + 1), outcome(pixels)) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"must pass on the same pixels, got 9\.0 apart"):
        end_to_end.agreement(null, outcome(pixels + 9), outcome(pixels))


def rows_of(tmp_path: Path, slower: float) -> list[dict[str, Any]]:
    """Rows of all sides, the rivals' so many times as slow as ours."""
    pythons = dict.fromkeys(end_to_end.RIVALS, "python")
    checked, times = [], {}
    for side in end_to_end.sides(pythons):
        factor = 1.0 if side.tool == "modaltune" else slower
        checked.append(Checked(side, 0.99999, 2000 / factor, "1.0"))
        runs = [Finished(0, factor * wall, 10.0, None) for wall in (11, 10, 12)]
        times[side.name] = [Outcome(run, factor * 4.0, 1024, "1.0") for run in runs]
    return end_to_end.rows(checked, times, place_in(tmp_path), 0.5)


def test_sides_are_those_asked_for() -> None:
    def names(pythons: dict[str, str], *encoders: str) -> list[str]:
        return [side.name for side in end_to_end.sides(pythons, encoders)]

    assert names({}, "null") == ["modaltune null"]
    both = {"slide2vec": "a", "lazyslide": "b"}
    assert names(both, "null") == ["modaltune null", "slide2vec null", "lazyslide null"]
    assert names({"lazyslide": "b"}, "torch") == ["modaltune session", "lazyslide torch"]
    assert len(names(both, *end_to_end.ENCODERS)) == 8


@pytest.mark.parametrize(("slower", "expected"), [(2.0, 1), (9.0, 0)])
def test_a_missed_bar_is_said_and_ends_with_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slower: float,
    expected: int,
) -> None:
    found = [{**row, "peak_mib": 900} for row in rows_of(tmp_path, slower)]
    monkeypatch.setattr(end_to_end, "prepare", lambda *_: place_in(tmp_path))
    monkeypatch.setattr(end_to_end, "measure", lambda *_: found)
    assert end_to_end.main(["--results", str(tmp_path)]) == expected
    assert ("missed: slide2vec torch" in capsys.readouterr().err) == bool(expected)
    assert len((tmp_path / end_to_end.CSV_NAME).read_text().splitlines()) == 9


def test_rows_bars_and_picture(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 2.0)
    assert len(rows) == 8
    ours, rival = rows[0], rows[2]
    assert (ours["wall_ratio"], ours["bar"], ours["wall_s"]) == (1.0, "", 11.0)
    assert (rival["tool"], rival["encoder"], rival["bar"]) == ("slide2vec", "torch", 3.0)
    assert (rival["wall_ratio"], rival["slide_ratio"], rival["cpu_ratio"]) == (2.0, 2.0, 1.0)
    assert rival["tiles_per_s"] == pytest.approx(12 / 22, abs=0.1)
    assert rival["slide_tiles_per_s"] == 128.0
    said = end_to_end.missed_bars(rows)
    assert [line.split(":")[0] for line in said] == [
        "modaltune session", "modaltune null", "slide2vec torch", "slide2vec null",
        "lazyslide null",
    ]  # fmt: skip
    assert "2000 MiB, bar 1536" in said[0]
    assert "command 2.0 x, second slide 2.0 x, processor time 1.0 x; bar 3.0" in said[2]
    for row in (*rows_of(tmp_path, 3.0), *rows):
        append_row(tmp_path / "rows.csv", row)
    last = read_rows(tmp_path / "rows.csv")
    assert [row["wall_ratio"] for row in last] == [row["wall_ratio"] for row in rows]
    assert plot_rows(last, tmp_path / "a.png").stat().st_size > 10_000


def test_a_rival_that_is_not_installed_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_in(tmp_path)
    absent = Side("slide2vec", "null", sys.executable)
    assert end_to_end.check([absent], place) == []
    said = capsys.readouterr().err
    assert "slide2vec null is left out: slide2vec null must end with status 0, got 1" in said
    assert "No module named 'slide2vec'" in said
    job = json.loads((tmp_path / "slide2vec-null" / "job.json").read_text())
    assert (job["width"], job["workers"]) == (27, 0)
    assert job["graph"].endswith("outside.onnx")
    with pytest.raises(InputError, match="modaltune null must end with status 0"):
        end_to_end.check([Side("modaltune", "null", sys.executable)], place)  # without a slide


def test_encoders_inside_rivals_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    job = place_in(tmp_path).job("slide2vec", "torch")
    inside = end_to_end_rival.ENCODERS["torch"](job)
    tiles = torch.from_numpy(tissue(256)[None].repeat(3, 0).copy())
    pixels = (tiles.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        want = network(pixels[..., 16:240, 16:240])
        torch.testing.assert_close(inside(pixels), want)
        middle = torch.stack([end_to_end_rival.Normalised(job)(tile.numpy()) for tile in tiles])
        torch.testing.assert_close(inside(middle), want, rtol=1e-4, atol=1e-4)
    null = end_to_end_rival.ENCODERS["null"](job)
    assert torch.equal(null(tiles), end_to_end_rival.null_features(tiles.numpy()))
    torch.testing.assert_close(null(tiles.permute(0, 3, 1, 2) / 255), null(tiles))
    assert null(tiles).shape == (3, 27)


@pytest.mark.parametrize("given", ["tiles", "pixels"])
def test_sessions_keep_the_order_of_tiles(tmp_path: Path, given: str) -> None:
    """A graph that means over each tile, or over its middle where pixels are handed on."""
    kind = TensorProto.UINT8 if given == "tiles" else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", [given], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["features"], keepdims=0),
    ]
    axes = helper.make_tensor(
        "axes", TensorProto.INT64, [2], [1, 2] if given == "tiles" else [2, 3]
    )
    graph = helper.make_graph(
        nodes, "mean", [helper.make_tensor_value_info(given, kind, ["n", None, None, None])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3])], [axes],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "mean.onnx")
    job = {**place_in(tmp_path).job("slide2vec", "session"), "graph": str(tmp_path / "mean.onnx")}
    session = end_to_end_rival.ENCODERS["session"](job)
    tiles = torch.from_numpy(np.stack([tissue(256, seed) for seed in range(7)]))
    if given == "pixels":
        pixels = tiles.permute(0, 3, 1, 2).float()
        want = pixels[..., 16:240, 16:240].mean(dim=(2, 3))
        torch.testing.assert_close(session(pixels), want)
    else:
        torch.testing.assert_close(session(tiles), tiles.float().mean(dim=(1, 2)))


def test_ours_on_a_small_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command and stream, on 25 tiles; rivals are in no environment of the tests."""
    monkeypatch.setenv("MODALTUNE_RUNTIME", "onnxruntime")
    source = write_pyramid(tmp_path / "source.tif", tissue(600), mpp=0.5)
    (tmp_path / "work").mkdir()
    place = prepare(tmp_path / "work", source, side_tiles=5)
    checked = end_to_end.check(end_to_end.sides({}), place)
    assert [(one.side.tool, one.side.encoder) for one in checked] == [
        ("modaltune", "session"), ("modaltune", "null"),
    ]  # fmt: skip
    for one in checked:
        assert 100 < one.peak_mib < end_to_end.PEAK_BAR_MIB
    assert checked[0].agreement == pytest.approx(1.0)
    report = json.loads((place.folder / "modaltune-session" / "out" / "report.json").read_text())
    assert report["tiles"] == place.tiles == 41
