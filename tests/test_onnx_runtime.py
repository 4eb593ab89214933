"""ONNX Runtime on the CPU: agreement, batches, cached graphs, layouts, full memory."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch

from modaltune.engine.encoders.agreement import check_gate, probe_tiles
from modaltune.engine.encoders.model_cache import (
    cache_folder,
    digest,
    writable_cache,
)
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.onnx_runtime import OnnxEncoder, OnnxLayout, graph_name, layouts
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError

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


def tiny_vit(seed: int = 0) -> TorchEncoder:
    torch.manual_seed(seed)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    return TorchEncoder(SPEC, TimmFeatures(network, "cls"))


@pytest.fixture(scope="module")
def eager() -> TorchEncoder:
    return tiny_vit()


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    "layout", [OnnxLayout(1, 1), OnnxLayout(1, 2), OnnxLayout(3, 1), OnnxLayout(2, 1, arena=False)]
)
def test_every_layout_gives_the_features(eager: TorchEncoder, layout: OnnxLayout) -> None:
    tiles = probe_tiles(23, 40, 40)
    encoder = OnnxEncoder(eager, layout=layout)
    assert check_gate(encoder, eager.encode(tiles), tiles).cosine > 0.999999
    want = encoder.encode(tiles)
    assert (want.dtype, want.device.type, tuple(want.shape)) == (torch.float32, "cpu", (23, 32))
    for size in (1, 5, 100):  # whatever the batch, and in the order of the tiles
        torch.testing.assert_close(encoder.encode(tiles, batch_size=size), want, rtol=0, atol=2e-6)
    assert encoder.encode(tiles[:0]).shape == (0, 32)
    assert torch.equal(encoder.encode(tiles.numpy()[::-1]), encoder.encode(tiles.flip(0)))


def test_calls_from_several_threads(eager: TorchEncoder) -> None:
    encoder = OnnxEncoder(eager)
    batches = [probe_tiles(n, 40, 40).roll(n, dims=1) for n in range(1, 9)]
    want = [encoder.encode(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(encoder.encode, batches * 3), want * 3, strict=True):
            assert torch.equal(got, expected)


def test_it_says_what_it_is(eager: TorchEncoder) -> None:
    encoder = OnnxEncoder(eager, layout=OnnxLayout(2, 1))
    assert (encoder.name, encoder.runtime, encoder.width) == ("tiny", "onnxruntime", 32)
    assert encoder.weights_sha256 == eager.weights_sha256
    assert encoder.provenance() == {
        "runtime": "onnxruntime",
        "runtime_version": onnxruntime.__version__,
        "precision": "fp32",
        "device": "cpu",
    }
    assert encoder.settings() == {**encoder.provenance(), "batch_size": 2}


def test_layouts_of_a_machine() -> None:
    assert layouts(1) == (OnnxLayout(1, 1),)
    assert layouts(8) == (OnnxLayout(8, 1), OnnxLayout(1, 8))
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        OnnxLayout(0, 1)


def test_graphs_are_kept_by_all_they_depend_on(eager: TorchEncoder) -> None:
    names = {
        graph_name(eager, (40, 40)),
        graph_name(eager, (40, 41)),
        graph_name(tiny_vit(seed=1), (40, 40)),
        graph_name(TorchEncoder(replace(SPEC, mean=(0.5, 0.5, 0.5)), eager.features), (40, 40)),
        graph_name(TorchEncoder(replace(SPEC, resize_px=28), eager.features), (40, 40)),
    }
    assert len(names) == 5
    assert graph_name(tiny_vit(), (40, 40)) in names


def test_a_graph_is_exported_once(eager: TorchEncoder, caplog: pytest.LogCaptureFixture) -> None:
    tiles = probe_tiles(2, 50, 50)
    with caplog.at_level(logging.INFO, "modaltune.engine.encoders.onnx_runtime"):
        first = OnnxEncoder(eager, tile_px=50).encode(tiles)
        assert caplog.text.count("exporting to") == 1
        assert torch.equal(OnnxEncoder(eager, tile_px=50).encode(tiles), first)
        assert caplog.text.count("exporting to") == 1
        path = cache_folder() / graph_name(eager, (50, 50))
        path.write_bytes(path.read_bytes()[:1000])  # cut by a full disk, say
        assert torch.equal(OnnxEncoder(eager, tile_px=50).encode(tiles), first)
        assert "it is made again" in caplog.text
        assert caplog.text.count("exporting to") == 2


def test_tiles_of_another_size_get_a_graph_of_their_own(eager: TorchEncoder) -> None:
    encoder = OnnxEncoder(eager)
    for side in (40, 34, 60, 40):
        tiles = probe_tiles(3, side, side + 2)
        check_gate(encoder, eager.encode(tiles), tiles)
    with pytest.raises(InputError, match="tile_px must suit"):
        OnnxEncoder(TorchEncoder(replace(SPEC, resize_px=None), eager.features), tile_px=20)


class Limited:
    """An ONNX Runtime session whose memory holds so many tiles."""

    def __init__(self, session: Any, limit: int) -> None:
        self.session, self.limit = session, limit
        self.sizes: list[int] = []

    def run(self, names: Any, feeds: dict[str, Any]) -> Any:
        from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

        (tiles,) = feeds.values()
        self.sizes.append(len(tiles))
        if len(tiles) > self.limit:
            raise RuntimeException("Failed to allocate memory for requested buffer of size 9")
        return self.session.run(names, feeds)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_memory_halves_the_batch(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    from modaltune.engine.encoders import onnx_runtime

    opened: list[Limited] = []
    real = onnx_runtime.open_session

    def limited(*arguments: Any) -> Limited:
        opened.append(Limited(real(*arguments), 3))
        return opened[-1]

    monkeypatch.setattr(onnx_runtime, "open_session", limited)
    encoder = OnnxEncoder(eager, layout=OnnxLayout(workers, 1), batch_size=16)
    tiles = probe_tiles(21, 40, 40)
    got = encoder.encode(tiles)
    torch.testing.assert_close(got, eager.encode(tiles), rtol=0, atol=1e-4)
    assert encoder.batch_size == 2
    assert len(opened) == 4  # a new session after each failure: an arena keeps what it has
    assert max(opened[-1].sizes) == 2
    opened[-1].limit = 0
    monkeypatch.setattr(onnx_runtime, "open_session", lambda *a: Limited(real(*a), 0))
    with pytest.raises(InputError, match="tiny must fit into the memory of cpu with one tile"):
        encoder.encode(tiles)


SUBNORMAL = """
import sys
import numpy as np
from modaltune.engine.encoders.onnx_runtime import OnnxEncoder, OnnxLayout
sys.path.insert(0, sys.argv[1])
from test_onnx_runtime import tiny_vit

