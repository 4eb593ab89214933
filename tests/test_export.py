"""Encoders as ONNX: agreement with eager PyTorch, types, batch, metadata, atomic files."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn

from modaltune.engine.encoders.agreement import (
    GateError,
    check_gate,
    measure_agreement,
    probe_tiles,
)
from modaltune.engine.encoders.export import OPSETS, export_encoder
from modaltune.engine.encoders.folded_norms import fold_batch_norms
from modaltune.engine.encoders.input_graph import TileInput
from modaltune.engine.encoders.loading import load_encoder
from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.errors import InputError
from modaltune.kernels.tile_norm.api import normalize_tiles

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
TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


def tiny_vit() -> TorchEncoder:
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    return TorchEncoder(SPEC, TimmFeatures(network, "cls"))


def run(path: Path, fed: Tensor) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(["features"], {given.name: fed.numpy()})[0])


@pytest.fixture(scope="module")
def vit() -> TorchEncoder:
    return tiny_vit()


@pytest.mark.parametrize(
    ("height", "width", "resize_px", "crop_px", "interpolation"),
    [
        (256, 256, 256, 224, "bicubic"),  # a crop alone
        (256, 256, None, 224, "bicubic"),
        (512, 512, 448, 448, "bilinear"),
        (300, 300, 256, 224, "bicubic"),
        (200, 200, 256, 224, "bicubic"),  # larger
        (301, 417, 256, 223, "bilinear"),  # the longer edge too, odd crop
        (256, 300, 256, 224, "bicubic"),  # one edge is already as long as wanted
    ],
)
def test_preprocessing_is_that_of_the_reference(
    height: int, width: int, resize_px: int | None, crop_px: int, interpolation: str
) -> None:
    spec = replace(
        get_spec("dinov2-base"),
        input_px=crop_px,
        resize_px=resize_px,
        interpolation=interpolation,
        tile_px=512,
    )
    tiles = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    )
    want = normalize_tiles(
        tiles,
        mean=spec.mean,
        std=spec.std,
        resize_px=resize_px,
        crop_px=crop_px,
        interpolation=interpolation,
        dtype=torch.float64,
        impl="reference",
    )
    got = TileInput(spec, height, width)(tiles)
    # Float32 sums of some 10 taps with values up to 255, scaled by 1 / (255 std): 0.001 grey level.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3 / 255 / min(spec.std))


@pytest.mark.parametrize(
    ("name", "precision", "preprocessing"),
    [
        ("default", "fp32", "inside"),
        ("default", "fp16", "outside"),
        ("default", "bf16", "outside"),
        ("vit", "fp32", "outside"),
        ("vit", "fp16", "inside"),
        ("vit", "bf16", "inside"),
    ],
)
def test_types_and_agreement(
    vit: TorchEncoder, tmp_path: Path, name: str, precision: str, preprocessing: Any
) -> None:
    encoder = vit if name == "vit" else load_encoder()
    side, pixels = encoder.spec.tile_px, encoder.spec.input_px
    path = tmp_path / "encoder.onnx"
    report = export_encoder(encoder, path, precision=precision, preprocessing=preprocessing)
    assert report.agreement is not None
    least = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.995}[precision]
    assert report.agreement.cosine >= least
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    kinds = Counter(
        onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) > 3 and not tensor.name.startswith("front.")
    )
    assert set(kinds) - {"INT64"} == {TYPES[precision]}
    assert model.opset_import[0].version == OPSETS[precision]
    (given,) = model.graph.input
    kind = onnx.TensorProto.DataType.Name(given.type.tensor_type.elem_type)
    shape = [d.dim_value or d.dim_param for d in given.type.tensor_type.shape.dim]
    if preprocessing == "inside":
        assert (given.name, kind, shape[1:]) == ("tiles", "UINT8", [side, side, 3])
    else:
        assert (given.name, kind, shape[1:]) == ("pixels", TYPES[precision], [3, pixels, pixels])
    assert isinstance(shape[0], str)  # the batch
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)


def test_any_batch_of_a_transformer(vit: TorchEncoder, tmp_path: Path) -> None:
    tiles = probe_tiles(9, 40, 40)
    want = vit.encode(tiles)
    export_encoder(vit, tmp_path / "vit.onnx", check=False)
    for count in (1, 2, 9):
        got = run(tmp_path / "vit.onnx", tiles[:count])
        assert measure_agreement(got, want[:count]).cosine > 0.999999
    with pytest.raises(Exception, match="Got invalid dimensions for input: tiles"):
        run(tmp_path / "vit.onnx", probe_tiles(1, 41, 40))


def test_the_file_says_what_it_is(vit: TorchEncoder, tmp_path: Path) -> None:
    report = export_encoder(vit, tmp_path / "vit.onnx", tile_px=(40, 44), precision="fp16")
    said = {p.key: p.value for p in onnx.load(str(report.path)).metadata_props}
    said = {key.removeprefix("modaltune."): value for key, value in said.items()}
    assert said["encoder"] == "tiny"
    assert said["weights_sha256"] == vit.weights_sha256
    assert json.loads(said["spec"])["std"] == [0.229, 0.224, 0.225]
    assert json.loads(said["tile_px"]) == [40, 44]
    assert (said["precision"], said["opset"]) == ("fp16", "20")
    assert json.loads(said["versions"])["torch"] == str(torch.__version__)
    assert json.loads(json.dumps(report.to_dict()))["agreement"]["cosine"] > 0.999


def test_large_weights_lie_in_a_file_named_by_their_hash(vit: TorchEncoder, tmp_path: Path) -> None:
    report = export_encoder(vit, tmp_path / "vit.onnx", external_above=10_000)
    assert report.data is not None
    assert vit.weights_sha256[:16] in report.data.name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["vit.onnx", report.data.name])
    assert report.path.stat().st_size < report.data.stat().st_size
    tiles = probe_tiles(3, 40, 40)
    assert measure_agreement(run(report.path, tiles), vit.encode(tiles)).cosine > 0.999999
    small = export_encoder(vit, tmp_path / "small.onnx", external_above=10**9)
    assert small.data is None
    assert small.path.stat().st_size > report.data.stat().st_size
    assert b".py" not in small.path.read_bytes()  # no traces of where it was made


class Deceiver(TimmFeatures):
    """Features that the exporter sees otherwise than eager execution does."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 28), "pooled")

    def pooled(self, x: Tensor) -> Tensor:
        out = self.network(x).flatten(1)
        return out.flip(1) if torch.compiler.is_compiling() else out


