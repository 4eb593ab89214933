"""Encoders that were opened before: the same features without a network, or the long way."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from modaltune.engine.encoders import load_encoder
from modaltune.engine.encoders.agreement import probe_tiles
from modaltune.engine.encoders.model_cache import cache_folder
from modaltune.engine.encoders.onnx_runtime import OnnxEncoder
from modaltune.engine.encoders.ready import Asked, open_ready
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.encoders.weights import packaged_weights

SPEC = get_spec("efficientnet-lite0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder in which the default encoder was opened once, in ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        load_encoder(runtime="onnxruntime", batch_size=2)
        yield cache_folder()


def asked(**changes: object) -> Asked:
    weights = packaged_weights(SPEC)
    assert weights is not None
    given = {"spec": SPEC, "weights": weights, "runtime": "onnxruntime", "batch_size": 2}
    return Asked(**{**given, **changes})  # type: ignore[arg-type]


def never() -> TorchEncoder:
    raise AssertionError("the network was built")


def ready_file(cache: Path) -> Path:
    (path,) = cache.glob("ready-*.json")
    return path


def test_the_same_features_without_a_network(cache: Path) -> None:
    encoder = open_ready(asked(), never)
    eager = load_encoder()
    assert isinstance(encoder, OnnxEncoder)
    assert encoder.weights_sha256 == eager.weights_sha256
    assert (encoder.batch_size, encoder.choice and encoder.choice.why) == (2, "asked")
    tiles = probe_tiles(9, 256, 256)
    np.testing.assert_allclose(encoder.encode(tiles), eager.encode(tiles), rtol=1e-3, atol=1e-4)


def test_a_program_that_opens_it_again_does_without_timm(cache: Path) -> None:
    code = (
        "import sys\nfrom modaltune.engine.encoders import load_encoder\n"
        "found = load_encoder(runtime='onnxruntime', batch_size=2)\n"
        "print(found.runtime, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["onnxruntime", "False"]


def test_tiles_of_another_size_load_it_after_all(cache: Path) -> None:
    loads: list[int] = []

    def load() -> TorchEncoder:
        loads.append(1)
        eager = load_encoder()
        assert isinstance(eager, TorchEncoder)
        return eager

    encoder = open_ready(asked(), load)
    assert encoder is not None
    assert encoder.encode(probe_tiles(2, 240, 240)).shape == (2, 1280)
    assert loads == [1]


def test_anything_else_is_opened_the_long_way(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_ready(asked(), never) is not None
    assert open_ready(asked(batch_size=1), never) is None
    assert open_ready(asked(runtime="auto"), never) is None
    assert open_ready(asked(tile_px=224), never) is None
    other = tmp_path / "other.pth"
    other.write_bytes(asked().weights.read_bytes() + b"\0")
    assert open_ready(asked(weights=other), never) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert open_ready(asked(), never) is None
    monkeypatch.setenv("MODALTUNE_RUNTIME", "torch")
    assert open_ready(asked(), never) is None


@pytest.mark.parametrize("fault", ["cut", "graph", "features", "width"])
def test_what_is_damaged_is_not_used(
    cache: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = ready_file(cache)
    whole = path.read_text()
    found = json.loads(whole)
    graphs = list(cache.glob("*-256x256-*.onnx"))
    try:
        if fault == "cut":
            path.write_text(whole[:-9])
        elif fault == "graph":
            graphs[0].rename(graphs[0].with_suffix(".away"))
        elif fault == "features":
            path.write_text(json.dumps({**found, "probe": found["probe"][::-1]}))
        else:
            path.write_text(json.dumps({**found, "probe": found["probe"][:400]}))
        with caplog.at_level(logging.WARNING):
            assert open_ready(asked(), never) is None
    finally:
        path.write_text(whole)
        if fault == "graph":
            graphs[0].with_suffix(".away").rename(graphs[0])
    said = "what is kept of it is not used" in caplog.text
    assert said == (fault in ("features", "width"))
    assert open_ready(asked(), never) is not None
