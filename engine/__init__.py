"""Slides to tile features: readers, tissue, tiling, encoders, stores. No training, no adapter.

`embed` is the engine inside another program. It is resolved on first use, so that importing one
module of the engine loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["embed"]

if TYPE_CHECKING:
    from modaltune.engine.stream import embed as embed


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modaltune.engine import stream

    return getattr(stream, name)
