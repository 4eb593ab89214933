"""The PyTorch runtime of tile encoders: batching, full memory, output checks, precision."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modaltune.engine.encoders.models import TimmFeatures
from modaltune.engine.encoders.registry import get_spec
from modaltune.engine.encoders.runtime import choose_precision, is_out_of_memory
from modaltune.engine.encoders.torch_runtime import CompiledEncoder, TorchEncoder
from modaltune.engine.errors import InputError

SPEC = replace(
    get_spec("prov-gigapath"),
    name="fake",
    input_px=4,
    resize_px=None,
    tile_px=6,
    width=3,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    model_args={},
)


class ChannelMeans(TimmFeatures):
    """Features are the channel means; fails as told."""

    def __init__(self, limit: int = 10**9, fault: Exception | None = None) -> None:
        super().__init__(nn.Conv2d(3, 2, 1), "pooled")
        self.limit, self.fault = limit, fault
        self.sizes: list[int] = []
        self.seen: list[tuple[bool, bool, torch.dtype, torch.Size]] = []

    def pooled(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        self.seen.append((self.training, torch.is_inference_mode_enabled(), x.dtype, x.shape[1:]))
        if x.shape[0] > self.limit and self.fault is not None:
            raise self.fault
        return x.mean(dim=(2, 3))


class Convolution(TimmFeatures):
    """Features of one convolution over the whole tile."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 4), "pooled")

    def pooled(self, x: Tensor) -> Tensor:
        return self.network(x).flatten(1)


def _tiles(n: int, seed: int = 0, side: int = 6) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def _wanted(tiles: Any) -> Tensor:
    middle = torch.from_numpy(tiles[:, 1:5, 1:5].astype(np.float64) / 255)
    return middle.mean(dim=(1, 2)).float()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8, 100])
def test_batches_join_in_order(batch_size: int) -> None:
    tiles = _tiles(7)
    features = ChannelMeans()
    encoder = TorchEncoder(SPEC, features.train(), batch_size=batch_size)
    got = encoder.encode(tiles)
    torch.testing.assert_close(got, _wanted(tiles), rtol=0, atol=1e-6)
    assert got.dtype == torch.float32
    assert got.device.type == "cpu"
    assert not got.requires_grad
    # An inference tensor could not be saved for a backward pass of the adapter.
    assert not got.is_inference()
    assert max(features.sizes) == min(batch_size, 7)
    assert set(features.seen) == {(False, True, torch.float32, torch.Size([3, 4, 4]))}
    torch.testing.assert_close(encoder.encode(tiles, batch_size=2), got, rtol=0, atol=0)


def test_torch_read_only_and_strided_tiles_are_taken() -> None:
    tiles = _tiles(5)
    encoder = TorchEncoder(SPEC, ChannelMeans())
    want = encoder.encode(tiles)
    frozen = tiles.copy()
    frozen.flags.writeable = False
    assert torch.equal(encoder.encode(torch.from_numpy(tiles)), want)
    assert torch.equal(encoder.encode(frozen), want)
    assert torch.equal(encoder.encode(tiles[::-1]), want.flip(0))


def test_no_tiles() -> None:
    features = ChannelMeans()
    got = TorchEncoder(SPEC, features).encode(_tiles(0))
    assert got.shape == (0, 3)
    assert got.dtype == torch.float32
    assert features.sizes == []


