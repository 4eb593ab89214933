"""Which library computes products: measured, cached, pinned."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modaltune.kernels import _product_choice as choosing
from modaltune.kernels._product_choice import (
    cache_file,
    known_product_choice,
    measure_products,
    pin_products,
    product_choice,
    product_fault,
    product_libraries,
)

RATES = {name: 10.0 + i for i, name in enumerate(product_libraries())}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MODALTUNE_PRODUCTS", raising=False)
    choosing.forget_choice()
    yield
    pin_products(None)
    choosing.forget_choice()


def test_measured_once_then_read_from_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return dict(RATES)

    monkeypatch.setattr(choosing, "measure_products", measure)
    with caplog.at_level(logging.INFO):
        first = product_choice()
        assert product_choice() is first
    assert (first.library, first.why, first.gflops) == ("torch", "measured", RATES)  # the fastest
    assert len([r for r in caplog.records if "float32 products" in r.message]) == 1
    assert first.file == cache_file()
    assert first.file.parent == tmp_path / "modaltune"
    choosing.forget_choice()
    again = product_choice()
    assert (again.library, again.why, len(calls)) == ("torch", "cached", 1)
    assert "torch 12" in again.describe() or "torch 11" in again.describe()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"gflops": {"torch": 1.0}}', "other machine", "other libraries", "text"],
)
def test_a_file_that_does_not_fit_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(choosing, "measure_products", lambda: dict(RATES))
    file = product_choice().file
    assert file is not None
    good: dict[str, Any] = json.loads(file.read_text())
    changed = {
        "other machine": {**good, "processor": "another"},
        "other libraries": {**good, "gflops": {"torch": 1.0}},
        "text": {**good, "gflops": dict.fromkeys(RATES, "fast")},
    }
    file.write_text(json.dumps(changed[content]) if content in changed else content)
    choosing.forget_choice()
    assert product_choice().why == "measured"
    assert json.loads(file.read_text()) == good


def test_the_choice_is_known_without_measuring_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "measure_products", lambda: dict(RATES))
    assert known_product_choice() is None
    product_choice()
    choosing.forget_choice()
    known = known_product_choice()
    assert known is not None
    assert (known.library, known.why) == ("torch", "cached")
    pin_products("numpy")
    pinned = known_product_choice()
    assert pinned is not None
    assert pinned.describe() == "numpy (pinned)"


def test_another_environment_or_thread_count_has_another_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = cache_file()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Something")
    other = cache_file()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert len({here, other, cache_file()}) == 3
    finally:
        torch.set_num_threads(threads)


def test_a_folder_that_can_not_be_written_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "modaltune").write_text("a file, not a folder")
    monkeypatch.setattr(choosing, "measure_products", lambda: dict(RATES))
    assert product_choice().why == "measured"


def test_a_file_that_can_not_be_replaced_leaves_nothing_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "measure_products", lambda: dict(RATES))
    cache_file().mkdir(parents=True)
    assert product_choice().why == "measured"
    assert list(cache_file().parent.iterdir()) == [cache_file()]


def test_the_environment_pins_and_a_call_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODALTUNE_PRODUCTS", "numpy")
    assert product_choice().describe() == "numpy (environment)"
    pin_products("torch")
    assert product_choice().describe() == "torch (pinned)"
    pin_products(None)
    assert product_choice().library == "numpy"
    monkeypatch.setenv("MODALTUNE_PRODUCTS", "cublas")
    with pytest.raises(ValueError, match=r"MODALTUNE_PRODUCTS must be one of .*numpy, torch"):
        product_choice()
    with pytest.raises(ValueError, match="library must be one of"):
        pin_products("cublas")


def test_a_real_measurement_gives_every_library_a_rate() -> None:
    rates = measure_products(rounds=1)
    assert list(rates) == list(product_libraries())
    assert all(rate > 0 for rate in rates.values())


def test_a_library_that_rounds_to_bf16_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def coarse(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return (x.bfloat16() @ weight.bfloat16().t()).float()

    monkeypatch.setitem(choosing.RUNNERS, "numpy", coarse)
    x, weight = torch.randn(64, 768), torch.randn(96, 768)
    assert "less than float32" in product_fault("numpy", x, weight)
    assert product_fault("torch", x, weight) == ""
    assert measure_products(rounds=1)["numpy"] == 0
    assert "numpy is left out, it computes in less than float32" in caplog.text

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such primitive")

    monkeypatch.setitem(choosing.RUNNERS, "numpy", broken)
    assert product_fault("numpy", x, weight) == "fails: no such primitive"


def test_a_torch_without_onednn_offers_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "has_onednn", lambda: False)
    assert product_libraries() == ("numpy", "torch")
    with pytest.raises(ValueError, match="one of numpy, torch"):
        pin_products("onednn")
