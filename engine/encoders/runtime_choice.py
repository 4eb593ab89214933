"""Which runtime encodes on this machine: asked for, pinned, or measured once and remembered.

`auto` measures every runtime that this machine and encoder can have on a probe batch, each at the
batch sizes and layouts worth trying, and keeps the figures in a small file below the cache folder:
one for each encoder (by the hash of its weights), tile size, device, number of threads and set of
versions. The environment variable `MODALTUNE_RUNTIME` pins what `auto` means. Whatever is chosen
must pass the gate of `agreement` each time it is opened.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modaltune.engine.atomic import write_json_atomic
from modaltune.engine.device import device_facts
from modaltune.engine.encoders.agreement import PROBE_TILES, GateError, check_gate, probe_tiles
from modaltune.engine.encoders.export import EXPORT_VERSION, spec_facts, tile_shape
from modaltune.engine.encoders.export_check import reference_features
from modaltune.engine.encoders.model_cache import cache_folder, digest
from modaltune.engine.encoders.registry import RUNTIMES
from modaltune.engine.encoders.runtime import RuntimeChoice, TileEncoder
from modaltune.engine.encoders.runtime_speed import Candidate, fastest
from modaltune.engine.encoders.tensorrt_library import NAMES as TENSORRT_NAMES
from modaltune.engine.encoders.torch_runtime import CompiledEncoder, TorchEncoder
from modaltune.engine.errors import InputError

logger = logging.getLogger(__name__)

VARIABLE = "MODALTUNE_RUNTIME"
_BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (32, 64, 128, 256, 512)}
_ONNX_BATCHES = (1, 2, 4)
_TENSORRT_BATCHES = (64, 256)  # of one engine: it has profiles for its largest and its quarters
_COMPILED_BATCHES = {"cpu": (8,), "cuda": (128,)}  # each is a compilation


def open_runtime(
    eager: TorchEncoder,
    runtime: str = "auto",
    *,
    tile_px: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    fallback: bool = False,
) -> TileEncoder:
    """Return the encoder in the runtime asked for, or in the fastest one that this machine has.

    Args:
        eager: The encoder in eager PyTorch.
        runtime: `auto`, `torch`, `torch-compile`, `onnxruntime` or `tensorrt`.
        tile_px: Side, or height and width, of the tiles to come; default the spec's.
        batch_size: Tiles at a time; default the fastest of some.
        fallback: Whether eager PyTorch takes over where the runtime asked for can't be had or does
            not pass the gate. `auto` always falls back to the next.

    Raises:
        InputError: The runtime is unknown or can't be had here.
        GateError: It gives other features than eager PyTorch, and `fallback` is not set.
    """
    asked, why = _asked(runtime)
    size = tile_shape(eager.spec, tile_px)
    if asked != "auto":
        try:
            return _opened(eager, (asked,), size, batch_size, why)
        except (InputError, ImportError) as error:
            if not fallback or asked == "torch":
                raise
            logger.warning("%s: %s; falling back to torch", eager.name, error)
            return _opened(eager, ("torch",), size, batch_size, "fallback")
    return _opened(eager, available_runtimes(eager.device), size, batch_size, why)


def _asked(runtime: str) -> tuple[str, str]:
    """Return the runtime that is meant and who says so."""
    pinned = os.environ.get(VARIABLE, "")
    for name, value in (("--runtime", runtime), (VARIABLE, pinned or "auto")):
        if value not in RUNTIMES:
            raise InputError(f"{name} must be one of {', '.join(RUNTIMES)}, got {value!r}")
    if runtime == "auto" and pinned and pinned != "auto":
        return pinned, "environment"
    return runtime, "measured" if runtime == "auto" else "asked"


def available_runtimes(device: torch.device) -> tuple[str, ...]:
    """Return the runtimes that `auto` measures on a device.

    On a CPU `torch.compile` is left out: it takes half a minute to compile.
    """
    if device.type == "cpu":
        return "torch", "onnxruntime"
    has_tensorrt = any(importlib.util.find_spec(name) is not None for name in TENSORRT_NAMES)
    return "torch", "torch-compile", *(("tensorrt",) if has_tensorrt else ())


def _opened(
    eager: TorchEncoder,
    runtimes: tuple[str, ...],
    size: tuple[int, int],
    batch_size: int | None,
    why: str,
) -> TileEncoder:
    """Return the fastest of some runtimes that passes the gate."""
    rest = list(runtimes)
    while True:
        choice = measured_choice(eager, tuple(rest), size, batch_size, why)
        try:
            encoder = _build(eager, choice, size)
            if encoder is not eager:
                tiles = probe_tiles(PROBE_TILES, *size)
                check_gate(encoder, reference_features(eager, tiles), tiles)
            break
        except (GateError, InputError, ImportError) as error:
            if len(rest) == 1:
                raise
            logger.warning("%s: %s is left out: %s", eager.name, choice.runtime, error)
            rest.remove(choice.runtime)
    encoder.choice = choice
    logger.info("%s: runtime %s", eager.name, choice.describe())
    return encoder


def _build(eager: TorchEncoder, choice: RuntimeChoice, size: tuple[int, int]) -> TileEncoder:
    batch = choice.settings["batch_size"]
    if choice.runtime == "torch":
        eager.batch_size = batch
        return eager
    if choice.runtime == "torch-compile":
        compiled = CompiledEncoder(eager)
        compiled.batch_size = batch
        return compiled
    if choice.runtime == "onnxruntime":
        from modaltune.engine.encoders.onnx_runtime import OnnxEncoder, OnnxLayout

        layout = OnnxLayout(choice.settings["workers"], choice.settings["threads"])
        return OnnxEncoder(eager, tile_px=size, layout=layout, batch_size=batch)
    from modaltune.engine.encoders.tensorrt_runtime import TensorrtEncoder

    return TensorrtEncoder(eager, batch_size=batch, engine_batch=choice.settings["engine_batch"])


def measured_choice(
    eager: TorchEncoder,
    runtimes: tuple[str, ...],
    size: tuple[int, int],
    batch_size: int | None = None,
    why: str = "measured",
) -> RuntimeChoice:
    """Return the fastest runtime of some with its settings, from the cache or by measuring.

    Args:
        eager: The encoder in eager PyTorch.
        runtimes: Names of runtimes.
        size: Height and width of the tiles in px.
        batch_size: The only batch size to try; default those worth trying.
        why: What to say of a choice that was not read from the cache.

    Raises:
        InputError: None of the runtimes can be had.
    """
    candidates = _candidates(eager, runtimes, size, batch_size)
    if len(candidates) == 1:
        (only,) = candidates
        return RuntimeChoice(only.runtime, why, settings=only.settings)
    facts = _facts(eager, runtimes, size, batch_size)
    path = cache_folder() / f"runtime-{digest(facts)}.json"
    found = _read(path, facts)
    if found is None:
        tiles = probe_tiles(PROBE_TILES, *size)
        found = fastest(candidates, tiles)
        try:
            write_json_atomic(path, {"facts": facts, **found})
        except OSError as error:
            logger.info("the measurement of runtimes is not kept: %s", error)
    elif why == "measured":
        why = "cached"
    rates = {str(name): float(rate) for name, rate in found["rates"].items()}
    return RuntimeChoice(found["runtime"], why, rates, dict(found["settings"]))


def _candidates(
    eager: TorchEncoder, runtimes: tuple[str, ...], size: tuple[int, int], batch_size: int | None
) -> list[Candidate]:
    kind = eager.device.type
    found: list[Candidate] = []

    def add(runtime: str, batches: tuple[int, ...], **settings: int) -> None:
        for batch in batches if batch_size is None else (batch_size,):
            chosen = {"batch_size": batch, **settings}
            choice = RuntimeChoice(runtime, "measured", settings=chosen)
            found.append(Candidate(runtime, chosen, partial(_build, eager, choice, size)))

    for runtime in runtimes:
        if runtime == "torch":
            add(runtime, _BATCHES.get(kind, _BATCHES["cpu"]))
        elif runtime == "torch-compile":
            add(runtime, _COMPILED_BATCHES.get(kind, _COMPILED_BATCHES["cpu"]))
        elif runtime == "onnxruntime":
            from modaltune.engine.encoders.onnx_runtime import layouts

            for layout in layouts(torch.get_num_threads()):
                add(runtime, _ONNX_BATCHES, workers=layout.workers, threads=layout.threads)
        else:
            add(runtime, _TENSORRT_BATCHES, engine_batch=batch_size or _TENSORRT_BATCHES[-1])
    return found


def _facts(
    eager: TorchEncoder, runtimes: tuple[str, ...], size: tuple[int, int], batch_size: int | None
) -> dict[str, Any]:
    """Return what a measurement holds for, as JSON values."""
    facts = {
        "weights": eager.weights_sha256,
        "spec": spec_facts(eager.spec),
        "tile_px": list(size),
        "batch_size": batch_size,
        "precision": eager.precision,
        "device": device_facts(eager.device).name,
        "threads": torch.get_num_threads(),
        "runtimes": list(runtimes),
        "versions": {
            "torch": str(torch.__version__),
            "onnxruntime": _version("onnxruntime"),
            "tensorrt": _version("tensorrt") or _version("tensorrt-rtx-cu13-bindings"),
            "export": EXPORT_VERSION,
        },
    }
    return json.loads(json.dumps(facts))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was measured, or None if the file is absent, damaged or of another machine."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        good = (
            found["facts"] == facts
            and found["runtime"] in facts["runtimes"]
            and found["rates"][found["runtime"]] > 0
            and all(isinstance(v, int) and v > 0 for v in found["settings"].values())
            and "batch_size" in found["settings"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if good else None
