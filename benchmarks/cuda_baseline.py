"""Plain CUDA C++ rivals of `inject` and `extract`: compiled by nvcc, run through PyCUDA.

PyCUDA shares torch's primary context and launches on the default stream, where torch works too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modaltune.benchmarks.kernel_spec import Call, NotHereError, Run, Tensors

SOURCES = Path(__file__).parent / "cuda"
ROWS, THREADS, SPAN, GROUP, OWNED = 32, 256, 256, 4, 2  # as in cuda/*.cu
EPS = 1e-5
_TIMEOUT_S = 300


@cache
def cuda_root() -> Path:
    """Return the CUDA folder that holds both nvcc and the headers.

    `which nvcc` may name a link elsewhere, without headers beside it.

    Raises:
        NotHereError: There is none.
    """
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc")
    beside = [Path(found).resolve().parents[1]] if found else []
    versioned = sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for root in (*map(Path, named), *beside, *versioned, Path("/usr/local/cuda")):
        if (root / "bin" / "nvcc").is_file() and (root / "include" / "cuda_fp16.h").is_file():
            return root
    raise NotHereError("no CUDA toolkit with nvcc and headers found; install it, or set CUDA_HOME")


def compile_cubin(name: str, capability: int, out: Path, sizes: Mapping[str, int]) -> Path:
    """Compile `cuda/<name>.cu` and return the file written.

    Args:
        name: `inject` or `extract`.
        capability: Target, such as 90.
        out: Folder to write to.
        sizes: Sizes known when compiling: WIDTH, INNER, HEADS.

    Raises:
        NotHereError: There is no nvcc, or it fails; the message has its last line.
    """
    root = cuda_root()
    target = out / f"{name}_sm{capability}.cubin"
    command = [str(root / "bin" / "nvcc"), "-cubin", f"-arch=sm_{capability}", "-O3", "-std=c++17"]
    command += [f"-I{root / 'include'}", *(f"-D{key}={value}" for key, value in sizes.items())]
    command += ["-o", str(target), str(SOURCES / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise NotHereError(f"nvcc failed on {name}.cu: {last}")
    return target


def _functions(name: str, wanted: tuple[str, ...], call: Call) -> list[Callable[..., None]]:
    """Compile and load a source for the call's device and sizes."""
    try:
        import pycuda.driver as driver
    except ImportError as error:
        raise NotHereError("PyCUDA is not installed; pip install 'modaltune[cuda]'") from error
    device = call.tensors["x"].device
    major, minor = torch.cuda.get_device_capability(device)
    sizes = {n.upper(): call.sizes[n] for n in ("width", "inner", "heads")}
    driver.init()
    context = driver.Device(device.index or 0).retain_primary_context()
    with tempfile.TemporaryDirectory() as folder:
        cubin = compile_cubin(name, 10 * major + minor, Path(folder), sizes)
        context.push()
        try:
            module = driver.module_from_file(str(cubin))
        finally:
            context.pop()
    return [module.get_function(one) for one in wanted]


def _pointers(tensors: Tensors, names: tuple[str, ...]) -> list[Any]:
    import numpy as np

    # The launch outlives this list, not the tensors: the caller holds them until it synchronises.
    return [np.uintp(tensors[name].data_ptr()) for name in names]


def _suffix(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32"):
        raise NotHereError(f"takes float16, bfloat16 and float32, got {name}")
    return name


_INJECT = ("x", "keys", "values", "gamma", "norm_weight", "norm_bias", "query_weight", "query_bias")
_EXTRACT = ("queries", "x", "norm_weight", "norm_bias", "kv_weight", "kv_bias")


def build_inject(call: Call) -> Run:
    """Return the CUDA form of `inject` for one case.

    Raises:
        NotHereError: PyCUDA or nvcc is absent, or the dtype is not covered.
    """
    (kernel,) = _functions("inject", (f"inject_{_suffix(call.tensors['x'].dtype)}",), call)
    import numpy as np

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        del options
        x = tensors["x"]
        y = torch.empty_like(x)
        given = _pointers(tensors, (*_INJECT, "output_weight", "output_bias"))
        counts = np.int32(x.shape[0]), np.int32(tensors["keys"].shape[1])
        blocks = -(-x.shape[0] // ROWS)
        kernel(*given, np.uintp(y.data_ptr()), *counts, np.float32(EPS),
               block=(THREADS, 1, 1), grid=(blocks, 1))  # fmt: skip
        return y

    return run


def build_extract(call: Call) -> Run:
    """Return the CUDA form of `extract` for one case.

    Raises:
        NotHereError: PyCUDA or nvcc is absent, or the dtype or number of queries is not covered.
    """
    count, heads = call.tensors["queries"].shape[1], call.options["num_heads"]
    if count * GROUP > THREADS * OWNED:
        raise NotHereError(f"takes at most {THREADS * OWNED // GROUP} queries, got {count}")
    suffix = _suffix(call.tensors["x"].dtype)
    kernel, merge = _functions("extract", (f"extract_{suffix}", f"merge_{suffix}"), call)
    import numpy as np

    def run(tensors: Tensors, options: Mapping[str, Any]) -> Tensor:
        del options
        rows, inner = tensors["x"].shape[0], tensors["queries"].shape[2]
        spans = -(-rows // SPAN)
        state = 2 + inner // heads
        partial = tensors["x"].new_empty(spans, heads, count, state, dtype=torch.float32)
        y = torch.empty_like(tensors["queries"])
        at = np.uintp(partial.data_ptr())
        kernel(*_pointers(tensors, _EXTRACT), at, np.int32(rows), np.int32(count), np.float32(EPS),
               block=(THREADS, 1, 1), grid=(spans, heads // GROUP))  # fmt: skip
        merge(at, np.uintp(y.data_ptr()), np.int32(spans), np.int32(count),
              block=(THREADS, 1, 1), grid=(-(-count * inner // THREADS), 1))  # fmt: skip
        return y

    return run
