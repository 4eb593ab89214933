"""The wheel, the one namespace, what an import costs, and life without Triton."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "engine", "benchmarks")
HEAVY = ("torch", "triton", "transformers", "pandas", "numpy", "timm", "sklearn")

# Prepended to a child's code: finders forget Triton, as where it was never installed.
HIDE_TRITON = """
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
"""

# Every module but those written in Triton, and the benchmarks, which the library never loads.
IMPORT_EVERY_MODULE = """
import importlib, pkgutil
import modaltune

def refuse(name):
    raise ImportError(f"can't import {name}")

skipped = ("modaltune.benchmarks", "modaltune.__main__")
names = [
    module.name
    for module in pkgutil.walk_packages(modaltune.__path__, "modaltune.", onerror=refuse)
    if ".triton_" not in module.name and not module.name.startswith(skipped)
]
assert len(names) > 30, names
for name in names:
    importlib.import_module(name)
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
"""

# What must run on CPU tensors with Triton absent, after every module has been imported.
CPU_PATH = """
import importlib.util

import torch

from modaltune.kernels import embed_positions

assert importlib.util.find_spec("triton") is None
tiles, cells, cls_token = torch.zeros(2, 8), torch.tensor([[0, 1], [2, 3]]), torch.ones(8)
assert embed_positions(tiles, cells, cls_token).shape == (3, 8)

from modaltune.adapter import AdapterConfig
from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.modalities import GeneConfig
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNetConfig

config = ModalTuneConfig(
    slide_encoder=LongNetConfig(in_features=8, width=16, depth=2, heads=2, ffn_width=32),
    adapter=AdapterConfig(heads=2, interactions=((0, 0), (1, 1))),
    genes=GeneConfig(width=8, depth=1, tokens=2),
    out_features=4,
)
model = ModalTune(config, gene_index=torch.arange(5), gene_offsets=torch.tensor([0, 2, 5]))
batch = CaseBatch(
    torch.rand(3, 8), torch.arange(6).reshape(3, 2) * 256, torch.tensor([0, 3]),
    {"genes": torch.rand(1, 5)},
)
outputs = model(batch)
outputs.sum().backward()
assert outputs.shape == (1, 3, 4) and bool(torch.isfinite(outputs).all())
try:
    embed_positions(tiles, cells, cls_token, impl="triton")
except RuntimeError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("impl='triton' fell back in silence")
"""


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Run code in a fresh interpreter and return its stdout; `path` goes before site-packages."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def copy_checkout(target: Path) -> None:
    """Copy what git knows or would add, links as links: nothing is built inside the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkout")
    copy_checkout(target)
    return target


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the copy with what is installed: torch brings a recent setuptools."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheels_only_top_level_is_modaltune(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = [n for n in names if n.endswith("dist-info/top_level.txt")]
        assert archive.read(top_level).decode().split() == ["modaltune"]
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modaltune"}
    assert len(tops) == 2


