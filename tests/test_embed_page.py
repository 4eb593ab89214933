"""The examples of docs/embed.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from modaltune.engine.pyramid import write_pyramid
from modaltune.engine.store import read_features

PAGE = Path(__file__).parents[1] / "docs" / "embed.md"


def test_the_engine_inside_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both examples on one slide; they give the same features."""
    rgb = np.random.default_rng(0).integers(120, 200, (512, 512, 3), dtype=np.uint8)
    rgb[..., 1] //= 2
    path = write_pyramid(tmp_path / "pink.tiff", rgb, mpp=0.5)
    monkeypatch.chdir(tmp_path)
    stream, folder = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    exec(stream, {"path": path})
    assert capsys.readouterr().out == "pink (4, 1280) (4, 2)\n"
    exec(folder, {"path": path})
    said = capsys.readouterr().out.split()
    assert said[:3] == ["pink", "done", "4"]
    assert len(read_features(said[3])) == 4
