"""Fixtures shared by all tests: where the shared data lies, and what its absence means."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.logging import RichHandler

from modaltune.testing import INTERPRET

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine can't run: kernels, and tests of data that is absent.

    Data that CI demands is not skipped, but a failure.
    """
    if not (INTERPRET or torch.cuda.is_available()):
        _skip(items, "triton", "needs a GPU, or TRITON_INTERPRET=1")
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        _skip(items, "tensorrt", "needs TensorRT-RTX, which .ci/run installs for a step of its own")
    if SHARED.is_dir() or os.environ.get("MODALTUNE_REQUIRE_SHARED") == "1":
        return
    _skip(items, "shared", f"shared data folder not found at {SHARED.name}/ beside the checkout")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if marker in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The shared data folder beside the checkout."""
    if not SHARED.is_dir():
        pytest.fail("MODALTUNE_REQUIRE_SHARED=1, but ../shared is absent")
    return SHARED


def _forget_command_line_logging() -> None:
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RichHandler)]:
        root.removeHandler(handler)
    logging.getLogger("modaltune").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undo what a command line did to logging, which belongs to the whole process."""
    _forget_command_line_logging()
    yield
    _forget_command_line_logging()


@pytest.fixture(autouse=True)
def _kernels_on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw the tensors of kernel tests on the GPU, unless the kernels are interpreted."""
    if INTERPRET or "triton" not in request.keywords:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