def test_the_wheel_holds_every_module_once(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
    expected = {
        f"modaltune/{path.relative_to(checkout).as_posix()}"
        for room in ROOMS
        for path in (checkout / room).rglob("*.py")
    }
    for path in (checkout / "modaltune").rglob("*.py"):
        relative = path.relative_to(checkout)
        # Python follows links to folders in rglob before 3.13; the rooms are listed above.
        if relative.parts[1] not in ROOMS:
            expected.add(relative.as_posix())
    assert len(names) == len(set(names))
    assert set(names) == expected
    # The benchmarks' own options go with them: `pytest --pyargs modaltune.benchmarks`.
    with_benchmarks = {"modaltune/benchmarks/conftest.py"}
    tests = [name for name in names if "test_" in name or "conftest" in name]
    assert set(tests) == with_benchmarks


def test_the_wheel_ships_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        (entry_points,) = [n for n in names if n.endswith("entry_points.txt")]
        assert "modaltune = modaltune.cli:main" in archive.read(entry_points).decode()
    assert "modaltune/py.typed" in names
    assert [n for n in names if n.endswith("LICENSE")]
    assert "Requires-Dist: torch" in metadata
    assert "Provides-Extra: tensorrt" in metadata


@pytest.mark.parametrize("at_root", [False, True])
def test_an_installed_wheel_works_from_every_folder(
    site: Path, checkout: Path, tmp_path: Path, at_root: bool
) -> None:
    """At the root, cwd comes first on the path: the links make the source the same namespace."""
    code = (
        "import modaltune, modaltune.kernels, modaltune.engine.errors, modaltune.errors\n"
        "print(modaltune.__path__[0]); print(modaltune.kernels.__path__[0])"
    )
    out = run_python(code, cwd=checkout if at_root else tmp_path, path=site).splitlines()
    home = (checkout if at_root else site) / "modaltune"
    assert [Path(line) for line in out] == [home, home / "kernels"]


def test_importing_is_cheap(site: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import modaltune\n"
        "took = time.perf_counter() - start\n"
        f"print(took, *({set(HEAVY)!r} & sys.modules.keys()))"
    )
    runs = [run_python(code, cwd=tmp_path, path=site).split() for _ in range(5)]
    assert all(len(run) == 1 for run in runs), runs
    assert statistics.median(float(run[0]) for run in runs) < 0.3


def test_the_rooms_import_without_their_libraries(site: Path, tmp_path: Path) -> None:
    code = (
        "import sys, modaltune.kernels, modaltune.engine, modaltune.errors, modaltune.doctor\n"
        f"print(*({set(HEAVY)!r} & sys.modules.keys()))"
    )
    assert run_python(code, cwd=tmp_path, path=site).strip() == ""


def test_unknown_names_are_attribute_errors(tmp_path: Path) -> None:
    code = (
        "import modaltune, modaltune.kernels\n"
        "for package in (modaltune, modaltune.kernels):\n"
        "    try:\n"
        "        package.nonsense\n"
        "    except AttributeError as error:\n"
        "        print(error)"
    )
    out = run_python(code, cwd=tmp_path)
    assert out.splitlines() == [
        "module 'modaltune' has no attribute 'nonsense'",
        "module 'modaltune.kernels' has no attribute 'nonsense'",
    ]


def test_the_command_explains_itself(tmp_path: Path) -> None:
    pytest.importorskip("modaltune.cli")
    out = run_python(
        "import sys; from modaltune.cli import main; sys.argv = ['modaltune', '--help']; main()",
        cwd=tmp_path,
    )
    for verb in ("demo", "doctor", "embed", "golden", "import-checkpoint", "slides"):
        assert verb in out


# Run with the repository root as cwd, where a bare `kernels` is found before any other.
AT_THE_ROOT = """
import importlib.util, json, sys
import transformers, transformers.modeling_utils
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available

import torch

config = transformers.BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11
)
hidden = transformers.BertModel(config).eval()(torch.tensor([[1, 2, 3]])).last_hidden_state
found = {
    "origin": importlib.util.find_spec("kernels").origin,
    "is_kernels_available": is_kernels_available(),
    "shape": list(hidden.shape),
    "submodules": [name for name in sys.modules if name.startswith("kernels.")],
}
try:
    import kernels._checks
except ImportError as error:
    found["refusal"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def at_the_root(checkout: Path) -> dict[str, Any]:
    return json.loads(run_python(AT_THE_ROOT, cwd=checkout).splitlines()[-1])


def test_transformers_is_not_hurt_by_a_folder_called_kernels(
    at_the_root: dict[str, Any], checkout: Path
) -> None:
    assert Path(at_the_root["origin"]) == checkout / "kernels" / "__init__.py"
    assert at_the_root["is_kernels_available"] is False
    assert at_the_root["shape"] == [1, 3, 8]
    assert at_the_root["submodules"] == []


def test_the_bare_name_is_refused(at_the_root: dict[str, Any]) -> None:
    """Operators must not be registered under two module names."""
    assert "import modaltune.kernels, not kernels" in at_the_root["refusal"]


def test_hiding_triton_hides_it(tmp_path: Path) -> None:
    code = (
        "import importlib.util\n"
        "print(importlib.util.find_spec('triton'))\n"
        "try:\n    import triton.language\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    out = run_python(HIDE_TRITON + code, cwd=tmp_path).splitlines()
    assert out == ["None", "No module named 'triton'"]


def test_the_cpu_path_without_triton(tmp_path: Path) -> None:
    run_python(HIDE_TRITON + IMPORT_EVERY_MODULE + CPU_PATH, cwd=tmp_path)
