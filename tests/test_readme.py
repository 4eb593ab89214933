"""The README's commands and its Python, as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from modaltune.demo import run_demo
from modaltune.demo_study import DemoStudy
from modaltune.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_first_two_commands() -> None:
    assert blocks("sh")[0].strip() == "pip install . && modaltune demo"
    assert blocks("sh")[1].strip() == "pip install '.[test]' && pytest"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split(blocks("sh")[0])[1].split(blocks("sh")[1])[0]
    assert between.replace("`", "").replace("sh", "").strip() == ""


def test_five_lines_embed_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = DemoStudy(
        folds=2,
        members=1,
        workers=1,
        width=32,
        out_features=16,
        training=TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, cases_per_step=10),
    )
    run_demo(tmp_path / "modaltune-demo", cases=20, study=study)
    (snippet,) = blocks("python")
    lines = [line for line in snippet.splitlines() if line.strip()]
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, torch.Tensor] = {}
    exec(snippet, names)
    assert names["embedding"].shape == (1, 3, 16)
    assert bool(torch.isfinite(names["embedding"]).all())


def test_documents_name_files_that_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
