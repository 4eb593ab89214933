"""Run an exported graph in ONNX Runtime on the CPU and hold it against eager PyTorch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modaltune.engine.encoders.agreement import (
    MIN_COSINE,
    PROBE_TILES,
    Agreement,
    GateError,
    measure_agreement,
    probe_tiles,
)
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.kernels.tile_norm.api import normalize_tiles


def check_export(
    path: Path, encoder: TorchEncoder, precision: str, preprocessing: str, size: tuple[int, int]
) -> Agreement:
    """Return how the graph's features agree with eager PyTorch in float32, at two batch sizes.

    Raises:
        GateError: The features differ too much.
    """
    tiles = probe_tiles(PROBE_TILES, *size)
    want = reference_features(encoder, tiles)
    fed = tiles if preprocessing == "inside" else _normalised(encoder, tiles, precision)
    with TemporaryDirectory() as folder:
        if precision == "bf16":
            path = _without_bf16(path, Path(folder) / "graph.onnx")
        got = _run(path, fed)
    found = measure_agreement(got, want)
    if not found.passes(precision):
        raise GateError(
            f"the {precision} graph of {encoder.name} must give eager PyTorch's features with "
            f"cosine >= {MIN_COSINE[precision]}, got {found.cosine:.6f} (relative error "
            f"{found.relative_error:.2g}) in ONNX Runtime; export another precision"
        )
    return found


def reference_features(encoder: TorchEncoder, tiles: Tensor) -> Tensor:
    """Return `[n, width]` by eager PyTorch in float32 on the encoder's device."""
    if encoder.precision == "fp32":
        return encoder.encode(tiles)
    exact = TorchEncoder(encoder.spec, encoder.features, device=encoder.device, precision="fp32")
    return exact.encode(tiles)


def _normalised(encoder: TorchEncoder, tiles: Tensor, precision: str) -> Tensor:
    spec = encoder.spec
    return normalize_tiles(
        tiles,
        mean=spec.mean,
        std=spec.std,
        resize_px=spec.resize_px,
        crop_px=spec.input_px,
        interpolation=spec.interpolation,
        dtype=torch.float16 if precision == "fp16" else torch.float32,
    )


def _run(path: Path, fed: Tensor) -> Tensor:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # that a half-precision node can't be folded is no news
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts: list[Any] = [
        session.run(None, {name: np.ascontiguousarray(part.numpy())})[0]
        for part in (fed[:1], fed[1:])
    ]
    return torch.from_numpy(np.concatenate(parts))


def _without_bf16(path: Path, out: Path) -> Path:
    """Write a graph whose bfloat16 tensors are float32 of the same values, and return its path."""
    import onnx
    from onnx import TensorProto, numpy_helper

    def widen(tensor: Any) -> None:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, str(out), save_as_external_data=True, location="graph.data")
    return out
