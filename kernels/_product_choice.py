"""Which library computes float32 products on this machine: measured once, cached, or pinned.

The order of precedence: `pin_products("numpy")`, the environment variable `MODALTUNE_PRODUCTS`
(`onednn`, `numpy`, `torch`, or `auto`), a measurement. The measurement takes about a second; its
result is a small JSON file below `$XDG_CACHE_HOME/modaltune` (`~/.cache/modaltune`), one for each
processor, torch, numpy, number of threads and `OPENBLAS_*` environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modaltune.kernels._products import MIN_ROWS, RUNNERS, has_onednn, run_with

logger = logging.getLogger(__name__)

VARIABLE = "MODALTUNE_PRODUCTS"
# Rows and (K, M) of products that the published slide encoder consists of.
_ROWS, _SHAPES = 512, ((768, 3072), (3072, 768))
_ROUNDS = 4


@dataclass(frozen=True)
class ProductChoice:
    """The library in use.

    Attributes:
        library: `onednn`, `numpy` or `torch`.
        why: `pinned`, `environment`, `measured` or `cached`.
        gflops: GFLOP/s of each library when it was measured; empty where nothing was.
        file: Where the measurement is kept, or None.
    """

    library: str
    why: str
    gflops: dict[str, float]
    file: Path | None = None

    def describe(self) -> str:
        """Return one line for a log or a report."""
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in self.gflops.items())
        return f"{self.library} ({self.why}{f'; GFLOP/s: {rates}' if rates else ''})"


_pinned: str | None = None
_lock = threading.Lock()


def product_libraries() -> tuple[str, ...]:
    """Return the libraries that this installation offers."""
    return tuple(name for name in RUNNERS if name != "onednn" or has_onednn())


def pin_products(library: str | None) -> None:
    """Use one library for all float32 products on the CPU from now on; None undoes it.

    Raises:
        ValueError: The library is unknown or not part of this installation.
    """
    global _pinned
    if library is not None:
        _check(library, "library")
    _pinned = library


@contextlib.contextmanager
def products_kept() -> Iterator[None]:
    """Keep the library that is in use now, whatever number of threads torch has meanwhile."""
    global _pinned
    before, _pinned = _pinned, product_choice().library
    try:
        yield
    finally:
        _pinned = before


def _check(library: str, name: str) -> None:
    offered = product_libraries()
    if library not in offered:
        raise ValueError(
            f"{name} must be one of {', '.join(offered)} (what this installation has), or auto "
            f"for the fastest, got {library!r}"
        )


def product_choice() -> ProductChoice:
    """Return the library in use, measuring (a second, once a machine) unless it is known.

    Raises:
        ValueError: `MODALTUNE_PRODUCTS` names no library of this installation.
    """
    if (wanted := _wanted()) is not None:
        return wanted
    with _lock:  # threads that arrive together must not measure each other
        return _measured(torch.get_num_threads())


def known_product_choice() -> ProductChoice | None:
    """Return the library in use, or None if the first product will have to measure it.

    Raises:
        ValueError: `MODALTUNE_PRODUCTS` names no library of this installation.
    """
    if (wanted := _wanted()) is not None:
        return wanted
    machine = _machine(torch.get_num_threads())
    return product_choice() if _read(cache_file(machine), machine) else None


def _wanted() -> ProductChoice | None:
    """Return what a call or the environment asks for."""
    if _pinned is not None:
        return ProductChoice(_pinned, "pinned", {})
    wanted = os.environ.get(VARIABLE, "auto")
    return None if wanted in ("", "auto") else _named(wanted)


@cache
def _named(library: str) -> ProductChoice:
    _check(library, VARIABLE)
    return _said(ProductChoice(library, "environment", {}))


@cache
def _measured(threads: int) -> ProductChoice:
    machine = _machine(threads)
    file = cache_file(machine)
    rates = _read(file, machine)
    why = "cached" if rates else "measured"
    if not rates:
        rates = measure_products()
        _write(file, {**machine, "gflops": rates})
    best = max(rates, key=lambda name: rates[name])
    return _said(ProductChoice(best, why, rates, file))


def _said(choice: ProductChoice) -> ProductChoice:
    logger.info("float32 products on the CPU: %s", choice.describe())
    return choice


def measure_products(rounds: int = _ROUNDS) -> dict[str, float]:
    """Return GFLOP/s of each library over the shapes of the slide encoder, best of some rounds.

    The libraries take turns, so that a busy machine slows all of them. A library that fails, or
    that computes in less than float32, gets 0.
    """
    generator = torch.Generator().manual_seed(0)
    seconds = dict.fromkeys(product_libraries(), 0.0)
    for inner, outer in _SHAPES:
        x = torch.randn(_ROWS, inner, generator=generator)
        weight = torch.randn(outer, inner, generator=generator)
        for name, took in _best_times(x, weight, rounds).items():
            seconds[name] += took
    flops = sum(2.0 * _ROWS * inner * outer for inner, outer in _SHAPES)
    return {name: round(flops / took / 1e9, 1) for name, took in seconds.items()}


def _best_times(x: Tensor, weight: Tensor, rounds: int) -> dict[str, float]:
    """Return the least seconds of one product by library, infinite for one that is unfit."""
    times: dict[str, float] = {}
    fit = []
    for name in product_libraries():
        times[name] = math.inf
        fault = product_fault(name, x, weight)  # a warm-up, too
        if fault and name != "torch":
            logger.warning("float32 products on the CPU: %s is left out, it %s", name, fault)
        else:
            fit.append(name)
    for _ in range(rounds):
        for name in fit:
            started = time.perf_counter()
            run_with(name, x, weight, keep=True)
            times[name] = min(times[name], time.perf_counter() - started)
    return times


def product_fault(library: str, x: Tensor, weight: Tensor) -> str:
    """Say why a library is unfit for `x weight^T`, or return nothing.

    The error allowed to each element is `2 sqrt(K) eps |x| |w|^T`: the probabilistic bound of a
    float32 sum of K products (Higham and Mary, 2019); bf16 or tf32 would exceed it tenfold.
    """
    rows = x[:MIN_ROWS]
    try:
        got = run_with(library, x, weight, keep=True)[:MIN_ROWS]
    except (RuntimeError, NotImplementedError) as error:
        return f"fails: {error}"
    exact = rows.double() @ weight.double().t()
    allowed = rows.double().abs() @ weight.double().abs().t()
    allowed *= 2 * math.sqrt(x.shape[1]) * torch.finfo(torch.float32).eps
    worst = float(((got.double() - exact).abs() / allowed).max())
    return "" if worst <= 1 else f"computes in less than float32 ({worst:.1f} x the error allowed)"


def _processor() -> str:
    """Return the processor by name and number: virtual machines share names."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        wanted = ("model name", "cpu family", "model", "stepping", "CPU part")
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if not line.strip() and len(found) > 2:
                break  # the first processor's lines end here
            if name.strip() in wanted:
                found.append(value.strip())
    else:
        found.append(platform.processor())
    return " ".join(found)


