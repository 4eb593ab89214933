"""Profiles of a model: the work of its stages, limits, tables, the picture, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from modaltune.adapter import AdapterConfig
from modaltune.checkpoint import Run, save_run
from modaltune.cli import app
from modaltune.config import ModalTuneConfig
from modaltune.engine.device import DeviceFacts, device_facts
from modaltune.machine_limits import Rates
from modaltune.model import ModalTune
from modaltune.model_flops import Work, count_flops
from modaltune.preprocessing import Preprocessing, TileRecipe
from modaltune.profile_report import (
    Limit,
    limit_of,
    operator_table,
    profile_model,
    stage_picture,
    stage_rows,
    stage_table,
    stage_work,
)
from modaltune.profiling import Profile, StageTime
from modaltune.slide_encoders.longnet import LongNetConfig
from modaltune.slide_encoders.titan import TitanConfig

ADAPTER = AdapterConfig(heads=4, interactions=((0, 0), (1, 1)))
TRUNK = LongNetConfig(in_features=12, width=48, depth=2, heads=4, ffn_width=64)


@pytest.fixture
def model() -> ModalTune:
    torch.manual_seed(0)
    return ModalTune(ModalTuneConfig(slide_encoder=TRUNK, adapter=ADAPTER, genes=None)).eval()


def text_of(table: object) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("training", [False, True])
def test_every_stage_of_the_work_is_a_stage_of_the_profile(
    model: ModalTune, training: bool
) -> None:
    found = profile_model(model, 40, training=training)
    seen = {row.stage for row in found.stages}
    work = stage_work(model, 40, training=training)
    assert {stage for stage, done in work.items() if done.total > 0} <= seen
    expected = {"embed", "injector", "longnet.attention", "longnet.ffn", "extractor", "head"}
    assert expected <= seen
    assert ("longnet.ffn (backward)" in seen) == training
    assert ("optimizer" in seen) == training
    other = next(row for row in found.stages if row.stage == "other")
    assert other.share < 0.5


def test_backward_work_is_what_training_adds(model: ModalTune) -> None:
    work = stage_work(model, 40, training=True)
    both = count_flops(model, [40], training=True)
    for stage, done in both.items():
        parts = work[stage].total + work[f"{stage} (backward)"].total
        assert parts == pytest.approx(done.total), stage
    assert work["embed (backward)"].total == 0


def test_work_of_another_encoder_is_unknown() -> None:
    config = ModalTuneConfig(
        slide_encoder=TitanConfig(depth=1, width=48, heads=4),
        adapter=AdapterConfig(heads=4, interactions=((0, 0),)),
        genes=None,
    )
    assert stage_work(ModalTune(config), 9, training=False) == {}


def test_limits_are_measured_on_a_cpu_and_looked_up_for_a_gpu() -> None:
    here = limit_of(device_facts("cpu"), training=True)
    assert here is not None
    assert here.source == "measured in this run"
    rates = here.rates
    assert min(rates.products, rates.attention, rates.attention_training) > 1e9
    gpu = DeviceFacts("NVIDIA H100 80GB HBM3", "cuda", "torch", 90, 132, *[None] * 5)  # type: ignore[arg-type]
    known = limit_of(gpu, training=False)
    assert known is not None
    assert known.rates.products == pytest.approx(989.4e12)
    assert limit_of(replace(gpu, name="NVIDIA H200"), training=False) is not None
    for other in ("NVIDIA T4", "NVIDIA H100 PCIe"):  # another board of a known chip has other peaks
        assert limit_of(replace(gpu, name=other), training=False) is None


def test_rows_table_and_picture(tmp_path: Path) -> None:
    stages = (StageTime("ffn", 2, 2.0, 0.5), StageTime("other", 1, 1.0, 0.25))
    found = Profile(4.0, 0.25, stages, (), device_facts("cpu"))
    limit = Limit(Rates(products=2e9, attention=1e9, attention_training=0.6e9), "told")
    rows = stage_rows(found, {"ffn": Work(products=2e9, attention=0.5e9)}, limit)
    assert rows[0]["gflops"] == pytest.approx(1.25)
    assert rows[0]["of_limit"] == pytest.approx(0.75)  # 1.0 s of products and 0.5 s of attention
    assert rows[1]["gflop"] is rows[1]["of_limit"] is None
    assert "75%" in text_of(stage_table(rows, "title"))
    # 3e9 of attention there and back at 0.6e9 take 5 s, 1 s of it forward: 4 s for the 2e9 back.
    assert limit.seconds(Work(0, 2e9), "ffn (backward)") == pytest.approx(4.0)
    assert stage_rows(found, {"ffn": Work(1e9)}, None)[0]["of_limit"] is None
    stage_picture(rows, "title", tmp_path / "stages.png")
    with Image.open(tmp_path / "stages.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20
    assert "The 3 operators" in text_of(operator_table(found, 3))


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_the_command_writes_trace_table_and_picture(
    model: ModalTune, tmp_path: Path, precision: str
) -> None:
    run = save_run(tmp_path / "run", Run(model, Preprocessing(TileRecipe(12))))
    out = tmp_path / "out"
    arguments = ["profile", "--run", str(run), "--tiles", "30", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--precision", precision])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told == json.loads((out / "profile.json").read_text())
    assert (told["mode"], told["tiles"], told["tasks"]) == ("forward", 30, 3)
    assert told["precision"] == ("float32" if precision == "auto" else "bfloat16")
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    assert (out / "stages.png").stat().st_size > 0


def test_the_command_refuses_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["profile", "--device", "cuda", "--out", str(out)])
    assert done.exit_code == 1
    assert "device must be one of the 0 GPUs" in done.stderr
    assert not out.exists()