def half():
    return float(np.float32(1e-38) * np.float32(0.5)) > 0

encoder = OnnxEncoder(tiny_vit(), layout=OnnxLayout(int(sys.argv[2]), 1))
encoder.encode(np.zeros((4, 40, 40, 3), np.uint8))
print(half(), encoder._pool.submit(half).result())
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_the_callers_arithmetic_stays_as_it_is(workers: int) -> None:
    """Numbers next to zero are zero in the threads of the runtime alone."""
    words = [sys.executable, "-c", SUBNORMAL, str(Path(__file__).parent), str(workers)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_other_failures_are_not_swallowed(
    eager: TorchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    class Broken:
        def run(self, *_: Any) -> Any:
            raise Fail("a node failed")

    monkeypatch.setattr("modaltune.engine.encoders.onnx_runtime.open_session", lambda *_: Broken())
    with pytest.raises(RuntimeError, match="a node failed"):
        OnnxEncoder(eager).encode(probe_tiles(2, 40, 40))


BUILD = """
import sys
from pathlib import Path
from modaltune.engine.encoders.model_cache import build_once
folder = Path(sys.argv[1])
def build(path):
    with (folder / "builds").open("a") as log:
        log.write("built\\n")
    path.write_text("done")
print("ready", flush=True)
sys.stdin.readline()
build_once(folder / "engine", build)
"""


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    """Three begin when the last is ready."""
    words = [sys.executable, "-c", BUILD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(words, **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_cache_that_cannot_be_written(
    eager: TorchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("no folder can be made below a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    tiles = probe_tiles(2, 40, 40)
    check_gate(OnnxEncoder(eager), eager.encode(tiles), tiles)
    with writable_cache() as folder:
        assert folder.is_dir()
    assert not folder.exists()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


@pytest.mark.parametrize("tiles", [np.zeros((2, 40, 40, 3), np.float32), np.zeros((40, 40, 3))])
def test_bad_tiles_are_named(eager: TorchEncoder, tiles: Any) -> None:
    with pytest.raises(ValueError, match="tiles must be uint8"):
        OnnxEncoder(eager).encode(tiles)
