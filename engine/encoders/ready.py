"""An encoder as it was opened here before, without building its network again.

Building a network with timm and reading its weights take seconds, which a machine that has the
exported graph need not spend: once ONNX Runtime was chosen for an encoder, a small file below the
cache folder says which graph that is, how it is run, and what eager PyTorch's features of the probe
batch were. The graph must reproduce those each time before it is trusted. The file holds for one
weights file (by the hash of its bytes), tile size, device, number of threads and set of versions;
where anything is another, or missing, the encoder is opened the long way.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.device import device_facts
from modaltune.engine.encoders.agreement import PROBE_TILES, GateError, check_gate, probe_tiles
from modaltune.engine.encoders.export import exporter_versions, spec_facts, tile_shape
from modaltune.engine.encoders.model_cache import cache_folder, digest
from modaltune.engine.encoders.onnx_runtime import OnnxEncoder, OnnxLayout, graph_name
from modaltune.engine.encoders.runtime import RuntimeChoice, TileEncoder
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.encoders.torch_runtime import DeferredEncoder, TorchEncoder
from modaltune.engine.errors import InputError

logger = logging.getLogger(__name__)

RUNTIMES = ("auto", "onnxruntime")
_DISTRIBUTIONS = ("modaltune", "timm", "onnxruntime")


@dataclass(frozen=True)
class Asked:
    """What an encoder is asked to be.

    Attributes:
        spec: Its spec.
        weights: Its weights file.
        runtime: `auto` or `onnxruntime`.
        tile_px: Side, or height and width, of the tiles to come; None for the spec's.
        batch_size: Tiles at a time; None for the fastest.
    """

    spec: EncoderSpec
    weights: Path
    runtime: str
    tile_px: int | tuple[int, int] | None = None
    batch_size: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the tiles."""
        return tile_shape(self.spec, self.tile_px)

    def facts(self) -> dict[str, Any]:
        """Return all that the file depends on, as JSON values."""
        with self.weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        versions = {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}
        facts = {
            "encoder": self.spec.name,
            "spec": spec_facts(self.spec),
            "weights_file": sha256,
            "runtime": self.runtime,
            "pinned": os.environ.get("MODALTUNE_RUNTIME", ""),
            "tile_px": list(self.size),
            "batch_size": self.batch_size,
            "device": device_facts(torch.device("cpu")).name,
            "threads": torch.get_num_threads(),
            "versions": {**exporter_versions(), **versions},
        }
        return json.loads(json.dumps(facts))


def _path(facts: dict[str, Any]) -> Path:
    return cache_folder() / f"ready-{digest(facts)}.json"


def keep_ready(asked: Asked, encoder: TileEncoder, eager: TorchEncoder) -> None:
    """Note how an encoder was opened; where it is not ONNX Runtime's or can't be noted, nothing.

    Args:
        asked: What was asked for.
        encoder: What was opened; it has passed the gate.
        eager: The same encoder in eager PyTorch.
    """
    if not isinstance(encoder, OnnxEncoder) or encoder.choice is None:
        return
    want = eager.encode(probe_tiles(PROBE_TILES, *asked.size)).numpy()
    facts = asked.facts()
    try:
        write_json_atomic(
            _path(facts),
            {
                "facts": facts,
                "weights_sha256": encoder.weights_sha256,
                "runtime": encoder.choice.runtime,
                "rates": encoder.choice.rates,
                "settings": encoder.choice.settings,
                "probe": base64.b64encode(want.astype("<f4").tobytes()).decode("ascii"),
            },
        )
    except OSError as error:
        logger.info("how %s is opened is not kept: %s", encoder.name, error)


def open_ready(asked: Asked, load: Callable[[], TorchEncoder]) -> TileEncoder | None:
    """Open an encoder as it was opened before, or return None where it never was.

    Args:
        asked: What is asked for.
        load: Loads it in eager PyTorch; called where tiles of another size come.
    """
    facts = asked.facts()
    found = _read(_path(facts), facts)
    if found is None:
        return None
    deferred = DeferredEncoder(asked.spec, found["weights_sha256"], load)
    if not (cache_folder() / graph_name(deferred, asked.size)).is_file():
        return None
    settings = found["settings"]
    try:
        encoder = OnnxEncoder(
            deferred,
            tile_px=asked.size,
            layout=OnnxLayout(settings["workers"], settings["threads"]),
            batch_size=settings["batch_size"],
        )
        want = _features(found["probe"], asked.spec.width)
        check_gate(encoder, want, probe_tiles(PROBE_TILES, *asked.size))
    except (GateError, InputError, KeyError, ValueError) as error:
        logger.warning("%s: what is kept of it is not used: %s", asked.spec.name, error)
        return None
    why = "asked" if asked.runtime != "auto" else "cached"
    encoder.choice = RuntimeChoice(found["runtime"], why, found["rates"], settings)
    logger.info("%s: runtime %s", asked.spec.name, encoder.choice.describe())
    return encoder


def _features(text: str, width: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    return torch.from_numpy(values.reshape(PROBE_TILES, width).astype(np.float32))


def _read(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was kept, or None if it is absent, damaged or of something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        good = (
            found["facts"] == facts
            and found["runtime"] == OnnxEncoder.runtime
            and isinstance(found["weights_sha256"], str)
            and isinstance(found["probe"], str)
            and all(isinstance(v, int) and v > 0 for v in found["settings"].values())
            and all(isinstance(v, float | int) for v in found["rates"].values())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if good else None
