"""`modaltune bench kernels`: modelled and measured, tables, JSON, rows and plots."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image
from typer.testing import CliRunner

from modaltune.benchmarks import kernel_spec
from modaltune.benchmarks.kernel_plots import plot_results, plot_rooflines
from modaltune.benchmarks.kernel_tables import modelled_rows
from modaltune.cli import app
from modaltune.kernels.roofline import DEVICES, costed_ops

runner = CliRunner()


def _run(*arguments: str) -> Any:
    return runner.invoke(app, ["bench", "kernels", *arguments])


def _is_drawn(path: Path) -> bool:
    """Whether a PNG holds a picture: many colours, and not only in one corner."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        small = image.convert("L").resize((8, 8))
        return len(image.convert("RGB").getcolors(1 << 24)) > 50 and len(small.getcolors()) > 4


def test_model_prints_json_and_draws(tmp_path: Path) -> None:
    done = _run("--model", "--json", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["modelled"] is True
    assert set(found["devices"]) == set(DEVICES)
    rows = found["rows"]
    assert {row["op"] for row in rows} == set(costed_ops())
    assert {row["tiles"] for row in rows} == {1_000, 10_000, 25_000}
    assert all(row["modelled"] is True for row in rows)
    assert all(row["ours_us"] >= row["roof_us"] > 0 for row in rows)
    sums = found["whole_model"]
    assert {(s["mode"], s["tiles"], s["device"]) for s in sums} == {
        (mode, tiles, device)
        for mode in ("forward", "train")
        for tiles in (1_000, 10_000, 25_000)
        for device in DEVICES
    }
    assert _is_drawn(Path(found["plots"][0]))


def test_model_table_says_modelled(tmp_path: Path) -> None:
    done = _run("--model", "--tiles", "2000", "--out", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    assert done.stdout.count("Modelled, not measured") == 2
    words = " ".join(done.stdout.split())  # as a narrow terminal may wrap them
    for name in (*DEVICES, *costed_ops(), "2,000", "fits half the L2"):
        assert name in words
    assert (tmp_path / "new" / "kernels_roofline.png").is_file()


def test_measured_writes_rows_plots_and_json(tmp_path: Path) -> None:
    done = _run(
        *("--op", "gated_pooling", "--tiles", "40", "--seconds", "0", "--compile-seconds", "0"),
        *("--device", "cpu", "--results", str(tmp_path), "--out", str(tmp_path), "--json"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {(row["mode"], row["impl"]) for row in found["rows"]} == {
        (mode, impl) for mode in ("forward", "backward") for impl in ("ours", "eager")
    }
    assert {(one["impl"], one["reason"]) for one in found["not_timed"]} == {
        ("torch.compile", "left out")
    }
    assert found["roof"].startswith("measured: ")
    assert all(row["roof_share"] > 0 for row in found["rows"])
    with (tmp_path / "kernels.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert _is_drawn(Path(found["plots"][0]))


def test_wrong_answers_of_ours_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(s for s in kernel_spec.all_specs() if s.op == "position_embed")
    wrong = type(spec)(
        **{
            **vars(spec),
            "ours": lambda call, impl: (
                lambda tensors, options: spec.reference(tensors, options) * 1.01
            ),
        }
    )
    monkeypatch.setattr(kernel_spec, "all_specs", lambda: [wrong])
    done = _run(
        *("--tiles", "30", "--seconds", "0", "--compile-seconds", "0", "--device", "cpu"),
        *("--results", str(tmp_path), "--out", str(tmp_path)),
    )
    assert done.exit_code == 1
    assert "wrong answer, not timed: out is off by" in done.stdout
    with (tmp_path / "kernels.csv").open(newline="") as file:
        assert "ours" not in {row["impl"] for row in csv.DictReader(file)}


def test_unknown_ops_are_refused() -> None:
    done = _run("--op", "inject")
    assert done.exit_code == 1
    assert "--op must be one of alibi_attn, dilated_attn, extraction" in done.stderr


def test_many_contenders_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plot = Axes.plot

    def watched(self: Axes, *args: Any, **kwargs: Any) -> Any:
        if "label" in kwargs:
            drawn.append((args[2], kwargs["color"]))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", watched)
    row = {"op": "op", "variant": "", "mode": "forward", "tiles": 1, "device": "d", "dtype": "t"}
    times = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0}
    plot_results([{**row, **times, "impl": f"i{i}"} for i in range(12)], tmp_path / "x.png")
    assert len(set(drawn)) == len(drawn) == 12


def test_plots_of_few_and_of_no_rows(tmp_path: Path) -> None:
    assert plot_results([], tmp_path / "none.png").is_file()
    rows = [row for row in modelled_rows([1000]) if row["op"] == "gated_pooling"]
    assert _is_drawn(plot_rooflines(rows, 1000, tmp_path / "one.png"))
