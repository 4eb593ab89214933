"""Tile encoders: a registry with enforced metadata, local weights, and runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_LAZY = {
    "DEFAULT_ENCODER": "registry",
    "RUNTIMES": "registry",
    "EncoderSpec": "spec",
    "EncoderStatus": "loading",
    "TileEncoder": "runtime",
    "describe_encoders": "loading",
    "get_spec": "registry",
    "list_encoders": "registry",
    "export_encoder": "export",
    "load_encoder": "loading",
}

__all__ = list(_LAZY)

if TYPE_CHECKING:
    from modaltune.engine.encoders.export import export_encoder as export_encoder
    from modaltune.engine.encoders.loading import EncoderStatus as EncoderStatus
    from modaltune.engine.encoders.loading import describe_encoders as describe_encoders
    from modaltune.engine.encoders.loading import load_encoder as load_encoder
    from modaltune.engine.encoders.registry import DEFAULT_ENCODER as DEFAULT_ENCODER
    from modaltune.engine.encoders.registry import RUNTIMES as RUNTIMES
    from modaltune.engine.encoders.registry import get_spec as get_spec
    from modaltune.engine.encoders.registry import list_encoders as list_encoders
    from modaltune.engine.encoders.runtime import TileEncoder as TileEncoder
    from modaltune.engine.encoders.spec import EncoderSpec as EncoderSpec


def __getattr__(name: str) -> Any:
    # The command line lists encoders in its help without waiting for torch and timm.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
