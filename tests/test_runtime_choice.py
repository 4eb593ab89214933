"""`--runtime auto`: measured once, remembered, pinned, gated, and what happens when it fails."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from typer.testing import CliRunner

from modaltune.cli import app
from modaltune.engine.encoders import RUNTIMES, load_encoder, runtime_choice
from modaltune.engine.encoders.agreement import GateError, probe_tiles
from modaltune.engine.encoders.model_cache import cache_folder
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.onnx_runtime import OnnxEncoder
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.runtime import RuntimeChoice, TileEncoder
from modaltune.engine.encoders.runtime_choice import (
    available_runtimes,
    measured_choice,
    open_runtime,
)
from modaltune.engine.encoders.runtime_speed import Candidate, fastest
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError
from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.store import open_features

SPEC = replace(
    get_spec("dinov2-small"),
    name="tiny",
    backend="timm",
    model_args={},
    input_px=28,
    resize_px=32,
    tile_px=40,
    width=32,
)
SIZE = (40, 40)


@pytest.fixture
def eager() -> TorchEncoder:
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    return TorchEncoder(SPEC, TimmFeatures(network, "cls"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MODALTUNE_RUNTIME", raising=False)


class Timed(TileEncoder):
    """An encoder that takes so many seconds a tile of a clock of its own."""

    runtime = "timed"
    version = "1"
    weights_sha256 = "0" * 64

    def __init__(self, clock: Clock, seconds: dict[int, float], fits: int = 10**9) -> None:
        super().__init__(SPEC, device=torch.device("cpu"), precision="fp32", batch_size=10**6)
        self.clock, self.seconds, self.fits = clock, seconds, fits

    def _run(self, tiles: Tensor, size: int) -> Tensor:
        if size > self.fits:
            raise MemoryError
        batch = tiles[:size]
        self.clock.now += self.seconds[size] * len(batch)
        return torch.ones(len(batch), 32)


class Clock:
    """What `time.perf_counter` says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("modaltune.engine.encoders.runtime_speed.time.perf_counter", made)
    return made


def candidates(clock: Clock, runtime: str, seconds: dict[int, float], **more: Any) -> list[Any]:
    return [
        Candidate(runtime, {"batch_size": size}, lambda: Timed(clock, seconds, **more))
        for size in seconds
    ]


def test_the_fastest_setting_of_the_fastest_runtime_wins(clock: Clock) -> None:
    tiles = probe_tiles(2, 40, 40)
    found = fastest(
        [
            *candidates(clock, "torch", {1: 0.02, 4: 0.01, 8: 0.03}),
            *candidates(clock, "other", {2: 0.004, 4: 0.008}),
        ],
        tiles,
    )
    assert found == {
        "runtime": "other",
        "settings": {"batch_size": 2},
        "rates": {"torch": 100.0, "other": 250.0},
    }


