"""docs/kernels.md: its code runs as written, its commands exist, every op has its section."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import typer

from modaltune import kernels
from modaltune.cli import app
from modaltune.kernels import __all__ as public
from modaltune.kernels.resources import stored_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def _blocks(language: str, section: str = "") -> list[str]:
    text = PAGE.partition(f"## {section}")[2].partition("\n## ")[0] if section else PAGE
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_an_op_can_be_lifted_out_as_described(tmp_path: Path) -> None:
    (shell,), (python,) = (_blocks(name, "Lift one op") for name in ("sh", "python"))
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(["bash", "-euc", shell], cwd=tmp_path, check=True, timeout=60)
    assert not [p for p in (tmp_path / "lifted").rglob("*.py") if "modaltune" in p.read_text()]
    alone = "import sys\nassert 'modaltune' not in sys.modules\n"
    # The call as on a GPU, of fewer rows.
    on_gpu = python.replace(
        "torch.tensor([0, 100, 300]))", "torch.tensor([0, 9, 30]), impl='triton')"
    )
    assert on_gpu != python
    printed = []
    for code, interpret in ((python, "0"), (on_gpu.replace("300, 64", "30, 64"), "1")):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{alone}"],
            cwd=tmp_path,
            env=environment | {"TRITON_INTERPRET": interpret},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip())
    assert printed == [
        "torch.Size([2, 2, 64]) torch.Size([300, 2]) torch.Size([300, 64])",
        "torch.Size([2, 2, 64]) torch.Size([30, 2]) torch.Size([30, 64])",
    ]


def test_first_example_runs() -> None:
    names: dict[str, object] = {}
    exec(_blocks("python")[0], names)
    assert list(getattr(names["pooled"], "shape", ())) == [2, 1, 768]


def test_every_op_has_its_section() -> None:
    names: dict[str, set[str]] = {}
    for name in public:
        folder = getattr(kernels, name).__module__.split(".")[-2]
        names.setdefault(folder, set()).add(name)
    sections = set(re.findall(r"^## `(\w+)`: ", PAGE, re.MULTILINE))
    folders = [path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernels.py")]
    assert len(folders) > 6
    assert not [folder for folder in folders if not names[folder] & sections]


def test_commands_take_the_options_named() -> None:
    bench = typer.main.get_command(app).commands["bench"].commands["kernels"]  # type: ignore[attr-defined]
    known = {option for parameter in bench.params for option in parameter.opts}
    text = " ".join(block.replace("\\\n", " ") for block in _blocks("sh"))
    named = re.findall(r"modaltune bench kernels((?: +(?!#)\S+)*)", text)
    assert len(named) >= 3
    for options in named:
        assert set(re.findall(r"--[a-z-]+", options.split("ncu")[0])) <= known


def test_offline_figures_are_those_stored() -> None:
    found = 0
    for page in sorted((ROOT / "docs" / "kernels").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for op, count in re.findall(r"--op (\w+)`, (\d+)\s+compilations", text):
            rows = stored_table([op]).values()
            assert len(rows) == int(count), page.name
            stored = {
                (int(row["shared_bytes"] / 1024), row["registers"], row["capability"])
                for row in rows
                if row["kernel"].endswith("_fwd_kernel") and row["dtype"] == "bf16"
            }
            pattern = r"(\d+) KB (?:shared )?and (\d+) (?:registers )?on\s+sm_(\d+)"
            written = {tuple(map(int, figures)) for figures in re.findall(pattern, text)}
            assert len(written) == 4
            assert written <= stored, page.name
            found += 1
    assert found == 2
