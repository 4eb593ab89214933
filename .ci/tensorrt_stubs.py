"""Write type stubs of an installed TensorRT binding, read off the binding itself.

    python .ci/tensorrt_stubs.py tensorrt_bindings STUBS

A pybind11 module says every signature in its docstrings. Signatures that are no Python become
untyped; names, classes, properties and enumerations are all there, so a name that the binding lacks
is an error in the type checker.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)(\(.*\)) -> (.+)$")
# Overloads of pybind11 may shadow each other; the stub's own faults are not this check's.
_HEAD = """# mypy: ignore-errors
import collections.abc
import typing
import typing_extensions
from typing import Any
"""
_UNTYPED = "def {name}(self, *args: Any, **kwargs: Any) -> {returned}: ..."


def _cleaned(text: str, known: set[str]) -> str:
    """Bring a signature's types to names that the stub has."""
    text = re.sub(r"<[^<>]*(?:<[^<>]*>[^<>]*)*>", "...", text)  # values of defaults
    text = re.sub(r"\b(?:tensorrt\w*\.)+(?:\w+\.)*?(\w+)", r"\1", text)
    text = re.sub(r"\b(?:nvinfer1|nvonnxparser)::[\w:]+", "Any", text)
    return re.sub(
        r"(?<![\w.])([A-Z]\w*)", lambda m: m[1] if m[1] in known | {"Any", "None"} else "Any", text
    )


def _functions(name: str, doc: str, known: set[str]) -> list[str]:
    """Return the stub lines of a method, one for each overload that is Python."""
    found = []
    for line in doc.splitlines():
        match = _SIGNATURE.match(line.strip())
        if match is None or match[1] != name:
            continue
        text = f"def {name}{_cleaned(match[2], known)} -> {_cleaned(match[3], known)}: ..."
        text = re.sub(r"\(self: [\w.]+", "(self", text)
        text = re.sub(r"(: typing\.Supports\w+ \| typing\.Supports\w+)", ": Any", text)
        try:
            ast.parse(text)
        except SyntaxError:
            continue
        found.append(text)
    found = list(dict.fromkeys(found))
    if not found:
        return [_UNTYPED.format(name=name, returned="None" if name == "__init__" else "Any")]
    return found if len(found) == 1 else [f"@typing.overload\n    {text}" for text in found]


def _returned(value: property, known: set[str]) -> str:
    doc = inspect.getdoc(value.fget) or ""
    match = re.search(r"-> (.+)$", doc.splitlines()[0] if doc else "")
    text = _cleaned(match[1], known) if match else "Any"
    try:
        ast.parse(f"x: {text}")
    except SyntaxError:
        return "Any"
    return text


def class_stub(kind: type, known: set[str]) -> str:
    """Return the stub of a class."""
    bases = [base.__name__ for base in kind.__bases__ if base.__name__ in known]
    lines = [f"class {kind.__name__}({', '.join(bases)}):" if bases else f"class {kind.__name__}:"]
    members = getattr(kind, "__members__", {})
    lines += [f"    {name}: typing.ClassVar[{kind.__name__}]" for name in members]
    if members:
        lines += ["    def __int__(self) -> int: ..."]
    for name, value in vars(kind).items():
        if name in members or (name.startswith("_") and name != "__init__"):
            continue
        if isinstance(value, property):
            got = _returned(value, known)
            lines += [f"    @property\n    def {name}(self) -> {got}: ..."]
            if value.fset is not None:
                lines += [f"    @{name}.setter\n    def {name}(self, value: Any) -> None: ..."]
        elif isinstance(value, type):
            lines += [f"    {name}: Any"]
        elif callable(value):
            doc = getattr(value, "__doc__", None) or ""
            lines += [f"    {text}" for text in _functions(name, doc, known)]
        else:
            lines += [f"    {name}: Any"]
    if hasattr(kind, "__getitem__"):
        lines += ["    def __iter__(self) -> typing.Iterator[int]: ..."]
    if kind.__name__ == "IHostMemory":  # a buffer, which pybind11 says nowhere
        lines += ["    def __buffer__(self, flags: int, /) -> memoryview: ..."]
    return "\n".join([*lines, "    ..."])


def module_stub(module: Any) -> str:
    """Return the stub of a binding: its classes, and its other names untyped."""
    classes = {name: v for name, v in vars(module).items() if isinstance(v, type)}
    known = {kind.__name__ for kind in classes.values()}
    others = [
        f"{name}: Any"
        for name in vars(module)
        if name not in classes and re.fullmatch(r"[A-Za-z]\w*", name)
    ]
    # Subclasses after their bases.
    ordered = sorted(classes.values(), key=lambda kind: len(kind.__mro__))
    return "\n".join(
        [_HEAD, "__version__: str", *others, *(class_stub(kind, known) for kind in ordered)]
    )


def main(name: str, folder: Path) -> None:
    """Write `FOLDER/tensorrt/__init__.pyi` of the binding `name`, and say of which version."""
    module = importlib.import_module(name)
    target = folder / "tensorrt" / "__init__.pyi"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(module_stub(module) + "\n", encoding="utf-8")
    print(f"stubs of {name} {module.__version__}: {len(target.read_text().splitlines())} lines")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