def test_batches_that_do_not_fit_and_runtimes_that_do_not_open(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> TileEncoder:
        raise ImportError("No module named 'tensorrt'")

    found = fastest(
        [
            *candidates(clock, "torch", {2: 0.02, 4: 0.01, 8: 0.001, 16: 0.0001}, fits=4),
            Candidate("tensorrt", {"batch_size": 2}, broken),
            Candidate("tensorrt", {"batch_size": 4}, broken),
        ],
        probe_tiles(2, 40, 40),
    )
    assert (found["runtime"], found["settings"]) == ("torch", {"batch_size": 4})
    assert caplog.text.count("--runtime tensorrt is left out: No module named") == 1
    with pytest.raises(InputError, match="--runtime must be one that works here, got tensorrt"):
        fastest([Candidate("tensorrt", {"batch_size": 2}, broken)], probe_tiles(2, 40, 40))


def test_auto_measures_once_and_remembers(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def counted(found: Any, tiles: Tensor) -> dict[str, Any]:
        calls.append(len(found))
        return {
            "runtime": "onnxruntime",
            "settings": {"batch_size": 3, "workers": 2, "threads": 1},
            "rates": {"torch": 10.0, "onnxruntime": 25.0},
        }

    monkeypatch.setattr(runtime_choice, "fastest", counted)
    with caplog.at_level(logging.INFO, "modaltune.engine.encoders.runtime_choice"):
        encoder = open_runtime(eager, "auto")
    assert isinstance(encoder, OnnxEncoder)
    assert (encoder.batch_size, encoder.layout.workers) == (3, 2)
    assert (
        "tiny: runtime onnxruntime (measured, 2.5 x torch; tiles/s: onnxruntime 25, torch 10)"
        in (caplog.text)
    )
    settings = open_runtime(eager, "auto").settings()
    assert (settings["chosen"], settings["tiles_per_s"]["torch"]) == ("cached", 10.0)
    assert len(calls) == 1
    open_runtime(eager, "auto", tile_px=48)  # another size is another measurement
    assert len(calls) == 2
    for path in cache_folder().glob("runtime-*.json"):
        path.write_text(path.read_text()[:-30])  # cut
    open_runtime(eager, "auto")
    assert len(calls) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": "cuda"},
        {"rates": {"torch": 10.0}},
        {"settings": {"workers": 2}},
        {"settings": {"batch_size": 0}},
        {"facts": {}},
    ],
)
def test_a_file_that_says_something_else_is_measured_again(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    result: dict[str, Any] = {
        "runtime": "onnxruntime",
        "settings": {"batch_size": 2, "workers": 1, "threads": 1},
        "rates": {"torch": 10.0, "onnxruntime": 20.0},
    }
    calls: list[int] = []
    monkeypatch.setattr(runtime_choice, "fastest", lambda *_: calls.append(1) or result)
    runtimes = ("torch", "onnxruntime")
    assert measured_choice(eager, runtimes, SIZE).why == "measured"
    assert measured_choice(eager, runtimes, SIZE).why == "cached"
    (path,) = cache_folder().glob("runtime-*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert measured_choice(eager, runtimes, SIZE).why == "measured"
    assert len(calls) == 2


def test_every_runtime_can_be_asked_for(eager: TorchEncoder) -> None:
    tiles = probe_tiles(5, 40, 40)
    want = eager.encode(tiles)
    for name in ("torch", "torch-compile", "onnxruntime"):
        encoder = open_runtime(eager, name, batch_size=4)
        assert encoder.runtime == name
        assert encoder.batch_size == 4
        torch.testing.assert_close(encoder.encode(tiles), want, rtol=0, atol=1e-4)
        assert encoder.choice is not None
        assert encoder.choice.why == "asked"


def test_the_environment_pins_auto_alone(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODALTUNE_RUNTIME", "torch")
    pinned = open_runtime(eager, "auto", batch_size=2)
    assert pinned is eager
    assert pinned.settings()["chosen"] == "environment"
    assert open_runtime(eager, "onnxruntime", batch_size=2).runtime == "onnxruntime"
    monkeypatch.setenv("MODALTUNE_RUNTIME", "tpu")
    with pytest.raises(InputError, match=r"MODALTUNE_RUNTIME must be one of auto, torch, .* 'tpu'"):
        open_runtime(eager, "auto")
    with pytest.raises(InputError, match=r"--runtime must be one of auto, torch, .* got 'cuda'"):
        open_runtime(eager, "cuda")


class Wrong(OnnxEncoder):
    """ONNX Runtime with a fault: it swaps features."""

    def encode(self, *arguments: Any, **more: Any) -> Tensor:
        return super().encode(*arguments, **more).roll(1, dims=1)


def test_a_runtime_below_the_gate_stops_or_falls_back(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modaltune.engine.encoders.onnx_runtime.OnnxEncoder", Wrong)
    with pytest.raises(GateError, match=r"--runtime onnxruntime must give tiny's .* got -?0\.\d+"):
        open_runtime(eager, "onnxruntime", batch_size=4)
    fallen = open_runtime(eager, "onnxruntime", batch_size=4, fallback=True)
    assert fallen is eager
    assert fallen.settings()["chosen"] == "fallback"
    assert "falling back to torch" in caplog.text
    monkeypatch.setattr(
        runtime_choice,
        "fastest",
        lambda *_: {
            "runtime": "onnxruntime",
            "settings": {"batch_size": 2, "workers": 1, "threads": 1},
            "rates": {"torch": 10.0, "onnxruntime": 20.0},
        },
    )
    assert open_runtime(eager, "auto", batch_size=4) is eager  # auto goes on with the next
    assert "onnxruntime is left out" in caplog.text


def test_names_and_descriptions() -> None:
    assert RUNTIMES[0] == "auto"
    assert available_runtimes(torch.device("cpu")) == ("torch", "onnxruntime")
    assert "torch-compile" in available_runtimes(torch.device("cuda"))
    assert RuntimeChoice("torch", "asked").describe() == "torch (asked)"
    shown = CliRunner().invoke(app, ["embed", "--help"], env={"COLUMNS": "200"}).output
    assert "auto|torch|torch-compile|onnxruntime|tensorrt" in shown


def test_runtimes_resume_each_other(tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(100, 190, (512, 512, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    slide = write_pyramid(tmp_path / "a.tiff", rgb, mpp=0.5)
    features = {}
    for runtime, out in (("torch", "one"), ("onnxruntime", "two")):
        words = ["embed", str(slide), "--out", str(tmp_path / out), "--json", "--runtime", runtime]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        said = json.loads(done.stdout)["runtime"]
        assert (said["runtime"], said["device"]) == (runtime, "cpu")
        read = open_features(tmp_path / out / "features_efficientnet-lite0" / "a.h5")
        assert read.extra["runtime"] == runtime
        features[runtime] = torch.tensor(read.features[:])
    torch.testing.assert_close(features["torch"], features["onnxruntime"], rtol=0, atol=1e-4)
    again = CliRunner().invoke(app, [*words[:-1], "torch"])  # the recipe does not name the runtime
    assert json.loads(again.stdout)["counts"]["kept"] == 1


@pytest.mark.parametrize("runtime", ["auto", "torch", "onnxruntime"])
def test_tiles_that_are_too_small_are_named(eager: TorchEncoder, runtime: str) -> None:
    no_resize = TorchEncoder(replace(SPEC, resize_px=None), eager.features)
    with pytest.raises(
        InputError, match=r"tile_px must suit tiny, got \(20, 20\): crop_px must be"
    ):
        open_runtime(no_resize, runtime, tile_px=20)


def test_loading_without_a_runtime_writes_nothing() -> None:
    encoder = load_encoder()
    assert isinstance(encoder, TorchEncoder)
    assert encoder.settings()["batch_size"] == 16
    assert not cache_folder().exists()


def test_export_command(tmp_path: Path) -> None:
    out = tmp_path / "lite0.onnx"
    words = ["export-encoder", str(out), "--precision", "fp16", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["agreement"]["cosine"] >= 0.999
    assert report["bytes"] == out.stat().st_size
    bad = CliRunner().invoke(app, ["export-encoder", str(out), "--tile-encoder", "nobody"])
    assert bad.exit_code == 1
