"""Any tile encoder as an ONNX file: typed weights, dynamic batch, checked before it is trusted."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modaltune.engine.atomic import atomic_path
from modaltune.engine.encoders.agreement import Agreement
from modaltune.engine.encoders.folded_norms import fold_batch_norms
from modaltune.engine.encoders.input_graph import TileInput
from modaltune.engine.encoders.spec import PRECISIONS, EncoderSpec
from modaltune.engine.encoders.torch_runtime import HALF_TYPES, TorchEncoder
from modaltune.engine.errors import InputError
from modaltune.kernels.tile_norm.api import crop_window

logger = logging.getLogger(__name__)

# 20 is the first with Gelu as one node, 22 the first whose convolutions take bfloat16.
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}
EXPORT_VERSION = 1  # of this module: another one makes other graphs
TILES, PIXELS, FEATURES = "tiles", "pixels", "features"
_MAX_BATCH = 65_535
# A protobuf message ends at 2 GiB; the graph itself takes some of it.
EXTERNAL_ABOVE = 2**31 - 2**24
_lock = threading.Lock()  # torch.export keeps state of its own in the module it traces

Preprocessing = Literal["inside", "outside"]


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        path: The ONNX file.
        data: The file of its weights beside it, or None where they are inside.
        precision: Type of weights and arithmetic.
        preprocessing: `inside` (takes `tiles [n, h, w, 3]` uint8) or `outside` (takes
            `pixels [n, 3, p, p]`, normalised, of the weights' type).
        tile_px: Height and width of the tiles that a graph with preprocessing takes.
        agreement: Agreement of ONNX Runtime with eager PyTorch, None if not checked.
        metadata: What the file says about itself.
    """

    path: Path
    data: Path | None
    precision: str
    preprocessing: str
    tile_px: tuple[int, int]
    agreement: Agreement | None
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "data": None if self.data is None else str(self.data),
            "tile_px": list(self.tile_px),
            "bytes": sum(p.stat().st_size for p in (self.path, self.data) if p is not None),
        }


class _Exported(nn.Module):
    """Preprocessing where wanted, then the network in its own type, then float32."""

    def __init__(self, front: nn.Module | None, features: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.front, self.features, self.dtype = front, features, dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.front is not None:
            x = self.front(x).to(self.dtype)
        return self.features(x).to(torch.float32)


def exporter_versions() -> dict[str, str]:
    """Return the versions that decide what a graph looks like."""
    # From their metadata: importing them takes a second.
    names = ("onnx", "onnx_ir", "onnxscript")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"torch": str(torch.__version__), **versions, "export": str(EXPORT_VERSION)}


def spec_facts(spec: EncoderSpec) -> dict[str, Any]:
    """Return the part of a spec that decides what a graph computes, as JSON values."""
    names = ("input_px", "resize_px", "mean", "std", "interpolation", "width", "pooling")
    return {"architecture": spec.architecture} | {name: getattr(spec, name) for name in names}


def export_encoder(
    encoder: TorchEncoder,
    path: Path | str,
    *,
    precision: str = "fp32",
    preprocessing: Preprocessing = "inside",
    tile_px: int | tuple[int, int] | None = None,
    check: bool = True,
    external_above: int = EXTERNAL_ABOVE,
) -> ExportReport:
    """Write an encoder as ONNX, batch dynamic, and check it in ONNX Runtime against eager PyTorch.

    The file appears whole or not at all. Weights of more than 2 GB go to a file beside it, whose
    name carries their hash, so that a graph never meets another graph's weights.

    Args:
        encoder: The eager encoder; it is not changed.
        path: File to write, by convention `.onnx`.
        precision: `fp32`, `fp16` or `bf16`: type of the weights and of the arithmetic.
        preprocessing: Whether resize, crop and normalisation are `inside` the graph.
        tile_px: Side, or height and width, of the tiles that it takes; default the spec's.
        check: Whether to run it. A bf16 graph is checked with its weights as they are rounded and
            float32 arithmetic, because ONNX Runtime's CPU has no bf16.
        external_above: Bytes of weights above which they get a file of their own.

    Raises:
        InputError: A setting is unknown, the network can't be exported, or the file not written.
        GateError: ONNX Runtime gives other features than eager PyTorch.
    """
    final = Path(path)
    if final.is_dir():
        raise InputError(f"path must be a file to write, got the folder {final}; name a file in it")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if preprocessing not in ("inside", "outside"):
        raise InputError(f"preprocessing must be inside or outside, got {preprocessing!r}")
    size = tile_shape(encoder.spec, tile_px)
    program = _trace(encoder, precision, preprocessing, size)
    metadata = _metadata(encoder, precision, preprocessing, size)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props.update(metadata)
    program.model.producer_name = "modaltune"
    with TemporaryDirectory() as folder:
        data = _save(program.model, Path(folder), final, encoder.weights_sha256, external_above)
        del program
        agreement = None
        if check:
            from modaltune.engine.encoders.export_check import check_export

            saved = Path(folder) / final.name
            agreement = check_export(saved, encoder, precision, preprocessing, size)
        kept = None if data is None else _put(data, final.parent / data.name)
        _put(Path(folder) / final.name, final)
    return ExportReport(final, kept, precision, preprocessing, size, agreement, metadata)