def _machine(threads: int) -> dict[str, Any]:
    """Return what a measurement holds for."""
    import numpy as np

    return {
        "processor": _processor(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "threads": threads,
        "libraries": list(product_libraries()),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("OPENBLAS_")},
    }


def cache_file(machine: dict[str, Any] | None = None) -> Path:
    """Return where the measurement of a machine (this one) is kept."""
    machine = _machine(torch.get_num_threads()) if machine is None else machine
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / "modaltune" / f"products-{digest}.json"


def _read(file: Path, machine: dict[str, Any]) -> dict[str, float]:
    """Return the rates in a file, or nothing if it is absent, cut or of another machine."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in machine.items()):
        return {}
    rates = found.get("gflops")
    if not isinstance(rates, dict) or sorted(rates) != sorted(machine["libraries"]):
        return {}
    if not all(isinstance(rate, float) and rate >= 0 for rate in rates.values()):
        return {}
    return rates


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all; where that fails, every process measures."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder, file.name)
            whole.write_text(json.dumps(content, indent=1), encoding="utf-8")
            whole.replace(file)
    except OSError as error:
        logger.info("the measurement of products is not kept: %s", error)


def forget_choice() -> None:
    """Look at the environment and the cache file again at the next product."""
    _named.cache_clear()
    _measured.cache_clear()
