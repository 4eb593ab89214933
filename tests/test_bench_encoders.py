"""The benchmark of encoder runtimes: sides agree before they are timed, bars, rows, picture."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from modaltune.benchmarks import encoders
from modaltune.cli import app
from modaltune.engine.encoders.agreement import measure_agreement, probe_tiles
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError

SPEC = replace(
    get_spec("dinov2-small"),
    name="vit-small",
    backend="timm",
    model_args={},
    input_px=28,
    resize_px=32,
    tile_px=40,
    width=32,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TorchEncoder:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    made = TorchEncoder(SPEC, TimmFeatures(network, "cls"))
    monkeypatch.setattr(encoders, "load_case", lambda name: made)
    return made


def test_rows_and_picture(tiny: TorchEncoder, tmp_path: Path) -> None:
    words = ["bench", "encoders", "--encoder", "vit-small", "--rounds", "2", "--json"]
    words += ["--results", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    said = json.loads(done.stdout)
    assert done.exit_code == (1 if said["missed"] else 0)
    plain, ours, chosen = said["rows"]
    assert (plain["side"], plain["ratio"]) == ("plain torch", 1.0)
    assert ours["side"] == "torch"
    assert chosen["side"].startswith("auto: ")
    for row in said["rows"]:
        assert row["cosine"] >= 0.9999
        assert row["tiles_per_s_p20"] <= row["tiles_per_s"] <= row["tiles_per_s_p80"]
    with (tmp_path / "encoders.csv").open() as file:
        assert [row["side"] for row in csv.DictReader(file)] == [r["side"] for r in said["rows"]]
    assert (tmp_path / "encoders.png").stat().st_size > 5000


def test_the_rival_preprocesses_as_its_authors_say(tiny: TorchEncoder) -> None:
    tiles = probe_tiles(5, 40, 40)
    got = encoders.plain_torch(tiny, 2)(tiles)
    assert measure_agreement(got, tiny.encode(tiles)).passes("fp32")


def test_a_side_with_other_features_is_not_timed(
    tiny: TorchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(eager: TorchEncoder, size: int) -> Any:
        return lambda tiles: eager.encode(tiles).roll(1, dims=1)

    monkeypatch.setattr(encoders, "plain_torch", wrong)
    with pytest.raises(InputError, match="plain torch must give vit-small's features"):
        encoders.measure("vit-small", 1)


def test_bars() -> None:
    row = {"encoder": "vit-small", "side": "auto: onnxruntime", "ratio": 1.29}
    assert encoders.missed_bars([row]) == [
        "vit-small: auto: onnxruntime is 1.29 x plain torch, the bar is 1.3 x"
    ]
    assert encoders.missed_bars([{**row, "ratio": 1.3}, {**row, "side": "torch"}]) == []
    with pytest.raises(InputError, match="--encoder must be one of efficientnet-lite0, vit-small"):
        encoders.load_case("resnet")


def test_flops_of_a_tile() -> None:
    # EfficientNet-Lite0 is published with 407 million multiply-adds, the classifier's 1.3 included.
    flops = encoders.tile_flops(encoders.load_case("efficientnet-lite0"))
    assert flops == pytest.approx(2 * 0.406e9, rel=0.06)
