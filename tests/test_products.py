"""Float32 products through each library: exactness, and the reordered copies of frozen weights."""

from __future__ import annotations

import copy
import gc
import io
import math

import pytest
import torch
from torch import Tensor, nn

from modaltune.kernels import _products as products
from modaltune.kernels._products import PACKED, PackedWeights, has_onednn, product, product_back
from modaltune.testing import normal

LIBRARIES = ("onednn", "numpy", "torch") if has_onednn() else ("numpy", "torch")
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch is built without oneDNN")


def allowed(x: Tensor, weight: Tensor) -> Tensor:
    """The probabilistic bound of a float32 sum of K products (Higham and Mary, 2019)."""
    bound = x.double().abs() @ weight.double().abs().t()
    return bound * 2 * math.sqrt(x.shape[1]) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [1, 65, 2049])
def test_every_library_is_exact_to_float32(library: str, keep: bool, rows: int) -> None:
    x, weight = normal(0, rows, 33, dtype=torch.float32), normal(1, 17, 33, dtype=torch.float32)
    bias = normal(2, 17, dtype=torch.float32)
    exact = x.double() @ weight.double().t() + bias.double()
    got = products.run_with(library, x, weight, bias, keep=keep)
    assert got.dtype == torch.float32
    assert bool(((got.double() - exact).abs() <= allowed(x, weight) + 2.0**-22).all())
    grad = normal(3, rows, 17, dtype=torch.float32)
    back = products.run_with(library, grad, weight, keep=keep, back=True)
    exact = grad.double() @ weight.double()
    assert bool(((back.double() - exact).abs() <= allowed(grad, weight.t())).all())
    wide = products.run_with(library, x, weight, bias, keep=keep, gelu=True)
    torch.testing.assert_close(wide, torch.nn.functional.gelu(got), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_strided_rows_and_transposed_weights(library: str) -> None:
    x = normal(0, 80, 60, dtype=torch.float32)[:, 20:50]
    weight = normal(1, 30, 40, dtype=torch.float32).t()
    got = products.run_with(library, x, weight, keep=True)
    assert bool(
        ((got.double() - x.double() @ weight.double().t()).abs() <= allowed(x, weight)).all()
    )
    got = products.run_with(library, x.t(), x.t().contiguous(), keep=True)
    assert got.shape == (30, 30)


def test_other_dtypes_and_few_rows_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name, run in products.RUNNERS.items():

        def spy(*args: Tensor, name: str = name, run=run, **options: bool) -> Tensor:  # type: ignore[no-untyped-def]
            asked.append(name)
            return run(*args, **options)

        monkeypatch.setitem(products.RUNNERS, name, spy)
    monkeypatch.setenv("MODALTUNE_PRODUCTS", "numpy")
    weight = normal(1, 5, 4)
    few, many = products.MIN_ROWS - 1, products.MIN_ROWS
    product(normal(0, many, 4, dtype=torch.float32), weight.float())
    product(normal(0, few, 4, dtype=torch.float32), weight.float())
    for dtype in (torch.float64, torch.bfloat16):
        assert product(normal(0, many, 4, dtype=dtype), weight.to(dtype)).dtype == dtype
        product_back(normal(0, many, 5, dtype=dtype), weight.to(dtype))
    assert asked == ["numpy", *["torch"] * 5]


@needs_onednn
def test_a_copy_is_kept_and_dies_with_its_weight() -> None:
    kept = PackedWeights()
    weight = nn.Parameter(torch.randn(96, 64), requires_grad=False)
    first = kept.get(weight, back=False)
    assert first is not None
    assert kept.get(weight, back=False) is first
    back = kept.get(weight, back=True)
    assert back is not None
    assert back is not first
    assert kept.bytes_kept() == 2 * 96 * 64 * 4
    del weight
    gc.collect()
    assert kept.bytes_kept() == 0


@needs_onednn
@pytest.mark.parametrize("how", ["in place", "data", "state", "set_data"])
def test_a_changed_weight_is_noticed(how: str) -> None:
    layer = nn.Linear(64, 96, bias=False).requires_grad_(False)
    x = torch.randn(70, 64)
    products.run_with("onednn", x, layer.weight, keep=True)
    new = torch.randn(96, 64)
    if how == "in place":
        layer.weight.copy_(new)
    elif how == "data":
        layer.weight.data.copy_(new)  # no version counts this
    elif how == "state":
        layer.load_state_dict({"weight": new})
    else:
        layer.weight.data = new
    got = products.run_with("onednn", x, layer.weight, keep=True)
    torch.testing.assert_close(got, x @ new.t(), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_modules_are_copied_and_pickled_without_copies_of_weights() -> None:
    layer = nn.Linear(64, 96).requires_grad_(False)
    x = torch.randn(70, 64)
    want = products.run_with("onednn", x, layer.weight, layer.bias, keep=True)
    twin = copy.deepcopy(layer)
    assert twin.weight.layout == torch.strided
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.tell() < 2 * 96 * 64 * 4
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        got = products.run_with("onednn", x, other.weight, other.bias, keep=True)
        assert torch.equal(got, want)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(products.run_with("onednn", x, layer.weight, layer.bias, keep=True), want)


@needs_onednn
def test_copies_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.MEMORY_VARIABLE, "1")
    kept = PackedWeights()
    weights = [torch.randn(256, 512) for _ in range(4)]  # half a MiB each
    got = [kept.get(weight, back=False) for weight in weights]
    assert [copied is None for copied in got] == [False, False, True, True]
    assert kept.bytes_kept() == 2**20
    del weights[0]
    assert kept.get(weights[-1], back=False) is not None
    monkeypatch.setenv(products.MEMORY_VARIABLE, "much")
    with pytest.raises(ValueError, match="MODALTUNE_PACKED_MIB must be a whole number of MiB"):
        kept.get(torch.randn(4, 4), back=False)


@needs_onednn
def test_what_can_not_be_watched_is_not_kept() -> None:
    kept = PackedWeights()
    with torch.inference_mode():
        unversioned = torch.randn(8, 8)
    assert kept.get(unversioned, back=False) is None
    assert kept.get(torch.randn(8, 8).t(), back=False) is None
    x = torch.randn(70, 8)
    with torch.inference_mode():
        got = products.run_with("onednn", x, unversioned, keep=True)
        torch.testing.assert_close(got, x @ unversioned.t(), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_forgetting_copies() -> None:
    weight = torch.randn(32, 64)
    products.run_with("onednn", torch.randn(70, 64), weight, keep=True)
    assert PACKED.bytes_kept() >= 32 * 64 * 4
    PACKED.clear()
    assert PACKED.bytes_kept() == 0
