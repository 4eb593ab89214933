"""From a name to a tile encoder with its weights, and what of all this is on the machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modaltune.engine.device import check_device, cpu_or_cuda
from modaltune.engine.encoders.registry import (
    DEFAULT_ENCODER,
    TIMM_PREFIX,
    get_spec,
    is_dynamic,
    list_encoders,
)
from modaltune.engine.encoders.runtime import TileEncoder
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.encoders.torch_runtime import TorchEncoder
from modaltune.engine.encoders.weights import (
    cached_weights,
    find_weights,
    load_strict,
    packaged_weights,
    read_state,
    way_out,
)
from modaltune.engine.errors import InputError

# Networks bring timm, which takes seconds: imported where one is built.
if TYPE_CHECKING:
    from modaltune.engine.encoders.models import ImageFeatures

logger = logging.getLogger(__name__)


def _load_built(spec: EncoderSpec, weights: Path | None, allow_download: bool) -> ImageFeatures:
    from modaltune.engine.encoders.models import (
        TimmFeatures,
        adapt_state,
        build_for_loading,
        build_network,
        drop_classifier,
    )

    path = find_weights(spec, weights, allow_download)
    network = build_for_loading(lambda: build_network(spec))
    load_strict(network, adapt_state(spec, network, read_state(path)), spec.name, str(path))
    drop_classifier(network)
    return TimmFeatures(network, spec.pooling)


def _load(
    name: str, weights: Path | None, allow_download: bool, trust_remote_code: str | None
) -> tuple[EncoderSpec, ImageFeatures]:
    if not is_dynamic(name):
        spec = get_spec(name)
        if trust_remote_code is not None:
            raise InputError(
                f"--trust-remote-code must come with --tile-encoder transformers:..., got "
                f"{spec.name}, which needs no code but this program's; leave it out"
            )
        if spec.backend != "transformers":
            return spec, _load_built(spec, weights, allow_download)
        from modaltune.engine.encoders.transformers_source import load_registered

        return spec, load_registered(spec, weights, allow_download)
    if name.startswith(TIMM_PREFIX):
        from modaltune.engine.encoders.timm_source import load_timm

        return load_timm(name, weights, allow_download)
    # Imported here: transformers takes seconds, and the default encoder does without it.
    from modaltune.engine.encoders.transformers_source import load_transformers

    return load_transformers(name, weights, allow_download, trust_remote_code)


def load_eager(
    name: str = DEFAULT_ENCODER,
    *,
    weights: Path | str | None = None,
    allow_download: bool = False,
    trust_remote_code: str | None = None,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    batch_size: int | None = None,
) -> TorchEncoder:
    """Load a tile encoder in eager PyTorch; arguments and errors as `load_encoder`."""
    place = check_device(device)
    path = None if weights is None else Path(weights)
    spec, features = _load(name, path, allow_download, trust_remote_code)
    encoder = TorchEncoder(spec, features, device=place, precision=precision, batch_size=batch_size)
    logger.info(
        "tile encoder %s: %d features, %d px of %d px tiles at %g mpp, %s on %s",
        spec.name,
        spec.width,
        spec.input_px,
        spec.tile_px,
        spec.mpp,
        encoder.precision,
        place,
    )
    return encoder


def load_encoder(
    name: str = DEFAULT_ENCODER,
    *,
    weights: Path | str | None = None,
    allow_download: bool = False,
    trust_remote_code: str | None = None,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    batch_size: int | None = None,
    runtime: str | None = None,
    tile_px: int | None = None,
    runtime_fallback: bool = False,
) -> TileEncoder:
    """Load a tile encoder with its weights; nothing is downloaded unless `allow_download` is set.

    Args:
        name: A registered name (`list_encoders`), `timm:NAME`, `timm:FOLDER`, `transformers:NAME`
            or `transformers:FOLDER`.
        weights: Weights file (`.safetensors`, or `.pt`, `.pth`, `.bin` with tensors only) or a
            folder that holds it. Default: the installed package or the local hub cache.
        allow_download: Whether missing weights may be fetched from the hub.
        trust_remote_code: Full commit id whose model code may run; only for `transformers:`.
        device: Where the encoder runs.
        precision: `fp32`, `fp16` or `bf16`; default fp32 on a CPU, the spec's on a GPU.
        batch_size: Tiles at a time; default the fastest of some with a `runtime`.
        runtime: `auto` (the fastest here, measured once a machine and remembered), `torch`,
            `torch-compile`, `onnxruntime` or `tensorrt`. Default: eager PyTorch as it is; nothing
            is measured or written.
        tile_px: Side of the tiles to come, for a runtime; default the spec's.
        runtime_fallback: Whether eager PyTorch takes over where the runtime can't be had.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        InputError: The name, device, runtime or a setting can't be used.
        WeightsError: The weights are missing, damaged or another network's.
        GateError: The runtime gives other features than eager PyTorch.
    """

    load = partial(
        load_eager,
        name,
        weights=weights,
        allow_download=allow_download,
        trust_remote_code=trust_remote_code,
        device=device,
        precision=precision,
        batch_size=batch_size,
    )
    if runtime is None:
        return load()
    # Imported here: the exporters take a second that eager PyTorch does without.
    from modaltune.engine.encoders.ready import RUNTIMES, Asked, keep_ready, open_ready
    from modaltune.engine.encoders.runtime_choice import open_runtime

    asked = None
    is_plain = (precision, trust_remote_code) == (None, None) and _is_built(name)
    if runtime in RUNTIMES and is_plain and cpu_or_cuda(device).type == "cpu":
        path = find_weights(get_spec(name), Path(weights) if weights else None, allow_download)
        asked = Asked(get_spec(name), path, runtime, tile_px, batch_size)
        if (ready := open_ready(asked, load)) is not None:
            return ready
    eager = load()
    encoder = open_runtime(
        eager, runtime, tile_px=tile_px, batch_size=batch_size, fallback=runtime_fallback
    )
    if asked is not None:
        keep_ready(asked, encoder, eager)
    return encoder


def _is_built(name: str) -> bool:
    """Whether an encoder's network is built here, not by transformers."""
    return not is_dynamic(name) and get_spec(name).backend != "transformers"


@dataclass(frozen=True)
class EncoderStatus:
    """What `doctor` and the help show of a registered encoder.

    Attributes:
        name: Name of the encoder.
        width: Features per tile.
        tile_px: Recommended tile side in px.
        mpp: Recommended microns per pixel.
        licence: Licence of the weights.
        is_gated: Whether terms must be accepted first.
        source: Hub id or package.
        weights: Path of the local weights, or None.
        notes: What else to know.
        way_out: How to get missing weights; empty where they are here.
    """

    name: str
    width: int
    tile_px: int
    mpp: float
    licence: str
    is_gated: bool
    source: str
    weights: Path | None
    notes: str
    way_out: str

    @property
    def is_available(self) -> bool:
        """Whether the encoder runs as it is, offline."""
        return self.weights is not None


def describe_encoders() -> list[EncoderStatus]:
    """Return the status of every registered encoder, the default first; offline and quick."""
    found = []
    for name in list_encoders():
        spec = get_spec(name)
        path = packaged_weights(spec) or cached_weights(spec)
        found.append(
            EncoderStatus(
                name=spec.name,
                width=spec.width,
                tile_px=spec.tile_px,
                mpp=spec.mpp,
                licence=spec.licence,
                is_gated=spec.is_gated,
                source=spec.source,
                weights=path,
                notes=spec.notes,
                way_out="" if path is not None else way_out(spec),
            )
        )
    return found
