"""The plain CUDA rivals: they compile for sm_80 and sm_90, and their arithmetic is right.

Without a GPU the same sources run on the CPU (`cuda_emulation.h`), with a thread per CUDA thread.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modaltune.benchmarks import cuda_baseline
from modaltune.benchmarks.cuda_baseline import SOURCES, compile_cubin, cuda_root
from modaltune.benchmarks.kernel_spec import Call, NotHereError, OpSpec, all_specs
from modaltune.testing import allowed_error

HERE = Path(__file__).parent
SIZES = {"WIDTH": 64, "INNER": 32, "HEADS": 2}
FLOAT = torch.float32
# Whole blocks of 32 rows, one row, one short of a block, one over, and three spans.
ROWS = (1, 31, 32, 33, 150)
DRIVERS = {
    "inject": """
#include "inject.cu"
extern "C" void run_inject(const float** in, float* y, int rows, int tokens, float eps) {
  launch((rows + ROWS - 1) / ROWS, 1, THREADS, [&] {
    inject_float32(in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8], in[9], y, rows,
                   tokens, eps);
  });
}
""",
    "extract": """
#include "extract.cu"
extern "C" void run_extract(const float** in, float* partial, float* y, int rows, int count,
                            float eps) {
  const int spans = (rows + SPAN - 1) / SPAN;
  launch(spans, HEADS / GROUP, THREADS, [&] {
    extract_float32(in[0], in[1], in[2], in[3], in[4], in[5], partial, rows, count, eps);
  });
  launch((count * INNER + THREADS - 1) / THREADS, 1, THREADS,
         [&] { merge_float32(partial, y, spans, count); });
}
""",
}


def _spec(op: str) -> OpSpec:
    return next(spec for spec in all_specs() if spec.op == op)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The baselines compiled for the CPU at small sizes."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    drivers = [folder / f"{name}.cpp" for name in DRIVERS]
    for path in drivers:
        path.write_text(DRIVERS[path.stem], encoding="utf-8")
    macros = [f"-D{name}={size}" for name, size in {**SIZES, "GROUP": 2, "SPAN": 64}.items()]
    out = folder / "baseline.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *macros]
    command += ["-include", str(HERE / "cuda_emulation.h"), f"-I{SOURCES}"]
    done = subprocess.run(
        [*command, "-o", str(out), *map(str, drivers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    assert all(t.is_contiguous() and t.dtype == FLOAT for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _assert_right(spec: OpSpec, call: Call, got: Tensor) -> None:
    exact = spec.reference(call.as_dtype(torch.float64).tensors, call.options)
    plain = spec.reference(call.tensors, call.options)
    # Sums run in order here, in blocks there: twice what the tests of our own kernels allow.
    assert float((got.double() - exact).abs().max()) <= 2 * allowed_error(exact, plain, FLOAT)


@pytest.mark.parametrize("rows", ROWS)
def test_inject_is_right(library: ctypes.CDLL, rows: int) -> None:
    spec = _spec("injection")
    sizes = {"width": 64, "inner": 32, "heads": 2, "tokens": 9}
    call = spec.make(rows, torch.device("cpu"), FLOAT, **sizes)
    guarded = torch.full((rows + 32, 64), torch.nan)  # rows past the end must stay untouched
    names = ("x", "keys", "values", "gamma", "norm_weight", "norm_bias", "query_weight")
    given = [call.tensors[n] for n in (*names, "query_bias", "output_weight", "output_bias")]
    library.run_inject(
        _pointers(given), _pointer(guarded), rows, 9, ctypes.c_float(cuda_baseline.EPS)
    )
    assert bool(guarded[rows:].isnan().all())
    _assert_right(spec, call, guarded[:rows])


def _extract(library: ctypes.CDLL, rows: int, count: int, scale: float) -> None:
    spec = _spec("extraction")
    sizes = {"width": 64, "inner": 32, "heads": 2, "tokens": count}
    call = spec.make(rows, torch.device("cpu"), FLOAT, **sizes)
    call.tensors["queries"].mul_(scale)
    names = ("queries", "x", "norm_weight", "norm_bias", "kv_weight", "kv_bias")
    spans = -(-rows // 64)
    partial = torch.full((spans, 2, count, 18), torch.nan)
    y = torch.full((1, count, 32), torch.nan)
    library.run_extract(
        _pointers([call.tensors[n] for n in names]),
        _pointer(partial),
        _pointer(y),
        rows,
        count,
        ctypes.c_float(cuda_baseline.EPS),
    )
    _assert_right(spec, call, y)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [1, 200])  # one task, and two for some threads
def test_extract_is_right(library: ctypes.CDLL, rows: int, count: int) -> None:
    _extract(library, rows, count, 1.0)


def test_extract_does_not_overflow(library: ctypes.CDLL) -> None:
    _extract(library, 150, 3, 200.0)  # scores of hundreds: e^88 is the largest of float32


@pytest.mark.parametrize("name", ["inject", "extract"])
@pytest.mark.parametrize("capability", [80, 90])
def test_nvcc_compiles(name: str, capability: int, tmp_path: Path) -> None:
    try:
        cuda_root()
    except NotHereError as error:
        pytest.skip(str(error))
    sizes = {"WIDTH": 768, "INNER": 192, "HEADS": 12}
    cubin = compile_cubin(name, capability, tmp_path, sizes).read_bytes()
    assert cubin.startswith(b"\x7fELF")
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"{name}_{dtype}".encode() in cubin


def test_nvcc_names_what_is_wrong(tmp_path: Path) -> None:
    try:
        cuda_root()
    except NotHereError as error:
        pytest.skip(str(error))
    with pytest.raises(NotHereError, match=r"nvcc failed on inject\.cu: .*error"):
        compile_cubin("inject", 90, tmp_path, {"INNER": 30})


def test_constants_are_those_of_the_sources() -> None:
    rows = (SOURCES / "rows.cuh").read_text(encoding="utf-8")
    extract = (SOURCES / "extract.cu").read_text(encoding="utf-8")
    assert f"constexpr int ROWS = {cuda_baseline.ROWS};" in rows
    assert f"constexpr int THREADS = {cuda_baseline.THREADS};" in rows
    assert f"#define GROUP {cuda_baseline.GROUP}\n" in extract
    assert f"#define SPAN {cuda_baseline.SPAN}\n" in extract
    assert f"constexpr int OWNED = {cuda_baseline.OWNED};" in extract