@pytest.mark.parametrize(
    "fault",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_full_memory_halves_the_batch_and_goes_on(
    fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tiles = _tiles(21)
    features = ChannelMeans(limit=3, fault=fault)
    encoder = TorchEncoder(SPEC, features, batch_size=16)
    with caplog.at_level(logging.WARNING):
        got = encoder.encode(tiles)
    torch.testing.assert_close(got, _wanted(tiles), rtol=0, atol=1e-6)
    assert features.sizes == [16, 8, 4, *[2] * 10, 1]
    assert "fake: out of memory with 16 tiles, going on with 8" in caplog.text
    assert encoder.batch_size == 2
    features.sizes.clear()
    encoder.encode(tiles[:4])
    assert features.sizes == [2, 2]


def test_a_short_last_batch_is_halved_from_its_own_size() -> None:
    features = ChannelMeans(limit=3, fault=MemoryError())
    TorchEncoder(SPEC, features, batch_size=64).encode(_tiles(5))
    assert features.sizes == [5, 2, 2, 1]


def test_one_tile_that_does_not_fit_is_an_error() -> None:
    encoder = TorchEncoder(SPEC, ChannelMeans(limit=0, fault=MemoryError()), batch_size=4)
    with pytest.raises(InputError, match="fake must fit into the memory of cpu with one tile, got"):
        encoder.encode(_tiles(4))


def test_other_runtime_errors_are_not_swallowed() -> None:
    encoder = TorchEncoder(SPEC, ChannelMeans(limit=0, fault=RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        encoder.encode(_tiles(2))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_named(value: float) -> None:
    class Poisoned(ChannelMeans):
        def pooled(self, x: Tensor) -> Tensor:
            out = super().pooled(x)
            out[x.shape[0] - 1, 1] = value
            return out

    encoder = TorchEncoder(SPEC, Poisoned(), batch_size=3)
    with pytest.raises(InputError, match=r"fake must give finite.* 1 tiles .*\(tiles 2\) in fp32"):
        encoder.encode(_tiles(6))


def test_output_of_another_width_is_an_error() -> None:
    encoder = TorchEncoder(replace(SPEC, width=4), ChannelMeans())
    with pytest.raises(InputError, match=r"fake must give 4 features per tile, got .* \[2, 3\]"):
        encoder.encode(_tiles(2))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (np.zeros((2, 6, 6, 3), np.float32), "must be uint8.*got float32"),
        (np.zeros((6, 6, 3), np.uint8), r"must be uint8 \[n, h, w, 3\], got uint8 \[6, 6, 3\]"),
        (np.zeros((2, 3, 6, 6), np.uint8), "must be uint8"),
        (torch.zeros(2, 6, 6, 3), "must be uint8.*got torch.float32"),
        (np.zeros((2, 3, 3, 3), np.uint8), "crop_px must be at most the tile's 3 x 3 px"),
    ],
)
def test_bad_tiles_are_named(tiles: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchEncoder(SPEC, ChannelMeans()).encode(tiles)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        TorchEncoder(SPEC, ChannelMeans(), batch_size=0)
    with pytest.raises(InputError, match="precision must be one of fp32, fp16, bf16, got 'fp8'"):
        TorchEncoder(SPEC, ChannelMeans(), precision="fp8")
    with pytest.raises(InputError, match="precision must be fp32 on cpu, got 'fp16'"):
        TorchEncoder(SPEC, ChannelMeans(), precision="fp16")


def test_precision_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    bf16 = replace(SPEC, precision="bf16")
    assert choose_precision(SPEC, cpu, None) == "fp32"
    assert choose_precision(SPEC, cuda, None) == "fp16"
    assert choose_precision(SPEC, cuda, "fp32") == "fp32"
    assert choose_precision(bf16, cuda, None) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision(bf16, cuda, None) == "bf16"


def test_hash_is_of_the_tensors() -> None:
    first, second = ChannelMeans(), ChannelMeans()
    one, other = TorchEncoder(SPEC, first), TorchEncoder(SPEC, second)
    assert one.weights_sha256 != other.weights_sha256
    second.network.load_state_dict(first.network.state_dict())
    # The hash is of the moment it is first asked for: this encoder's stays.
    assert other.weights_sha256 != one.weights_sha256
    assert TorchEncoder(SPEC, second).weights_sha256 == one.weights_sha256
    assert len(one.weights_sha256) == 64


def test_compiled_features_are_the_eager_ones() -> None:
    # A graph of its own for each batch size, and none for a short last batch.
    eager = TorchEncoder(SPEC, Convolution(), batch_size=8)
    compiled = CompiledEncoder(eager)
    tiles = _tiles(21)
    torch._dynamo.utils.counters.clear()
    got = compiled.encode(tiles)
    torch.testing.assert_close(got, eager.encode(tiles), rtol=1e-5, atol=1e-6)
    assert (got.dtype, got.is_inference(), got.requires_grad) == (torch.float32, False, False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (compiled.runtime, compiled.name, compiled.batch_size) == ("torch-compile", "fake", 8)
    assert compiled.weights_sha256 == eager.weights_sha256
    assert compiled.encode(tiles[:0]).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_the_cpu() -> None:
    tiles = _tiles(9)
    want = TorchEncoder(SPEC, ChannelMeans()).encode(tiles)
    for precision, step in (("fp32", 2**-22), ("fp16", 2**-9)):
        got = TorchEncoder(SPEC, ChannelMeans(), device="cuda", precision=precision).encode(tiles)
        torch.testing.assert_close(got, want, rtol=0, atol=step)
