"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `modaltune bench kernels` has, too."""
    group = parser.getgroup("modaltune")
    group.addoption("--tiles", type=int, default=1000, help="tiles of a slide")
    group.addoption("--compile-seconds", type=float, default=120.0, help="0: no torch.compile")
    group.addoption("--results", default=None, help="existing folder whose kernels.csv gets rows")
