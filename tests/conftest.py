"""Fixtures shared by all tests: where the shared data lies, and what its absence means."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.logging import RichHandler

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `shared` where the data is absent, unless CI demands the data."""
    if SHARED.is_dir() or os.environ.get("MODALTUNE_REQUIRE_SHARED") == "1":
        return
    reason = f"shared data folder not found at {SHARED.name}/ beside the checkout"
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(skip)


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
