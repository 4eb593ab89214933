"""Read the tensors of an untrusted `.pt` file in a child process, without unpickling objects.

The module has two sides. `load_pt_tensors` runs in our process: it starts this very file as a
script (isolated mode, bare environment), waits for a bounded time, and takes the tensors back
through a safetensors file. `_main` runs in the child: it limits its own memory, file size and
CPU time and calls `torch.load(weights_only=True)`. No pickle crosses back.

Being a script too, the file imports nothing of ModalTune.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

_MIB = 1 << 20
_DEFAULT_TIMEOUT_S = 300.0
# What torch's import needs; credentials and Python settings of the parent stay outside.
_PASSED_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR")
_SINGLE = "tensor"


class UntrustedPtError(Exception):
    """A `.pt` file was refused, could not be read, or took its reader down; the text says why."""


def load_pt_tensors(path: Path, *, timeout_s: float = _DEFAULT_TIMEOUT_S) -> dict[str, Any]:
    """Read a `.pt` file that holds one tensor, or a dict of tensors, in a child process.

    Args:
        path: The file; nothing about its content is trusted.
        timeout_s: Wall-clock and CPU seconds after which the child is ended.

    Returns:
        Name to numpy array; a bare tensor has the name "" (bfloat16 comes back as float32).

    Raises:
        UntrustedPtError: The file holds anything but dense tensors, declares more data than it
            carries, or the child failed or ran out of time or memory.
    """
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory(prefix="modaltune-pt-") as folder:
        result, report = Path(folder, "tensors.safetensors"), Path(folder, "report.json")
        arguments = [str(path.resolve()), str(result), str(report), str(int(timeout_s) + 1)]
        environment = {k: os.environ[k] for k in _PASSED_ENVIRONMENT if k in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(Path(folder, "stderr"), "w+b") as stderr:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", __file__, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=environment,
                    cwd=folder,
                    timeout=timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise UntrustedPtError(f"its reader did not finish in {timeout_s:g} s") from None
            stderr.seek(max(0, stderr.tell() - 400))
            last_words = stderr.read().decode(errors="replace").strip()
        if not report.is_file():
            raise UntrustedPtError(f"its reader ended with code {done.returncode}: {last_words}")
        outcome = json.loads(report.read_text(encoding="utf-8"))
        if done.returncode != 0 or "error" in outcome:
            raise UntrustedPtError(str(outcome.get("error", last_words)))
        tensors = load_file(result)
    if outcome["layout"] == _SINGLE:
        return {"": tensors[_SINGLE]}
    return dict(tensors)


def _main(path: str, result: str, report: str, limit_s: str) -> int:
    """Child: read `path`, write tensors to `result` and what happened to `report`."""
    import torch
    from safetensors.torch import save_file

    try:
        size = os.path.getsize(path)
        check_archive(path, size)
        _limit_resources(size, int(limit_s))
        content = torch.load(path, map_location="cpu", weights_only=True)
        layout, tensors = dense_tensors(content, budget=2 * size + _MIB)
        save_file(tensors, result)
        outcome = {"layout": layout}
    except Exception as error:  # whatever a hostile file provokes becomes a line of text
        reason = str(error).strip().splitlines() or [""]
        outcome = {"error": f"{type(error).__name__}: {' '.join(reason)[:500]}"}
    Path(report).write_text(json.dumps(outcome), encoding="utf-8")
    return 1 if "error" in outcome else 0


def check_archive(path: str, size: int) -> None:
    """Refuse a zip archive that unpacks to far more than it weighs (torch stores, never packs)."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    if declared > 2 * size + _MIB:
        raise ValueError(f"the archive declares {declared} bytes in a file of {size}")


def _limit_resources(size: int, limit_s: int) -> None:
    """Cap memory, output and CPU time, relative to the file and to what torch already uses."""
    import resource

    used_kib = 0
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        used_kib = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limit_s,
        resource.RLIMIT_FSIZE: 4 * size + 16 * _MIB,
    }
    if used_kib:
        limits[resource.RLIMIT_DATA] = used_kib * 1024 + 8 * size + 512 * _MIB
    for kind, soft in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(kind, (value, value))


def dense_tensors(content: Any, budget: int) -> tuple[str, dict[str, Any]]:
    """Take the tensors out of what was loaded, within a budget of bytes."""
    import torch

    layout, items = "dict", content
    if isinstance(content, torch.Tensor):
        layout, items = _SINGLE, {_SINGLE: content}
    if not isinstance(items, dict):
        raise TypeError(f"holds a {type(content).__name__}, not a tensor or a dict of tensors")
    # Other keys (names, sizes) are harmless and of no use here.
    tensors = {str(k): v for k, v in items.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise TypeError(f"holds no tensors, only {sorted(map(str, items))[:10]}")
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
            raise TypeError(f"tensor {name!r} is not a plain dense tensor")
        total += tensor.numel() * tensor.element_size()
    if total > budget:
        raise ValueError(f"the tensors declare {total} bytes, more than the file carries")
    plain = {
        name: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach()
        for name, tensor in tensors.items()
    }
    # Clones, since safetensors refuses tensors that share memory.
    return layout, {name: tensor.contiguous().clone() for name, tensor in plain.items()}


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
