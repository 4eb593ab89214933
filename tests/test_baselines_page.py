"""docs/baselines.md: its example runs as written, its figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from modaltune.baselines import BASELINES, make_baseline
from modaltune.testing import pack_offsets

PAGE = (Path(__file__).parents[1] / "docs" / "baselines.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_trains_a_rival(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    exec(example, {})
    said = capsys.readouterr().out
    assert said == "torch.Size([3, 2]) torch.Size([3]) torch.Size([3, 4])\n"


def test_the_parameters_are_counted() -> None:
    sizes = [30] * 146 + [29] * 185
    assert (len(sizes), sum(sizes)) == (331, 9745)
    pathways = (torch.arange(sum(sizes)) % 4999, pack_offsets(sizes))
    for name in BASELINES:
        (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", PAGE, re.MULTILINE)
        *_, width, stated = (cell.strip() for cell in row.split("|"))
        if name == "linear_probe":
            assert stated == "heads only"
            continue
        model = make_baseline(name, tile_width=1536, pathways=pathways)
        assert model.width == int(width)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == stated
