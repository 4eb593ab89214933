"""What every shipped kernel costs on each GPU, found by compiling it without one.

`python -m modaltune.kernels.resources --check` compiles every kernel in every shipped configuration
for sm_80, sm_90, sm_100 and sm_120, and fails on a spilled register, shared memory over the limit,
a half-precision product without tensor-core instructions, a buffer filled while a product still
reads it (`_refills`), or a figure worse than the stored table (`configs/resources/<op>.json`).
Results are cached by source, configuration and Triton version.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from modaltune.kernels._refills import early_refills
from modaltune.kernels._tuning import COMPUTE_CAPABILITIES, CONFIGS

STORED = CONFIGS / "resources"
ROOT = Path(__file__).parent

# Per compute capability: shared memory of a block in KiB, of a multiprocessor in KiB, resident
# warps, registers of a multiprocessor (NVIDIA CUDA C++ Programming Guide, compute capabilities).
LIMITS = {
    80: {"block_kib": 163, "sm_kib": 164, "warps": 64, "registers": 65536, "blocks": 32},
    90: {"block_kib": 227, "sm_kib": 228, "warps": 64, "registers": 65536, "blocks": 32},
    100: {"block_kib": 227, "sm_kib": 228, "warps": 64, "registers": 65536, "blocks": 32},
    120: {"block_kib": 99, "sm_kib": 100, "warps": 48, "registers": 65536, "blocks": 24},
}
_TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_LOAD = re.compile(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)")
_ASYNC_LOAD = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)")


@dataclass(frozen=True)
class CompileSpec:
    """One kernel in one shipped configuration: all that the compiler needs to know.

    Attributes:
        op: Folder of the op.
        kernel: Name of the kernel in its `triton_kernels.py`.
        capability: Target, such as 90.
        signature: Argument name to Triton type (`*fp16`, `i32`, `fp32`, `constexpr`).
        constexprs: Values of the constexpr arguments.
        options: `num_warps`, `num_stages`.
        aligned: Arguments that are multiples of 16 (pointers, strides).
        dtype: Element type of the tensors, for the table.
        has_product: Whether the kernel multiplies matrices.
    """

    op: str
    kernel: str
    capability: int
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: Sequence[str]
    dtype: str
    has_product: bool = True

    @property
    def label(self) -> str:
        """Name of the row in tables."""
        shape = ",".join(f"{k}={v}" for k, v in sorted(self.constexprs.items()) if k.isupper())
        return f"{self.op}.{self.kernel}[{self.dtype} sm_{self.capability} {shape}]"


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a spec."""

    label: str
    op: str
    kernel: str
    capability: int
    dtype: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    tensor_core: str
    widest_load_bytes: int
    problems: list[str] = field(default_factory=list)


def ops_with_kernels() -> list[str]:
    """Return the folders that have Triton kernels."""
    return sorted(path.parent.name for path in ROOT.glob("*/triton_kernels.py"))


def all_specs(ops: Sequence[str] = ()) -> list[CompileSpec]:
    """Return the specs of every op that has Triton kernels (or of some)."""
    found: list[CompileSpec] = []
    for op in ops_with_kernels():
        if ops and op not in ops:
            continue
        module = importlib.import_module(f"modaltune.kernels.{op}.triton_kernels")
        for capability in COMPUTE_CAPABILITIES:
            found += module.compile_specs(capability)
    return found


def compile_spec(spec: CompileSpec) -> Resources:
    """Compile one spec (in a process without TRITON_INTERPRET) and read its resources."""
    cached = cache_path(spec)
    if cached.is_file():
        return Resources(**json.loads(cached.read_text()))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"modaltune.kernels.{spec.op}.triton_kernels")
    kernel = getattr(module, spec.kernel)
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: spec.signature[name] for name in names},
        constexprs={(names.index(k),): v for k, v in spec.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    target = GPUTarget("cuda", spec.capability, 32)
    knobs = triton.knobs
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        # Triton's own cache would keep every intermediate form of what is kept here as one row.
        knobs.cache.dir = folder
        # Source lines change no instruction and cost a tenth of the time.
        knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=target, options=dict(spec.options))
        ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    found = _read(spec, ptx, cubin, int(compiled.metadata.shared))
    few = early_refills(compiled.asm["ttgir"], spec.options["num_stages"])
    found.problems.extend(f"a product in flight reads a buffer of {n} slots" for n in few)
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(found)))
    temporary.replace(cached)
    return found


def cache_path(spec: CompileSpec) -> Path:
    """Return where a spec's resources are kept; the name stands for all they depend on."""
    import triton

    key = json.dumps([asdict(spec), triton.__version__], sort_keys=True, default=str).encode()
    digest = hashlib.sha256(key + _sources(spec.op)).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "modaltune" / "resources" / f"{digest}.json"


@cache
def _sources(op: str) -> bytes:
    """Return all that decides what a spec of an op compiles to, and how it is read."""
    kernels = b"".join(p.read_bytes() for p in sorted((ROOT / op).glob("triton*.py")))
    return kernels + b"".join(
        (ROOT / name).read_bytes() for name in ("resources.py", "_refills.py")
    )


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("resources need Triton; install it with: pip install triton")
    return str(Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name)


