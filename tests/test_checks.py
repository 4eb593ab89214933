"""Argument checks of the kernels: what passes, what is refused, and with which words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modaltune.kernels._checks import (
    check_float,
    check_offsets,
    check_shape,
    operator_dtype,
    require,
)

ROOT = Path(__file__).resolve().parents[1]


def test_require() -> None:
    require(True, "never said")
    with pytest.raises(ValueError, match=r"^p must be even, got 3$"):
        require(False, "p must be even, got 3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_pass(dtype: torch.dtype) -> None:
    check_float("x", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"^x must be a floating point tensor, got {dtype}$"):
        check_float("x", torch.zeros(1, dtype=dtype))


def test_the_dtype_that_an_operator_gets() -> None:
    """Autocast leaves float64 alone, and says nothing of other devices."""
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert operator_dtype(single) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert operator_dtype(single) == torch.bfloat16
        assert operator_dtype(double) == torch.float64
        assert operator_dtype(single.to("meta")) == torch.float32


@pytest.mark.parametrize("shape", [(2, 3), (None, 3), (2, None), (None, None)])
def test_shapes_that_fit(shape: tuple[int | None, ...]) -> None:
    check_shape("x", torch.zeros(2, 3), shape)


def test_no_dimensions_fit_a_scalar() -> None:
    check_shape("x", torch.zeros(()), ())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 2), r"^x must have shape \[3, 2\], got \[2, 3\]$"),
        ((None, 4), r"^x must have shape \[\*, 4\], got \[2, 3\]$"),
        ((2,), r"^x must have shape \[2\], got \[2, 3\]$"),
        ((2, 3, None), r"^x must have shape \[2, 3, \*\], got \[2, 3\]$"),
        ((), r"^x must have shape \[\], got \[2, 3\]$"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shape("x", torch.zeros(2, 3), shape)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("listed", [[0, 5], [0, 0, 5], [0, 2, 2, 5, 5]])
def test_offsets_that_fit(listed: list[int], dtype: torch.dtype) -> None:
    got = check_offsets(torch.tensor(listed, dtype=dtype), 5)
    assert got.dtype == torch.int64
    assert got.device.type == "cpu"
    assert got.tolist() == listed


def test_offsets_of_nothing() -> None:
    assert check_offsets(torch.tensor([0]), 0).tolist() == [0]
    assert check_offsets(None, 7).tolist() == [0, 7]
    assert check_offsets(None, 0).tolist() == [0, 0]


@pytest.mark.parametrize(
    "listed", [[0, 4], [0, 6], [1, 5], [0, 4, 3, 5], [0, -1, 5], [0], [5, 0], [0, 6, 5]]
)
def test_offsets_that_do_not_fit(listed: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^offsets must rise from 0 to the number of rows 5, got"):
        check_offsets(torch.tensor(listed), 5)


def test_long_offsets_are_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, 4, 5, 6, 7\]$"):
        check_offsets(torch.arange(100), 5)


@pytest.mark.parametrize(
    "offsets", [torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.empty(0).long()]
)
def test_offsets_of_the_wrong_kind(offsets: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"offsets must be a 1-D integer tensor \[B \+ 1\], got"):
        check_offsets(offsets, 5)


def test_the_folder_cannot_be_imported_under_its_bare_name() -> None:
    """From the repository root `kernels` is on the path; its operators must not load twice."""
    done = subprocess.run(
        [sys.executable, "-c", "import kernels\nimport kernels._checks"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1
    assert "ImportError: import modaltune.kernels, not kernels" in done.stderr
    # The package itself is inert: transformers may import it without harm.
    assert 'File "<string>", line 2' in done.stderr
