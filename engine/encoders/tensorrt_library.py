"""The TensorRT in use: `tensorrt`, or TensorRT-RTX, which has the same names for what we call.

`library` stands for the module and loads it on first use, so that importing the code that builds
and runs engines needs no TensorRT. Type checkers see `tensorrt` itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from modaltune.engine.errors import InputError

NAMES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_INSTALL = "pip install 'modaltune[tensorrt]'"


class TensorrtLibrary:
    """Attributes are those of the TensorRT module, found on first use."""

    def __init__(self) -> None:
        self._module: Any = None

    def use(self, module: Any) -> Any:
        """Take this module from now on (None: look for one again); returns what was in use."""
        before, self._module = self._module, module
        return before

    @property
    def module(self) -> Any:
        """The module.

        Raises:
            InputError: None is installed, or its libraries can't be loaded.
        """
        if self._module is None:
            self._module = _found()
        return self._module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _found() -> ModuleType:
    faults = []
    for name in NAMES:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # a library that it links to is missing
            faults.append(f"{name}: {error}")
    raise InputError(
        f"--runtime tensorrt must have TensorRT, got {'; '.join(faults) or 'none installed'}; "
        f"{_INSTALL}, or use --runtime torch-compile"
    )


library = TensorrtLibrary()


def library_version() -> str:
    """Return name and version of the library in use, such as `tensorrt 11.4.0.106`."""
    module = library.module
    return f"{module.__name__.split('.')[0]} {module.__version__}"


def is_rtx() -> bool:
    """Whether the library in use is TensorRT-RTX, which builds for GPUs that are not here."""
    return "rtx" in str(library.module.__name__)
