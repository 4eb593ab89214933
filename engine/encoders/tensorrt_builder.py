"""From an ONNX file to a serialised TensorRT engine: typed as the file is, one profile a batch.

Networks are strongly typed (TensorRT 11 knows no other): precision is that of the ONNX tensors.
Plans are kept in the cache folder, by everything that decides them; the timings of kernels are kept
beside them for the next plan on the same GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modaltune.engine.atomic import atomic_path
from modaltune.engine.encoders.model_cache import digest, locked
from modaltune.engine.encoders.tensorrt_library import is_rtx, library_version
from modaltune.engine.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt
else:
    from modaltune.engine.encoders.tensorrt_library import library as trt

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 4 * 2**30
_ERRORS_SHOWN = 3


class BuildError(InputError):
    """TensorRT can't make an engine of a graph."""


def build_plan(
    onnx_path: Path,
    batches: Sequence[int],
    *,
    timing_cache: Path | None = None,
    capability: str | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> bytes:
    """Build a serialised engine with one optimisation profile for each batch size.

    Args:
        onnx_path: Graph with one input whose first dimension is the batch.
        batches: Sizes, growing; each profile is for exactly that many tiles.
        timing_cache: File of kernel timings to start from and to add to.
        capability: Another GPU to build for, such as `SM89`; TensorRT-RTX only. Default: this one.
        workspace_bytes: Most memory that a kernel may use beside its tensors.

    Raises:
        BuildError: The graph can't be parsed or built; TensorRT's own words are in the message.
    """
    trt_logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(trt_logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt_logger)
    if not parser.parse_from_file(str(onnx_path)):
        faults = [str(parser.get_error(i)) for i in range(min(parser.num_errors, _ERRORS_SHOWN))]
        raise BuildError(
            f"{onnx_path.name} must be a graph that {library_version()} can parse, got: "
            f"{'; '.join(faults)}; use --runtime torch-compile"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if capability is not None:
        _aim(config, capability)
    _add_profiles(builder, network, config, batches)
    timings = _start_timings(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(
            f"{onnx_path.name} must be a graph that {library_version()} can build, got no engine "
            "(its log says why); use --runtime torch-compile"
        )
    if timings is not None and timing_cache is not None:
        _keep_timings(config, timing_cache)
    return bytes(plan)


def _aim(config: Any, capability: str) -> None:
    """Build for another GPU: names that only TensorRT-RTX has."""
    if not is_rtx():
        raise BuildError(
            f"capability must be left out with {library_version()}, got {capability!r}; only "
            "TensorRT-RTX builds for a GPU that is not here"
        )
    kinds: Any = trt
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(kinds.ComputeCapability, capability), 0)


def _add_profiles(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    batches: Sequence[int],
) -> None:
    given = network.get_input(0)
    rest = tuple(given.shape)[1:]
    for batch in batches:
        profile = builder.create_optimization_profile()
        shape: Any = (batch, *rest)  # a tuple is taken where the names say Dims
        profile.set_shape(given.name, shape, shape, shape)
        config.add_optimization_profile(profile)


def _start_timings(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    if path is None:
        return None
    known = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(known)
    if not config.set_timing_cache(timings, ignore_mismatch=False):
        # Of another GPU or version, or cut: a slower build, not a wrong one.
        logger.info("%s is not of this GPU and TensorRT; timings start anew", path)
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _keep_timings(config: trt.IBuilderConfig, path: Path) -> None:
    with locked(path):
        ours = config.get_timing_cache()
        if path.is_file():  # another process may have added its own meanwhile
            ours.combine(config.create_timing_cache(path.read_bytes()), ignore_mismatch=False)
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(ours.serialize()))


def plan_name(slug: str, facts: dict[str, Any]) -> str:
    """Return the file name of a plan in the cache.

    Args:
        slug: The encoder, for people who look into the folder.
        facts: Weights hash, GPU, TensorRT, precision, shapes, exporter: all that decides the plan.
    """
    return f"{slug}-{facts['precision']}-{digest(facts)}.plan"


def timing_cache_name(gpu: str, version: str) -> str:
    """Return the file name of the kernel timings of one GPU and TensorRT version."""
    return f"timings-{digest({'gpu': gpu, 'tensorrt': version})}.cache"
