"""Where the bottleneck of tile encoding sits on a GPU: a model, with decoding rates measured here.

    tiles/s of the GPU   = attainable x dense half-precision peak / FLOP per tile
    cores for decoding   = tiles/s of the GPU / tiles/s that one core decodes (`decode.csv`)
    traffic to the GPU   = tiles/s x 3 bytes x side^2

FLOPs are counted over the real network, on tensors without memory.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from modaltune.engine.encoders.models import build_network
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.errors import InputError
from modaltune.kernels.roofline import DEVICES, Device

ATTAINABLE = 0.5  # share of the dense peak that large vision transformers reach in TensorRT
TILES_PER_SLIDE = 25_000
# Bytes/s of a x16 slot in one direction, as measured by many: 80 % of the raw rate.
LINKS = {"A100": 25e9, "H100": 50e9, "B200": 50e9, "RTX 4090": 25e9}
CORES = 16  # of a usual machine, per GPU
# Vision transformers: a depthwise convolution is bound by memory, which this model leaves out.
ENCODERS = ("dinov2-small", "conch-v1.5", "uni2-h", "prov-gigapath", "virchow2")
_CASE = "jpeg 256, 0.5 mpp, on the grid"
_WORKERS = 2  # of the rows in decode.csv


@dataclass(frozen=True)
class Modelled:
    """One encoder on one GPU; everything but the decoding rate is modelled.

    Attributes:
        encoder: The tile encoder.
        device: The GPU.
        gflop_per_tile: Products of one tile.
        tiles_per_s: Of the GPU at half its dense peak, whatever else is slower.
        seconds_per_slide: Of a slide of 25,000 tiles.
        cores: Cores that decode so fast.
        gigabytes_per_s: Pixels to the GPU.
        link_share: Of what a x16 slot carries.
        memory_gb: Memory traffic of uint8 pixels in and half-precision pixels out and in, GB/s.
        bottleneck: `GPU`, `decoding` (more than 16 cores) or `link`.
    """

    encoder: str
    device: str
    gflop_per_tile: float
    tiles_per_s: float
    seconds_per_slide: float
    cores: float
    gigabytes_per_s: float
    link_share: float
    memory_gb: float
    bottleneck: str


def flop_per_tile(spec: EncoderSpec) -> float:
    """Count the products of one tile through an encoder's network.

    Args:
        spec: Of an encoder.
    """
    with torch.device("meta"):
        network = _network(spec).eval().requires_grad_(False)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            network(torch.empty(1, 3, spec.input_px, spec.input_px))
    return float(counter.get_total_flops())


def _network(spec: EncoderSpec) -> torch.nn.Module:
    if spec.backend != "transformers":
        return build_network(spec)
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(spec.architecture, **dict(spec.model_args))
    config.image_size = spec.input_px
    return AutoModel.from_config(config)


def decode_rate(path: Path) -> float:
    """Return tiles/s that one core decodes: the last row of a JPEG slide read on its grid.

    Raises:
        InputError: There is no such row.
    """
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["case"] == _CASE]
    ours = [float(row["tiles_per_s_p50"]) for row in rows if row["impl"] == "modaltune"]
    if not ours:
        raise InputError(
            f"{path} must have a row of ours for '{_CASE}', got none; run `modaltune bench decode`"
        )
    return ours[-1] / _WORKERS


def model_throughput(
    encoder: str, device: Device, tiles_per_core: float, *, attainable: float = ATTAINABLE
) -> Modelled:
    """Model one encoder on one GPU.

    Args:
        encoder: Name of a registered encoder.
        device: The GPU.
        tiles_per_core: Tiles/s that one core decodes.
        attainable: Share of the dense peak that the encoder reaches, 0..1.
    """
    spec = get_spec(encoder)
    flops = flop_per_tile(spec)
    rate = attainable * device.half_flops / flops
    pixels = 3 * spec.tile_px**2
    seen = 2 * 3 * spec.input_px**2
    cores, link = rate / tiles_per_core, rate * pixels / LINKS[device.name]
    limits = {"GPU": 1.0, "decoding": cores / CORES, "link": link}
    return Modelled(
        encoder=encoder,
        device=device.name,
        gflop_per_tile=round(flops / 1e9, 1),
        tiles_per_s=round(rate),
        seconds_per_slide=round(TILES_PER_SLIDE / rate, 1),
        cores=round(cores, 1),
        gigabytes_per_s=round(rate * pixels / 1e9, 2),
        link_share=round(link, 3),
        memory_gb=round(rate * (pixels + 2 * seen) / 1e9, 2),
        bottleneck=max(limits, key=lambda name: limits[name]),
    )


def table(encoders: Sequence[str], results: Path) -> list[dict[str, Any]]:
    """Return the model of some encoders on all GPUs that are modelled."""
    rate = decode_rate(results / "decode.csv")
    return [
        asdict(model_throughput(name, device, rate))
        for name in encoders
        for device in DEVICES.values()
    ]
