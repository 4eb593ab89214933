"""TensorRT's runtime against a recorded stand-in: order of calls, lifetimes, failures."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from modaltune.engine.encoders.agreement import GateError, check_gate, probe_tiles
from modaltune.engine.encoders.model_cache import cache_folder
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.runtime_choice import open_runtime
from modaltune.engine.encoders.tensorrt_builder import BuildError, build_plan
from modaltune.engine.encoders.tensorrt_library import library
from modaltune.engine.encoders.tensorrt_runner import PlanError
from modaltune.engine.encoders.tensorrt_runtime import TensorrtEncoder, profile_batches
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError


def _beside(name: str) -> Any:
    """Load a file of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = _beside("fake_tensorrt")

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


@pytest.fixture(scope="module")
def eager() -> TorchEncoder:
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    return TorchEncoder(SPEC, TimmFeatures(network, "cls"))


@pytest.fixture
def recorder(eager: TorchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def no_export(encoder: Any, path: Path, **settings: Any) -> None:
        assert settings == {"precision": "fp32", "preprocessing": "outside"}
        path.write_bytes(b"graph")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("modaltune.engine.encoders.tensorrt_runtime.export_encoder", no_export)
    made = fake.Recorder(eager.features)
    before = library.use(fake.fake_library(made))
    yield made
    library.use(before)


def opened(eager: TorchEncoder, recorder: Any, batch_size: int = 4) -> TensorrtEncoder:
    return TensorrtEncoder(eager, batch_size=batch_size, transfers=fake.FakeTransfers(recorder))


def test_batches_of_an_engine() -> None:
    assert profile_batches(128) == (1, 2, 8, 32, 128)
    assert profile_batches(4) == (1, 4)
    assert profile_batches(1) == (1,)


def test_an_engine_for_larger_batches(eager: TorchEncoder, recorder: Any) -> None:
    tiles = probe_tiles(9, 40, 40)
    transfers = fake.FakeTransfers(recorder)
    encoder = TensorrtEncoder(eager, batch_size=4, engine_batch=16, transfers=transfers)
    torch.testing.assert_close(encoder.encode(tiles), eager.encode(tiles), rtol=0, atol=1e-5)
    assert "execute 16" not in recorder.log
    assert recorder.log.count("add profile pixels [16, 3, 28, 28]") == 1
    got = encoder.encode(tiles, batch_size=100)  # the largest that it has
    torch.testing.assert_close(got, eager.encode(tiles), rtol=0, atol=1e-5)
    assert recorder.log.count("execute 16") == 1


@pytest.mark.parametrize("count", [1, 3, 4, 9, 23])
def test_features_are_the_eager_ones(eager: TorchEncoder, recorder: Any, count: int) -> None:
    encoder = opened(eager, recorder)
    tiles = probe_tiles(count, 40, 40)
    got = encoder.encode(tiles)
    torch.testing.assert_close(got, eager.encode(tiles), rtol=0, atol=1e-5)
    assert (got.dtype, got.device.type, got.is_inference()) == (torch.float32, "cpu", False)
    # Other tiles next, through the captured graphs.
    for shift in (1, 2):
        other = tiles.roll(shift, dims=2)
        torch.testing.assert_close(encoder.encode(other), eager.encode(other), rtol=0, atol=1e-5)
    assert (encoder.runtime, encoder.version) == ("tensorrt", "tensorrt 11.fake")
    assert check_gate(encoder, eager.encode(tiles), tiles).cosine > 0.99999


def test_order_of_building(eager: TorchEncoder, recorder: Any) -> None:
    opened(eager, recorder)
    assert recorder.log == [
        "builder",
        "network 1",  # strongly typed
        "parse",
        f"workspace {4 * 2**30}",
        "add profile pixels [1, 3, 28, 28]",
        "add profile pixels [4, 3, 28, 28]",
        "timing cache of 0 bytes",
        "build",
        "runtime",
        "deserialise",
    ]
    (timings,) = cache_folder().glob("timings-*.cache")
    assert timings.read_bytes() == b"timings"
    (plan,) = cache_folder().glob("tiny-fp32-*.plan")
    assert plan.read_bytes() == b"plan 2"


def test_order_of_running(eager: TorchEncoder, recorder: Any) -> None:
    encoder = opened(eager, recorder)
    recorder.log.clear()
    encoder.encode(probe_tiles(9, 40, 40))
    buffers = ["pinned [4, 40, 40, 3]", "device [4, 40, 40, 3]", "pinned [4, 32]"]
    first_of_profile = ["profile 1", "synchronize", "shape pixels [4, 3, 28, 28]"]
    addresses = ["address pixels", "address features"]
    assert recorder.log == [
        *buffers, *buffers,  # two slots
        "upload 4", "wait uploaded",
        "context", "device [4, 3, 28, 28]", "device [4, 32]", *first_of_profile, *addresses,
        "execute 4", "record done",
        "upload 4", "wait uploaded",  # the second slot, while the first computes
        "capture", "execute 4", "replay", "record done",
        "synchronize done",  # the first slot's features are read, and only then is it written
        "hold upload for done", "upload 1", "wait uploaded",
        "context", "device [1, 3, 28, 28]", "device [1, 32]",
        "profile 0", "synchronize", "shape pixels [1, 3, 28, 28]", *addresses,
        "execute 1", "record done",
        "synchronize done", "synchronize done",
    ]  # fmt: skip
    recorder.log.clear()
    encoder.encode(probe_tiles(4, 40, 40))
    assert recorder.log == [
        "hold upload for done", "upload 4", "wait uploaded", "replay", "record done",
        "synchronize done",
    ]  # fmt: skip


def test_buffers_live_as_long_as_their_addresses(eager: TorchEncoder, recorder: Any) -> None:
    encoder = opened(eager, recorder)
    tiles = probe_tiles(5, 40, 40)
    want = eager.encode(tiles)
    for side in (40, 44, 40):  # other tiles take other slots, not other engine buffers
        encoder.encode(probe_tiles(5, side, side))
        torch.testing.assert_close(encoder.encode(tiles), want, rtol=0, atol=1e-5)
    encoder.release_memory()
    gc.collect()  # the stand-in's graph and what it captured hold each other
    assert all(buffer() is None for buffer in recorder.buffers.values())


def test_a_plan_is_built_once(
    eager: TorchEncoder, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    opened(eager, recorder)
    opened(eager, recorder)
    assert recorder.plans == 1
    opened(eager, recorder, batch_size=8)
    assert recorder.plans == 2
    assert "timing cache of 7 bytes" in recorder.log  # of the first build
    for plan in cache_folder().glob("*.plan"):
        plan.write_bytes(b"cut")
    opened(eager, recorder)
    assert recorder.plans == 3
    assert "got one that it can't read; it is made again" in caplog.text
    recorder.fault = "deserialise"
    with pytest.raises(PlanError, match=r"the plan must be of this GPU and tensorrt 11\.fake"):
        opened(eager, recorder)
    assert recorder.plans == 4  # again, but once


def test_timings_of_another_gpu_are_left(
    recorder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "timings.cache"
    path.write_bytes(b"of another GPU")
    with caplog.at_level(logging.INFO):
        build_plan(tmp_path / "x.onnx", (1,), timing_cache=path)
    assert "timings start anew" in caplog.text
    assert path.read_bytes() == b"timings"


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("parse", BuildError, "can parse, got: node 0 is unknown; node 1 is unknown; node 2"),
        ("build", BuildError, "can build, got no engine"),
        ("dtype", PlanError, "the plan's pixels must be float, got half"),
    ],
)
def test_failures_of_building_and_loading(
    eager: TorchEncoder, recorder: Any, fault: str, kind: Any, message: str
) -> None:
    recorder.fault = fault
    with pytest.raises(kind, match=message):
        opened(eager, recorder)
    assert fault == "dtype" or not list(cache_folder().glob("*.plan"))


def test_full_memory_halves_the_batch(eager: TorchEncoder, recorder: Any) -> None:
    encoder = opened(eager, recorder, batch_size=16)
    recorder.fits = 5
    tiles = probe_tiles(21, 40, 40)
    torch.testing.assert_close(encoder.encode(tiles), eager.encode(tiles), rtol=0, atol=1e-5)
    assert encoder.batch_size == 8  # which runs at the engine's 4
    assert recorder.log.count("execute 16") == 1
    assert "execute 4" in recorder.log
    recorder.fits = 0
    with pytest.raises(InputError, match="tiny must fit into the memory of cpu with one tile"):
        encoder.encode(tiles.flip(0), batch_size=1)
    recorder.fits, recorder.fault = 10**9, "context"
    encoder.release_memory()
    with pytest.raises(InputError, match="must fit into the memory"):
        encoder.encode(tiles, batch_size=1)


def test_a_run_that_fails_is_an_error(eager: TorchEncoder, recorder: Any) -> None:
    encoder = opened(eager, recorder)
    recorder.fault = "execute"
    with pytest.raises(RuntimeError, match=r"tensorrt 11\.fake could not run; its log says why"):
        encoder.encode(probe_tiles(9, 40, 40))
    assert recorder.log[-1] == "synchronize"  # nothing is in flight
    recorder.fault = ""
    tiles = probe_tiles(9, 40, 40)
    torch.testing.assert_close(encoder.encode(tiles), eager.encode(tiles), rtol=0, atol=1e-5)


def test_an_engine_below_the_gate_is_refused(eager: TorchEncoder, recorder: Any) -> None:
    def wrong(pixels: Tensor) -> Tensor:
        return eager.features(pixels).roll(1, dims=1)

    recorder.network = wrong
    tiles = probe_tiles(4, 40, 40)
    with pytest.raises(GateError, match=r"--runtime tensorrt must give tiny's features"):
        check_gate(opened(eager, recorder), eager.encode(tiles), tiles)


def test_without_a_gpu_or_without_tensorrt(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"tensorrt must have a device cuda, got 'cpu'"):
        open_runtime(eager, "tensorrt", batch_size=4)
    fallen = open_runtime(eager, "tensorrt", batch_size=4, fallback=True)
    assert fallen.settings()["chosen"] == "fallback"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = library.use(None)
    try:
        with pytest.raises(InputError, match="must have TensorRT, got none installed; pip install"):
            build_plan(tmp_path / "x.onnx", (1,))
    finally:
        library.use(before)