def tile_shape(spec: EncoderSpec, tile_px: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width of the tiles that are meant.

    Raises:
        InputError: They are too small for the encoder's crop.
    """
    side = spec.tile_px if tile_px is None else tile_px
    size = (side, side) if isinstance(side, int) else side
    try:
        crop_window(*size, spec.resize_px, spec.input_px)
    except ValueError as error:
        raise InputError(f"tile_px must suit {spec.name}, got {size}: {error}") from error
    return size


def _typed_features(encoder: TorchEncoder, precision: str) -> nn.Module:
    """Return the network on the CPU in a type; the encoder's own where that is what it is."""
    if precision == "fp32" and encoder.device.type == "cpu":
        return encoder.features  # the exporter folds what can be folded, in float32
    copied = copy.deepcopy(encoder.features).to("cpu")
    side = encoder.spec.input_px
    fold_batch_norms(copied, torch.zeros(1, 3, side, side))
    return copied.to(HALF_TYPES.get(precision, torch.float32))


def _trace(
    encoder: TorchEncoder, precision: str, preprocessing: str, size: tuple[int, int]
) -> torch.onnx.ONNXProgram:
    spec = encoder.spec
    dtype = HALF_TYPES.get(precision, torch.float32)
    front = TileInput(spec, *size) if preprocessing == "inside" else None
    module = _Exported(front, _typed_features(encoder, precision), dtype).eval()
    example = (
        torch.zeros((2, *size, 3), dtype=torch.uint8)
        if front is not None
        else torch.zeros((2, 3, spec.input_px, spec.input_px), dtype=dtype)
    )
    batch = torch.export.Dim("n", min=1, max=_MAX_BATCH)
    with _lock, torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[PIXELS if front is None else TILES],
                output_names=[FEATURES],
                opset_version=OPSETS[precision],
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise InputError(
                f"{spec.name} must be a network that torch.onnx can export, got: "
                f"{str(error).strip().splitlines()[0]}; use --runtime torch or torch-compile"
            ) from error
    if program is None:
        raise InputError(f"{spec.name} must export to a graph, got none; use --runtime torch")
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about itself from users; what matters is checked afterwards."""
    names = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _metadata(
    encoder: TorchEncoder, precision: str, preprocessing: str, size: tuple[int, int]
) -> dict[str, str]:
    return {
        "modaltune.encoder": encoder.name,
        "modaltune.weights_sha256": encoder.weights_sha256,
        "modaltune.spec": json.dumps(spec_facts(encoder.spec), sort_keys=True),
        "modaltune.precision": precision,
        "modaltune.preprocessing": preprocessing,
        "modaltune.tile_px": json.dumps(size),
        "modaltune.opset": str(OPSETS[precision]),
        "modaltune.licence": encoder.spec.licence,
        "modaltune.versions": json.dumps(exporter_versions(), sort_keys=True),
    }


def _save(model: Any, folder: Path, final: Path, weights: str, external_above: int) -> Path | None:
    """Write graph and weights into `folder`, and return the file of the weights if there is one."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size <= external_above:
        onnx_ir.save(model, folder / final.name)
        return None
    dtypes = sorted({str(v.const_value.dtype) for v in model.graph.initializers.values()})
    name = f"{final.stem}.{weights[:16]}-{'-'.join(dtypes).lower()}.data"
    onnx_ir.save(model, folder / final.name, external_data=name)
    return folder / name


def _put(written: Path, final: Path) -> Path:
    """Move a finished file to its place, over file systems if need be, and make it durable."""
    import shutil

    try:
        with atomic_path(final) as temporary:
            shutil.move(written, temporary)
    except InputError:  # a full disk
        raise
    except OSError as error:
        raise InputError(
            f"path must lie in a folder that can be written, got {final} ({error}); mend its "
            "rights, or name another"
        ) from error
    return final
