"""ARCHITECTURE's "Who may import whom", read off the syntax tree of every file.

`faults(path, source)` names what a file breaks; it is fed bad snippets first, then the repository.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "engine", "benchmarks", "tests", "modaltune")
# Room -> the rooms whose modules it may import besides its own.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "modaltune": {"modaltune", "engine", "kernels"},
    "benchmarks": {"modaltune", "engine", "kernels", "benchmarks"},
    "tests": {"modaltune", "engine", "kernels", "benchmarks"},
}
KERNEL_LIBRARIES = {"torch", "triton", "numpy", "numba", "llvmlite"}  # llvmlite comes with numba
# Not brought by a plain install: imported in the function that needs them.
OPTIONAL = {
    *("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "pycuda", "cuda", "ray", "wsidicom"),
    *("anndata", "zarr", "wandb", "pytest", "hypothesis"),
}
GPL = {"sksurv"}
BAD_STEMS = {"triton", "utils", "common", "helpers"}
MAX_LINES, MAX_KERNEL_LINES = 400, 600
PATH_EDITS = {"append", "insert", "extend", "remove", "pop", "clear", "reverse", "sort"}


@dataclass(frozen=True)
class Import:
    """One imported name: `module`, or `name` from `module`; `top` = runs on loading the file."""

    module: str
    name: str | None
    bound: str
    line: int
    top: bool

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def imports(tree: ast.AST) -> Iterator[Import]:
    """Every import outside `if TYPE_CHECKING`, with whether it stands inside a function."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for a in child.names:
                    bound = a.asname or a.name.split(".")[0]
                    yield Import(a.name, None, bound, child.lineno, top)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                for a in child.names:
                    yield Import(module, a.name, a.asname or a.name, child.lineno, top)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                yield from walk(ast.Module(child.orelse, []), top)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not inside)

    yield from walk(tree, True)


def room_of(module: str) -> str | None:
    """Name the room of a `modaltune.*` module, None for anything else."""
    parts = module.split(".")
    if parts[0] != "modaltune":
        return None
    is_room = len(parts) > 1 and parts[1] in ("kernels", "engine", "benchmarks")
    return parts[1] if is_room else "modaltune"


def faults(path: str, source: str) -> list[str]:
    """Return one line per rule that the file at `path` (from the root) breaks."""
    tree, where = ast.parse(source), PurePosixPath(path)
    found = [*_length(where, source), *_names(where, tree), *_path_edits(tree)]
    room = where.parts[0] if where.parts[0] in ROOMS else None
    listed = list(imports(tree))
    for item in listed if room else ():
        found += [f"line {item.line}: {text}" for text in _import_faults(where, room, item)]
    if room in ("tests", "benchmarks"):
        found += _private_names(where, tree, listed)
    return found


def _length(where: PurePosixPath, source: str) -> Iterator[str]:
    limit = MAX_KERNEL_LINES if where.name.startswith("triton_") else MAX_LINES
    if (lines := len(source.splitlines())) > limit:
        yield f"{lines} lines, the limit is {limit}: split by idea"