def test_a_graph_that_disagrees_is_refused_and_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = TorchEncoder(SPEC, Deceiver())
    (tmp_path / "old.onnx").write_bytes(b"an earlier file")
    with pytest.raises(GateError, match=r"the fp32 graph of tiny must give .* got -?0\.\d+"):
        export_encoder(encoder, tmp_path / "old.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"an earlier file"


class Branching(TimmFeatures):
    """Python decisions on values, which no exporter can trace."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 28), "pooled")

    def pooled(self, x: Tensor) -> Tensor:
        return self.network(x).flatten(1) * (2 if bool(x.sum() > 0) else 1)


def test_settings_and_networks_that_do_not_export(vit: TorchEncoder, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(InputError, match="precision must be one of fp32, fp16, bf16, got 'int8'"):
        export_encoder(vit, path, precision="int8")
    with pytest.raises(InputError, match="preprocessing must be inside or outside, got 'both'"):
        export_encoder(vit, path, preprocessing="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"tiny must be a network that torch.onnx can export"):
        export_encoder(TorchEncoder(SPEC, Branching()), path)
    no_resize = TorchEncoder(replace(SPEC, resize_px=None), vit.features)
    with pytest.raises(InputError, match=r"tile_px must suit tiny, got \(20, 20\): crop_px"):
        export_encoder(no_resize, path, tile_px=20)
    assert list(tmp_path.iterdir()) == []


def test_places_where_no_file_can_be(vit: TorchEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path must be a file to write, got the folder"):
        export_encoder(vit, tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"path must lie in a folder that can be written, got .*"):
        export_encoder(vit, tmp_path / "file" / "x.onnx", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_encoder_stays_as_it_was(vit: TorchEncoder, tmp_path: Path) -> None:
    tiles = probe_tiles(2, 40, 40)
    before = vit.encode(tiles)
    export_encoder(vit, tmp_path / "half.onnx", precision="fp16")
    assert torch.equal(vit.encode(tiles), before)
    assert {p.dtype for p in vit.features.parameters()} == {torch.float32}


class Norms(nn.Module):
    """A convolution that two layers read, one that one reads, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.alone = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.third = nn.BatchNorm2d(4)
        self.twice, self.fourth = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        x = self.third(self.alone(self.first(x) + self.second(x)))
        return self.fourth(self.twice(self.twice(x)))


def test_norms_are_folded_where_that_changes_nothing() -> None:
    torch.manual_seed(0)
    network = Norms()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 2)
    network.eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        want = network(x)
        assert fold_batch_norms(network, x[:1]) == 1
        torch.testing.assert_close(network(x), want, rtol=1e-5, atol=1e-5)
    assert isinstance(network.third, nn.Identity)
    assert isinstance(network.fourth, nn.BatchNorm2d)


def test_the_gate_sees_turns_factors_and_nan(vit: TorchEncoder) -> None:
    tiles = probe_tiles(3, 40, 40)
    want = vit.encode(tiles)
    assert check_gate(vit, want, tiles).relative_error == 0
    with pytest.raises(GateError, match=r"--runtime torch must give tiny's features with cosine"):
        check_gate(vit, want.roll(1, dims=1), tiles)
    assert measure_agreement(want * 1.5, want).cosine == pytest.approx(1)
    assert not measure_agreement(want * 1.5, want).passes("fp32")
    assert not measure_agreement(want * float("nan"), want).passes("bf16")
    assert not measure_agreement(want + 0.05 * want.std(), want).passes("fp32")


def test_probe_tiles_look_like_tissue() -> None:
    tiles = probe_tiles(4, 64, 80)
    assert tiles.shape == (4, 64, 80, 3)
    assert torch.equal(tiles, probe_tiles(4, 64, 80))
    red, green, blue = tiles[0].float().mean(dim=(0, 1))
    assert red > green
    assert blue > green
    assert not torch.equal(tiles[0], tiles[2])