def _read(spec: CompileSpec, ptx: str, cubin: bytes, shared_bytes: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")
    )
    warps = int(spec.options["num_warps"])
    tensor_core = next(iter(sorted(set(_TENSOR_CORES.findall(ptx)))), "")
    found = Resources(
        label=spec.label,
        op=spec.op,
        kernel=spec.kernel,
        capability=spec.capability,
        dtype=spec.dtype,
        registers=registers,
        spilled_bytes=stack + local,  # no kernel calls or indexes a local array
        shared_bytes=shared_bytes,
        warps=warps,
        occupancy=occupancy(spec.capability, registers, shared_bytes, warps),
        tensor_core=tensor_core,
        widest_load_bytes=_widest_load(ptx),
    )
    found.problems.extend(_problems(spec, found))
    return found


def _widest_load(ptx: str) -> int:
    widths = [int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx)]
    widths += [int(size, 0) for size in _ASYNC_LOAD.findall(ptx)]
    if "cp.async.bulk" in ptx:
        widths.append(16)
    return max(widths, default=0)


def occupancy(capability: int, registers: int, shared_bytes: int, warps: int) -> float:
    """Return resident warps over the most a multiprocessor can hold.

    Registers come in units of 256 a warp, shared memory in units of 128 bytes plus the 1 KiB that
    the system keeps per block.
    """
    limits = LIMITS[capability]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limits["registers"] // (per_warp * warps)
    shared = -(-shared_bytes // 128) * 128 + 1024
    by_shared = limits["sm_kib"] * 1024 // shared
    blocks = min(by_registers, by_shared, limits["warps"] // warps, limits["blocks"])
    return blocks * warps / limits["warps"]


def _problems(spec: CompileSpec, found: Resources) -> Iterator[str]:
    limit = LIMITS[spec.capability]["block_kib"] * 1024
    if found.spilled_bytes:
        yield f"{found.spilled_bytes} bytes spilled"
    if found.shared_bytes > limit:
        yield f"{found.shared_bytes} bytes of shared memory, the limit is {limit}"
    if found.occupancy == 0:
        yield "does not fit a multiprocessor"
    if spec.has_product and spec.dtype in ("fp16", "bf16") and not found.tensor_core:
        yield "a product without tensor-core instructions"
    if spec.dtype in ("fp16", "bf16") and found.widest_load_bytes < 16:
        yield f"widest load {found.widest_load_bytes} bytes, not 16"


def stored_table(ops: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the stored rows by label, of every op or of some."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(STORED.glob("*.json")):
        if not ops or path.stem in ops:
            rows.update(json.loads(path.read_text(encoding="utf-8")))
    return rows


def store(found: Sequence[Resources]) -> None:
    """Make these the stored rows of their ops, one file per op."""
    STORED.mkdir(exist_ok=True)
    for op in sorted({row.op for row in found}):
        rows = {row.label: asdict(row) for row in found if row.op == op}
        text = json.dumps(rows, indent=1, sort_keys=True) + "\n"
        (STORED / f"{op}.json").write_text(text, encoding="utf-8")


def regressions(found: Sequence[Resources], stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what got worse than the stored rows, and where the two know different kernels."""
    worse = []
    for row in found:
        old = stored.get(row.label)
        if old is None:
            worse.append(f"{row.label}: not in the stored table; run with --store")
            continue
        if row.occupancy < old["occupancy"]:
            worse.append(f"{row.label}: occupancy {row.occupancy:.2f}, was {old['occupancy']:.2f}")
        if row.widest_load_bytes < old["widest_load_bytes"]:
            worse.append(f"{row.label}: widest load {row.widest_load_bytes} bytes, was "
                         f"{old['widest_load_bytes']}")  # fmt: skip
    gone = set(stored) - {row.label for row in found}
    worse += [
        f"{label}: stored, but no longer compiled; run with --store" for label in sorted(gone)
    ]
    return worse


def measure(ops: Sequence[str] = (), workers: int | None = None) -> list[Resources]:
    """Compile everything, in parallel; results are cached by source and configuration."""
    specs = all_specs(ops)
    # The slowest first, so that no worker is left alone with one at the end.
    order = sorted(range(len(specs)), key=lambda i: specs[i].dtype != "fp32")
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        compiled = list(pool.map(compile_spec, [specs[i] for i in order]))
    return [row for _, row in sorted(zip(order, compiled, strict=True), key=lambda pair: pair[0])]


def _table(rows: Sequence[Resources]) -> str:
    head = ("kernel", "regs", "spill", "shared KiB", "warps", "occupancy", "tensor core", "load B")
    lines = [
        (
            row.label,
            str(row.registers),
            str(row.spilled_bytes),
            f"{row.shared_bytes / 1024:.1f}",
            str(row.warps),
            f"{row.occupancy:.2f}",
            row.tensor_core or "-",
            str(row.widest_load_bytes),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="modaltune.kernels.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 on a problem or regression")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--store", action="store_true", help="make this the stored table")
    parser.add_argument(
        "--op",
        action="append",
        choices=ops_with_kernels(),
        default=[],
        help="only this op's folder",
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    rows = measure(options.op)
    if options.store:
        store(rows)
    failures = [f"{row.label}: {problem}" for row in rows for problem in row.problems]
    failures += regressions(rows, stored_table(options.op))
    if options.json:
        print(json.dumps({"kernels": [asdict(r) for r in rows], "failures": failures}, indent=1))
    else:
        print(_table(rows))
        print("\n".join(failures) or f"{len(rows)} compilations, no problem")
    return 1 if options.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
