"""`modaltune embed` on a folder in which decoders hang and crash: the others don't notice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from modaltune.engine.ledger_report import read_status
from modaltune.engine.pyramid import write_pyramid

GOOD = ("first", "last")
BAD = {
    "crashes": "died with signal SIGSEGV",
    "hangs": "took longer than 5 s and was ended",
    "truncated": "truncated",
}
# Interpreters import this at their start where it lies on their path. Decoders then stop in the
# middle of opening one slide, and die of a bad access in the middle of opening another.
FAULTS = """
import os, signal, sys


def fault(event, given):
    if event == "open" and isinstance(given[0], str) and "decode_child" in " ".join(sys.orig_argv):
        if given[0].endswith("hangs.tiff"):
            while True:
                signal.pause()
        if given[0].endswith("crashes.tiff"):
            os.kill(os.getpid(), signal.SIGSEGV)


sys.addaudithook(fault)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def slides(tmp_path: Path) -> dict[str, Path]:
    """Five slides of 12 to 20 tiles, one of them cut."""
    rng = np.random.default_rng(3)
    (tmp_path / "slides").mkdir()
    paths = {}
    for number, name in enumerate(sorted((*GOOD, *BAD))):
        rgb = rng.integers(90, 190, (1024, 768 + 128 * number, 3), dtype=np.uint8)
        rgb[..., 1] //= 2
        path = tmp_path / "slides" / f"{name}.tiff"
        paths[name] = write_pyramid(path, rgb, mpp=0.5, compression="jpeg")
    cut = paths["truncated"]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    return paths


def embed(out: Path, slides: Iterable[Path], *, imports: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with a folder on the path of all interpreters."""
    words = ["embed", *map(str, slides), "--out", str(out)]
    words += ["--runtime", "onnxruntime", "--decode-timeout", "1"]
    path = os.pathsep.join([str(imports), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "modaltune.cli", *words], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip


def test_decoders_that_hang_or_crash_cost_their_slides_only(
    tmp_path: Path, slides: dict[str, Path]
) -> None:
    good = [slides[name] for name in GOOD]
    alone = embed(tmp_path / "alone", good, imports=tmp_path)
    assert alone.returncode == 0, alone.stderr
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    out = tmp_path / "out"
    done = embed(out, slides.values(), imports=tmp_path / "faults")
    said = re.sub(r"\s+", " ", done.stdout)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "3 of 5 slides could not be embedded" in said
    assert f"`modaltune retry {out}`" in said
    report = json.loads((out / "report.json").read_text())
    assert report["counts"]["done"] == 2
    found = {slide["slide_id"]: slide for slide in report["slides"]}
    for name, reason in BAD.items():
        assert found[name]["status"] == "quarantined"
        assert reason in found[name]["reason"], found[name]
        assert f"{name}.tiff" in found[name]["reason"]
    for kind in ("features_efficientnet-lite0", "overlays"):
        undisturbed = contents(tmp_path / "alone" / kind)
        assert len(undisturbed) == 2
        assert contents(out / kind) == undisturbed
    (one,) = read_status(out)
    assert one.counts["quarantined"] == 3
    assert {(row.slide_id, row.attempts) for row in one.problems} == {(name, 3) for name in BAD}
