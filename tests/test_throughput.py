"""The model of tile encoding on GPUs: FLOPs counted right, bottlenecks named right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modaltune.benchmarks import throughput
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.errors import InputError
from modaltune.kernels.roofline import DEVICES


def test_flops_are_those_of_the_network() -> None:
    """DINOv2-S: 12 blocks of width 384 over 257 tokens, and the patch embedding."""
    tokens, width, depth = 257, 384, 12
    products = 2 * tokens * 12 * width**2
    attention = 4 * tokens**2 * width
    patches = 2 * 256 * 3 * 14**2 * width
    want = depth * (products + attention) + patches
    assert throughput.flop_per_tile(get_spec("dinov2-small")) == pytest.approx(want, rel=1e-3)


def test_the_slowest_part_is_named() -> None:
    h100 = DEVICES["H100"]
    free = throughput.model_throughput("dinov2-small", h100, 1e9)
    assert free.bottleneck == "GPU"
    assert free.seconds_per_slide == pytest.approx(25_000 / free.tiles_per_s, abs=0.1)
    slow = throughput.model_throughput("dinov2-small", h100, free.tiles_per_s / 100)
    assert (slow.bottleneck, slow.cores) == ("decoding", 100.0)
    quick = replace(h100, half_flops=100 * h100.half_flops)
    assert throughput.model_throughput("dinov2-small", quick, 1e9).bottleneck == "link"


def test_without_a_measured_rate_nothing_is_modelled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"decode.csv must have a row.*bench decode"):
        throughput.decode_rate(tmp_path / "decode.csv")