def _names(where: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if where.stem in BAD_STEMS:
        yield f"a file must not be called {where.name}"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = {node.name for node in tree.body if isinstance(node, functions)}
    if where.stem in defined:
        yield f"module {where.stem} has the name of a function it defines"
    if where.stem in ("api", "__init__") and where.parent.name in defined:
        yield f"folder {where.parent.name} has the name of a function it exports"


def _path_edits(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
        elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            text = ast.unparse(node)
        edits = text.removeprefix("sys.path.") in PATH_EDITS and text.startswith("sys.path.")
        is_aimed = text == "sys.path" or text.startswith("sys.path[")
        if edits or is_aimed or text in ("site.addsitedir", "monkeypatch.syspath_prepend"):
            yield f"line {getattr(node, 'lineno', 0)}: edits sys.path ({text})"
    for item in imports(tree):
        if item.full == "sys.path":
            yield f"line {item.line}: takes sys.path apart from sys"


def _import_faults(where: PurePosixPath, room: str, item: Import) -> Iterator[str]:
    top_level = item.module.split(".")[0]
    if item.module.startswith(".") or top_level in (*ROOMS[:4], "conftest"):
        yield f"imports {item.full}: write the full name from modaltune"
        return
    target = room_of(item.full)
    if target is not None:
        is_cli = where == PurePosixPath("modaltune/cli.py")
        if target not in MAY_IMPORT[room] and not (is_cli and target == "benchmarks"):
            yield f"{room} must not import {item.full}"
    if room in ("kernels", "engine", "modaltune"):
        if top_level in GPL:
            yield f"{top_level} is GPL: in tests only"
        if item.top and top_level in OPTIONAL:
            yield f"{top_level} is optional: import it in the function that needs it"
        if "triton_kernels" in item.full.split("."):
            is_ours = where.name in ("ops.py", "resources.py") and room == "kernels"
            if item.top or not is_ours:
                yield "triton_kernels is imported by ops.py alone, inside the device function"
    if room == "kernels":
        yield from _kernel_faults(where, item, top_level)


def _kernel_faults(where: PurePosixPath, item: Import, top_level: str) -> Iterator[str]:
    allowed = KERNEL_LIBRARIES | set(sys.stdlib_module_names) | {"modaltune"}
    if top_level not in allowed:
        yield f"kernels must not import {top_level}"
    if top_level == "triton" and where.name == "reference.py":
        yield "a reference never imports Triton"
    elif top_level == "triton" and item.top and not where.name.startswith("triton_"):
        yield "Triton is imported inside functions, except in triton_kernels.py and its parts"
    if len(where.parts) != 3 or room_of(item.full) != "kernels":
        return
    parts = item.full.split(".")[2:]
    if not parts or parts[0].startswith("_") or parts[0] in ("roofline", "resources"):
        return
    if parts[0] != where.parts[1]:
        yield f"op {where.parts[1]} must not import op {parts[0]}"
        return
    # Inside an op, what each file may see; triton_kernels has its own rule above.
    sees = {"reference": set(), "cpu": {"reference"}, "ops": {"reference", "cpu"}}
    sees |= {"api": {"reference", "ops", "cpu"}, "triton_kernels": set(), "__init__": {"api"}}
    part = parts[1] if len(parts) > 1 else "__init__"
    if where.stem.startswith("triton_") and part.startswith("triton_"):
        return  # one op's kernels, in several files
    if part not in sees.get(where.stem, {part}) | {"triton_kernels"} and "_" not in part[:1]:
        yield f"{where.name} must not import {part} of its op"


def _private_names(where: PurePosixPath, tree: ast.AST, listed: list[Import]) -> Iterator[str]:
    """Tests and benchmarks use public names; only a private module's own test may open it."""
    own = where.stem.removeprefix("test_").removeprefix("bench_")
    ours = {}
    for item in listed:
        if room_of(item.module) is None:
            continue
        ours[item.bound] = item
        private = [p for p in item.full.split(".") if p.startswith("_") and not p.endswith("__")]
        if [p for p in private if p.strip("_") != own.strip("_")]:
            yield f"line {item.line}: imports the private name {item.full}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.attr
            if node.value.id in ours and name.startswith("_") and not name.endswith("__"):
                yield f"line {node.lineno}: uses the private name {ast.unparse(node)}"


def files() -> list[str]:
    """Every Python file of the repository, once: the links inside modaltune/ are not followed."""
    listed = [path.name for path in ROOT.glob("*.py")]
    for room in ROOMS:
        for folder, _, names in os.walk(ROOT / room, followlinks=False):
            relative = Path(folder).relative_to(ROOT)
            listed += [(relative / name).as_posix() for name in names if name.endswith(".py")]
    return sorted(listed)


def test_repository_keeps_the_rules() -> None:
    listed = files()
    assert {name.split("/")[0] for name in listed} >= {*ROOMS, "setup.py"}
    broken = [
        f"{name}: {fault}"
        for name in listed
        for fault in faults(name, (ROOT / name).read_text(encoding="utf-8"))
    ]
    assert not broken, "\n" + "\n".join(broken)


def hidden_modules(package: str, source: str, children: set[str]) -> set[str]:
    """Return the modules of a package that its `__init__` exports something else under."""
    tree = ast.parse(source)
    lazy = {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound = {i.bound for i in imports(tree) if i.name and i.module != package}
    return children & (lazy | defined | bound)


def test_exported_names_do_not_hide_modules() -> None:
    packages = [ROOT / name for name in files() if name.endswith("__init__.py")]
    assert len(packages) > 5
    for init in packages:
        dotted = ".".join(("modaltune", *init.parent.relative_to(ROOT).parts))
        children = {p.stem for p in init.parent.iterdir() if p.suffix == ".py" or p.is_dir()}
        assert not hidden_modules(dotted, init.read_text(encoding="utf-8"), children), init


@pytest.mark.parametrize(
    "source",
    [
        "_LAZY = {'inject': 'modaltune.kernels.inject'}",
        "from modaltune.kernels.inject.api import inject",
        "from modaltune.kernels.inject.api import run as inject",
        "def inject(): ...",
    ],
)
def test_hidden_modules_are_found(source: str) -> None:
    children = {"inject", "__init__"}
    assert hidden_modules("modaltune.kernels", source, children) == {"inject"}
    the_module_itself = "from modaltune.kernels import inject"
    assert hidden_modules("modaltune.kernels", the_module_itself, children) == set()


BAD = [
    ("kernels/_checks.py", "import pandas", "kernels must not import pandas"),
    ("kernels/inject/api.py", "from modaltune.engine import store", "kernels must not import"),
    ("kernels/inject/api.py", "def f():\n import modaltune.cases", "kernels must not import"),
    ("engine/store.py", "from modaltune.cases import Case", "engine must not import"),
    ("engine/store.py", "import modaltune", "engine must not import modaltune"),
    ("engine/store.py", "from modaltune import engine, model", "engine must not import"),
    ("engine/store.py", "from engine.errors import X", "write the full name"),
    ("kernels/_dispatch.py", "from kernels import _checks", "write the full name"),
    ("modaltune/model.py", "from . import cases", "write the full name"),
    ("modaltune/train.py", "from modaltune.benchmarks import x", "must not import"),
    ("engine/store.py", "from modaltune.benchmarks import x", "must not import"),
    ("modaltune/a.py", "import tests.conftest", "write the full name"),
    ("tests/test_a.py", "from conftest import SHARED", "write the full name"),
    ("kernels/extraction/api.py", "from modaltune.kernels.injection.api import inject", "op extr"),
    ("kernels/extraction/cpu.py", "def f():\n from modaltune.kernels.injection import x", "op ext"),
    ("kernels/extraction/cpu.py", "from modaltune.kernels import injection", "must not import op"),
    ("kernels/op/reference.py", "def f():\n import triton", "a reference never imports Triton"),
    ("kernels/op/ops.py", "import triton.language as tl", "Triton is imported inside functions"),
    ("kernels/op/ops.py", "from modaltune.kernels.op import triton_kernels", "by ops.py alone"),
    ("kernels/op/api.py", "def f():\n import modaltune.kernels.op.triton_kernels", "by ops.py"),
    ("kernels/op/reference.py", "from modaltune.kernels.op.ops import f", "must not import ops"),
    ("kernels/op/cpu.py", "from modaltune.kernels.op.api import f", "must not import api"),
    ("engine/readers.py", "import wsidicom", "wsidicom is optional"),
    ("engine/readers.py", "try:\n import tensorrt\nexcept ImportError:\n pass", "is optional"),
    ("modaltune/a.py", "class A:\n import pycuda.driver", "pycuda is optional"),
    ("modaltune/a.py", "def f():\n from sksurv import metrics", "sksurv is GPL"),
    ("tests/test_a.py", "from modaltune.model import _hidden", "private name"),
    ("tests/test_a.py", "from modaltune.kernels._dispatch import choose_impl", "private name"),
    ("tests/test_a.py", "from modaltune import model\nmodel._hidden()", "uses the private name"),
    ("benchmarks/a.py", "import modaltune.model as m\nm._hidden", "uses the private name"),
    ("tests/test_a.py", "import sys\nsys.path.insert(0, '.')", "edits sys.path"),
    ("setup.py", "import sys\nsys.path += ['.']", "edits sys.path"),
    ("modaltune/a.py", "import sys\nsys.path[:0] = ['.']", "edits sys.path"),
    ("modaltune/a.py", "import sys\ndel sys.path[0]", "edits sys.path"),
    ("modaltune/a.py", "from sys import path\npath.append('.')", "takes sys.path apart"),
    ("tests/test_a.py", "def test(monkeypatch): monkeypatch.syspath_prepend('.')", "edits sys"),
    ("engine/utils.py", "", "must not be called utils.py"),
    ("kernels/op/triton.py", "", "must not be called triton.py"),
    ("engine/tiling.py", "def tiling(): ...", "has the name of a function it defines"),
    ("kernels/inject/api.py", "def inject(): ...", "folder inject has the name of a function"),
    ("engine/a.py", "\n" * 401, "401 lines, the limit is 400"),
    ("kernels/op/triton_kernels.py", "\n" * 601, "601 lines, the limit is 600"),
]
GOOD = [
    ("kernels/op/api.py", "import math\nimport torch\nfrom modaltune.kernels.op import ops"),
    ("kernels/op/ops.py", "def f():\n from modaltune.kernels.op.triton_kernels import g"),
    ("kernels/op/triton_kernels.py", "import triton\n" * 600),
    ("kernels/op/cpu.py", "import numba\nfrom modaltune.kernels._checks import require"),
    ("engine/store.py", "def f():\n import anndata\nfrom modaltune.kernels import inject"),
    ("engine/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import ray"),
    ("modaltune/cli.py", "def f():\n from modaltune.benchmarks import harness"),
    ("modaltune/a.py", "import sys\nprint(sys.path, sys.path[0], sys.path.index('a'))"),
    ("tests/test_dispatch.py", "from modaltune.kernels._dispatch import choose_impl"),
    ("tests/test_a.py", "import sksurv, pytest\nfrom modaltune import model\nmodel.__name__"),
    ("engine/tiling.py", "def tile_slide(): ..."),
]


@pytest.mark.parametrize(("path", "source", "fault"), BAD)
def test_rules_can_fail(path: str, source: str, fault: str) -> None:
    found = faults(path, source)
    assert any(fault in text for text in found), found


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_rules_let_good_code_pass(path: str, source: str) -> None:
    assert faults(path, source) == []
